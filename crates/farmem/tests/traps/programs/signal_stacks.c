/* Signals whose handlers run on alternate stacks, while those stacks are out. */
#include "trap.h"

#define THREADS 4
#define STACK (256ul << 10)

static char *stacks;
static _Thread_local volatile uint64_t handled;

static void handle(int number, siginfo_t *info, void *context) {
    (void)info;
    (void)context;
    /* Pages of its own, below the frame that the kernel has written. */
    volatile char frame[32 << 10];
    for (size_t at = 0; at < sizeof frame; at += 512)
        frame[at] = (char)(at >> 9);
    for (size_t at = 0; at < sizeof frame; at += 512)
        EXPECT(frame[at] == (char)(at >> 9));
    EXPECT((char *)frame > stacks && (char *)frame < stacks + THREADS * STACK);
    handled += number == SIGUSR1;
}

static void *work(void *argument) {
    size_t thread = (size_t)argument;
    stack_t stack = {.ss_sp = stacks + thread * STACK, .ss_size = STACK};
    EXPECT(sigaltstack(&stack, NULL) == 0);
    char *memory = map(ALL / THREADS);
    for (uint64_t round = 0; round < 6; round++) {
        fill(memory, ALL / THREADS, thread);
        EXPECT(raise(SIGUSR1) == 0);
        EXPECT(handled == round + 1);
        check(memory, ALL / THREADS, thread);
    }
    stack.ss_flags = SS_DISABLE;
    EXPECT(sigaltstack(&stack, NULL) == 0);
    return NULL;
}

int main(void) {
    stacks = mmap(NULL, THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(stacks != MAP_FAILED);
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_ONSTACK | SA_SIGINFO};
    EXPECT(sigaction(SIGUSR1, &action, NULL) == 0);
    pthread_t threads[THREADS];
    for (size_t thread = 0; thread < THREADS; thread++)
        EXPECT(pthread_create(&threads[thread], NULL, work, (void *)thread) == 0);
    for (size_t thread = 0; thread < THREADS; thread++)
        EXPECT(pthread_join(threads[thread], NULL) == 0);
}
