// What execve leaves as it was and what it does not: run again and again as the program that is executed. See look().
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static char self[4096];

static long kb(const char *field) {
    char line[256];
    long v = -1;
    FILE *f = fopen("/proc/self/status", "re");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, field, strlen(field))) v = atol(line + strlen(field));
    if (f) fclose(f);
    return v;
}
static int fds(void) {
    int n = 0;
    for (int fd = 0; fd < 900; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

// argv[1] is "look": what is there after exec.
static int look(int argc, char **argv) {
    printf("  %s:", argv[2]);
    for (int fd = 3; fd < 40; fd++)
        if (fcntl(fd, F_GETFD) >= 0) printf(" fd%d", fd);
    sigset_t s;
    sigprocmask(SIG_BLOCK, 0, &s);
    sigset_t p;
    sigpending(&p);
    for (int i = 1; i < 65; i++) {
        struct sigaction a;
        if (i != 32 && i != 33 && !sigaction(i, 0, &a)) {
            if (a.sa_handler == SIG_IGN) printf(" ign%d", i);
            else if (a.sa_handler != SIG_DFL) printf(" HANDLER%d", i);
            if (a.sa_flags & ~0x04000000) printf(" flags%d:%x", i, a.sa_flags);
        }
        if (sigismember(&s, i) == 1) printf(" blk%d", i);
        if (sigismember(&p, i) == 1) printf(" pend%d", i);
    }
    stack_t alt;
    sigaltstack(0, &alt);
    struct itimerval t;
    getitimer(ITIMER_REAL, &t);
    char comm[32] = "", exe[4096] = "", line[256] = "";
    prctl(PR_GET_NAME, comm);
    long n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    int fd = open("/proc/self/cmdline", O_RDONLY);
    long len = read(fd, line, sizeof line);
    close(fd);
    unsigned csr = __builtin_ia32_stmxcsr();
    unsigned short fcw;
    __asm__("fnstcw %0" : "=m"(fcw));
    char cwd[4096];
    printf(" alt %d timer %d comm %s exe %d cmdline %d mxcsr %x fcw %x umask %o cwd %s", alt.ss_flags, t.it_value.tv_sec > 0, comm,
           n > 0 && !strcmp(exe, self), len > 4 && !strcmp(line, argv[0]), csr, fcw, umask(0), getcwd(cwd, sizeof cwd) ? cwd : "?");
    if (argc > 3) printf(" pid %d", getpid() == atoi(argv[3]));
    if (argc > 4) printf(" page %s", mincore((void *)strtoul(argv[4], 0, 0), 4096, (unsigned char *)line) && errno == ENOMEM ? "gone" : "there");
    char *env = getenv("SEEN");
    printf(" env %s", env ? env : "-");
    void *brk = sbrk(0);
    printf(" heap %d\n", sbrk(4096) == brk);
    fflush(stdout);
    return 0;
}

static int reap(pid_t p) {
    int s;
    while (waitpid(p, &s, 0) < 0)
        if (errno != EINTR) return -errno;
    return WIFEXITED(s) ? WEXITSTATUS(s) : 1000 + WTERMSIG(s);
}
static void go(const char *name, int with_pid, void *page) {
    char pid[16] = "", at[32];
    snprintf(pid, sizeof pid, "%d", getpid());
    snprintf(at, sizeof at, "%p", page);
    char *args[] = {"looking", "look", (char *)name, with_pid ? pid : 0, page ? at : 0, 0};
    char *env[] = {"SEEN=yes", 0};
    execve(self, args, env);
    printf("  %s: %s\n", name, strerror(errno));
    fflush(stdout);
    _exit(1);
}
static void nothing(int sig) { (void)sig; }
static void *sleeper(void *arg) { for (;;) pause(); }
static void *other(void *arg) { go("exec by another thread", 1, 0); return 0; }
#define CHILD(what) do { fflush(stdout); pid_t p_ = fork(); if (!p_) { what; _exit(99); } int r_ = reap(p_); if (r_) printf("%s: %d\n", #what, r_); } while (0)

static void signals_and_files(void) {
    struct sigaction a = {.sa_handler = nothing, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &a, 0);
    sigaction(SIGFPE, &a, 0);
    a.sa_handler = SIG_DFL;
    a.sa_flags = SA_NOCLDWAIT | SA_NOCLDSTOP;
    sigaction(SIGCHLD, &a, 0);
    signal(SIGUSR2, SIG_IGN);
    signal(SIGTRAP, SIG_IGN);
    signal(40, nothing);
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGHUP);
    sigaddset(&s, SIGILL);
    sigaddset(&s, 41);
    sigprocmask(SIG_SETMASK, &s, 0);
    raise(SIGHUP);
    raise(SIGHUP);
    raise(41);
    stack_t alt = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    sigaltstack(&alt, 0);
    open("/dev/null", O_RDONLY);
    open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(3, 20);
    fcntl(20, F_SETFD, FD_CLOEXEC);
    dup2(3, 21);
    struct itimerval t = {.it_value = {1000, 0}};
    setitimer(ITIMER_REAL, &t, 0);
    umask(027);
    if (chdir("/usr")) _exit(98);
    prctl(PR_SET_NAME, "another");
    __builtin_ia32_ldmxcsr(0x9fc0);
    unsigned short fcw = 0x27f;
    __asm__("fldcw %0" ::"m"(fcw));
    // Where the next program has nothing of its own by chance.
    void *page = mmap((void *)0x300000000000, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    go("signals and files", 1, page);
}
static void posix_timer(void) {
    timer_t t;
    struct sigevent e = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    struct itimerspec soon = {.it_value = {0, 100000000}};
    timer_create(CLOCK_MONOTONIC, &e, &t);
    timer_settime(t, 0, &soon, 0);
    execl(self, "pausing", "pause", (char *)0);
}
static void threads(void) {
    pthread_t t;
    for (int i = 0; i < 3; i++) pthread_create(&t, 0, sleeper, 0);
    go("exec with threads", 1, 0);
}
static void by_thread(void) {
    pthread_t t;
    pthread_create(&t, 0, other, 0);
    for (;;) pause();
}
// The next owner of a robust lock hears that the first is gone.
static void robust(void) {
    pthread_mutex_t *m = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(m, &a);
    pid_t p = fork();
    if (!p) {
        pthread_mutex_lock(m);
        execl(self, "pausing", "pause", (char *)0);
    }
    usleep(50000);
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 5;
    int r = pthread_mutex_timedlock(m, &until);
    for (int i = 0; i < 500 && r == 0; i++) {
        // The child was not there yet.
        pthread_mutex_unlock(m);
        usleep(10000);
        r = pthread_mutex_timedlock(m, &until);
    }
    kill(p, SIGKILL);
    printf("robust: %s, child %d\n", strerror(r), reap(p));
}
static void vforks(void) {
    pid_t p = vfork();
    if (!p) go("vfork", 0, 0);
    printf("vfork: %d\n", reap(p));
    char *args[] = {"looking", "look", "spawn", 0};
    int r = posix_spawn(&p, self, 0, 0, args, environ);
    printf("spawn: %d %d\n", r, reap(p));
    // The parent waits for the exec, not for the end.
    fflush(stdout);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    p = syscall(SYS_clone, CLONE_VFORK | SIGCHLD, 0, 0, 0, 0);
    if (!p) {
        execl("/bin/sleep", "sleep", "3", (char *)0);
        _exit(1);
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("waited to the end: %d\n", b.tv_sec - a.tv_sec >= 3);
    kill(p, SIGKILL);
    reap(p);
}
// An exec that fails changes nothing.
static void failures(void) {
    char path[] = "/tmp/execs-XXXXXX", *args[] = {"x", 0};
    int fd = mkstemp(path);
    if (write(fd, "plain text", 10) != 10) _exit(1);
    signal(SIGUSR1, nothing);
    open("/dev/null", O_RDONLY | O_CLOEXEC);
    int before = fds();
    printf("no such file: %d\n", execve("/nonexistent/x", args, environ) ? errno : 0);
    printf("not executable: %d\n", execve(path, args, environ) ? errno : 0);
    fchmod(fd, 0700);
    close(fd);
    printf("no format: %d\n", execve(path, args, environ) ? errno : 0);
    printf("a directory: %d\n", execve("/tmp", args, environ) ? errno : 0);
    printf("bad pointers: %d %d\n", execve(self, (char **)8, environ) ? errno : 0, execve((char *)8, args, environ) ? errno : 0);
    char *big = malloc(200000);
    memset(big, 'x', 199999);
    big[199999] = 0;
    char *one[] = {"x", big, 0};
    printf("one too long: %d\n", execve(self, one, environ) ? errno : 0);
    big[100000] = 0;
    char **many = calloc(1000, sizeof *many);
    for (int i = 0; i < 100; i++) many[i] = big;
    printf("all too long: %d\n", execve(self, many, environ) ? errno : 0);
    struct sigaction a;
    sigaction(SIGUSR1, 0, &a);
    printf("as before: %d %d\n", a.sa_handler == nothing, fds() == before);
    fflush(stdout);
    unlink(path);
}
static void script(void) {
    char path[] = "/tmp/execs-XXXXXX", text[4200];
    int fd = mkstemp(path);
    int n = snprintf(text, sizeof text, "#!%s look\n", self);
    if (write(fd, text, n) != n) _exit(1);
    fchmod(fd, 0700);
    close(fd);
    pid_t p = fork();
    if (!p) {
        // Its name is another each time.
        if (dup2(open("/dev/null", O_WRONLY | O_CLOEXEC), 1) < 0) _exit(1);
        execl(path, "x", "y", (char *)0);
    }
    printf("script: %d\n", reap(p));
    unlink(path);
}
// argv[1] is "again": executes itself so many times more, in the same process.
static int again(int argc, char **argv) {
    int left = atoi(argv[2]);
    long first = argc > 3 ? atol(argv[3]) : 0;
    if (left == 140) first = kb("VmSize:");
    if (left == 0) {
        // What is mapped has not grown by more than 32 MiB.
        printf("again: %d descriptors, grown %d\n", fds(), kb("VmSize:") - first > 32 << 10);
        return 0;
    }
    open("/dev/null", O_RDONLY | O_CLOEXEC);
    char a[16], b[32];
    snprintf(a, sizeof a, "%d", left - 1);
    snprintf(b, sizeof b, "%ld", first);
    execl(self, "again", "again", a, b, (char *)0);
    return 1;
}

// argv[1] is "mapped": code of a file, at the same address before and after an exec, unchanged and changed.
static int mapped(int argc, char **argv) {
    static const unsigned char one[] = {0xb8, 1, 0, 0, 0, 0xc3}, two[] = {0xb8, 2, 0, 0, 0, 0xc3};
    int fd = open(argv[2], O_RDWR | O_CLOEXEC), step = atoi(argv[3]), sum = 0;
    if (step == 0 && pwrite(fd, one, sizeof one, 0) != sizeof one) return 1;
    int (*code)(void) = mmap((void *)0x600000000000, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED_NOREPLACE, fd, 0);
    for (int i = 0; i < 100; i++) sum += code();
    printf("mapped, step %d: %d\n", step, sum);
    fflush(stdout);
    if (step == 1 && pwrite(fd, two, sizeof two, 0) != sizeof two) return 1;
    if (step == 3) return 0;
    execl(self, "mapped", "mapped", argv[2], step == 0 ? "1" : step == 1 ? "2" : "3", (char *)0);
    return 1;
}
static void code_of_files(void) {
    char path[] = "/tmp/execs-XXXXXX";
    int fd = mkstemp(path);
    if (ftruncate(fd, 4096)) _exit(1);
    close(fd);
    pid_t p = fork();
    if (!p) execl(self, "mapped", "mapped", path, "0", (char *)0);
    printf("mapped: %d\n", reap(p));
    unlink(path);
}

int main(int argc, char **argv) {
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n] = 0;
    if (argc > 2 && !strcmp(argv[1], "look")) return look(argc, argv);
    if (argc > 2 && !strcmp(argv[1], "again")) return again(argc, argv);
    if (argc > 3 && !strcmp(argv[1], "mapped")) return mapped(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "pause")) {
        usleep(400000);
        return 3;
    }
    CHILD(go("plain", 1, 0));
    CHILD(signals_and_files());
    CHILD(posix_timer());
    CHILD(threads());
    CHILD(by_thread());
    CHILD(prctl(PR_SET_DUMPABLE, 0); execl(self, "looking", "look", "dumpable", (char *)0));
    robust();
    vforks();
    failures();
    script();
    fflush(stdout);
    code_of_files();
    fflush(stdout);
    CHILD(execl(self, "again", "again", "150", (char *)0));
    return 0;
}
