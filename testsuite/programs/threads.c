// Threads: creation, joining, thread-local storage, locks, signals to threads, cancellation, exit of the first thread.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t c = PTHREAD_COND_INITIALIZER;
static __thread long mine = 5;
static long total;
static pthread_key_t key;
static int destroyed;
static void destroy(void *p) { __atomic_add_fetch(&destroyed, 1, __ATOMIC_SEQ_CST); }

static void *worker(void *arg) {
    long n = (long)arg;
    pthread_setspecific(key, arg);
    for (int i = 0; i < 500; i++) {
        pthread_mutex_lock(&m);
        total += n;
        pthread_mutex_unlock(&m);
        mine++;
        if (i % 100 == 0) sched_yield();
    }
    return (void *)(mine + n);
}

static int turn;
static void *ping(void *arg) {
    long me = (long)arg;
    for (int i = 0; i < 200; i++) {
        pthread_mutex_lock(&m);
        while (turn != me) pthread_cond_wait(&c, &m);
        turn = !me;
        pthread_cond_broadcast(&c);
        pthread_mutex_unlock(&m);
    }
    return 0;
}

static volatile int got_by, ready;
static __thread int who;
static void handler(int sig) { got_by = who * 100 + sig; }
static void *sleeper(void *arg) {
    who = (long)arg;
    __atomic_add_fetch(&ready, 1, __ATOMIC_SEQ_CST);
    struct timespec t = {20, 0};
    int r = nanosleep(&t, 0);
    return (void *)(long)(r < 0 && errno == EINTR ? 1 : 2);
}
static void *blocked(void *arg) {
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR2);
    int sig;
    __atomic_add_fetch(&ready, 1, __ATOMIC_SEQ_CST);
    sigwait(&s, &sig);
    return (void *)(long)sig;
}
static int cleaned;
static void cleanup(void *p) { cleaned++; }
static void *canceled(void *arg) {
    pthread_cleanup_push(cleanup, 0);
    __atomic_add_fetch(&ready, 1, __ATOMIC_SEQ_CST);
    if (arg) {
        pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, 0);
        for (;;) __asm__ volatile("pause");
    }
    for (;;) sleep(100);
    pthread_cleanup_pop(0);
}
static void *outlive(void *arg) {
    pthread_join(*(pthread_t *)arg, 0);
    usleep(20000);
    printf("the first thread is gone, tid is pid: %d\n", syscall(SYS_gettid) == getpid());
    fflush(stdout);
    return 0;
}
static void *nothing(void *arg) { return arg; }
static void *forker(void *arg) {
    pid_t p = fork();
    if (!p) _exit(syscall(SYS_gettid) == getpid() ? 11 : 12);
    int s;
    waitpid(p, &s, 0);
    return (void *)(long)WEXITSTATUS(s);
}
static volatile int stop;
static void *churn(void *arg) {
    while (!stop) free(malloc(100 + rand() % 5000));
    return 0;
}
static void *locker(void *arg) {
    pthread_mutex_lock(arg);
    return 0;
}

int main(void) {
    pthread_t t[8];
    void *r;
    pthread_key_create(&key, destroy);
    for (long i = 0; i < 8; i++) pthread_create(t + i, 0, worker, (void *)(i + 1));
    long sum = 0;
    for (int i = 0; i < 8; i++) {
        pthread_join(t[i], &r);
        sum += (long)r;
    }
    printf("workers: %ld %ld mine %ld destroyed %d\n", total, sum, mine, destroyed);

    for (long i = 0; i < 2; i++) pthread_create(t + i, 0, ping, (void *)i);
    for (int i = 0; i < 2; i++) pthread_join(t[i], 0);
    printf("ping pong: %d\n", turn);

    for (int i = 0; i < 200; i++) {
        pthread_create(t, 0, nothing, (void *)(long)i);
        pthread_join(*t, &r);
        if ((long)r != i) printf("wrong result\n");
    }
    pthread_attr_t a;
    pthread_attr_init(&a);
    pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
    for (int i = 0; i < 20; i++) pthread_create(t, &a, nothing, 0);
    printf("many\n");

    struct sigaction act = {.sa_handler = handler};
    sigaction(SIGUSR1, &act, 0);
    for (long i = 0; i < 3; i++) pthread_create(t + i, 0, sleeper, (void *)(i + 1));
    while (ready < 3) usleep(1000);
    usleep(20000);
    for (int i = 2; i >= 0; i--) {
        pthread_kill(t[i], SIGUSR1);
        pthread_join(t[i], &r);
        printf("thread got %d, sleep %ld\n", got_by, (long)r);
    }

    sigset_t s, old;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &s, &old);
    ready = 0;
    pthread_create(t, 0, blocked, 0);
    while (ready < 1) usleep(1000);
    kill(getpid(), SIGUSR2);
    pthread_join(*t, &r);
    printf("sigwait in a thread: %ld\n", (long)r);
    pthread_sigmask(SIG_SETMASK, &old, 0);

    for (long i = 0; i < 2; i++) {
        ready = 0;
        pthread_create(t, 0, canceled, (void *)i);
        while (ready < 1) usleep(1000);
        usleep(5000);
        pthread_cancel(*t);
        pthread_join(*t, &r);
        printf("canceled %d, cleaned %d\n", r == PTHREAD_CANCELED, cleaned);
    }

    // All threads change their ids together: the C library signals each.
    ready = 0;
    pthread_create(t, 0, sleeper, (void *)7);
    while (ready < 1) usleep(1000);
    printf("setgid %d\n", setgid(getgid()));
    pthread_kill(*t, SIGUSR1);
    pthread_join(*t, &r);

    pthread_create(t, 0, forker, 0);
    pthread_join(*t, &r);
    printf("fork in a thread: %ld\n", (long)r);

    // A fork while another thread is in the allocator.
    pthread_create(t, 0, churn, 0);
    int good = 0;
    for (int i = 0; i < 20; i++) {
        pid_t p = fork();
        if (!p) {
            char *x = malloc(3000);
            memset(x, 1, 3000);
            free(x);
            _exit(4);
        }
        int st;
        waitpid(p, &st, 0);
        good += WIFEXITED(st) && WEXITSTATUS(st) == 4;
    }
    stop = 1;
    pthread_join(*t, 0);
    printf("forks beside a busy thread: %d\n", good);

    // The owner of a robust lock goes away.
    pthread_mutexattr_t ma;
    pthread_mutexattr_init(&ma);
    pthread_mutexattr_setrobust(&ma, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_t robust;
    pthread_mutex_init(&robust, &ma);
    pthread_create(t, 0, locker, &robust);
    pthread_join(*t, 0);
    printf("robust: %s\n", strerror(pthread_mutex_lock(&robust)));

    // exit_group while others run.
    fflush(stdout);
    pid_t p = fork();
    if (!p) {
        for (int i = 0; i < 4; i++) pthread_create(t + i, 0, churn, 0);
        stop = 0;
        usleep(5000);
        exit(23);
    }
    int st;
    waitpid(p, &st, 0);
    printf("exit beside busy threads: %d\n", WEXITSTATUS(st));

    static pthread_t self;
    self = pthread_self();
    pthread_create(t, 0, outlive, &self);
    pthread_exit(0);
}
