/* Fills and checks as many MiB as its argument says. */
#include "trap.h"

int main(int count, char **arguments) {
    EXPECT(count == 2);
    size_t mib = atoi(arguments[1]);
    char *memory = map(mib);
    for (int round = 0; round < 2; round++) {
        fill(memory, mib, round);
        check(memory, mib, round);
    }
}
