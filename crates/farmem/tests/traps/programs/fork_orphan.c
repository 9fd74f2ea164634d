/* The parent is gone when the child looks at what it inherited. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    check(memory, ALL, 1);
    pid_t parent = getpid();
    if (fork() != 0)
        return 0;
    while (getppid() == parent)
        usleep(1000);
    check(memory, ALL, 1);
    fill(memory, ALL, 2);
    check(memory, ALL, 2);
    puts("the orphan found everything");
}
