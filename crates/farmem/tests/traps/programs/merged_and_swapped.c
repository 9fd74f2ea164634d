/* Pages that the kernel merges with equal ones (KSM) and swaps out by itself, among those that farmem
 * moves out: a swapped page is there, and a merged one is shared. */
#include "trap.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

static char *memory;

/* Equal in all of the first 32 MiB, its own in the others. */
static uint64_t seed_of(size_t page) {
    return page < 32 * MIB / PAGE ? 7 : 7 + page;
}

static void write_page(size_t page) {
    for (int at = 0; at < 512; at++)
        *word(memory, page, at) = stamp(seed_of(page), at);
}

static int is_right(size_t page) {
    for (int at = 0; at < 512; at++)
        if (*word(memory, page, at) != stamp(seed_of(page), at))
            return 0;
    return 1;
}

int main(void) {
    memory = map(ALL);
    /* Without KSM in the kernel this is refused, and the rest counts. */
    (void)madvise(memory, 32 * MIB, MADV_MERGEABLE);
    for (size_t page = 0; page < ALL_PAGES; page++)
        write_page(page);
    await_paging(ALL);
    unsigned state = 1;
    for (double end = now() + 3; now() < end;) {
        size_t window = random_below(&state, ALL) * (MIB / PAGE);
        (void)madvise(memory + window * PAGE, MIB, MADV_PAGEOUT);
        for (int at = 0; at < 500; at++) {
            size_t page = random_below(&state, ALL_PAGES);
            EXPECT(is_right(page));
            if (at % 2)
                write_page(page);
        }
    }
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(is_right(page));
}
