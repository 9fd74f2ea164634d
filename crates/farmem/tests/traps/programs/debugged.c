/* Is attached to by gdb, which reads the stamp of a page in each MiB while all threads stand. */
#include "trap.h"

static char *memory;

int main(void) {
    memory = map(ALL);
    fill(memory, ALL, 1);
    /* Yama, where it is, lets only parents attach. */
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    char script[] = "debugged.gdb", command[200];
    FILE *file = fopen(script, "w");
    EXPECT(file != NULL);
    for (size_t mib = 0; mib < ALL; mib++)
        fprintf(file, "printf \"%%lx\\n\", *(unsigned long *)%p\n", (void *)(memory + mib * MIB));
    EXPECT(fclose(file) == 0);
    snprintf(command, sizeof command, "gdb -q -nx -batch -p %d -x %s 2>gdb.err", getpid(), script);
    FILE *gdb = popen(command, "r");
    EXPECT(gdb != NULL);
    size_t found = 0;
    char line[4096], expected[32];
    while (fgets(line, sizeof line, gdb) != NULL && found < ALL) {
        snprintf(expected, sizeof expected, "%lx\n", stamp(1, found * (MIB / PAGE)));
        found += strcmp(line, expected) == 0;
    }
    EXPECT(pclose(gdb) == 0 && found == ALL);
    check(memory, ALL, 1);
    fill(memory, ALL, 2);
    check(memory, ALL, 2);
}
