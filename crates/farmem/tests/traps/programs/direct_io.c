/* O_DIRECT reads and writes: the disk's driver holds the pages while they are asked to go. */
#include "trap.h"

int main(int count, char **arguments) {
    EXPECT(count == 2);
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    int file = open(arguments[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
    if (file < 0 && errno == EINVAL)
        return 77;
    EXPECT(file >= 0);
    for (size_t mib = 0; mib < ALL; mib++)
        EXPECT(pwrite(file, memory + mib * MIB, MIB, mib * MIB) == (ssize_t)MIB);
    for (int round = 0; round < 2; round++) {
        fill(memory, ALL, 9 + round);
        for (size_t mib = 0; mib < ALL; mib++)
            EXPECT(pread(file, memory + mib * MIB, MIB, mib * MIB) == (ssize_t)MIB);
        check(memory, ALL, 1);
    }
}
