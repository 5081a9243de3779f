/* /init of the guest that `cargo in-guest` boots, and the same natively: runs the programs beside it and loops of system calls, and prints
   for each the nanoseconds of one operation. As process 1 it turns the machine off then. Arguments: the directory of the programs, and
   the names of what is to be run; none: all. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *self, *directory = "/";
static char input[4096];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void check(int good, const char *what) {
    if (!good) { perror(what); exit(1); }
}

static void end(pid_t child) {
    int status = 0;
    check(waitpid(child, &status, 0) == child && status == 0, "wait");
}

static void run(const char *path, const char *argument) {
    pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        if (null < 0) null = open("/null", O_WRONLY | O_CREAT, 0600);
        dup2(null, 1);
        int in = open(input, O_RDONLY);
        if (in >= 0) dup2(in, 0);
        execl(path, path, argument, (char *)0);
        _exit(127);
    }
    end(child);
}

static void getppids(long n) { while (n--) syscall(SYS_getppid); }
static void forkexec(long n) { while (n--) run(self, "--nothing"); }

static void forks(long n) {
    while (n--) {
        pid_t child = fork();
        if (child == 0) _exit(0);
        end(child);
    }
}

static void pingpong(long n) {
    int there[2], back[2];
    char c = 'x';
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t child = fork();
    if (child == 0) {
        while (n-- && read(there[0], &c, 1) == 1 && write(back[1], &c, 1) == 1) {}
        _exit(0);
    }
    for (long i = 0; i < n; i++) check(write(there[1], &c, 1) == 1 && read(back[0], &c, 1) == 1, "pipe");
    end(child);
    for (int i = 0; i < 2; i++) { close(there[i]); close(back[i]); }
}

static void touch(long n) {
    const long part = 2048;
    for (; n > 0; n -= part) {
        char *p = mmap(0, part * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(p != MAP_FAILED, "mmap");
        madvise(p, part * 4096, MADV_NOHUGEPAGE);
        for (long i = 0; i < part; i++) p[i * 4096] = 1;
        munmap(p, part * 4096);
    }
}

static volatile long seen;
static void handler(int s) { (void)s; seen++; }
static void signals(long n) {
    struct sigaction a = {.sa_handler = handler};
    sigaction(SIGUSR1, &a, 0);
    while (n--) kill(getpid(), SIGUSR1);
}

/* A file in memory on both sides: what is behind a disk is not what is compared. */
static void writes(long n) {
    static char block[4096];
    int file = memfd_create("file", 0);
    check(file >= 0, "memfd_create");
    for (long i = 0; i < n; i++) check(pwrite(file, block, 4096, (i & 255) * 4096) == 4096, "write");
    close(file);
}

static void opens(long n) {
    while (n--) close(open(self, O_RDONLY));
}

static const struct { const char *name; void (*loop)(long); const char *program, *argument; long n; } all[] = {
    {"core", 0, "core", "400", 1},
    {"sha256", 0, "sha256", "8", 1},
    {"fib", 0, "fib", "32", 1},
    {"calls", 0, "calls", "100000", 1},
    {"goto", 0, "goto", "20000000", 1},
    {"matrix", 0, "matrix", "8", 1},
    {"bzip2", 0, "bzip2", "-c", 1},
    {"getppid", getppids, 0, 0, 200000},
    {"open", opens, 0, 0, 20000},
    {"fork", forks, 0, 0, 200},
    {"forkexec", forkexec, 0, 0, 100},
    {"pipe", pingpong, 0, 0, 5000},
    {"page", touch, 0, 0, 16384},
    {"signal", signals, 0, 0, 20000},
    {"write", writes, 0, 0, 20000},
};

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--nothing") == 0) return 0;
    self = argv[0];
    if (argc > 1) directory = argv[1];
    snprintf(input, sizeof input, "%s/input", directory);
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
        int wanted = argc < 3;
        for (int a = 2; a < argc; a++) wanted |= strcmp(argv[a], all[i].name) == 0;
        if (!wanted) continue;
        char path[4096];
        double before = 0;
        if (all[i].program) {
            snprintf(path, sizeof path, "%s/%s", directory, all[i].program);
            /* bzip2 is the host's, if it has one. */
            if (access(path, X_OK) != 0) continue;
        }
        /* The first round warms up. */
        for (int round = 0; round < 2; round++) {
            before = now();
            if (all[i].loop) {
                all[i].loop(all[i].n);
            } else {
                run(path, all[i].argument);
            }
        }
        printf("took %s %.1f\n", all[i].name, (now() - before) / all[i].n);
        fflush(stdout);
    }
    if (getpid() == 1) reboot(RB_POWER_OFF);
    return 0;
}
