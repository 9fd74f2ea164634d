/* What was dropped before a fork is zero in the child, however soon the fork came. */
#include "trap.h"

#define ROUNDS 400
#define DROPPED 16
#define READS 200

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 0);
    unsigned random = 1;
    for (int round = 0; round < ROUNDS; round++) {
        /* A pager that serves one thread's fast faults lets it run before itself. */
        for (int at = 0; at < READS; at++) {
            size_t page = random_below(&random, ALL_PAGES);
            EXPECT(holds(memory, page, 0) || *word(memory, page, 100) == 0);
        }
        size_t first = random_below(&random, ALL_PAGES - DROPPED);
        char *start = memory + first * PAGE;
        EXPECT(madvise(start, DROPPED * PAGE, MADV_DONTNEED) == 0);
        pid_t child = fork();
        if (child == 0) {
            for (size_t at = 0; at < DROPPED * PAGE / sizeof(uint64_t); at++)
                EXPECT(((uint64_t *)start)[at] == 0);
            _exit(0);
        }
        child_succeeds(child);
        for (size_t page = first; page < first + DROPPED; page++) {
            *word(memory, page, 0) = stamp(0, page);
            *word(memory, page, 100) = page;
            *word(memory, page, 511) = ~stamp(0, page);
        }
    }
}
