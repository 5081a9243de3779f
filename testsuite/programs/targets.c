/* Branches to what is no address of user code, however near to one: where the fault is, and what the branch has done before. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

static sigjmp_buf back;
static uint64_t stack[64], target, branch_at;
static int sign, code;
static greg_t regs[NGREG];
static void *address;

static void caught(int s, siginfo_t *info, void *context) {
    sign = s;
    code = info->si_code;
    address = info->si_addr;
    memcpy(regs, ((ucontext_t *)context)->uc_mcontext.gregs, sizeof regs);
    siglongjmp(back, 1);
}

/* Each runs with RSP in `stack`, the target on top of it, in RAX, in R11 and in memory at RDX. */
static const struct { const char *name; unsigned char bytes[8]; int length; } branches[] = {
    {"ret", {0xc3}, 1},
    {"ret 16", {0xc2, 16, 0}, 3},
    {"jmp rax", {0xff, 0xe0}, 2},
    {"call rax", {0xff, 0xd0}, 2},
    {"jmp r11", {0x41, 0xff, 0xe3}, 3},
    {"call r11", {0x41, 0xff, 0xd3}, 3},
    {"jmp [rdx]", {0xff, 0x22}, 2},
    {"call [rdx]", {0xff, 0x12}, 2},
    {"call [rsp]", {0xff, 0x14, 0x24}, 3},
};

static void attempt(int kind, unsigned char *at, uint64_t to) {
    memcpy(at, branches[kind].bytes, branches[kind].length);
    memset(stack, 0x5a, sizeof stack);
    stack[32] = target = to;
    branch_at = (uint64_t)at;
    sign = 0;
    if (!sigsetjmp(back, 1))
        __asm__ volatile("mov %0, %%rdi\n mov %1, %%rsp\n mov %2, %%rax\n mov %2, %%r11\n mov %3, %%rdx\n"
                         "mov $0x1234, %%ecx\n cmp $7, %%ecx\n jmp *%%rdi"
                         : : "r"(branch_at), "r"(stack + 32), "r"(to), "r"(&target) : "memory");
    uint64_t rip = regs[REG_RIP], below = stack[31];
    const char *where = rip == branch_at ? "the branch" : rip == to ? "the target" : "elsewhere";
    const char *pushed = below == 0x5a5a5a5a5a5a5a5a ? "nothing" : below == branch_at + branches[kind].length ? "next" : "?";
    printf("%s to %d,%d: signal %d, code %d, trap %lld, error %llx, address %s, at %s, rsp %+lld, pushed %s, %d%d%d, flags %llx\n",
        branches[kind].name, (int)(to >> 47 & 0x1ffff), (int)(to - branch_at & 0xfff), sign, code, (long long)regs[REG_TRAPNO],
        (unsigned long long)regs[REG_ERR], (uint64_t)address == to ? "target" : address ? "other" : "0", where,
        (long long)(regs[REG_RSP] - (greg_t)(stack + 32)), pushed, regs[REG_RAX] == (greg_t)to, regs[REG_R11] == (greg_t)to,
        regs[REG_RCX] == 0x1234, (unsigned long long)regs[REG_EFL] & 0x8d5);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    static char other[65536];
    stack_t alternate = {.ss_sp = other, .ss_size = sizeof other};
    sigaltstack(&alternate, NULL);
    struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    unsigned char *page = mmap(NULL, 4096, 7, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int kinds = sizeof branches / sizeof *branches;
    for (int kind = 0; kind < kinds; kind++) {
        unsigned char *at = page + 64 * kind;
        /* Code that exists, with each of the bits above user space set, and some more. */
        for (int bit = 47; bit < 64; bit++)
            attempt(kind, at, (uint64_t)at | 1ull << bit);
        for (int bits = 1; bits < 1 << 17; bits = bits * 3 + 1)
            attempt(kind, at, (uint64_t)at | (uint64_t)bits << 47);
        attempt(kind, at, 0x8000000000000000);
        attempt(kind, at, ~0ull);
        attempt(kind, at, 0x1000);
    }
    return 0;
}
