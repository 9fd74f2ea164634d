/* Pages given to MADV_FREE are moved out while the kernel takes them back: they hold what they held,
 * or zeros; and what is written there afterwards, though it is the same again. */
#include "trap.h"

enum { LAZY = 24, OTHER = 72 };

static void pass(char *other, uint64_t seed) {
    for (size_t page = 0; page < OTHER * MIB / PAGE; page++)
        *word(other, page, 0) = stamp(seed, page);
    for (size_t page = 0; page < OTHER * MIB / PAGE; page++)
        EXPECT(*word(other, page, 0) == stamp(seed, page));
}

int main(void) {
    char *lazy = map(LAZY), *other = map(OTHER);
    size_t pages = LAZY * MIB / PAGE;
    for (uint64_t round = 0; round < 12; round++) {
        for (size_t page = 0; page < pages; page++)
            *word(lazy, page, 0) = stamp(7, page);
        pass(other, 2 * round);
        for (size_t page = 0; page < pages; page++)
            EXPECT(*word(lazy, page, 0) == stamp(7, page));
        EXPECT(madvise(lazy, LAZY * MIB, MADV_FREE) == 0);
        usleep(60 * 1000);
        pass(other, 2 * round + 1);
        for (size_t page = 0; page < pages; page++) {
            uint64_t found = *word(lazy, page, 0);
            EXPECT(found == 0 || found == stamp(7, page));
        }
    }
    return 0;
}
