/* System calls under fire: a signal finds the registers as they are before SYSCALL or after it, wherever it comes; memory that was code
 * can be read into; what cannot be written costs no data. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static volatile long handled, wrong, at_call, behind_call;
static long parent;
extern char before[], behind[];

static void on_signal(int sig, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)sig, (void)info;
    if (r[REG_RIP] == (greg_t)before) {
        at_call++;
        /* Not begun, or to be made again (SYSCALL has RIP in RCX and RFLAGS in R11). */
        int fresh = r[REG_RCX] == 0x1111 && r[REG_R11] == 0x2222;
        int again = r[REG_RCX] == (greg_t)behind && (r[REG_R11] & 0x8d5) == (r[REG_EFL] & 0x8d5);
        wrong += r[REG_RAX] != SYS_getppid || !(fresh || again);
    }
    if (r[REG_RIP] == (greg_t)behind) {
        behind_call++;
        wrong += r[REG_RAX] != parent || r[REG_RCX] != (greg_t)behind || (r[REG_R11] & 0x8d5) != (r[REG_EFL] & 0x8d5);
    }
    wrong += r[REG_RDI] != 0x3333 && r[REG_RIP] >= (greg_t)before && r[REG_RIP] <= (greg_t)behind;
    handled++;
}

static void *fire(void *target) {
    for (long i = 0; i < 3000; i++) {
        pthread_kill(*(pthread_t *)target, SIGUSR1);
        while (handled <= i) sched_yield();
    }
    return 0;
}

static void storm(void) {
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
    pthread_t self = pthread_self(), thread;
    parent = getppid();
    sigaction(SIGUSR1, &action, 0);
    pthread_create(&thread, 0, fire, &self);
    long bad = 0;
    while (handled < 3000) {
        long result, rcx, r11, flags;
        __asm__ volatile(
            "mov $110, %%eax\n mov $0x1111, %%ecx\n mov $0x2222, %%r11d\n mov $0x3333, %%edi\n"
            "cmp $110, %%eax\n stc\n"
            ".globl before, behind\n before: syscall\n behind:\n"
            "lea -128(%%rsp), %%rsp\n pushfq\n pop %%rdx\n lea 128(%%rsp), %%rsp\n mov %%r11, %%rsi"
            : "=a"(result), "=c"(rcx), "=S"(r11), "=d"(flags)
            :
            : "rdi", "r11", "memory", "cc");
        bad += result != parent || rcx != (long)behind || (r11 & 0x8d5) != 0x45 || (flags & 0x8d5) != 0x45;
    }
    pthread_join(thread, 0);
    printf("%ld signals, %ld wrong in handlers, %ld wrong behind calls\n", handled, wrong, bad);
}

/* mov eax, N; ret */
static unsigned char code[] = {0xb8, 1, 0, 0, 0, 0xc3};

static void into_code(void) {
    unsigned char *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int ends[2];
    memcpy(page, code, sizeof code);
    if (pipe(ends)) return;
    for (int i = 1; i <= 5; i++) {
        int result = ((int (*)(void))page)();
        code[1] = i + 1;
        ssize_t out = write(ends[1], code, sizeof code);
        errno = 0;
        ssize_t bad = read(ends[0], (void *)16, sizeof code);
        int why = errno;
        ssize_t in = read(ends[0], page, sizeof code);
        printf("%d: out %zd, nowhere %zd %s, in %zd\n", result, out, bad, strerror(why), in);
    }
}

int main(void) {
    storm();
    into_code();
    printf("%ld %ld\n", syscall(0x10000 + SYS_getppid), syscall(511));
    return 0;
}
