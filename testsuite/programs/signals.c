// Handlers, masks, queues, faults: what signal(7) and sigaction(2) promise. Prints the same on every machine.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static char line[4096];
static void note(const char *format, int a, int b) {
    size_t n = strlen(line);
    snprintf(line + n, sizeof line - n, format, a, b);
}
// What a call gives, and errno after it.
#define TELL(call)                                                                                                     \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        int result = call;                                                                                             \
        note(" %d(%d)", result, errno);                                                                                \
    } while (0)
static void flush(const char *what) {
    printf("%s:%s\n", what, line);
    line[0] = 0;
}
static void on(int sig, void (*f)(int, siginfo_t *, void *), int flags) {
    struct sigaction a = {.sa_sigaction = f, .sa_flags = SA_SIGINFO | flags};
    sigemptyset(&a.sa_mask);
    if (sigaction(sig, &a, 0)) perror("sigaction");
}
static sigset_t set_of(int a, int b) {
    sigset_t s;
    sigemptyset(&s);
    if (a) sigaddset(&s, a);
    if (b) sigaddset(&s, b);
    return s;
}

static void plain(int sig, siginfo_t *i, void *u) { note(" %d/%d", sig - (sig >= 34 ? 34 : 0), i->si_code); }
static void valued(int sig, siginfo_t *i, void *u) {
    note(" %d=%d", sig >= 34 ? sig - 34 : sig, i->si_value.sival_int);
    if (i->si_pid != getpid()) note(" pid?%d%d", 0, 0);
}
static int depth;
static void nest(int sig, siginfo_t *i, void *u) {
    depth++;
    note(" <%d@%d", sig, depth);
    if (sig == SIGUSR1 && depth < 4) raise(depth == 1 ? SIGUSR2 : SIGUSR1);
    note(" %d@%d>", sig, depth);
    depth--;
}

static void basics(void) {
    on(SIGUSR1, plain, 0);
    on(SIGUSR2, plain, 0);
    raise(SIGUSR1);
    kill(getpid(), SIGUSR2);
    flush("raise and kill");

    sigset_t s = set_of(SIGUSR1, SIGUSR2), old, p;
    sigprocmask(SIG_BLOCK, &s, &old);
    raise(SIGUSR2);
    raise(SIGUSR1);
    raise(SIGUSR1);
    sigpending(&p);
    note(" pending %d%d", sigismember(&p, SIGUSR1), sigismember(&p, SIGUSR2));
    sigprocmask(SIG_SETMASK, &old, 0);
    flush("blocked, then all at once");

    on(SIGRTMIN + 1, valued, 0);
    on(SIGRTMIN, valued, 0);
    s = set_of(SIGRTMIN, SIGRTMIN + 1);
    sigprocmask(SIG_BLOCK, &s, 0);
    for (int i = 0; i < 4; i++) {
        sigqueue(getpid(), SIGRTMIN + 1, (union sigval){.sival_int = 10 + i});
        sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = 20 + i});
    }
    sigprocmask(SIG_UNBLOCK, &s, 0);
    flush("queued in order");

    on(SIGUSR1, nest, 0);
    on(SIGUSR2, nest, 0);
    raise(SIGUSR1);
    flush("nested");
    on(SIGUSR1, nest, SA_NODEFER);
    depth = 1;
    raise(SIGUSR1);
    depth = 0;
    flush("nodefer");

    on(SIGUSR1, plain, SA_RESETHAND);
    raise(SIGUSR1);
    struct sigaction now;
    sigaction(SIGUSR1, 0, &now);
    note(" default %d flags %x", now.sa_handler == SIG_DFL, now.sa_flags & ~0x04000000);
    flush("resethand");

    signal(SIGUSR1, SIG_IGN);
    raise(SIGUSR1);
    signal(SIGCHLD, SIG_DFL);
    raise(SIGCHLD);
    raise(SIGURG);
    flush("ignored");

    TELL(sigaction(SIGKILL, &now, 0));
    TELL(sigaction(65, &now, 0));
    TELL(kill(getpid(), 65));
    TELL(sigprocmask(77, &s, 0));
    flush("errors");
}

static void waiting(void) {
    sigset_t s = set_of(SIGUSR1, SIGRTMIN), old, p;
    on(SIGUSR1, plain, 0);
    sigprocmask(SIG_BLOCK, &s, &old);
    siginfo_t info;
    raise(SIGUSR1);
    sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = 5});
    TELL(sigwaitinfo(&s, &info));
    note(" code %d", info.si_code, 0);
    TELL(sigwaitinfo(&s, &info) - SIGRTMIN);
    note(" value %d", info.si_value.sival_int, 0);
    struct timespec zero = {0, 1000};
    TELL(sigtimedwait(&s, &info, &zero));
    flush("sigtimedwait");

    // Faults that are sent, too.
    sigset_t f = set_of(SIGTRAP, SIGSEGV);
    sigprocmask(SIG_BLOCK, &f, 0);
    raise(SIGTRAP);
    sigpending(&p);
    note(" pending %d%d", sigismember(&p, SIGTRAP), sigismember(&p, SIGSEGV));
    TELL(sigtimedwait(&f, &info, &zero));
    note(" code %d", info.si_code, 0);
    TELL(sigtimedwait(&f, &info, &zero));
    raise(SIGSEGV);
    on(SIGSEGV, plain, 0);
    sigprocmask(SIG_UNBLOCK, &f, 0);
    signal(SIGSEGV, SIG_DFL);
    flush("sent faults");

    pid_t child = fork();
    if (!child) {
        usleep(20000);
        kill(getppid(), SIGUSR1);
        _exit(0);
    }
    sigset_t none;
    sigemptyset(&none);
    TELL(sigsuspend(&none));
    sigprocmask(SIG_BLOCK, 0, &p);
    note(" blocked after %d", sigismember(&p, SIGUSR1), 0);
    waitpid(child, 0, 0);
    sigprocmask(SIG_SETMASK, &old, 0);
    flush("sigsuspend");
}

static char *page;
static sigjmp_buf back;
static void fault(int sig, siginfo_t *i, void *u) {
    // The kernel leaves AC as it was.
    __asm__ volatile("pushf; andl $~0x40000, (%%rsp); popf" ::: "memory", "cc");
    mcontext_t *m = &((ucontext_t *)u)->uc_mcontext;
    note(" %d/%d", sig, i->si_code);
    note(" trap %d err %x", (int)m->gregs[REG_TRAPNO], (int)m->gregs[REG_ERR]);
    uintptr_t a = (uintptr_t)i->si_addr;
    if (a == (uintptr_t)m->gregs[REG_RIP]) note(" addr rip%d%d", 0, 0);
    else if (a >= (uintptr_t)page && a < (uintptr_t)page + 0x10000) note(" addr page+%x", (int)(a - (uintptr_t)page), 0);
    else note(" addr %x", (int)a, 0);
    siglongjmp(back, 1);
}
#define FAULT(what, code)                                                                                              \
    do {                                                                                                               \
        if (!sigsetjmp(back, 1)) {                                                                                     \
            code;                                                                                                      \
            note(" none%d%d", 0, 0);                                                                                   \
        }                                                                                                              \
        flush(what);                                                                                                   \
    } while (0)

static void faults(void) {
    for (int *s = (int[]){SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, 0}; *s; s++) on(*s, fault, 0);
    page = mmap(0, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(page, 1, 0x10000);
    mprotect(page + 0x1000, 0x1000, PROT_READ);
    mprotect(page + 0x2000, 0x1000, PROT_NONE);
    munmap(page + 0x3000, 0x1000);
    FAULT("load from 16", *(volatile int *)16);
    FAULT("store to 24", *(volatile int *)24 = 1);
    FAULT("store to read-only", page[0x1010] = 2);
    FAULT("load from none", *(volatile char *)(page + 0x2020));
    FAULT("load from hole", *(volatile char *)(page + 0x3030));
    FAULT("jump to data", ((void (*)(void))(page + 0x40))());
    FAULT("jump to 0", ((void (*)(void))0)());
    FAULT("not canonical", *(volatile char *)0x8000000000000000);
    FAULT("divide", __asm__ volatile("xor %%ecx, %%ecx; mov $1, %%eax; cltd; idiv %%ecx" ::: "rax", "rcx", "rdx"));
    FAULT("overflow of divide", __asm__ volatile("mov $-1, %%rcx; mov $0x8000000000000000, %%rax; cqto; idiv %%rcx" ::: "rax", "rcx", "rdx"));
    FAULT("ud2", __asm__ volatile("ud2"));
    FAULT("hlt", __asm__ volatile("hlt"));
    FAULT("int 0x81", __asm__ volatile("int $0x81"));
    FAULT("int3", __asm__ volatile("int3"));
    FAULT("single step", __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; nop; nop" ::: "memory", "cc"));
    FAULT("alignment", __asm__ volatile("pushf; orl $0x40000, (%%rsp); popf; mov %%rsp, %%rax; mov 1(%%rax), %%eax" ::: "rax", "memory", "cc"));
    FAULT("x87 divide by 0", __asm__ volatile("fninit; pushq $0x37b; fldcw (%%rsp); pop %%rax; fld1; fldz; fdivrp; fwait" ::: "rax", "memory"));
    __asm__ volatile("fninit");
    FAULT("SSE divide by 0", __asm__ volatile("pushq $0x1d80; ldmxcsr (%%rsp); pop %%rax; xorps %%xmm1, %%xmm1; mov $0x3f800000, %%eax; movd %%eax, %%xmm0; divss %%xmm1, %%xmm0" ::: "rax", "xmm0", "xmm1", "memory"));
    int fd = memfd_create("short", 0);
    if (ftruncate(fd, 100)) perror("ftruncate");
    page = mmap(0, 0x2000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    FAULT("past the end of the file", *(volatile char *)(page + 0x1000));
    for (int *s = (int[]){SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, 0}; *s; s++) signal(*s, SIG_DFL);
}

static void skip(int sig, siginfo_t *i, void *u) {
    mcontext_t *m = &((ucontext_t *)u)->uc_mcontext;
    m->gregs[REG_RIP] += 2;
    m->gregs[REG_RAX] = 1234;
    unsigned fcw, mx = m->fpregs->mxcsr;
    memcpy(&fcw, m->fpregs, 2);
    note(" mxcsr %x sw %x", mx, m->fpregs->__glibc_reserved1[12] == 0x46505853);
    m->fpregs->_xmm[3].element[0] = 77;
    unsigned now;
    __asm__ volatile("stmxcsr %0" : "=m"(now));
    unsigned long flags;
    __asm__ volatile("pushf; pop %0" : "=r"(flags));
    note(" handler mxcsr %x df %d", now, (int)(flags >> 10 & 1));
    uint32_t zero[4];
    __asm__ volatile("movdqu %%xmm5, %0" : "=m"(zero));
    note(" handler xmm5 %x", zero[0], 0);
}

static void context(void) {
    on(SIGILL, skip, 0);
    unsigned mx = 0x1fc0, after, x3, x5;
    long rax, df, red;
    __asm__ volatile("ldmxcsr %6\n"
                     "movq $0x5a5a, -120(%%rsp)\n"
                     "mov $55, %%eax\n movd %%eax, %%xmm5\n movd %%eax, %%xmm3\n"
                     "std\n ud2\n"
                     "pushf\n pop %2\n cld\n"
                     "stmxcsr %1\n movd %%xmm3, %3\n movd %%xmm5, %4\n"
                     "mov %%rax, %0\n"
                     : "=&r"(rax), "=m"(after), "=&r"(df), "=&r"(x3), "=&r"(x5), "=&r"(red)
                     : "m"(mx)
                     : "rax", "xmm3", "xmm5", "memory", "cc");
    mx = 0x1f80;
    __asm__ volatile("ldmxcsr %0" ::"m"(mx));
    printf("changed context: rax %ld mxcsr %x df %ld xmm3 %u xmm5 %u\n", rax, after, df >> 10 & 1, x3, x5);
    flush("seen");
    signal(SIGILL, SIG_DFL);
}

// Every register but RSP survives a handler at any instruction.
static volatile sig_atomic_t ticks;
static void tick(int sig) {
    ticks++;
    __asm__ volatile("mov $-1, %%rax; mov %%rax, %%r8; mov %%rax, %%r9; movq %%rax, %%xmm0; movq %%rax, %%xmm15; fldpi; fstp %%st(0); cmp %%rax, %%rax" ::: "rax", "r8", "r9", "xmm0", "xmm15", "cc");
}
static void storm(void) {
    signal(SIGALRM, tick);
    timer_t t;
    struct sigevent e = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    timer_create(CLOCK_MONOTONIC, &e, &t);
    struct itimerspec every = {{0, 1000000}, {0, 1000000}};
    timer_settime(t, 0, &every, 0);
    uint64_t h = 1;
    double d = 0.5;
    long n = 0;
    while (ticks < 30) {
        for (int i = 0; i < 100; i++) {
            h = h * 6364136223846793005ull + 1442695040888963407ull;
            d = d * 3.9 * (1 - d);
        }
        n++;
    }
    timer_delete(t);
    uint64_t h2 = 1;
    double d2 = 0.5;
    for (long k = 0; k < n * 100; k++) {
        h2 = h2 * 6364136223846793005ull + 1442695040888963407ull;
        d2 = d2 * 3.9 * (1 - d2);
    }
    printf("storm: same %d %d\n", h == h2, d == d2);
    signal(SIGALRM, SIG_DFL);
}

static int died(void (*f)(void)) {
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        f();
        _exit(77);
    }
    int status;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}
static void die_abort(void) { abort(); }
static void __attribute__((noinline)) die_segv(void) { *(volatile int *)16 = 0; }
static void die_term(void) { raise(SIGTERM); }
static void die_kill(void) { kill(getpid(), SIGKILL); }
static void die_blocked(void) {
    sigset_t s = set_of(SIGSEGV, 0);
    on(SIGSEGV, plain, 0);
    sigprocmask(SIG_BLOCK, &s, 0);
    die_segv();
}
static void die_ignored(void) {
    signal(SIGSEGV, SIG_IGN);
    die_segv();
}
static void die_sent(void) { raise(SIGTRAP); }
static void die_frame(void) {
    on(SIGUSR1, plain, 0);
    __asm__ volatile("mov $0x1000, %%rsp; mov $39, %%eax; syscall; mov %%eax, %%edi; mov $10, %%esi; mov $62, %%eax; syscall; ud2" ::: "memory");
}
static void die_return(void) { __asm__ volatile("mov $0x1000, %%rsp; mov $15, %%eax; syscall; ud2" ::: "memory"); }
static void die_pipe(void) {
    int p[2];
    if (pipe(p)) return;
    close(p[0]);
    if (write(p[1], "x", 1) < 0) perror("write");
}
static void die_handler(void) {
    on(SIGSEGV, (void (*)(int, siginfo_t *, void *))die_segv, 0);
    die_segv();
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    basics();
    waiting();
    faults();
    context();
    storm();
    struct { const char *name; void (*f)(void); } deaths[] = {
        {"abort", die_abort}, {"segv", die_segv}, {"term", die_term}, {"kill", die_kill}, {"blocked fault", die_blocked},
        {"ignored fault", die_ignored}, {"sent trap", die_sent}, {"no stack for the frame", die_frame}, {"bad frame", die_return},
        {"pipe", die_pipe}, {"fault in its handler", die_handler},
    };
    for (unsigned i = 0; i < sizeof deaths / sizeof *deaths; i++) printf("death by %s: %d\n", deaths[i].name, died(deaths[i].f));
    return 0;
}
