/* On a signal forks a child that has inherited more than fits, reads all of it twice and writes it:
 * it comes to have a pager of its own. That one may be killed: then so may the child be. */
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
        check(memory, ALL, 1);
        check(memory, ALL, 1);
        fill(memory, ALL, 2);
        check(memory, ALL, 2);
        _exit(0);
    }
    int status;
    EXPECT(child > 0 && waitpid(child, &status, 0) == child);
    EXPECT(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
    check(memory, ALL, 1);
    puts(status == 0 ? "the child found everything" : "the child was stopped");
    return 0;
}
