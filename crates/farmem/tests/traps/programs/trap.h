/* What the programs share: memory with a stamp in every page, and checking it. */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)
/* Four times what the tests let the programs keep. */
#define ALL 128ul
#define ALL_PAGES (ALL * MIB / PAGE)

/* Ends with a message unless it holds. */
#define EXPECT(holds)                                                                    \
    do {                                                                                 \
        if (!(holds)) {                                                                  \
            fprintf(stderr, "%s:%d: wrong: %s (errno %d)\n", __FILE__, __LINE__, #holds, \
                    errno);                                                              \
            exit(3);                                                                     \
        }                                                                                \
    } while (0)

static inline char *map(size_t mib) {
    char *memory = mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(memory != MAP_FAILED);
    return memory;
}

static inline uint64_t *word(char *memory, size_t page, size_t index) {
    return (uint64_t *)(memory + page * PAGE) + index;
}

static inline uint64_t stamp(uint64_t seed, size_t page) {
    return seed ^ page * 0x9E3779B97F4A7C15ul;
}

/* Waits, for a second at most, until some of that much memory is out: what is tried with pages that
 * are out must not be over before the pager has come. */
static inline void await_paging(size_t mib) {
    for (int tries = 0; tries < 500; tries++) {
        size_t pages = 0, resident = 0;
        FILE *statm = fopen("/proc/self/statm", "r");
        int read = statm ? fscanf(statm, "%zu %zu", &pages, &resident) : 0;
        if (statm)
            fclose(statm);
        if (read != 2 || resident < mib * MIB / PAGE * 3 / 4)
            return;
        usleep(2000);
    }
}

/* Stamps the first, the last and another word of each page. */
static inline void fill(char *memory, size_t mib, uint64_t seed) {
    static int filled;
    for (size_t page = 0; page < mib * MIB / PAGE; page++) {
        *word(memory, page, 0) = stamp(seed, page);
        *word(memory, page, 100) = page;
        *word(memory, page, 511) = ~stamp(seed, page);
    }
    if (!filled++)
        await_paging(mib);
}

static inline int holds(char *memory, size_t page, uint64_t seed) {
    return *word(memory, page, 0) == stamp(seed, page) && *word(memory, page, 100) == page &&
           *word(memory, page, 511) == ~stamp(seed, page);
}

static inline void check(char *memory, size_t mib, uint64_t seed) {
    for (size_t page = 0; page < mib * MIB / PAGE; page++)
        if (!holds(memory, page, seed)) {
            fprintf(stderr, "wrong: page %zu of %zu MiB: %lx instead of %lx\n", page, mib,
                    *word(memory, page, 0), stamp(seed, page));
            _exit(3);
        }
}

static inline double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* The next of a fixed sequence of numbers without a pattern. */
static inline unsigned random_below(unsigned *state, unsigned bound) {
    *state = *state * 1103515245 + 12345;
    return (*state >> 8) % bound;
}

static inline void child_succeeds(pid_t child) {
    int status;
    EXPECT(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}
