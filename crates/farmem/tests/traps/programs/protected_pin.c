/* Not run under farmem: what would be lost if a page that cannot be moved were protected against
 * writing, copied, and dropped. io_uring has it pinned, and writes where no protection is asked. */
#include "trap.h"
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

static void protect(int uffd, char *page) {
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    EXPECT(ioctl(uffd, UFFDIO_API, &api) == 0);
    struct uffdio_register range = {.range = {(uintptr_t)page, PAGE},
                                    .mode = UFFDIO_REGISTER_MODE_WP};
    EXPECT(ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
    struct uffdio_writeprotect writeprotect = {.range = {(uintptr_t)page, PAGE},
                                               .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    EXPECT(ioctl(uffd, UFFDIO_WRITEPROTECT, &writeprotect) == 0);
}

int main(void) {
    char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(page != MAP_FAILED);
    memset(page, 0x11, PAGE);
    int file = open("pinned", O_RDWR | O_CREAT | O_TRUNC, 0600);
    char content[PAGE];
    memset(content, 0x99, PAGE);
    EXPECT(file >= 0 && write(file, content, PAGE) == (ssize_t)PAGE);
    struct io_uring_params parameters = {0};
    int ring = syscall(SYS_io_uring_setup, 4, &parameters);
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    if (ring < 0 || uffd < 0)
        return 77;
    size_t bytes = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe) + PAGE;
    char *queue = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    EXPECT(queue != MAP_FAILED && entry != MAP_FAILED);
    struct iovec vector = {page, PAGE};
    EXPECT(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1) == 0);

    protect(uffd, page);
    char copy[PAGE];
    memcpy(copy, page, PAGE);
    *entry = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED, .fd = file,
                                   .addr = (uintptr_t)page, .len = PAGE};
    *(unsigned *)(queue + parameters.sq_off.array) = 0;
    __atomic_store_n((unsigned *)(queue + parameters.sq_off.tail), 1, __ATOMIC_RELEASE);
    EXPECT(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
    /* Nobody was told of the write: no fault waits. */
    struct uffd_msg message;
    EXPECT(read(uffd, &message, sizeof message) == -1 && errno == EAGAIN);
    EXPECT(page[0] == (char)0x99);
    /* Dropping the page now and bringing the copy back loses it. */
    EXPECT(copy[0] == 0x11);
    puts("a protected page changed and nobody was told");
}
