/* Three generations, each of which writes its own stamps over those it inherited, while its own
 * child and its parent do the same. */
#include "trap.h"

static char *memory;

static void generation(int depth) {
    check(memory, ALL, depth);
    if (depth < 3) {
        pid_t child = fork();
        if (child == 0) {
            fill(memory, ALL, depth + 1);
            generation(depth + 1);
            _exit(0);
        }
        fill(memory, ALL / 2, 100 + depth);
        child_succeeds(child);
        check(memory, ALL / 2, 100 + depth);
    }
    for (size_t page = ALL_PAGES / 2; page < ALL_PAGES; page++)
        EXPECT(holds(memory, page, depth));
}

int main(void) {
    memory = map(ALL);
    fill(memory, ALL, 0);
    generation(0);
}
