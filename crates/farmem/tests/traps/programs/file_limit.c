/* A child whose program may write to no file. */
#include "trap.h"

int main(void) {
    struct rlimit limit;
    EXPECT(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    limit.rlim_cur = 0;
    EXPECT(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    pid_t child = fork();
    if (child == 0) {
        char *memory = map(ALL);
        fill(memory, ALL, 1);
        check(memory, ALL, 1);
        _exit(0);
    }
    child_succeeds(child);
    return 0;
}
