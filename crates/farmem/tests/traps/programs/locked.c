/* mlock, MAP_LOCKED and MAP_POPULATE among memory that goes out. */
#include "trap.h"

static char *mapped_with(size_t mib, int flags) {
    return mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    EXPECT(mlock(memory, 8 * MIB) == 0);
    fill(memory + 8 * MIB, ALL - 8, 2);
    check(memory, 8, 1);
    check(memory + 8 * MIB, ALL - 8, 2);
    EXPECT(munlock(memory, 8 * MIB) == 0);
    char *populated = mapped_with(16, MAP_POPULATE), *locked = mapped_with(4, MAP_LOCKED);
    EXPECT(populated != MAP_FAILED && locked != MAP_FAILED);
    fill(populated, 16, 3);
    fill(locked, 4, 4);
    check(populated, 16, 3);
    check(memory, 8, 1);
    check(memory + 8 * MIB, ALL - 8, 2);
    check(locked, 4, 4);
}
