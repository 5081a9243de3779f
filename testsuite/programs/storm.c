// Signals at a high rate while everything else goes on: nothing is lost, nothing fails, no register changes.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static volatile sig_atomic_t hits;
static void hit(int sig) {
    int e = errno;
    hits++;
    getppid();
    errno = e;
}
static void check(int ok, const char *what) {
    if (ok) return;
    printf("WRONG: %s (%s)\n", what, strerror(errno));
    exit(1);
}
static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

// Bytes through two pipes and a child that sends them back.
static void echo(void) {
    int a[2], b[2];
    check(!pipe(a) && !pipe(b), "pipe");
    pid_t p = fork();
    check(p >= 0, "fork");
    if (!p) {
        close(a[1]);
        close(b[0]);
        char c;
        while (read(a[0], &c, 1) == 1) check(write(b[1], &c, 1) == 1, "write of the child");
        _exit(0);
    }
    close(a[0]);
    close(b[1]);
    for (int i = 0; i < 500; i++) {
        unsigned char c = i * 7, d = 0;
        check(write(a[1], &c, 1) == 1, "write");
        check(read(b[0], &d, 1) == 1, "read");
        check(c == d, "byte");
    }
    close(a[1]);
    close(b[0]);
    int s;
    check(waitpid(p, &s, 0) == p && s == 0, "wait");
}

static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t c = PTHREAD_COND_INITIALIZER;
static long turn, sum;
static void *player(void *arg) {
    long me = (long)arg;
    for (int i = 0; i < 100; i++) {
        pthread_mutex_lock(&m);
        while (turn % 3 != me) pthread_cond_wait(&c, &m);
        turn++;
        sum += me;
        pthread_cond_broadcast(&c);
        pthread_mutex_unlock(&m);
    }
    return 0;
}
static void threads(void) {
    pthread_t t[3];
    sum = turn = 0;
    for (long i = 0; i < 3; i++) check(!pthread_create(t + i, 0, player, (void *)i), "pthread_create");
    for (int i = 0; i < 3; i++) check(!pthread_join(t[i], 0), "join");
    check(sum == 300, "sum");
}
static void processes(void) {
    for (int i = 0; i < 10; i++) {
        pid_t p = fork();
        check(p >= 0, "fork");
        if (!p) _exit(i);
        int s;
        check(waitpid(p, &s, 0) == p && WEXITSTATUS(s) == i, "fork and wait");
        p = vfork();
        check(p >= 0, "vfork");
        if (!p) _exit(i);
        check(waitpid(p, &s, 0) == p && WEXITSTATUS(s) == i, "vfork and wait");
    }
    for (int i = 0; i < 2; i++) {
        pid_t p;
        int s;
        check(!posix_spawnp(&p, "true", 0, 0, (char *[]){"true", 0}, environ), "spawn");
        check(waitpid(p, &s, 0) == p && s == 0, "spawn and wait");
        check(posix_spawn(&p, "/nonexistent", 0, 0, (char *[]){"x", 0}, environ) == ENOENT, "spawn of nothing");
    }
}
static void sleeps(void) {
    // The whole time is slept, in as many pieces as it takes.
    struct timespec left = {0, 30000000};
    long start = now();
    while (nanosleep(&left, &left) < 0) check(errno == EINTR, "nanosleep");
    check(now() - start >= 29, "slept too short");
    struct pollfd p = {-1, 0, 0};
    check(poll(&p, 1, 5) == 0 || errno == EINTR, "poll");
}
static uint64_t numbers(int n) {
    uint64_t h = 1;
    double d = 0.3;
    for (int i = 0; i < n; i++) {
        h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull + i;
        d = 3.99 * d * (1 - d);
        uint64_t bits;
        memcpy(&bits, &d, 8);
        h += bits;
    }
    return h;
}
static void masks(void) {
    sigset_t s, old;
    sigfillset(&s);
    for (int i = 0; i < 300; i++) {
        sigprocmask(SIG_BLOCK, &s, &old);
        int before = hits;
        for (volatile int k = 0; k < 50; k++);
        check(before == hits, "a blocked signal came");
        sigprocmask(SIG_SETMASK, &old, 0);
    }
}
static void mappings(void) {
    for (int i = 0; i < 50; i++) {
        char *p = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(p != MAP_FAILED, "mmap");
        memset(p, i, 65536);
        check(p[65535] == i && !munmap(p, 65536), "munmap");
    }
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    uint64_t quiet = numbers(20000);
    struct sigaction a = {.sa_handler = hit, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &a, 0);
    sigaction(SIGUSR1, &a, 0);
    struct itimerval t = {{0, 500}, {0, 500}};
    setitimer(ITIMER_REAL, &t, 0);
    // A second source, from another process.
    pid_t parent = getpid(), p = fork();
    if (!p) {
        setitimer(ITIMER_REAL, &(struct itimerval){0}, 0);
        struct timespec pause = {0, 700000};
        while (getppid() == parent && !kill(parent, SIGUSR1)) nanosleep(&pause, 0);
        _exit(0);
    }
    for (int round = 0; round < 3; round++) {
        check(numbers(20000) == quiet, "numbers");
        echo();
        threads();
        processes();
        sleeps();
        masks();
        mappings();
    }
    kill(p, SIGKILL);
    waitpid(p, 0, 0);
    setitimer(ITIMER_REAL, &(struct itimerval){0}, 0);
    printf("done, many signals: %d\n", hits > 50);
    return 0;
}
