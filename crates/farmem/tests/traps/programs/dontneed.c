/* Pages given back with MADV_DONTNEED read as zero, or as what was stored since. Two threads
 * touch, one drops, one keeps up the pressure. */
#include "trap.h"

#define SHARED_PAGES 4096

static char *shared;
static volatile int stop;

static void *touch(void *seed) {
    unsigned random = (uintptr_t)seed;
    while (!stop) {
        unsigned page = random_below(&random, SHARED_PAGES);
        uint64_t found = __atomic_load_n(word(shared, page, 0), __ATOMIC_RELAXED);
        EXPECT(found == 0 || found == page + 1);
        if (random & 64)
            __atomic_store_n(word(shared, page, 0), page + 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void *drop(void *seed) {
    unsigned random = (uintptr_t)seed;
    while (!stop) {
        unsigned page = random_below(&random, SHARED_PAGES - 64);
        EXPECT(madvise(shared + page * PAGE, 64 * PAGE, MADV_DONTNEED) == 0);
        usleep(100);
    }
    return NULL;
}

int main(void) {
    shared = map(SHARED_PAGES * PAGE / MIB);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    pthread_t threads[3];
    pthread_create(&threads[0], NULL, touch, (void *)1);
    pthread_create(&threads[1], NULL, touch, (void *)2);
    pthread_create(&threads[2], NULL, drop, (void *)3);
    double until = now() + 3;
    for (int round = 1; now() < until; round++) {
        check(memory, ALL, round);
        fill(memory, ALL, round + 1);
    }
    stop = 1;
    for (int index = 0; index < 3; index++)
        pthread_join(threads[index], NULL);
    /* Alone, and out: dropped pages must not come back with their former content. */
    fill(memory, ALL, 7);
    EXPECT(madvise(memory, ALL * MIB / 2, MADV_DONTNEED) == 0);
    for (size_t page = 0; page < ALL_PAGES / 2; page++)
        EXPECT(*word(memory, page, 0) == 0 && *word(memory, page, 511) == 0);
    for (size_t page = ALL_PAGES / 2; page < ALL_PAGES; page++)
        EXPECT(holds(memory, page, 7));
}
