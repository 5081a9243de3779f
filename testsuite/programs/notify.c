// Notifications that end in signals or threads: POSIX timers, SIGIO, SIGCHLD, signalfd with epoll, ITIMER_VIRTUAL, resource limits.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static sem_t sem;
static volatile int value, count, code, fd, status, pid, by;
static void in_thread(union sigval v) {
    value = v.sival_int;
    sem_post(&sem);
}
static void info(int sig, siginfo_t *i, void *u) {
    count++;
    code = i->si_code;
    value = i->si_value.sival_int;
    by = syscall(SYS_gettid);
    if (sig == SIGCHLD) status = i->si_status, pid = i->si_pid;
    if (i->si_code > 0 && sig == SIGRTMIN + 2) fd = i->si_fd;
}
static void on(int sig, int flags) {
    struct sigaction a = {.sa_sigaction = info, .sa_flags = SA_SIGINFO | flags};
    sigaction(sig, &a, 0);
    count = code = value = 0;
}
static void wait_for(int n) {
    for (int i = 0; i < 3000 && count < n; i++) usleep(1000);
}
static int tid;
static void *timed(void *p) {
    tid = syscall(SYS_gettid);
    timer_t t;
    struct sigevent e = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = 33};
    e.sigev_notify_thread_id = tid;
    timer_create(CLOCK_MONOTONIC, &e, &t);
    timer_settime(t, 0, &(struct itimerspec){{0, 0}, {0, 1000000}}, 0);
    wait_for(1);
    timer_delete(t);
    return 0;
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    sem_init(&sem, 0, 0);
    timer_t t;
    struct sigevent e = {.sigev_notify = SIGEV_THREAD, .sigev_notify_function = in_thread, .sigev_value.sival_int = 11};
    printf("timer %d\n", timer_create(CLOCK_MONOTONIC, &e, &t));
    timer_settime(t, 0, &(struct itimerspec){{0, 0}, {0, 1000000}}, 0);
    while (sem_wait(&sem));
    printf("thread notified %d\n", value);
    timer_delete(t);

    on(SIGRTMIN + 1, 0);
    e = (struct sigevent){.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 22};
    timer_create(CLOCK_REALTIME, &e, &t);
    timer_settime(t, 0, &(struct itimerspec){{0, 1000000}, {0, 1000000}}, 0);
    wait_for(3);
    timer_delete(t);
    printf("timer signal %d code %d value %d\n", count >= 3, code, value);

    on(SIGRTMIN + 3, 0);
    pthread_t th;
    pthread_create(&th, 0, timed, 0);
    pthread_join(th, 0);
    printf("timer for a thread: %d value %d there %d\n", count, value, by == tid);

    int s[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, s)) return 1;
    on(SIGRTMIN + 2, 0);
    fcntl(s[0], F_SETOWN, getpid());
    fcntl(s[0], F_SETSIG, SIGRTMIN + 2);
    fcntl(s[0], F_SETFL, O_ASYNC | O_NONBLOCK);
    if (write(s[1], "x", 1) != 1) return 1;
    wait_for(1);
    printf("SIGIO %d code %d fd %d\n", count > 0, code, fd == s[0]);

    on(SIGCHLD, SA_RESTART);
    pid_t p = fork();
    if (!p) _exit(6);
    wait_for(1);
    printf("SIGCHLD code %d status %d pid %d\n", code, status, pid == p);
    waitpid(p, 0, 0);
    on(SIGCHLD, SA_NOCLDWAIT);
    p = fork();
    if (!p) _exit(6);
    int r = waitpid(p, 0, 0);
    printf("no zombie: %d %s\n", r, strerror(errno));
    signal(SIGCHLD, SIG_DFL);

    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, 0);
    int sfd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC), ep = epoll_create1(0);
    struct epoll_event ev = {EPOLLIN, {0}};
    epoll_ctl(ep, EPOLL_CTL_ADD, sfd, &ev);
    p = fork();
    if (!p) {
        kill(getppid(), SIGUSR1);
        usleep(10000);
        _exit(9);
    }
    for (int seen = 0; seen < 2;) {
        if (epoll_wait(ep, &ev, 1, 3000) != 1) break;
        struct signalfd_siginfo i;
        while (read(sfd, &i, sizeof i) == sizeof i) {
            printf("signalfd %u code %d status %d from the child %d\n", i.ssi_signo, i.ssi_code, i.ssi_status, (pid_t)i.ssi_pid == p);
            seen++;
        }
    }
    waitpid(p, 0, 0);
    sigprocmask(SIG_UNBLOCK, &set, 0);

    on(SIGVTALRM, 0);
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){{0, 0}, {0, 5000}}, 0);
    while (!count);
    printf("virtual timer code %d\n", code);

    p = fork();
    if (!p) {
        setrlimit(RLIMIT_CPU, &(struct rlimit){1, 2});
        signal(SIGXCPU, SIG_DFL);
        for (;;);
    }
    waitpid(p, (int *)&status, 0);
    printf("out of time: %d\n", WTERMSIG(status));
    p = fork();
    if (!p) {
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){10, 10});
        int f = open("/tmp", O_TMPFILE | O_RDWR, 0600);
        for (;;)
            if (write(f, "0123456789", 10) < 0) _exit(1);
    }
    waitpid(p, (int *)&status, 0);
    printf("file too large: %d\n", WTERMSIG(status));

    // The parent's death is told.
    int q[2];
    if (pipe(q)) return 1;
    p = fork();
    if (!p) {
        if (!fork()) {
            on(SIGUSR2, 0);
            prctl(PR_SET_PDEATHSIG, SIGUSR2);
            if (write(q[1], "r", 1) != 1) _exit(1);
            wait_for(1);
            _exit(write(q[1], count ? "d" : "n", 1) != 1);
        }
        char c;
        _exit(read(q[0], &c, 1) != 1);
    }
    waitpid(p, 0, 0);
    close(q[1]);
    char c = '?';
    if (read(q[0], &c, 1) < 0) perror("read");
    printf("parent death: %c\n", c);
    return 0;
}
