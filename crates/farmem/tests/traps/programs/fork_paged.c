/* Forks a child that comes to have a pager of its own, and most of whose inherited memory is out. */
#include "trap.h"

int main(void) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    EXPECT(sigprocmask(SIG_BLOCK, &signals, NULL) == 0);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    puts("filled");
    fflush(stdout);
    int signal;
    EXPECT(sigwait(&signals, &signal) == 0);
    pid_t child = fork();
    if (child == 0) {
        char *own = map(ALL);
        fill(own, ALL, 2);
        printf("child %d filled\n", getpid());
        fflush(stdout);
        for (;;)
            check(own, ALL, 2);
    }
    wait(NULL);
    return 0;
}
