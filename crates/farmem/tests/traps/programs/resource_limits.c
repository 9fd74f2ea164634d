/* A program that may open nothing, lock nothing, and hardly map anything more. */
#include "trap.h"

static void limit(int resource, unsigned long most) {
    struct rlimit both = {most, most};
    EXPECT(setrlimit(resource, &both) == 0);
}

int main(void) {
    limit(RLIMIT_NOFILE, 3);
    limit(RLIMIT_AS, 300 * MIB);
    limit(RLIMIT_MEMLOCK, 0);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    check(memory, ALL, 1);
    if (getuid() == 0)
        EXPECT(chroot("/tmp") == 0 && chdir("/") == 0);
    fill(memory, ALL, 2);
    check(memory, ALL, 2);
}
