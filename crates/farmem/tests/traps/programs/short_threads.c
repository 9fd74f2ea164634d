/* Thousands of threads that live for a moment: at a thread's end the kernel writes to its stack,
 * and nothing serves that fault. */
#include "trap.h"

static void *live(void *argument) {
    volatile char stack[5 * PAGE];
    for (size_t page = 0; page < 5; page++)
        stack[page * PAGE] = 2;
    return (void *)((uintptr_t)argument * stack[4 * PAGE]);
}

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    unsigned random = 1;
    for (int round = 0; round < 150; round++) {
        pthread_t threads[64];
        for (size_t index = 0; index < 64; index++)
            EXPECT(pthread_create(&threads[index], NULL, live, (void *)index) == 0);
        for (int touched = 0; touched < 64; touched++)
            EXPECT(holds(memory, random_below(&random, ALL_PAGES), 1));
        for (size_t index = 0; index < 64; index++) {
            void *result;
            EXPECT(pthread_join(threads[index], &result) == 0 && (uintptr_t)result == index * 2);
        }
    }
    check(memory, ALL, 1);
}
