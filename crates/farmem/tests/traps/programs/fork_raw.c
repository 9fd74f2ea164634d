/* Forks by the raw system calls, past the C library: nobody in the child knows of it. */
#include "trap.h"
#include <linux/sched.h>

static char *memory;

static pid_t raw_clone(void) {
    return syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

static pid_t raw_clone3(void) {
    struct clone_args arguments = {.exit_signal = SIGCHLD};
    return syscall(SYS_clone3, &arguments, sizeof arguments);
}

static void fork_by(pid_t (*call)(void), uint64_t seed) {
    pid_t child = call();
    if (child == 0) {
        check(memory, ALL, seed);
        fill(memory, ALL, seed + 100);
        /* And its own children. */
        pid_t grandchild = call();
        if (grandchild == 0) {
            check(memory, ALL, seed + 100);
            _exit(0);
        }
        fill(memory, ALL / 2, seed + 200);
        child_succeeds(grandchild);
        check(memory, ALL / 2, seed + 200);
        _exit(0);
    }
    fill(memory, ALL, seed + 1);
    child_succeeds(child);
    check(memory, ALL, seed + 1);
}

int main(void) {
    memory = map(ALL);
    fill(memory, ALL, 1);
    fork_by(raw_clone, 1);
    fork_by(raw_clone3, 2);
}
