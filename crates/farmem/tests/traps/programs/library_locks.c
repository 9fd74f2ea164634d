/* Locks of the C library are held while pages that are out are touched: whoever brings them may not
 * need these locks, though it shares the memory that they lie in. */
#include "trap.h"
#include <link.h>

static char *memory;
static unsigned state = 1;

static void touch(void) {
    for (int at = 0; at < 2000; at++) {
        size_t page = random_below(&state, ALL_PAGES);
        EXPECT(holds(memory, page, 1));
    }
}

/* The loader's lock is held here, without which no thread-local storage is made. */
static int in_the_loader(struct dl_phdr_info *info, size_t size, void *data) {
    (void)info, (void)size;
    touch();
    ++*(int *)data;
    return 0;
}

/* The lock of a stream is held here. */
static ssize_t in_a_stream(void *cookie, const char *bytes, size_t size) {
    (void)bytes;
    touch();
    ++*(int *)cookie;
    return size;
}

/* Held by exit, which runs what was left to it. */
static void at_exit(void) {
    touch();
    check(memory, ALL, 1);
}

int main(void) {
    memory = map(ALL);
    EXPECT(atexit(at_exit) == 0);
    fill(memory, ALL, 1);
    int visits = 0, writes = 0;
    EXPECT(dl_iterate_phdr(in_the_loader, &visits) == 0 && visits > 0);
    FILE *stream = fopencookie(&writes, "w", (cookie_io_functions_t){.write = in_a_stream});
    EXPECT(stream);
    flockfile(stderr);
    flockfile(stdout);
    EXPECT(fprintf(stream, "all locks are held") > 0 && fflush(stream) == 0 && writes > 0);
    touch();
    funlockfile(stdout);
    funlockfile(stderr);
    EXPECT(fclose(stream) == 0);
}
