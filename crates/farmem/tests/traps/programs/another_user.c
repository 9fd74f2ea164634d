/* setuid: signals every thread of the program, and takes its privileges. */
#include "trap.h"

static volatile int stop;

static void *wait_for_stop(void *argument) {
    while (!stop)
        usleep(1000);
    return argument;
}

int main(void) {
    char *memory = map(ALL);
    pthread_t thread;
    EXPECT(pthread_create(&thread, NULL, wait_for_stop, NULL) == 0);
    fill(memory, ALL, 1);
    if (getuid() == 0)
        EXPECT(setgid(65534) == 0 && setuid(65534) == 0);
    check(memory, ALL, 1);
    fill(memory, ALL, 2);
    char *more = map(64);
    fill(more, 64, 3);
    check(more, 64, 3);
    check(memory, ALL, 2);
    stop = 1;
    EXPECT(pthread_join(thread, NULL) == 0);
}
