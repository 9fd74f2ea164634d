/* Keeps so many MiB, `busy` with them or `idle`, until there is a file called `stop`. */
#include "trap.h"

int main(int count, char **arguments) {
    EXPECT(count == 3);
    size_t mib = strtoul(arguments[1], NULL, 10);
    int busy = strcmp(arguments[2], "busy") == 0;
    char *memory = map(mib);
    for (size_t page = 0; page < mib * MIB / PAGE; page++) {
        *word(memory, page, 0) = stamp(7, page);
        *word(memory, page, 100) = page;
        *word(memory, page, 511) = ~stamp(7, page);
    }
    printf("filled %d %s\n", getpid(), arguments[2]);
    fflush(stdout);
    while (access("stop", F_OK) != 0) {
        if (busy)
            check(memory, mib, 7);
        else
            usleep(20000);
    }
    check(memory, mib, 7);
    return 0;
}
