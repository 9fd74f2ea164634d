/* A timer interrupts, a thousand times a second and on a stack of its own, system calls that wait
 * for pages. */
#include "trap.h"

static volatile long signals;

static void count(int number) {
    (void)number;
    signals++;
}

static void uninterrupted(ssize_t (*call)(int, void *, size_t), int file, void *page) {
    ssize_t done;
    do
        done = call(file, page, PAGE);
    while (done < 0 && errno == EINTR);
    EXPECT(done == (ssize_t)PAGE);
}

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    stack_t stack = {.ss_sp = map(1), .ss_size = MIB};
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_ONSTACK | SA_RESTART};
    struct itimerval timer = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    int pipes[2];
    EXPECT(sigaltstack(&stack, NULL) == 0 && sigaction(SIGALRM, &action, NULL) == 0);
    EXPECT(pipe(pipes) == 0 && setitimer(ITIMER_REAL, &timer, NULL) == 0);
    unsigned random = 1;
    double until = now() + 3;
    while (now() < until) {
        unsigned from = random_below(&random, ALL_PAGES), to = random_below(&random, ALL_PAGES);
        uninterrupted((ssize_t(*)(int, void *, size_t))write, pipes[1], memory + from * PAGE);
        uninterrupted(read, pipes[0], memory + to * PAGE);
        EXPECT(*word(memory, to, 0) == stamp(1, from) && *word(memory, to, 511) == ~stamp(1, from));
        *word(memory, to, 0) = stamp(1, to);
        *word(memory, to, 511) = ~stamp(1, to);
        *word(memory, to, 100) = to;
    }
    EXPECT(setitimer(ITIMER_REAL, &never, NULL) == 0 && signals > 100);
    check(memory, ALL, 1);
}
