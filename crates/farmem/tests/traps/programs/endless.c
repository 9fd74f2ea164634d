/* Says when its memory is filled, and checks it until something stops the program; `idle` touches
 * nothing any more; `child` does so in a child, and the parent ends. */
#include "trap.h"

int main(int count, char **arguments) {
    const char *way = count > 1 ? arguments[1] : "";
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    check(memory, ALL, 1);
    if (strcmp(way, "child") == 0 && fork() != 0)
        return 0;
    printf("filled by %d\n", getpid());
    fflush(stdout);
    while (strcmp(way, "idle") == 0)
        pause();
    for (;;)
        check(memory, ALL, 1);
}
