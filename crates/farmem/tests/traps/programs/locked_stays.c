/* mlock(2): "pages are guaranteed to be resident in RAM when the call returns successfully; the pages
 * are guaranteed to stay in RAM until later unlocked"; so does mmap(2) of MAP_LOCKED. MAP_POPULATE prefaults. */
#include "trap.h"

#define LOCKED 8ul

static int all_present(char *memory, size_t mib) {
    static unsigned char there[ALL_PAGES];
    EXPECT(mincore(memory, mib * MIB, there) == 0);
    for (size_t page = 0; page < mib * MIB / PAGE; page++)
        if (!(there[page] & 1))
            return 0;
    return 1;
}

static char *mapped_with(size_t mib, int flags) {
    char *memory = mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    EXPECT(memory != MAP_FAILED);
    return memory;
}

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    /* Most of it is out by now. */
    EXPECT(getenv("FARMEM_RUN") == NULL || !all_present(memory, ALL));
    EXPECT(mlock(memory, LOCKED * MIB) == 0);
    EXPECT(all_present(memory, LOCKED));
    char *locked = mapped_with(4, MAP_LOCKED);
    EXPECT(all_present(locked, 4));
    char *lazily = mapped_with(4, 0);
    EXPECT(mlock2(lazily, 4 * MIB, MLOCK_ONFAULT) == 0);
    fill(lazily, 4, 2);
    for (int round = 0; round < 3; round++) {
        fill(memory + LOCKED * MIB, ALL - LOCKED, round);
        check(memory + LOCKED * MIB, ALL - LOCKED, round);
        EXPECT(all_present(memory, LOCKED) && all_present(locked, 4) && all_present(lazily, 4));
    }
    check(memory, LOCKED, 1);
    check(lazily, 4, 2);
    EXPECT(munlock(memory, LOCKED * MIB) == 0 && munlock(lazily, 4 * MIB) == 0);
    /* More than the limit cannot all be there, but mapping it completes. */
    char *large = mapped_with(ALL, MAP_POPULATE);
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(*word(large, page, 0) == 0);
    fill(large, ALL, 5);
    check(large, ALL, 5);
    /* Unlocked memory goes out again, in its time. */
    double until = now() + 20;
    while (getenv("FARMEM_RUN") != NULL && all_present(memory, LOCKED)) {
        EXPECT(now() < until);
        check(large, ALL, 5);
    }
    check(memory, LOCKED, 1);
}
