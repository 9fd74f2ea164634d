/* Says who it is and where its memory lies, and checks it until SIGUSR1. */
#include "trap.h"

static volatile sig_atomic_t told;

static void tell(int number) {
    told = number;
}

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 0);
    signal(SIGUSR1, tell);
    /* One page at least is not out. */
    EXPECT(mlock(memory + MIB, PAGE) == 0);
    /* Yama, where it is, lets only parents attach. */
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    printf("filled %d %zu\n", getpid(), (size_t)memory);
    fflush(stdout);
    while (!told)
        check(memory, ALL, 0);
    fill(memory, ALL, 2);
    check(memory, ALL, 2);
}
