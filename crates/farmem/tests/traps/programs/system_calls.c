/* The kernel reads and writes pages that are out for the program: files, pipes, sockets, vectors of
 * buffers that lie apart, results of all kinds. */
#include "trap.h"
#include <sys/random.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define VECTORS 16

static char *memory;
static unsigned seed = 1;

static size_t some_page(void) {
    return random_below(&seed, ALL_PAGES);
}

static void stamp_again(size_t page) {
    *word(memory, page, 0) = stamp(1, page);
    *word(memory, page, 100) = page;
    *word(memory, page, 511) = ~stamp(1, page);
}

/* What was written from one page and read into another. */
static void has_come(size_t from, size_t to) {
    EXPECT(*word(memory, to, 0) == stamp(1, from) && *word(memory, to, 100) == from &&
           *word(memory, to, 511) == ~stamp(1, from));
    stamp_again(to);
}

static void by_file(int file) {
    size_t from = some_page(), to = some_page();
    EXPECT(pwrite(file, memory + from * PAGE, PAGE, 0) == (ssize_t)PAGE);
    EXPECT(pread(file, memory + to * PAGE, PAGE, 0) == (ssize_t)PAGE);
    has_come(from, to);
}

static void by_vectors(int file) {
    struct iovec out[VECTORS], in[VECTORS];
    size_t from[VECTORS], to[VECTORS];
    for (int at = 0; at < VECTORS; at++) {
        from[at] = some_page();
        /* No page twice. */
        to[at] = some_page() / VECTORS * VECTORS + at;
        out[at] = (struct iovec){memory + from[at] * PAGE, PAGE};
        in[at] = (struct iovec){memory + to[at] * PAGE, PAGE};
    }
    EXPECT(pwritev(file, out, VECTORS, 0) == (ssize_t)(VECTORS * PAGE));
    EXPECT(preadv(file, in, VECTORS, 0) == (ssize_t)(VECTORS * PAGE));
    for (int at = 0; at < VECTORS; at++)
        EXPECT(*word(memory, to[at], 100) == from[at]);
    for (int at = 0; at < VECTORS; at++)
        stamp_again(to[at]);
}

/* From a file into a pipe without the program's memory, and from there into it. */
static void by_sendfile(int file, int pipes[2]) {
    size_t from = some_page(), to = some_page();
    EXPECT(pwrite(file, memory + from * PAGE, PAGE, 0) == (ssize_t)PAGE);
    off_t *offset = (off_t *)word(memory, to, 7);
    *offset = 0;
    EXPECT(sendfile(pipes[1], file, offset, PAGE) == (ssize_t)PAGE && *offset == (off_t)PAGE);
    EXPECT(read(pipes[0], memory + to * PAGE, PAGE) == (ssize_t)PAGE);
    has_come(from, to);
}

static void by_socket(int sockets[2]) {
    size_t from = some_page(), to = some_page(), head = some_page();
    /* The header of the message lies in a page that is out as well. */
    struct msghdr *message = (struct msghdr *)word(memory, head, 8);
    struct iovec *vector = (struct iovec *)word(memory, head, 40);
    *vector = (struct iovec){memory + from * PAGE, PAGE};
    *message = (struct msghdr){.msg_iov = vector, .msg_iovlen = 1};
    EXPECT(sendmsg(sockets[0], message, 0) == (ssize_t)PAGE);
    EXPECT(recv(sockets[1], memory + to * PAGE, PAGE, MSG_WAITALL) == (ssize_t)PAGE);
    has_come(from, to);
}

static void results(int file) {
    struct stat *found = (struct stat *)word(memory, some_page(), 200);
    EXPECT(fstat(file, found) == 0 && found->st_size >= (off_t)PAGE);
    EXPECT(getrandom(word(memory, some_page(), 300), 64, 0) == 64);
    char *path = (char *)word(memory, some_page(), 400);
    EXPECT(getcwd(path, 512) == path && path[0] == '/');
    struct timespec *time = (struct timespec *)word(memory, some_page(), 500);
    EXPECT(syscall(SYS_clock_gettime, CLOCK_MONOTONIC, time) == 0 && time->tv_sec > 0);
}

int main(void) {
    memory = map(ALL);
    fill(memory, ALL, 1);
    int file = open("calls", O_RDWR | O_CREAT | O_TRUNC, 0600), pipes[2], sockets[2];
    EXPECT(file >= 0 && pipe(pipes) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    for (int round = 0; round < 400; round++) {
        by_file(file);
        by_vectors(file);
        by_sendfile(file, pipes);
        by_socket(sockets);
        results(file);
    }
    check(memory, ALL, 1);
}
