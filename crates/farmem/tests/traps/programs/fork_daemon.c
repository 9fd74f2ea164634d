/* daemon(3): forks, and goes on in the child, which closes its streams. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    int output = dup(1);
    EXPECT(daemon(0, 0) == 0);
    check(memory, ALL, 1);
    fill(memory, ALL, 2);
    check(memory, ALL, 2);
    dprintf(output, "the daemon found everything\n");
}
