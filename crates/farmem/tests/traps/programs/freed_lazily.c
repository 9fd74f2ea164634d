/* Pages given to MADV_FREE are moved out while the kernel takes them back: they hold what they held,
 * or zeros. */
#include "trap.h"

int main(void) {
    char *lazy = map(24), *other = map(ALL - 32);
    size_t lazies = 24 * MIB / PAGE, others = (ALL - 32) * MIB / PAGE;
    for (uint64_t round = 0; round < 20; round++) {
        for (size_t page = 0; page < lazies; page++)
            *word(lazy, page, 0) = stamp(round, page);
        EXPECT(madvise(lazy, 24 * MIB, MADV_FREE) == 0);
        usleep(60 * 1000);
        for (size_t page = 0; page < others; page++)
            *word(other, page, 0) = stamp(~round, page);
        for (size_t page = 0; page < others; page++)
            EXPECT(*word(other, page, 0) == stamp(~round, page));
        for (size_t page = 0; page < lazies; page++) {
            uint64_t found = *word(lazy, page, 0);
            EXPECT(found == 0 || found == stamp(round, page));
        }
    }
    return 0;
}
