/* Uses a userfaultfd of its own for some of its memory, and plain memory besides. */
#include "trap.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#define OWN 40ul

static int faults;
static char *own;

/* Fills each page with its stamp when it is first touched. */
static void *serve(void *unused) {
    (void)unused;
    static char content[PAGE] __attribute__((aligned(4096)));
    for (;;) {
        struct uffd_msg message;
        EXPECT(read(faults, &message, sizeof message) == sizeof message);
        EXPECT(message.event == UFFD_EVENT_PAGEFAULT);
        uint64_t address = message.arg.pagefault.address & ~(PAGE - 1);
        memset(content, 0, sizeof content);
        *(uint64_t *)content = stamp(7, (address - (uint64_t)own) / PAGE);
        struct uffdio_copy copy = {.dst = address, .src = (uint64_t)content, .len = PAGE};
        EXPECT(ioctl(faults, UFFDIO_COPY, &copy) == 0 || errno == EEXIST);
    }
}

int main(void) {
    own = map(OWN);
    faults = syscall(SYS_userfaultfd, O_CLOEXEC);
    EXPECT(faults >= 0);
    struct uffdio_api api = {.api = UFFD_API};
    EXPECT(ioctl(faults, UFFDIO_API, &api) == 0);
    struct uffdio_register range = {.range = {(uint64_t)own, OWN * MIB},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    EXPECT(ioctl(faults, UFFDIO_REGISTER, &range) == 0);
    pthread_t server;
    EXPECT(pthread_create(&server, NULL, serve, NULL) == 0);
    char *memory = map(ALL);
    for (int round = 0; round < 2; round++) {
        fill(memory, ALL, round);
        for (size_t page = 0; page < OWN * MIB / PAGE; page++)
            EXPECT(*word(own, page, 0) == stamp(7, page));
        check(memory, ALL, round);
    }
}
