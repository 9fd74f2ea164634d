/* Pages given back with MADV_FREE keep what is stored afterwards. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    for (size_t round = 0; round < 3; round++) {
        fill(memory, ALL, round);
        EXPECT(madvise(memory, ALL * MIB, MADV_FREE) == 0);
        for (size_t page = 0; page < ALL_PAGES; page++)
            *word(memory, page, 7) = page + round;
        for (size_t page = 0; page < ALL_PAGES; page++) {
            uint64_t first = *word(memory, page, 0);
            EXPECT(*word(memory, page, 7) == page + round);
            EXPECT(first == 0 || first == stamp(round, page));
        }
    }
}
