/* io_uring reads a file into a registered buffer: its pages stay pinned for as long as the ring is
 * there, while all other memory is used. */
#include "trap.h"
#include <linux/io_uring.h>

#define BUFFER_MIB 4ul
#define BUFFER_PAGES (BUFFER_MIB * MIB / PAGE)

static struct io_uring_params parameters;
static char *submissions, *entries;
static int ring;

static void *ring_map(size_t bytes, off_t what) {
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, what);
    EXPECT(mapped != MAP_FAILED);
    return mapped;
}

static unsigned *field(unsigned offset) {
    return (unsigned *)(submissions + offset);
}

/* One read, waited for. The kernel lets both queues share one mapping. */
static void read_fixed(int file, char *to, unsigned bytes, uint64_t offset) {
    unsigned tail = *field(parameters.sq_off.tail), slot = tail & (parameters.sq_entries - 1);
    struct io_uring_sqe *entry = (struct io_uring_sqe *)entries + slot;
    *entry = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED, .fd = file, .off = offset,
                                   .addr = (uintptr_t)to, .len = bytes};
    field(parameters.sq_off.array)[slot] = slot;
    __atomic_store_n(field(parameters.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
    EXPECT(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
    unsigned head = *field(parameters.cq_off.head);
    struct io_uring_cqe *done = (struct io_uring_cqe *)(submissions + parameters.cq_off.cqes);
    EXPECT(done[head & (parameters.cq_entries - 1)].res == (int)bytes);
    __atomic_store_n(field(parameters.cq_off.head), head + 1, __ATOMIC_RELEASE);
}

int main(void) {
    char *buffer = map(BUFFER_MIB), *memory = map(ALL);
    int file = open("registered", O_RDWR | O_CREAT | O_TRUNC, 0600);
    EXPECT(file >= 0);
    for (int content = 0; content < 4; content++) {
        fill(buffer, BUFFER_MIB, content);
        EXPECT(write(file, buffer, BUFFER_MIB * MIB) == (ssize_t)(BUFFER_MIB * MIB));
    }
    fill(memory, ALL, 1);
    ring = syscall(SYS_io_uring_setup, 4, &parameters);
    EXPECT(ring >= 0 && parameters.features & IORING_FEAT_SINGLE_MMAP);
    submissions = ring_map(
        parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe) + PAGE,
        IORING_OFF_SQ_RING);
    entries = ring_map(parameters.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
    /* Registering pins pages that were out until now. */
    struct iovec vector = {buffer, BUFFER_MIB * MIB};
    EXPECT(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1) == 0);
    for (int round = 0; round < 12; round++) {
        fill(buffer, BUFFER_MIB, 99);
        fill(memory, ALL, round);
        for (size_t mib = 0; mib < BUFFER_MIB; mib++)
            read_fixed(file, buffer + mib * MIB, MIB, (round % 4 * BUFFER_MIB + mib) * MIB);
        check(memory, ALL, round);
        check(buffer, BUFFER_MIB, round % 4);
    }
}
