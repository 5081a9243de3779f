/* Jumps and calls through pointers in memory that cannot be written, as the linker makes them, and what may happen to that memory:
   rights taken back, another mapping over it, a target that is no code. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static unsigned char *code;
static uint64_t *pointers;
static uint64_t sum;

typedef uint64_t (*function)(uint64_t);

static uint64_t one(uint64_t v) { return v + 1; }
static uint64_t twice(uint64_t v) { return v * 2; }
static uint64_t square(uint64_t v) { return v * v; }
static const function functions[] = {one, twice, square};

static void note(const char *what) {
    printf("%s %llx\n", what, (unsigned long long)sum);
    sum = 0;
}

static void mix(uint64_t v) { sum = sum * 0x9e3779b97f4a7c15 + v; }

/* At code: jmp [rip + pointers]. At code + 64: sub rsp, 8; call [rip + pointers]; add rsp, 8; ret. */
static void emit(void) {
    int32_t d = (unsigned char *)pointers - (code + 6);
    memcpy(code, "\xff\x25", 2);
    memcpy(code + 2, &d, 4);
    memcpy(code + 64, "\x48\x83\xec\x08\xff\x15", 6);
    d = (unsigned char *)pointers - (code + 74);
    memcpy(code + 70, &d, 4);
    memcpy(code + 74, "\x48\x83\xc4\x08\xc3", 5);
}

static void both(int times) {
    for (int i = 0; i < times; i++) {
        mix(((function)code)(i));
        mix(((function)(code + 64))(i + 3));
    }
}

static sigjmp_buf back;
static uint64_t where;

static void stopped(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)info;
    ucontext_t *u = context;
    where = u->uc_mcontext.gregs[REG_RIP] - (uintptr_t)code;
    siglongjmp(back, 1);
}

/* Which address stops it: inside our code, or the target itself. */
static void broken(uint64_t target) {
    if (mprotect(pointers, 4096, PROT_READ | PROT_WRITE) == 0) {
        pointers[0] = target;
        mprotect(pointers, 4096, PROT_READ);
    }
    for (int way = 0; way < 128; way += 64) {
        if (sigsetjmp(back, 1) == 0)
            mix(((function)(code + way))(1));
        else
            mix(where < 4096 ? where : where + (uintptr_t)code == target ? 4097 : 4098);
    }
}

int main(void) {
    code = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (code == MAP_FAILED) return 1;
    pointers = (uint64_t *)(code + 2 * 4096);
    emit();
    mprotect(code, 4096, PROT_READ | PROT_EXEC);

    for (int i = 0; i < 60; i++) {
        mprotect(pointers, 4096, PROT_READ | PROT_WRITE);
        pointers[0] = (uintptr_t)functions[i * 7 % 3];
        /* While it can be written. */
        if (i % 4 == 1) both(2);
        mprotect(pointers, 4096, PROT_READ);
        both(5);
    }
    note("rights");

    for (int i = 0; i < 30; i++) {
        uint64_t *other = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        other[0] = (uintptr_t)functions[i % 3];
        mprotect(other, 4096, PROT_READ);
        if (mremap(other, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, pointers) != pointers) return 2;
        both(5);
    }
    note("moved");

    /* A file's page that is written by way of the file, and shared memory with another view. */
    int fd = memfd_create("pointers", 0);
    if (fd < 0 || ftruncate(fd, 4096)) return 3;
    uint64_t *view = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mmap(pointers, 4096, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != pointers) return 4;
    for (int i = 0; i < 30; i++) {
        view[0] = (uintptr_t)functions[i % 3];
        both(3);
    }
    note("shared");

    mmap(pointers, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    struct sigaction action = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGBUS, &action, 0);
    broken(0x1000);
    broken(0x8000000000000000);
    broken(0x0000800000000000);
    broken((uintptr_t)pointers);
    broken((uintptr_t)one);
    for (int i = 0; i < 3; i++) {
        munmap(pointers, 4096);
        broken(0);
        mmap(pointers, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        broken((uintptr_t)functions[i]);
    }
    note("broken");
    return 0;
}
