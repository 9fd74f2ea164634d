/* Waits until there is a file called `go`, fills so many MiB as fast as it can, looks at them, and keeps
 * them until there is a file called `stop`. */
#include "trap.h"

static void await(const char *file) {
    while (access(file, F_OK) != 0)
        usleep(1000);
}

int main(int count, char **arguments) {
    EXPECT(count == 2);
    size_t mib = strtoul(arguments[1], NULL, 10);
    char *memory = map(mib);
    printf("ready %d\n", getpid());
    fflush(stdout);
    await("go");
    for (size_t page = 0; page < mib * MIB / PAGE; page++) {
        *word(memory, page, 0) = stamp(7, page);
        *word(memory, page, 100) = page;
        *word(memory, page, 511) = ~stamp(7, page);
    }
    check(memory, mib, 7);
    printf("filled %d\n", getpid());
    fflush(stdout);
    await("stop");
    return 0;
}
