/* mlockall brings everything in, over the limit, and waits for no page for ever. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    EXPECT(mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
    check(memory, ALL, 1);
    EXPECT(munlockall() == 0);
    fill(memory, ALL, 2);
    check(memory, ALL, 2);
}
