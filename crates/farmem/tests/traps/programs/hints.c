/* What madvise(2) promises of each piece of advice, for memory that is mostly out. */
#include "trap.h"

#define CHILD(expected)                                                        \
    do {                                                                       \
        pid_t child = fork();                                                  \
        if (child == 0)                                                        \
            _exit((expected) ? 0 : 1);                                         \
        child_succeeds(child);                                                 \
    } while (0)

/* "The default", "expect page references in sequential order", ... : the content stays. */
static void hints_change_nothing(char *memory) {
    int hints[] = {MADV_SEQUENTIAL, MADV_RANDOM,      MADV_WILLNEED, MADV_NORMAL,
                   MADV_COLD,       MADV_PAGEOUT,     MADV_HUGEPAGE, MADV_NOHUGEPAGE,
                   MADV_DONTDUMP,   MADV_DODUMP,      MADV_MERGEABLE, MADV_UNMERGEABLE};
    for (size_t hint = 0; hint < sizeof hints / sizeof *hints; hint++) {
        fill(memory, ALL, hint);
        /* A kernel may be built without one of them. */
        if (madvise(memory, ALL * MIB, hints[hint]) != 0)
            EXPECT(errno == EINVAL);
        check(memory, ALL, hint);
    }
}

/* "Subsequent accesses of pages in the range will succeed, but will result in zero-fill-on-demand
 * pages", page by page as well as all at once. */
static void dontneed_zeroes(char *memory) {
    fill(memory, ALL, 20);
    for (size_t page = 0; page < ALL_PAGES; page += 2)
        EXPECT(madvise(memory + page * PAGE, PAGE, MADV_DONTNEED) == 0);
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(page % 2 ? holds(memory, page, 20) : *word(memory, page, 0) == 0 && *word(memory, page, 511) == 0);
    EXPECT(madvise(memory, ALL * MIB, MADV_DONTNEED) == 0);
    for (size_t page = 0; page < ALL_PAGES; page++)
        EXPECT(*word(memory, page, 100) == 0);
}

/* "After a successful MADV_FREE operation, any stale data (i.e., dirty, unwritten pages) will be
 * lost when the kernel frees the pages. However, subsequent writes will succeed, and then the kernel
 * cannot free those dirtied pages." */
static void free_keeps_what_is_written_later(char *memory) {
    fill(memory, ALL, 21);
    EXPECT(madvise(memory, ALL * MIB, MADV_FREE) == 0);
    for (size_t page = 0; page < ALL_PAGES; page += 3)
        *word(memory, page, 0) = page + 5;
    for (int round = 0; round < 2; round++)
        for (size_t page = 0; page < ALL_PAGES; page++) {
            uint64_t found = *word(memory, page, 0);
            EXPECT(page % 3 == 0 ? found == page + 5 : found == 0 || found == stamp(21, page));
        }
}

/* "Populate (prefault) page tables readable/writable": the content stays, success means present. */
static void populate_brings_back(char *memory) {
    fill(memory, ALL, 22);
#ifdef MADV_POPULATE_READ
    for (size_t mib = 0; mib < ALL; mib += 8) {
        EXPECT(madvise(memory + mib * MIB, 4 * MIB, MADV_POPULATE_READ) == 0);
        EXPECT(madvise(memory + mib * MIB + 4 * MIB, 4 * MIB, MADV_POPULATE_WRITE) == 0);
    }
#endif
    check(memory, ALL, 22);
}

/* "Do not make the pages in this range available to the child after a fork(2)." */
static void dontfork_hides(char *memory) {
    fill(memory, ALL, 23);
    EXPECT(madvise(memory + 8 * MIB, 8 * MIB, MADV_DONTFORK) == 0);
    unsigned char there;
    CHILD(mincore(memory + 8 * MIB, PAGE, &there) == -1 && errno == ENOMEM &&
          holds(memory, 0, 23) && holds(memory, 16 * MIB / PAGE, 23));
    EXPECT(madvise(memory + 8 * MIB, 8 * MIB, MADV_DOFORK) == 0);
    CHILD(holds(memory, 8 * MIB / PAGE, 23));
    check(memory, ALL, 23);
}

int main(void) {
    char *memory = map(ALL);
    hints_change_nothing(memory);
    dontneed_zeroes(memory);
    free_keeps_what_is_written_later(memory);
    populate_brings_back(memory);
    dontfork_hides(memory);
}
