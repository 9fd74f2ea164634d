/* vmsplice: a pipe holds the very pages of the program while they are asked to go. */
#include "trap.h"

static int pipes[2];

static void into_pipe(char *memory, size_t pages) {
    struct iovec vector = {memory, pages * PAGE};
    EXPECT(vmsplice(pipes[1], &vector, 1, 0) == (ssize_t)(pages * PAGE));
}

int main(void) {
    static char read_back[PAGE];
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    EXPECT(pipe(pipes) == 0 && fcntl(pipes[1], F_SETPIPE_SZ, MIB) > 0);
    unsigned random = 1;
    for (int round = 0; round < 4000; round++) {
        unsigned page = random_below(&random, ALL_PAGES);
        into_pipe(memory + page * PAGE, 1);
        EXPECT(holds(memory, random_below(&random, ALL_PAGES), 1));
        EXPECT(read(pipes[0], read_back, PAGE) == (ssize_t)PAGE);
        EXPECT(*word(read_back, 0, 0) == stamp(1, page) && *word(read_back, 0, 100) == page);
    }
    /* Pages that lie in the pipe while all others are used, written to meanwhile. */
    into_pipe(memory, 16);
    fill(memory + MIB, ALL - 1, 2);
    for (size_t page = 0; page < 16; page++)
        *word(memory, page, 200) = page + 5;
    fill(memory + MIB, ALL - 1, 3);
    for (size_t page = 0; page < 16; page++)
        EXPECT(*word(memory, page, 200) == page + 5 && holds(memory, page, 1));
    check(memory + MIB, ALL - 1, 3);
}
