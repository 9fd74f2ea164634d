/* posix_spawn, system and vfork: children that share memory until they call exec. */
#include "trap.h"
#include <spawn.h>

extern char **environ;

int main(void) {
    char *memory = map(ALL);
    fill(memory, ALL, 1);
    for (int round = 0; round < 10; round++) {
        pid_t child;
        char *arguments[] = {"true", NULL};
        EXPECT(posix_spawnp(&child, "true", NULL, NULL, arguments, environ) == 0);
        child_succeeds(child);
        EXPECT(WEXITSTATUS(system("exit 7")) == 7);
        child = vfork();
        if (child == 0) {
            execlp("true", "true", (char *)NULL);
            _exit(1);
        }
        child_succeeds(child);
        EXPECT(holds(memory, round * 3000, 1));
    }
    check(memory, ALL, 1);
}
