/* One thread forbids and allows access to pages while another keeps up the pressure. */
#include "trap.h"

static char *protected;
static volatile int stop;

static void *change(void *argument) {
    unsigned random = 7;
    while (!stop) {
        char *start = protected + random_below(&random, ALL_PAGES - 256) * PAGE;
        size_t bytes = (1 + random_below(&random, 255)) * PAGE;
        int to = random & 0x10000 ? PROT_READ : PROT_NONE;
        EXPECT(mprotect(start, bytes, to) == 0);
        EXPECT(mprotect(start, bytes, PROT_READ | PROT_WRITE) == 0);
    }
    return argument;
}

int main(void) {
    protected = map(ALL);
    fill(protected, ALL, 1);
    char *memory = map(64);
    fill(memory, 64, 1);
    pthread_t thread;
    EXPECT(pthread_create(&thread, NULL, change, NULL) == 0);
    double until = now() + 3;
    for (int round = 1; now() < until; round++) {
        check(memory, 64, round);
        fill(memory, 64, round + 1);
    }
    stop = 1;
    EXPECT(pthread_join(thread, NULL) == 0);
    check(protected, ALL, 1);
}
