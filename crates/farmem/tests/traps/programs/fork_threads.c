/* Forks while other threads read what is out and write: the child has each page as it was at one
 * moment, and goes on by itself; so do the threads. */
#include "trap.h"

#define WRITERS 3
#define PART (ALL_PAGES / WRITERS)
#define FORKS 40

static char *memory;
static volatile int stop;

/* Each page of a writer's part has its own count, twice. */
static void *write_on(void *argument) {
    size_t first = (size_t)argument * PART;
    unsigned random = first + 1;
    while (!stop) {
        size_t page = first + random_below(&random, PART);
        uint64_t count = *word(memory, page, 0);
        EXPECT(*word(memory, page, 511) == count);
        __atomic_store_n(word(memory, page, 0), count + 1, __ATOMIC_RELEASE);
        __atomic_store_n(word(memory, page, 511), count + 1, __ATOMIC_RELEASE);
    }
    return NULL;
}

int main(void) {
    memory = map(ALL);
    for (size_t page = 0; page < ALL_PAGES; page++) {
        *word(memory, page, 0) = *word(memory, page, 511) = 1;
        *word(memory, page, 100) = stamp(5, page);
    }
    await_paging(ALL);
    pthread_t writers[WRITERS];
    for (size_t at = 0; at < WRITERS; at++)
        EXPECT(pthread_create(&writers[at], NULL, write_on, (void *)at) == 0);
    unsigned random = 7;
    double until = now() + 6;
    int forks = 0;
    for (; forks < FORKS && now() < until; forks++) {
        pid_t child = fork();
        if (child == 0) {
            unsigned torn = 0;
            random += forks;
            for (int at = 0; at < 300; at++) {
                size_t page = random_below(&random, ALL_PAGES);
                uint64_t before = *word(memory, page, 0), after = *word(memory, page, 511);
                EXPECT(before == after || before == after + 1);
                EXPECT(before >= 1 && *word(memory, page, 100) == stamp(5, page));
                torn += before != after;
                *word(memory, page, 0) = *word(memory, page, 511) = 1ul << 60;
            }
            EXPECT(torn <= WRITERS);
            _exit(0);
        }
        child_succeeds(child);
    }
    stop = 1;
    for (size_t at = 0; at < WRITERS; at++)
        EXPECT(pthread_join(writers[at], NULL) == 0);
    EXPECT(forks >= 3);
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(*word(memory, page, 0) == *word(memory, page, 511) &&
               *word(memory, page, 0) < 1ul << 60 && *word(memory, page, 100) == stamp(5, page));
}
