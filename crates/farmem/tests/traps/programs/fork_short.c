/* More children at a time than the pager may have descriptors: who forks waits until some have ended. */
#include "trap.h"

#define FORKS 120
#define DESCRIPTORS 48

int main(int count, char **arguments) {
    if (count == 1) {
        struct rlimit limit = {DESCRIPTORS, DESCRIPTORS};
        EXPECT(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        /* The pager of the new image has this limit, too. */
        execl("/proc/self/exe", arguments[0], "limited", NULL);
        EXPECT(!"executed");
    }
    char *memory = map(ALL);
    fill(memory, ALL, 0);
    unsigned random = 1;
    for (int child = 0; child < FORKS; child++) {
        pid_t pid = fork();
        EXPECT(pid >= 0);
        if (pid == 0) {
            for (int at = 0; at < 20; at++)
                EXPECT(holds(memory, random_below(&random, ALL_PAGES), 0));
            usleep(500 * 1000);
            _exit(0);
        }
        random_below(&random, ALL_PAGES);
    }
    for (int child = 0; child < FORKS; child++) {
        int status;
        EXPECT(wait(&status) > 0 && status == 0);
    }
    check(memory, ALL, 0);
}
