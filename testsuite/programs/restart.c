// Which calls go on after a handler and which give EINTR (signal(7), "Interruption of system calls").
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t hits;
static int pipe_fd[2], feed = -1;
static void hit(int sig) {
    hits++;
    // What waits and goes on finds something the second time.
    if (feed >= 0 && hits == 2 && write(feed, "x", 1) != 1) _exit(9);
}
static void every(int ms) {
    struct itimerval t = {{0, ms * 1000}, {0, ms * 1000}};
    setitimer(ITIMER_REAL, &t, 0);
}
static void arm(int flags) {
    struct sigaction a = {.sa_handler = hit, .sa_flags = flags};
    sigaction(SIGALRM, &a, 0);
    hits = 0;
    every(10);
}
static void tell(const char *what, int flags, long r) {
    int e = r < 0 ? errno : 0;
    every(0);
    printf("%s%s: %ld %s, handler ran%s\n", what, flags ? " restart" : "", r, e ? strerror(e) : "ok", hits ? "" : " never");
    fflush(stdout);
}
#define TRY(what, call)                                                                                                \
    for (int k = 0; k < 2; k++) {                                                                                      \
        int flags = k ? SA_RESTART : 0;                                                                                \
        arm(flags);                                                                                                    \
        long r = call;                                                                                                 \
        tell(what, flags, r);                                                                                          \
        drain();                                                                                                       \
    }
static void drain(void) {
    char c[16];
    if (read(pipe_fd[0], c, 16) < 0 && errno != EAGAIN) perror("drain");
}
static long blocking_read(int fd) {
    int f = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, f & ~O_NONBLOCK);
    char c;
    feed = pipe_fd[1];
    long r = read(fd, &c, 1);
    int e = errno;
    feed = -1;
    fcntl(fd, F_SETFL, f | O_NONBLOCK);
    errno = e;
    return r;
}
static long wait_child(void) {
    pid_t p = fork();
    if (!p) {
        usleep(60000);
        _exit(3);
    }
    int s = 0;
    long r = waitpid(p, &s, 0);
    int e = errno;
    if (r < 0) while (waitpid(p, &s, 0) < 0);
    errno = e;
    return r < 0 ? r : WEXITSTATUS(s);
}
static long remaining(int flags) {
    struct timespec t = {10, 0}, rest = {0, 0};
    long r = nanosleep(&t, &rest);
    return r < 0 && rest.tv_sec == 9 ? r : 100 + rest.tv_sec;
}
static long lock_file(void) {
    char name[] = "/tmp/restart-XXXXXX";
    int fd = mkstemp(name), p[2];
    if (pipe(p)) return -9;
    pid_t child = fork();
    if (!child) {
        int own = open(name, O_RDWR);
        flock(own, LOCK_EX);
        if (write(p[1], "l", 1) != 1) _exit(1);
        usleep(60000);
        _exit(0);
    }
    char c;
    while (read(p[0], &c, 1) != 1);
    long r = flock(fd, LOCK_EX);
    int e = errno;
    while (waitpid(child, 0, 0) < 0 && errno == EINTR);
    unlink(name);
    close(fd);
    close(p[0]);
    close(p[1]);
    errno = e;
    return r;
}
static long receive(int with_timeout) {
    int s[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, s)) return -9;
    if (with_timeout) {
        struct timeval t = {5, 0};
        setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    }
    feed = s[1];
    char c;
    long r = recv(s[0], &c, 1, 0);
    int e = errno;
    feed = -1;
    close(s[0]);
    close(s[1]);
    errno = e;
    return r;
}

int main(void) {
    if (pipe2(pipe_fd, O_NONBLOCK)) return 1;
    struct pollfd p = {pipe_fd[0], POLLIN, 0};
    sigset_t none;
    sigemptyset(&none);
    int ep = epoll_create1(0);
    struct epoll_event ev = {EPOLLIN, {0}};
    epoll_ctl(ep, EPOLL_CTL_ADD, pipe_fd[0], &ev);
    struct timespec ten = {10, 0};
    TRY("read", blocking_read(pipe_fd[0]));
    TRY("wait", wait_child());
    TRY("poll", poll(&p, 1, 10000));
    TRY("ppoll", ppoll(&p, 1, &ten, &none));
    TRY("select", ({ fd_set f; FD_ZERO(&f); FD_SET(pipe_fd[0], &f); select(pipe_fd[0] + 1, &f, 0, 0, 0); }));
    TRY("pselect", ({ fd_set f; FD_ZERO(&f); FD_SET(pipe_fd[0], &f); pselect(pipe_fd[0] + 1, &f, 0, 0, &ten, &none); }));
    TRY("epoll_wait", epoll_wait(ep, &ev, 1, 10000));
    TRY("epoll_pwait", epoll_pwait(ep, &ev, 1, 10000, &none));
    TRY("pause", pause());
    TRY("sigsuspend", sigsuspend(&none));
    TRY("nanosleep", remaining(flags));
    TRY("clock_nanosleep", -(long)clock_nanosleep(CLOCK_MONOTONIC, 0, &ten, 0));
    TRY("flock", lock_file());
    TRY("recv", receive(0));
    TRY("recv with timeout", receive(1));
    int word = 0;
    struct timespec five = {5, 0};
    TRY("futex with timeout", syscall(SYS_futex, &word, FUTEX_WAIT, 0, &five, 0, 0));
    sem_t sem;
    sem_init(&sem, 0, 0);
    TRY("sem_wait", ({ struct timespec until; clock_gettime(CLOCK_REALTIME, &until); until.tv_sec += 5; sem_timedwait(&sem, &until); }));

    // A mask that holds only while the call waits.
    sigset_t alarm_only, old, pending;
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGALRM);
    sigprocmask(SIG_BLOCK, &alarm_only, &old);
    arm(SA_RESTART);
    usleep(25000);
    sigpending(&pending);
    printf("blocked: hits %d pending %d\n", hits, sigismember(&pending, SIGALRM));
    every(0);
    int r = ppoll(&p, 1, &ten, &old);
    printf("ppoll lets it in: %d %s hits %d\n", r, strerror(errno), hits);
    sigprocmask(SIG_BLOCK, 0, &pending);
    printf("blocked again: %d\n", sigismember(&pending, SIGALRM));

    int sfd = signalfd(-1, &alarm_only, 0);
    raise(SIGALRM);
    struct signalfd_siginfo info;
    long got = read(sfd, &info, sizeof info);
    printf("signalfd: %d signo %u\n", got == sizeof info, info.ssi_signo);

    // Stopped and continued, a call goes on by itself.
    pid_t child = fork();
    if (!child) {
        struct timespec t = {0, 100000000};
        _exit(nanosleep(&t, 0) ? 1 : 5);
    }
    usleep(20000);
    kill(child, SIGSTOP);
    int s;
    waitpid(child, &s, WUNTRACED);
    printf("stopped %d by %d\n", WIFSTOPPED(s), WSTOPSIG(s));
    kill(child, SIGCONT);
    waitpid(child, &s, WCONTINUED);
    printf("continued %d\n", WIFCONTINUED(s));
    waitpid(child, &s, 0);
    printf("sleep went on: %d\n", WEXITSTATUS(s));
    return 0;
}
