/* Ten times the limit, in a control group that has hardly more than the limit. */
#include "trap.h"

int main(void) {
    /* Enough to be paged from here on. Who fills faster than a pager starts exceeds its limit for a
     * moment, and the group would not bear it. */
    char *first = map(28);
    fill(first, 28, 9);
    usleep(500 * 1000);
    for (int round = 0; round < 2; round++) {
        char *memory = map(320);
        fill(memory, 320, round);
        check(memory, 320, round);
        check(first, 28, 9);
        EXPECT(munmap(memory, 320 * MIB) == 0);
    }
}
