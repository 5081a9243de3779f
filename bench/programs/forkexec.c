/* fork, execve of /bin/true and wait, over and over. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int n = argc > 1 ? atoi(argv[1]) : 200, failed = 0;
    for (int i = 0; i < n; i++) {
        pid_t child = fork();
        if (child == 0) {
            execl("/bin/true", "true", (char *)0);
            _exit(127);
        }
        int status = 0;
        if (waitpid(child, &status, 0) != child || status) failed++;
    }
    printf("%d failed\n", failed);
    return failed != 0;
}
