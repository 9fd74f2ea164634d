/* Threads that do nothing but give pages back: no call on the program's memory works while one of
 * their changes is under way, and there is no moment without. Another thread goes through memory that
 * is out, which has to end all the same. */
#include "trap.h"

#define STORMS 4

static volatile int stop;
static volatile unsigned long storms[STORMS];

static void *storm(void *data) {
    size_t own = (uintptr_t)data;
    char *memory = map(1);
    while (!stop) {
        EXPECT(madvise(memory, MIB, MADV_DONTNEED) == 0);
        storms[own]++;
    }
    return NULL;
}

int main(void) {
    char *memory = map(ALL);
    pthread_t threads[STORMS];
    for (size_t own = 0; own < STORMS; own++)
        EXPECT(pthread_create(&threads[own], NULL, storm, (void *)own) == 0);
    for (int round = 1; round < 4; round++) {
        fill(memory, ALL, round);
        check(memory, ALL, round);
    }
    stop = 1;
    for (size_t own = 0; own < STORMS; own++) {
        EXPECT(pthread_join(threads[own], NULL) == 0);
        EXPECT(storms[own] > 0);
    }
}
