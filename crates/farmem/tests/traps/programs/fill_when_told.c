/* Fills its memory once it has read something from `go`, and checks it when there is a file called `stop`. */
#include "trap.h"

int main(void) {
    char byte;
    puts("ready");
    fflush(stdout);
    int told = open("go", O_RDONLY);
    EXPECT(told >= 0 && read(told, &byte, 1) == 1);
    char *memory = map(ALL);
    for (size_t page = 0; page < ALL_PAGES; page++)
        *word(memory, page, 0) = stamp(1, page);
    puts("filled");
    fflush(stdout);
    while (access("stop", F_OK) != 0)
        usleep(20000);
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(*word(memory, page, 0) == stamp(1, page));
}
