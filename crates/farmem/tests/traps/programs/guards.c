/* Guards (MADV_GUARD_INSTALL) stop whoever touches them, whatever is read ahead or filled around
 * them, and what is behind them is gone. */
#include "trap.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>

enum { INSTALL = 102, REMOVE = 103, EVERY = 512, FIRST = 100, GUARDS = 8 };

static sigjmp_buf touched;

static void on_fault(int signal) {
    (void)signal;
    siglongjmp(touched, 1);
}

static int guarded(size_t page) { return page >= FIRST && (page - FIRST) % EVERY < GUARDS; }

/* Every guard, by the C library's function or around it. */
static void guard(char *memory, int direct) {
    for (size_t page = FIRST; page < ALL_PAGES; page += EVERY) {
        void *start = word(memory, page, 0);
        long failed = direct ? syscall(SYS_madvise, start, GUARDS * PAGE, INSTALL)
                             : madvise(start, GUARDS * PAGE, INSTALL);
        if (failed && errno == EINVAL && page == FIRST)
            exit(77); /* A kernel without guards. */
        EXPECT(!failed);
    }
}

static void check_guarded(char *memory, size_t round) {
    for (volatile size_t page = 0; page < ALL_PAGES; page++) {
        if (sigsetjmp(touched, 1)) {
            EXPECT(guarded(page));
            continue;
        }
        uint64_t found = *(volatile uint64_t *)word(memory, page, 0);
        EXPECT(!guarded(page));
        EXPECT(found == stamp(round, page));
    }
}

int main(void) {
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    EXPECT(sigaction(SIGSEGV, &action, NULL) == 0);

    /* As below the stacks of threads: where nothing has been yet, not announced by anybody. */
    char *memory = map(ALL);
    guard(memory, 1);
    for (size_t page = 0; page < ALL_PAGES; page++)
        if (!guarded(page))
            *word(memory, page, 0) = stamp(0, page);
    check_guarded(memory, 0);
    check_guarded(memory, 0);
    EXPECT(munmap(memory, ALL * MIB) == 0);

    /* Over contents, most of which is out. */
    memory = map(ALL);
    fill(memory, ALL, 1);
    for (int round = 0; round < 2; round++) {
        guard(memory, 0);
        if (round)
            check_guarded(memory, 1);
        for (size_t page = FIRST; page < ALL_PAGES; page += EVERY)
            EXPECT(madvise(word(memory, page, 0), GUARDS * PAGE, REMOVE) == 0);
        for (size_t page = 0; page < ALL_PAGES; page++) {
            EXPECT(*word(memory, page, 0) == (guarded(page) ? 0 : stamp(1, page)));
            if (guarded(page))
                *word(memory, page, 0) = stamp(1, page);
        }
    }
    return 0;
}
