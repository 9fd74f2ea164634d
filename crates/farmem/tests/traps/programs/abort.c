/* Dumps its core while most of its memory is out. Says before where it is. */
#include "trap.h"

int main(void) {
    struct rlimit unlimited = {RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_CORE, &unlimited);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    check(memory, ALL, 1);
    printf("filled %zu\n", (size_t)memory);
    fflush(stdout);
    abort();
}
