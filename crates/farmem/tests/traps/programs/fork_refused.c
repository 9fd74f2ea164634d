/* Most forks fail for lack of processes; those that succeed see the right memory. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    if (getuid() == 0)
        EXPECT(setgid(54321) == 0 && setuid(54321) == 0);
    struct rlimit processes = {4, 4};
    EXPECT(setrlimit(RLIMIT_NPROC, &processes) == 0);
    int forked = 0, refused = 0, status;
    for (unsigned attempt = 0; attempt < 100; attempt++) {
        pid_t child = fork();
        if (child == 0)
            _exit(holds(memory, attempt * 7919 % ALL_PAGES, 1) ? 0 : 3);
        if (child > 0) {
            forked++;
            continue;
        }
        refused++;
        while (wait(&status) > 0)
            EXPECT(status == 0);
    }
    while (wait(&status) > 0)
        EXPECT(status == 0);
    EXPECT(forked > 0 && refused > 0);
    check(memory, ALL, 1);
}
