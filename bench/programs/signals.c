/* Signals to oneself: kill, handler, return. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static volatile long seen;
static void handler(int s) { (void)s; seen++; }

int main(int argc, char **argv) {
    long n = argc > 1 ? atol(argv[1]) : 100000;
    struct sigaction a = {.sa_handler = handler};
    sigaction(SIGUSR1, &a, 0);
    for (long i = 0; i < n; i++) kill(getpid(), SIGUSR1);
    printf("%ld\n", seen);
    return seen != n;
}
