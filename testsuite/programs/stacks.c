// Alternate signal stacks, jumps out of handlers, frames: sigaltstack(2), sigsetjmp(3), getcontext(3).
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>
#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1u << 31)
#endif

static char alt[65536] __attribute__((aligned(16))), other[16384];
static const char *where(const void *p) {
    uintptr_t a = (uintptr_t)p;
    return a >= (uintptr_t)alt && a < (uintptr_t)alt + sizeof alt ? "alternate" : "normal";
}
static void show(const char *what) {
    stack_t s;
    sigaltstack(0, &s);
    printf("%s: %s size %zu flags %x\n", what, s.ss_sp == alt ? "alt" : s.ss_sp == other ? "other" : s.ss_sp ? "?" : "none", s.ss_size, s.ss_flags);
}
static void handler(int sig, siginfo_t *i, void *v) {
    ucontext_t *u = v;
    char here;
    printf("  handler %d on %s, aligned %d\n", sig, where(&here), ((uintptr_t)__builtin_frame_address(0) & 15) == 0);
    printf("  frame: flags %lx link %d stack size %zu flags %x\n", u->uc_flags, u->uc_link != 0, u->uc_stack.ss_size, u->uc_stack.ss_flags & ~2);
    show("  inside");
    stack_t s = {.ss_sp = other, .ss_size = sizeof other};
    int r = sigaltstack(&s, 0);
    printf("  change inside: %d %s\n", r, r ? strerror(errno) : "");
    if (sig == SIGUSR1) raise(SIGUSR2);
}
static void on(int sig, int flags) {
    struct sigaction a = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigaction(sig, &a, 0);
}
static void set(void *sp, size_t size, int flags) {
    stack_t s = {.ss_sp = sp, .ss_size = size, .ss_flags = flags};
    int r = sigaltstack(&s, 0);
    if (r) printf("sigaltstack: %s\n", strerror(errno));
}

static sigjmp_buf env;
static int deep;
static long overflow(long n) {
    volatile char big[4096];
    big[n & 4095] = n;
    deep++;
    return overflow(n + 1) + big[(n + 1) & 4095];
}
static void escape(int sig, siginfo_t *i, void *v) {
    char here;
    printf("  fault on %s\n", where(&here));
    siglongjmp(env, sig);
}
static void *in_thread(void *p) {
    show("thread");
    on(SIGUSR1, SA_ONSTACK);
    raise(SIGUSR2);
    return 0;
}
static jmp_buf plain;
static void jump_plain(int sig) { longjmp(plain, 3); }

static ucontext_t main_context, side_context;
static int steps;
static void side(void) {
    for (int i = 0; i < 3; i++) {
        steps = steps * 10 + i + 1;
        swapcontext(&side_context, &main_context);
    }
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    show("start");
    set(alt, 100, 0);
    set(alt, sizeof alt, 77);
    set(alt, sizeof alt, 0);
    show("set");
    on(SIGUSR1, SA_ONSTACK);
    on(SIGUSR2, SA_ONSTACK);
    raise(SIGUSR1);
    printf("without SA_ONSTACK\n");
    on(SIGUSR2, 0);
    raise(SIGUSR2);
    printf("with SS_AUTODISARM\n");
    set(alt, sizeof alt, SS_AUTODISARM);
    show("set");
    on(SIGUSR2, SA_ONSTACK);
    raise(SIGUSR2);
    show("after");
    set(0, 0, SS_DISABLE);
    show("disabled");
    raise(SIGUSR2);

    set(alt, sizeof alt, 0);
    pthread_t t;
    pthread_create(&t, 0, in_thread, 0);
    pthread_join(t, 0);
    show("main still");

    struct sigaction a = {.sa_sigaction = escape, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGSEGV, &a, 0);
    for (int i = 0; i < 3; i++) {
        deep = 0;
        int r = sigsetjmp(env, 1);
        if (!r) overflow(0);
        printf("stack overflow: %d deep %d\n", r, deep > 1000);
        show("after the jump");
    }

    // Nothing lies right below the stack: an overflow finds no memory of others.
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    unsigned long end = 0, from, to, gap = 0;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx", &from, &to) == 2 && strstr(line, "[stack]")) gap = from - end;
        end = to;
    }
    fclose(maps);
    printf("gap below the stack: %d\n", gap >= 256 * 4096);

    // longjmp does not restore the mask, siglongjmp does if asked.
    signal(SIGUSR1, jump_plain);
    int r = setjmp(plain);
    if (!r) raise(SIGUSR1);
    sigset_t s;
    sigprocmask(SIG_BLOCK, 0, &s);
    printf("longjmp: %d blocked %d\n", r, sigismember(&s, SIGUSR1));
    sigemptyset(&s);
    sigprocmask(SIG_SETMASK, &s, 0);

    static char stack[32768];
    getcontext(&side_context);
    side_context.uc_stack.ss_sp = stack;
    side_context.uc_stack.ss_size = sizeof stack;
    side_context.uc_link = &main_context;
    makecontext(&side_context, side, 0);
    for (int i = 0; i < 3; i++) swapcontext(&main_context, &side_context);
    printf("contexts: %d\n", steps);

    // An alternate stack too small for the frame.
    fflush(stdout);
    pid_t p = fork();
    if (!p) {
        static char small[2048];
        set(small, sizeof small, 0);
        on(SIGUSR1, SA_ONSTACK);
        raise(SIGUSR1);
        _exit(1);
    }
    int status;
    waitpid(p, &status, 0);
    printf("too small: %d\n", WTERMSIG(status));
    return 0;
}
