/* Many children, one after another, of a parent that never stops writing: each sees one instant. */
#include "trap.h"

#define FORKS 300

static char *memory;
static volatile uint64_t forks;
static volatile int stop;

/* Counts up in two words of each page, always the first before the second. */
static void *write_on(void *argument) {
    for (uint64_t round = 2; !stop; round++)
        for (size_t page = 0; page < ALL_PAGES && !stop; page++) {
            __atomic_store_n(word(memory, page, 0), round, __ATOMIC_RELEASE);
            __atomic_store_n(word(memory, page, 511), round, __ATOMIC_RELEASE);
        }
    return argument;
}

/* At one instant, pages that were written earlier are as far as, or one round ahead of, those
 * written later, and the page being written differs in its words by one. */
static void is_one_instant(unsigned *random) {
    uint64_t former = *word(memory, 0, 0), first = former;
    unsigned step = 1 + random_below(random, 31), torn = 0;
    for (size_t page = 0; page < ALL_PAGES; page += step) {
        uint64_t before = *word(memory, page, 0), after = *word(memory, page, 511);
        EXPECT(before == after || before == after + 1);
        torn += before != after;
        EXPECT(before <= former && first - before <= 1);
        former = before;
    }
    EXPECT(torn <= 1);
}

int main(void) {
    memory = map(ALL);
    pthread_t writer;
    unsigned random = 1;
    for (size_t page = 0; page < ALL_PAGES; page++)
        *word(memory, page, 0) = *word(memory, page, 511) = 1;
    EXPECT(pthread_create(&writer, NULL, write_on, NULL) == 0);
    double until = now() + 4;
    for (forks = 0; forks < FORKS && now() < until; forks++) {
        pid_t child = fork();
        if (child == 0) {
            random += forks;
            is_one_instant(&random);
            _exit(0);
        }
        child_succeeds(child);
    }
    stop = 1;
    EXPECT(pthread_join(writer, NULL) == 0 && forks >= 3);
}
