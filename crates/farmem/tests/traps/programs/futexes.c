/* Locks and conditions all over memory that is out: the kernel looks at their words and finds the
 * sleepers by their addresses. */
#include "trap.h"
#include <linux/futex.h>

#define THREADS 4
#define ROUNDS 300

static char *memory;

/* In the middle of a page: a lock, a condition and what they protect. */
struct place {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t turn;
};

static struct place *place_at(size_t round) {
    return (struct place *)word(memory, round * 7919 % ALL_PAGES, 128);
}

/* The threads take turns at each place. */
static void *take_turns(void *argument) {
    uint64_t own = (uintptr_t)argument;
    for (size_t round = 0; round < ROUNDS; round++) {
        struct place *place = place_at(round);
        pthread_mutex_lock(&place->lock);
        while (place->turn != own)
            pthread_cond_wait(&place->changed, &place->lock);
        place->turn++;
        pthread_cond_broadcast(&place->changed);
        pthread_mutex_unlock(&place->lock);
    }
    return NULL;
}

static void *wake_bare(void *argument) {
    uint32_t *word = argument;
    __atomic_store_n(word, 1, __ATOMIC_RELEASE);
    for (;;) {
        long woken = syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
        EXPECT(woken >= 0);
        if (woken == 1 || __atomic_load_n(word + 1, __ATOMIC_ACQUIRE) != 0)
            return NULL;
        sched_yield();
    }
}

int main(void) {
    memory = map(ALL);
    pthread_mutexattr_t inherits;
    EXPECT(pthread_mutexattr_init(&inherits) == 0);
    /* The kernel writes the owner into such a lock's word. */
    EXPECT(pthread_mutexattr_setprotocol(&inherits, PTHREAD_PRIO_INHERIT) == 0);
    for (size_t round = 0; round < ROUNDS; round++) {
        pthread_mutex_init(&place_at(round)->lock, round % 2 ? &inherits : NULL);
        pthread_cond_init(&place_at(round)->changed, NULL);
    }
    fill(memory, ALL, 1);
    pthread_t threads[THREADS];
    for (uintptr_t at = 0; at < THREADS; at++)
        EXPECT(pthread_create(&threads[at], NULL, take_turns, (void *)at) == 0);
    for (int at = 0; at < THREADS; at++)
        EXPECT(pthread_join(threads[at], NULL) == 0);
    for (size_t round = 0; round < ROUNDS; round++)
        EXPECT(place_at(round)->turn == THREADS);
    check(memory, ALL, 1);
    for (int round = 0; round < 50; round++) {
        uint32_t *bare = (uint32_t *)word(memory, round * 613 % ALL_PAGES, 64);
        pthread_t waker;
        EXPECT(pthread_create(&waker, NULL, wake_bare, bare) == 0);
        while (__atomic_load_n(bare, __ATOMIC_ACQUIRE) == 0)
            EXPECT(syscall(SYS_futex, bare, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == 0 ||
                   errno == EAGAIN || errno == EINTR);
        __atomic_store_n(bare + 1, 1, __ATOMIC_RELEASE);
        EXPECT(pthread_join(waker, NULL) == 0);
    }
    check(memory, ALL, 1);
}
