/* Fills some MiB, tells, and waits for a file to appear; then it fills some more, and checks all. */
#include "trap.h"

int main(int count, char **arguments) {
    EXPECT(count == 4);
    size_t first = atoi(arguments[1]), then = atoi(arguments[2]);
    char *early = map(first);
    fill(early, first, 1);
    check(early, first, 1);
    puts("filled");
    fflush(stdout);
    while (access(arguments[3], F_OK))
        usleep(10 * 1000);
    char *late = map(then);
    fill(late, then, 2);
    check(late, then, 2);
    check(early, first, 1);
    return 0;
}
