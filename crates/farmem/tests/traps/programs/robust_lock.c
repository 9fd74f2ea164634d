/* Children that are killed while they hold a robust lock, with memory of theirs out. */
#include "trap.h"

int main(void) {
    pthread_mutex_t *lock = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT(lock != MAP_FAILED);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(lock, &attributes);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    for (int round = 0; round < 3; round++) {
        pid_t child = fork();
        if (child == 0) {
            pthread_mutex_lock(lock);
            check(memory, ALL, 1);
            kill(getpid(), SIGKILL);
        }
        int status;
        EXPECT(waitpid(child, &status, 0) == child && WTERMSIG(status) == SIGKILL);
        struct timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_sec += 10;
        EXPECT(pthread_mutex_timedlock(lock, &limit) == EOWNERDEAD);
        EXPECT(pthread_mutex_consistent(lock) == 0 && pthread_mutex_unlock(lock) == 0);
    }
    check(memory, ALL, 1);
}
