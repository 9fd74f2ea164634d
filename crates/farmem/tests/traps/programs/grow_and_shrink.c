/* realloc of one large block: mremap in place and to elsewhere, growing and shrinking. */
#include "trap.h"

static void numbered(uint64_t *words, size_t from, size_t to) {
    for (size_t index = from; index < to; index++)
        words[index] = index;
}

int main(void) {
    size_t count = MIB / 8;
    uint64_t *words = malloc(count * 8);
    numbered(words, 0, count);
    while (count < ALL * MIB / 8) {
        size_t larger = count + count / 3;
        words = realloc(words, larger * 8);
        numbered(words, count, larger);
        count = larger;
    }
    for (; count > 2 * MIB / 8; count /= 2) {
        words = realloc(words, count * 8);
        for (size_t index = 0; index < count; index++)
            EXPECT(words[index] == index);
    }
}
