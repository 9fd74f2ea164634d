/* process_vm_readv of another process's pages that are out. */
#include "trap.h"

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    pid_t child = fork();
    if (child == 0) {
        static char copy[MIB];
        for (size_t mib = 0; mib < ALL; mib++) {
            struct iovec to = {copy, MIB}, from = {memory + mib * MIB, MIB};
            EXPECT(process_vm_readv(getppid(), &to, 1, &from, 1, 0) == (ssize_t)MIB);
            for (size_t page = 0; page < MIB / PAGE; page++)
                EXPECT(*word(copy, page, 0) == stamp(1, mib * (MIB / PAGE) + page));
        }
        _exit(0);
    }
    child_succeeds(child);
    check(memory, ALL, 1);
}
