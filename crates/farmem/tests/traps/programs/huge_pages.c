/* Memory that asks for transparent huge pages. */
#include "trap.h"

int main(void) {
    uintptr_t start = (uintptr_t)map(ALL + 2), huge = 2 * MIB;
    char *memory = (char *)((start + huge - 1) / huge * huge);
    EXPECT(madvise(memory, ALL * MIB, MADV_HUGEPAGE) == 0);
    for (int round = 0; round < 2; round++) {
        fill(memory, ALL, round);
        check(memory, ALL, round);
    }
}
