/* Code that is written again and again, by others and by itself: each way of being changed, often enough that no engine goes on
   protecting the page. */
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static unsigned char *page;
static uint64_t sum;

typedef uint64_t (*function)(uint64_t, uint64_t);

static void note(const char *what) {
    printf("%s %llx\n", what, (unsigned long long)sum);
    sum = 0;
}

static void mix(uint64_t v) { sum = sum * 0x9e3779b97f4a7c15 + v; }

static uint64_t call(unsigned char *at, uint64_t a, uint64_t b) { return ((function)at)(a, b); }

/* Every operation with a 32-bit immediate, and its flags. */
static void immediates(void) {
    for (int op = 0; op < 8; op++) {
        for (int form = 0; form < 3; form++) {
            unsigned char *p = page + 64;
            /* mov rax, rdi; mov r9, rdi; mov rcx, rdi; cmp rdi, rsi (sets CF) */
            static const unsigned char begin[] = {0x48, 0x89, 0xf8, 0x49, 0x89, 0xf9, 0x48, 0x89, 0xf9, 0x48, 0x39, 0xf7};
            memcpy(p, begin, sizeof begin);
            p += sizeof begin;
            if (form == 0) *p++ = 5 | op << 3;                                                /* op eax, imm */
            else if (form == 1) *p++ = 0x41, *p++ = 0x81, *p++ = 0xc1 | op << 3;               /* op r9d, imm */
            else *p++ = 0x81, *p++ = 0xc1 | op << 3;                                           /* op ecx, imm */
            unsigned char *immediate = p;
            p += 4;
            /* pushfq; add rax, r9; add rax, rcx; pop rdx; and edx, 0x8d5 (without AF's bit 4: logic leaves it undefined);
               shl rdx, 32; add rax, rdx; ret */
            static const unsigned char end[] = {0x9c, 0x4c, 0x01, 0xc8, 0x48, 0x01, 0xc8, 0x5a, 0x81, 0xe2, 0xc5, 0x08, 0, 0,
                                                0x48, 0xc1, 0xe2, 0x20, 0x48, 0x01, 0xd0, 0xc3};
            memcpy(p, end, sizeof end);
            for (uint32_t i = 0; i < 60; i++) {
                uint32_t v = i * 0x12345679u ^ (i & 1 ? 0x80000000u : 0);
                memcpy(immediate, &v, 4);
                mix(call(page + 64, 0x80000001u * i, 77u * i * i));
            }
        }
    }
    note("immediates");
}

static void constants(void) {
    unsigned char *p = page + 256;
    static const unsigned char code[] = {0x49, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0,      /* mov r11, imm64 */
                                         0xb9, 0, 0, 0, 0,                        /* mov ecx, imm32 */
                                         0xc7, 0xc2, 0, 0, 0, 0,                  /* mov edx, imm32, the long form */
                                         0x49, 0x8d, 0x04, 0x0b, 0x48, 0x01, 0xd0, 0xc3}; /* lea rax, [r11 + rcx]; add rax, rdx; ret */
    memcpy(p, code, sizeof code);
    for (uint64_t i = 0; i < 100; i++) {
        uint64_t v = i * 0xdeadbeefcafef00d;
        memcpy(p + 2, &v, 8);
        memcpy(p + 11, &v, 4);
        uint32_t w = v >> 32;
        memcpy(p + 17, &w, 4);
        mix(call(p, 0, 0));
    }
    note("constants");
}

/* Another function at the same place. */
static void shapes(void) {
    static const unsigned char code[3][8] = {
        {0x48, 0x8d, 0x04, 0x37, 0xc3},       /* lea rax, [rdi + rsi]; ret */
        {0x48, 0x89, 0xf8, 0x48, 0x29, 0xf0, 0xc3}, /* mov rax, rdi; sub rax, rsi; ret */
        {0x31, 0xc0, 0xff, 0xc8, 0xc3},       /* xor eax, eax; dec eax; ret */
    };
    for (int i = 0; i < 300; i++) {
        int k = i * 7 % 3;
        memcpy(page + 512, code[k], 7);
        mix(call(page + 512, i, i * 3));
    }
    /* Across a page end. */
    for (int i = 0; i < 300; i++) {
        int k = i * 5 % 3;
        memcpy(page + 4096 - 3, code[k], 7);
        mix(call(page + 4096 - 3, i, i * 3));
    }
    note("shapes");
}

/* A store into the instruction right after it, and one into the loop that it is in. */
static void itself(void) {
    unsigned char *p = page + 1024;
    /* mov [rip + 1], dil -> the immediate of: mov al, imm8; movzx eax, al; ret */
    static const unsigned char next[] = {0x40, 0x88, 0x3d, 1, 0, 0, 0, 0xb0, 0, 0x0f, 0xb6, 0xc0, 0xc3};
    memcpy(p, next, sizeof next);
    for (int i = 0; i < 200; i++) mix(call(p, i, 0));
    /* xor eax, eax; loop: add eax, imm32; add [rip - 8 (the immediate)], edi ; dec esi; jnz loop; ret */
    unsigned char *q = page + 1100;
    static const unsigned char loop[] = {0x31, 0xc0, 0x05, 1, 0, 0, 0, 0x01, 0x3d, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xce, 0x75, 0xf1, 0xc3};
    memcpy(q, loop, sizeof loop);
    for (int i = 0; i < 50; i++) mix(call(q, i, 20));
    /* A string operation over the code behind it: mov rdx, rdi; lea rdi, [rip + 5]; mov eax, edx; mov ecx, 3; rep stosb; 3 bytes; mov eax, edx; ret */
    unsigned char *r = page + 1200;
    static const unsigned char string[] = {0x48, 0x89, 0xfa, 0x48, 0x8d, 0x3d, 9, 0, 0, 0, 0x89, 0xd0, 0xb9, 3, 0, 0, 0, 0xf3, 0xaa,
                                           0x90, 0x90, 0x90, 0x89, 0xd0, 0xc3};
    memcpy(r, string, sizeof string);
    for (int i = 0; i < 100; i++) mix(call(r, i & 1 ? 0x90 : 0xf8, 0)); /* NOPs or CLCs */
    note("itself");
}

/* The stack in the page with the code: PUSH and CALL write there too. */
static void stack(void) {
    unsigned char *p = page + 2048;
    /* mov rax, rsp; lea rsp, [rip + after]; push rdi; push rsi; (8 bytes that the pushes write are executed as code below) */
    static const unsigned char code[] = {0x48, 0x89, 0xe0,                   /* mov rax, rsp */
                                         0x48, 0x8d, 0x25, 9, 0, 0, 0,       /* lea rsp, [rip + 9]: the byte after the eight */
                                         0x57,                               /* push rdi: written over the eight bytes that follow */
                                         0, 0, 0, 0, 0, 0, 0, 0,
                                         0x48, 0x89, 0xc4, 0x4c, 0x89, 0xc8, 0xc3}; /* mov rsp, rax; mov rax, r9; ret */
    memcpy(p, code, sizeof code);
    for (uint64_t i = 0; i < 200; i++) {
        uint64_t instructions = 0x9090000000b94190 & ~0xffffffff000000ull; /* nop; mov r9d, imm32; nop; nop */
        instructions |= (i * 3 & 0xff) << 24 | (i * 5 & 0xff) << 32 | 0x40ull << 40;
        mix(call(p, instructions, 0));
    }
    note("stack");
}

static sigjmp_buf back;
static volatile uint64_t where;
static void stopped(int sig, siginfo_t *info, void *context) {
    (void)context;
    where = (uint64_t)info->si_addr - (uint64_t)page;
    siglongjmp(back, sig);
}

/* Code that becomes invalid, is unmapped or loses its rights while it is written often. */
static void lost(void) {
    struct sigaction action = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, 0);
    sigaction(SIGSEGV, &action, 0);
    unsigned char *p = page + 3000;
    for (int i = 0; i < 150; i++) {
        static const unsigned char code[] = {0xb8, 0, 0, 0, 0, 0xc3};
        memcpy(p, code, sizeof code);
        p[1] = i;
        if (i % 10 == 9) p[0] = 0x0f, p[1] = 0x0b; /* ud2 */
        if (i % 25 == 24) mprotect(page, 4096, PROT_READ | PROT_WRITE);
        int sig = sigsetjmp(back, 1);
        if (!sig) mix(call(p, 0, 0));
        else mix(sig * 1000000 + where);
        mprotect(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    }
    note("lost");
}

int main(void) {
    page = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return 1;
    immediates();
    constants();
    shapes();
    itself();
    stack();
    lost();
    /* Once more, with all of it known as written often. */
    immediates();
    constants();
    shapes();
    itself();
    stack();
    return 0;
}
