/* The parent of its descendants' orphans: waits for a command that it starts, or leaves it when there is
 * a file called `leave`, or runs another image that counts the children it has not made. */
#include "trap.h"

static int count_children(void) {
    alarm(10);
    usleep(200000);
    int children = 0;
    while (wait(NULL) > 0)
        children++;
    printf("%d children\n", children);
    return 0;
}

int main(int count, char **arguments) {
    EXPECT(count >= 2);
    if (strcmp(arguments[1], "count") == 0)
        return count_children();
    EXPECT(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    if (strcmp(arguments[1], "exec") == 0)
        execl(arguments[0], arguments[0], "count", NULL);
    pid_t child = fork();
    if (child == 0) {
        execvp(arguments[2], arguments + 2);
        _exit(127);
    }
    while (strcmp(arguments[1], "leave") == 0)
        if (access("leave", F_OK) == 0)
            return 0;
        else
            usleep(5000);
    child_succeeds(child);
    return 0;
}
