/* A thread that faults fast chooses where it runs: there it stays. */
#include "trap.h"
#include <sched.h>

#define READS 20000

static void read_some(char *memory, unsigned *random) {
    for (int at = 0; at < READS; at++)
        EXPECT(holds(memory, random_below(random, ALL_PAGES), 0));
}

int main(void) {
    cpu_set_t all, one, found;
    EXPECT(sched_getaffinity(0, sizeof all, &all) == 0);
    char *memory = map(ALL);
    fill(memory, ALL, 0);
    unsigned random = 1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &all))
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        read_some(memory, &random);
        EXPECT(sched_setaffinity(0, sizeof one, &one) == 0);
        read_some(memory, &random);
        EXPECT(sched_getaffinity(0, sizeof found, &found) == 0 && CPU_EQUAL(&found, &one));
        EXPECT(sched_setaffinity(0, sizeof all, &all) == 0);
        read_some(memory, &random);
        EXPECT(sched_getaffinity(0, sizeof found, &found) == 0 && CPU_EQUAL(&found, &all));
    }
}
