/* A thousand children in a row of a parent most of whose memory is out and that writes between the
 * forks: each finds what was there at its fork, and writes over it. */
#include "trap.h"

#define FORKS 1000
#define WRITES 200
#define LOOKS 40

static uint64_t written[ALL_PAGES];

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 0);
    unsigned random = 1;
    for (unsigned round = 1; round <= FORKS; round++) {
        for (int at = 0; at < WRITES; at++) {
            size_t page = random_below(&random, ALL_PAGES);
            *word(memory, page, 300) = written[page] = round;
        }
        pid_t child = fork();
        if (child == 0) {
            for (int at = 0; at < LOOKS; at++) {
                size_t page = random_below(&random, ALL_PAGES);
                EXPECT(holds(memory, page, 0) && *word(memory, page, 300) == written[page]);
                *word(memory, page, 300) = ++written[page];
            }
            _exit(0);
        }
        EXPECT(child > 0);
        size_t page = random_below(&random, ALL_PAGES);
        *word(memory, page, 300) = written[page] = round + FORKS;
        child_succeeds(child);
    }
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(holds(memory, page, 0) && *word(memory, page, 300) == written[page]);
}
