/* Shared anonymous memory, written by parent and child, beside memory of their own. */
#include "trap.h"

#define SHARED 24ul

int main(void) {
    char *shared = mmap(NULL, SHARED * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT(shared != MAP_FAILED);
    fill(shared, SHARED, 1);
    char *memory = map(ALL);
    fill(memory, ALL, 2);
    pid_t child = fork();
    if (child == 0) {
        check(shared, SHARED, 1);
        check(memory, ALL, 2);
        fill(shared, SHARED, 3);
        fill(memory, ALL, 4);
        check(memory, ALL, 4);
        _exit(0);
    }
    child_succeeds(child);
    check(shared, SHARED, 3);
    check(memory, ALL, 2);
}
