// fork, vfork, exec, spawn and wait. Runs itself again as the program that is executed: see child().
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static char self[4096], dir[] = "/tmp/processes-XXXXXX";

// argv[1] is "child": tell what was passed on.
static int child(int argc, char **argv) {
    printf("  child %s:", argv[0]);
    // The directory has another name each time.
    for (int i = 2; i < argc; i++) printf(" [%s]", strncmp(argv[i], dir, 15) ? argv[i] : strrchr(argv[i], '/'));
    char *v = getenv("PASSED"), *w = getenv("LD_SHOWN");
    printf(" env %s %s", v ? v : "-", w ? w : "-");
    for (int fd = 3; fd < 20; fd++)
        if (fcntl(fd, F_GETFD) >= 0) printf(" fd%d", fd);
    sigset_t s;
    sigprocmask(SIG_BLOCK, 0, &s);
    for (int i = 1; i < 32; i++) {
        struct sigaction a;
        if (sigaction(i, 0, &a)) continue;
        if (a.sa_handler == SIG_IGN) printf(" ign%d", i);
        else if (a.sa_handler != SIG_DFL) printf(" HANDLER%d", i);
        if (sigismember(&s, i)) printf(" blk%d", i);
    }
    sigpending(&s);
    for (int i = 1; i < 32; i++)
        if (sigismember(&s, i)) printf(" pend%d", i);
    char comm[32] = "?";
    int fd = open("/proc/self/comm", O_RDONLY);
    long n = read(fd, comm, 31);
    if (n > 0) comm[n - 1] = 0;
    printf(" comm %s\n", strcmp(comm, "exe") ? comm : "processes");
    return atoi(argc > 3 ? argv[argc - 3] : "0");
}

static int reap(pid_t p) {
    int s;
    if (p < 0) return -errno;
    while (waitpid(p, &s, 0) < 0)
        if (errno != EINTR) return -errno;
    return WIFEXITED(s) ? WEXITSTATUS(s) : 1000 + WTERMSIG(s);
}
static void tell(const char *what, int r) {
    printf("%s: %d%s%s\n", what, r, r < 0 ? " " : "", r < 0 ? strerror(-r) : "");
    fflush(stdout);
}
static char *args[] = {"name", "child", "3", "x y", "", 0};

static int run(const char *path, char **argv, char **envp) {
    pid_t p = fork();
    if (!p) {
        execve(path, argv, envp);
        int e = errno;
        _exit(e == ENOENT ? 201 : e == EACCES ? 202 : e == ENOEXEC ? 203 : e == EFAULT ? 204 : e == ENOTDIR ? 205 : e == ELOOP ? 206 : e == ENAMETOOLONG ? 207 : 255);
    }
    return reap(p);
}
static char *file(const char *name, const char *text, int mode) {
    static char path[4200];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (write(fd, text, strlen(text)) < 0) perror(path);
    fchmod(fd, mode);
    close(fd);
    return path;
}

static void forks(void) {
    tell("exit", reap(({ pid_t p = fork(); if (!p) _exit(7); p; })));
    tell("kill", reap(({ pid_t p = fork(); if (!p) raise(SIGTERM); p; })));
    int x = 1;
    volatile int *shared = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    tell("copy", reap(({ pid_t p = fork(); if (!p) { x = 2; *shared = 5; _exit(x); } p; })));
    printf("x %d shared %d\n", x, *shared);
    int p[2];
    if (pipe(p)) return;
    pid_t kids[5];
    for (int i = 0; i < 5; i++)
        if (!(kids[i] = fork())) {
            char c = 'a' + i;
            usleep(1000 * i);
            _exit(write(p[1], &c, 1) != 1);
        }
    close(p[1]);
    int sum = 0, n = 0;
    for (char c; read(p[0], &c, 1) == 1; n++) sum += c - 'a';
    for (int i = 0; i < 5; i++) sum += reap(kids[i]);
    printf("five children %d %d\n", n, sum);
    close(p[0]);
    siginfo_t i = {0};
    pid_t q = fork();
    if (!q) _exit(9);
    int r = waitid(P_PID, q, &i, WEXITED);
    printf("waitid %d code %d status %d\n", r, i.si_code, i.si_status);
    tell("nobody left", waitpid(-1, 0, 0) < 0 ? -errno : 0);
    tell("grandchild", reap(({ pid_t p = fork(); if (!p) _exit(reap(({ pid_t g = fork(); if (!g) _exit(6); g; })) + 1); p; })));
    tell("getpid", reap(({ pid_t me = getpid(), p = fork(); if (!p) _exit(getppid() == me && getpid() != me && syscall(SYS_gettid) == getpid()); p; })));
}

static volatile int caught;
static void on_signal(int sig) { caught++; }
struct clone3 {
    unsigned long long flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
};
static void clones(void) {
    int pidfd = -1, parent_tid = 0, child_tid = 0;
    struct clone3 a = {.flags = CLONE_PIDFD | CLONE_PARENT_SETTID | CLONE_CHILD_SETTID | 1ull << 32, .pidfd = (long)&pidfd,
                       .parent_tid = (long)&parent_tid, .child_tid = (long)&child_tid, .exit_signal = SIGCHLD};
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, SIG_IGN);
    pid_t p = syscall(SYS_clone3, &a, sizeof a);
    if (!p) {
        struct sigaction x, y;
        sigaction(SIGUSR1, 0, &x);
        sigaction(SIGUSR2, 0, &y);
        _exit((x.sa_handler == SIG_DFL) + 2 * (y.sa_handler == SIG_IGN) + 4 * (child_tid == getpid()) + 8 * (parent_tid == 0));
    }
    struct pollfd f = {pidfd, POLLIN, 0};
    int ready = poll(&f, 1, 5000), flags = fcntl(pidfd, F_GETFD);
    int r = reap(p);
    printf("clone3: %d pidfd ready %d flags %d tid %d\n", r, ready, flags, parent_tid == p);
    close(pidfd);
    signal(SIGUSR1, SIG_DFL);
    signal(SIGUSR2, SIG_DFL);
    tell("too small", syscall(SYS_clone3, &a, 32) < 0 ? -errno : 0);
    a.flags = CLONE_THREAD;
    tell("thread alone", syscall(SYS_clone3, &a, sizeof a) < 0 ? -errno : 0);
    // An exit signal that is not SIGCHLD.
    caught = 0;
    signal(SIGUSR1, on_signal);
    p = syscall(SYS_clone, SIGUSR1, 0, 0, 0, 0);
    if (!p) _exit(5);
    int s;
    while (waitpid(p, &s, __WALL) < 0);
    printf("other exit signal: %d caught %d\n", WEXITSTATUS(s), caught);
    signal(SIGUSR1, SIG_DFL);
    caught = 0;
}
static int sharing(void *p) {
    *(int *)p += 40;
    return 5;
}
static void vforks(void) {
    volatile int x = 1;
    pid_t p = vfork();
    if (!p) {
        x = 2;
        _exit(8);
    }
    int r = reap(p);
    printf("vfork: %d, x %d\n", r, x);
    // What the child does about signals is its own.
    signal(SIGUSR1, on_signal);
    sigset_t s, now;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR2);
    p = vfork();
    if (!p) {
        signal(SIGUSR1, SIG_IGN);
        sigprocmask(SIG_BLOCK, &s, 0);
        kill(getpid(), SIGUSR1);
        _exit(1);
    }
    reap(p);
    sigprocmask(SIG_BLOCK, 0, &now);
    raise(SIGUSR1);
    printf("after vfork: caught %d blocked %d\n", caught, sigismember(&now, SIGUSR2));
    p = vfork();
    if (!p) kill(getpid(), SIGKILL);
    tell("killed in vfork", reap(p));
    char *missing[] = {"missing", 0};
    p = vfork();
    if (!p) {
        execv("/nonexistent/missing", missing);
        x = errno;
        _exit(2);
    }
    reap(p);
    printf("errno from vfork: %d\n", x);
    fflush(stdout);
    p = vfork();
    if (!p) {
        execve(self, args, environ);
        _exit(1);
    }
    tell("exec from vfork", reap(p));
    static char stack[65536] __attribute__((aligned(16)));
    int y = 2;
    p = clone(sharing, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, &y);
    r = reap(p);
    printf("clone: %d %d\n", r, y);
    signal(SIGUSR1, SIG_DFL);
}

static void execs(void) {
    char *env[] = {"PASSED=yes", "LD_SHOWN=too", 0};
    tell("exec", run(self, args, env));
    tell("no environment", run(self, args, 0));
    tell("missing", run("/nonexistent", args, environ));
    tell("empty", run("", args, environ));
    tell("directory", run("/tmp", args, environ));
    tell("through a file", run("/etc/passwd/x", args, environ));
    tell("not executable", run(file("text", "echo hi\n", 0600), args, environ));
    tell("no format", run(file("plain", "exit 17\n", 0700), args, environ));
    tell("empty file", run(file("nothing", "", 0700), args, environ));
    tell("cut ELF", run(file("elf", "\177ELF\2\1\1", 0700), args, environ));
    tell("bad path", run((char *)1, args, environ));
    tell("bad argv", run(self, (char **)1, environ));
    char long_name[5000];
    memset(long_name, 'x', sizeof long_name);
    long_name[0] = '/';
    long_name[4999] = 0;
    tell("long path", run(long_name, args, environ));
    char script[5000];
    snprintf(script, sizeof script, "#!%s child\n", self);
    char *path = file("script", script, 0700);
    tell("script", run(path, args, environ));
    tell("missing interpreter", run(file("lost", "#!/nonexistent/sh\n", 0700), args, environ));
    if (chdir(dir)) perror("chdir");
    file("script", script, 0700);
    tell("relative", run("script", args, environ));
    tell("from the link", run("/proc/self/exe", args, environ));
    tell("execvp finds no format a script", reap(({ pid_t p = fork(); if (!p) { execlp("./plain", "plain", (char *)0); _exit(1); } p; })));
    int fd = open(self, O_RDONLY | O_CLOEXEC);
    tell("fexecve", reap(({ pid_t p = fork(); if (!p) { fexecve(fd, args, environ); _exit(1); } p; })));
    close(fd);
}

static void *exec_in_thread(void *unused) {
    execve(self, args, environ);
    return 0;
}
static void inherited(void) {
    int open_fd = open("/dev/null", O_RDONLY), closed = open("/dev/null", O_RDONLY | O_CLOEXEC);
    pid_t p = fork();
    if (!p) {
        signal(SIGINT, SIG_IGN);
        signal(SIGTRAP, SIG_IGN);
        signal(SIGUSR1, on_signal);
        signal(SIGSEGV, on_signal);
        sigset_t s;
        sigemptyset(&s);
        sigaddset(&s, SIGUSR1);
        sigaddset(&s, SIGSEGV);
        sigaddset(&s, SIGUSR2);
        sigprocmask(SIG_BLOCK, &s, 0);
        raise(SIGUSR2);
        execve(self, args, environ);
        _exit(1);
    }
    tell("dispositions, mask, pending", reap(p));
    close(open_fd);
    close(closed);
    p = fork();
    if (!p) {
        pthread_t t;
        pthread_create(&t, 0, exec_in_thread, 0);
        for (;;) pause();
    }
    tell("exec from a thread", reap(p));
}

static void spawns(void) {
    pid_t p;
    int r = posix_spawn(&p, self, 0, 0, args, environ);
    tell("spawn", r ? -r : reap(p));
    r = posix_spawn(&p, "/nonexistent", 0, 0, args, environ);
    tell("spawn of nothing", r ? -r : reap(p));
    r = posix_spawnp(&p, "true", 0, 0, (char *[]){"true", 0}, environ);
    tell("spawn by PATH", r ? -r : reap(p));
    posix_spawn_file_actions_t f;
    posix_spawn_file_actions_init(&f);
    posix_spawn_file_actions_addopen(&f, 1, "/dev/null", O_WRONLY, 0);
    posix_spawnattr_t a;
    posix_spawnattr_init(&a);
    sigset_t s;
    sigfillset(&s);
    posix_spawnattr_setsigdefault(&a, &s);
    posix_spawnattr_setflags(&a, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    signal(SIGUSR1, on_signal);
    r = posix_spawn(&p, self, &f, &a, args, environ);
    tell("spawn with actions", r ? -r : reap(p));
    raise(SIGUSR1);
    printf("handler kept: %d\n", caught);
    tell("system", system("exit 12"));
    tell("system true", system(0));
    FILE *in = popen("echo one; echo two; exit 3", "r");
    char b[100];
    while (fgets(b, sizeof b, in)) printf("popen: %s", b);
    tell("pclose", pclose(in));
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    int good = 0;
    for (int i = 0; i < 20; i++) {
        if (!posix_spawnp(&p, "true", 0, 0, (char *[]){"true", 0}, environ)) good += reap(p) == 0;
    }
    clock_gettime(CLOCK_MONOTONIC, &t1);
    fprintf(stderr, "a spawn: %ld us\n", ((t1.tv_sec - t0.tv_sec) * 1000000 + (t1.tv_nsec - t0.tv_nsec) / 1000) / 20);
    printf("twenty: %d\n", good);
}

int main(int argc, char **argv) {
    if (argc > 1 && (!strcmp(argv[1], "child"))) return child(argc, argv);
    if (argc > 1) printf("called as %s with %s\n", argv[0], argv[1]);
    signal(SIGPIPE, SIG_DFL);
    long n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n < 0 || !mkdtemp(dir)) return 1;
    setenv("PASSED", "1", 1);
    forks();
    clones();
    vforks();
    execs();
    inherited();
    spawns();
    char command[100];
    snprintf(command, sizeof command, "rm -r %s", dir);
    tell("rm", system(command));
    return 0;
}
