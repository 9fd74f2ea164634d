/* Two hundred threads sleep while everything else is used, so that what they have goes out; then
 * they end. */
#include "trap.h"

#define THREADS 200
#define OWN_BYTES 200000

static pthread_barrier_t morning;

static void *sleep_long(void *argument) {
    unsigned char *own = malloc(OWN_BYTES), value = (uintptr_t)argument;
    memset(own, value, OWN_BYTES);
    pthread_barrier_wait(&morning);
    for (size_t index = 0; index < OWN_BYTES; index++)
        EXPECT(own[index] == value);
    free(own);
    return argument;
}

int main(void) {
    char *memory = map(ALL);
    pthread_t threads[THREADS];
    EXPECT(pthread_barrier_init(&morning, NULL, THREADS + 1) == 0);
    for (size_t index = 0; index < THREADS; index++)
        EXPECT(pthread_create(&threads[index], NULL, sleep_long, (void *)index) == 0);
    for (int round = 0; round < 5; round++) {
        fill(memory, ALL, round);
        check(memory, ALL, round);
    }
    pthread_barrier_wait(&morning);
    for (size_t index = 0; index < THREADS; index++) {
        void *result;
        EXPECT(pthread_join(threads[index], &result) == 0 && (size_t)result == index);
    }
}
