/* Dumps its core while most of its memory is out. */
#include "trap.h"

int main(void) {
    struct rlimit unlimited = {RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_CORE, &unlimited);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    check(memory, ALL, 1);
    abort();
}
