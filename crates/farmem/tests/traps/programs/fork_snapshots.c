/* Children check what the parent had at the fork, while it writes something else. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    for (int round = 1; round <= 4; round++) {
        pid_t child = fork();
        if (child == 0) {
            check(memory, ALL, round);
            fill(memory, 32, 77);
            check(memory, 32, 77);
            _exit(0);
        }
        fill(memory, ALL, round + 1);
        child_succeeds(child);
        check(memory, ALL, round + 1);
    }
}
