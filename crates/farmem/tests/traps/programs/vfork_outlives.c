/* A thread's child that borrows the memory looks at all of it when its parent has ended, been killed or
 * run another image. */
#include "trap.h"

static char *memory;
static int started[2];
static int runs_on;

static void *borrow(void *unused) {
    pid_t parent = getpid();
    if (vfork() == 0) {
        EXPECT(write(started[1], "x", 1) == 1);
        while (!runs_on && getppid() == parent)
            usleep(1000);
        /* Long enough for a pager to see that its program has left, and for the supervisor to lose
         * patience with it. */
        usleep(1500000);
        check(memory, ALL, 1);
        EXPECT(write(STDOUT_FILENO, "the child found everything\n", 27) == 27);
        _exit(0);
    }
    return unused;
}

int main(int count, char **arguments) {
    EXPECT(count == 2);
    runs_on = strcmp(arguments[1], "exec") == 0;
    memory = map(ALL);
    fill(memory, ALL, 1);
    check(memory, ALL, 1);
    pthread_t thread;
    char byte;
    EXPECT(pipe(started) == 0 && pthread_create(&thread, NULL, borrow, NULL) == 0);
    EXPECT(read(started[0], &byte, 1) == 1);
    if (runs_on)
        execl("/bin/sleep", "sleep", "0.2", NULL);
    if (strcmp(arguments[1], "kill") == 0)
        kill(getpid(), SIGKILL);
    _exit(0);
}
