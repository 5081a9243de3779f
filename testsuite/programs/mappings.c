// Mappings: what mmap and its kin return and what accesses to them then do; code that is written, moved and shared.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)
#define FIXED (ANON | MAP_FIXED)
// Large values are addresses, which differ from run to run.
#define SHOW(x) \
    do { \
        long r = (long)(x); \
        printf("%d %s = %ld %s\n", __LINE__, #x, r > 1000000 ? 1 : r, r == -1 ? strerror(errno) : ""); \
    } while (0)
#define TRY(x) \
    do { \
        sig = 0; \
        if (!sigsetjmp(back, 1)) { \
            x; \
        } \
        printf("%d %s: signal %d code %d\n", __LINE__, #x, sig, sig ? code : 0); \
    } while (0)
#define CALL(p) (((int (*)(void))(p))())

static sigjmp_buf back;
static int sig, code;

static void fault(int s, siginfo_t *info, void *context) {
    sig = s;
    code = info->si_code;
    siglongjmp(back, 1);
}

static void protection(void) {
    char *p = mmap(0, 8 * PAGE, 3, ANON, -1, 0);
    SHOW(mmap(0, 0, 3, ANON, -1, 0));
    SHOW(mmap(p + 1, PAGE, 3, FIXED, -1, 0));
    SHOW(mmap(0, -1UL, 3, ANON, -1, 0));
    SHOW(mmap(0, PAGE, 3, MAP_PRIVATE, -1, 0));
    SHOW(mmap(0, PAGE, 3, MAP_ANONYMOUS, -1, 0));
    SHOW(munmap(p + 1, 10));
    SHOW(munmap(p, 0));
    SHOW(munmap(p + PAGE, PAGE));
    SHOW(munmap(p + PAGE, PAGE));
    TRY(p[PAGE] = 1);
    SHOW(mprotect(p, 8 * PAGE, PROT_READ));
    TRY(p[0] = 1);
    TRY(p[3 * PAGE] = 1);
    SHOW(mprotect(p, PAGE, PROT_NONE));
    TRY((void)*(volatile char *)p);
    SHOW(mprotect(p + 1, 10, 3));
    SHOW(mprotect(p, 0, 3));
    SHOW(mprotect(p, PAGE, 3 | PROT_GROWSDOWN));
    SHOW(mprotect(p, PAGE, 0xfff0));
    SHOW(mremap(p + 2 * PAGE, PAGE, 2 * PAGE, 0));
    SHOW(mremap(p + PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE));
    SHOW(mremap(p + 2 * PAGE, 4 * PAGE, 2 * PAGE, 0));
    SHOW(mremap(p + 2 * PAGE, PAGE, PAGE, MREMAP_FIXED, p + 2 * PAGE));
    SHOW(mremap(p + 2 * PAGE, PAGE, PAGE, MREMAP_FIXED | MREMAP_MAYMOVE, p + 2 * PAGE));
    SHOW(madvise(p, 8 * PAGE, MADV_DONTNEED));
    SHOW(madvise(p + 2 * PAGE, PAGE, 12345));
    SHOW(madvise(p + 1, PAGE, MADV_DONTNEED));
    unsigned char resident[8];
    SHOW(mincore(p, PAGE, resident));
    SHOW(mincore(p + PAGE, PAGE, resident));
    SHOW(msync(p + 2 * PAGE, PAGE, MS_SYNC));
    SHOW(msync(p + PAGE, PAGE, MS_SYNC));
    SHOW(mlock(p + PAGE, PAGE));
    SHOW(munlock(p + 2 * PAGE, PAGE));
}

static void places(void) {
    char *at = (char *)0x10000000;
    SHOW(mmap(at, PAGE, 3, FIXED, -1, 0) == at);
    SHOW(mmap(at, PAGE, 3, ANON | MAP_FIXED_NOREPLACE, -1, 0));
    SHOW((long)mmap(0, PAGE, 3, ANON | MAP_32BIT, -1, 0) < 0x7fffffff);
    SHOW(mmap((void *)0x7ffffffff000, PAGE, 3, FIXED, -1, 0));
    SHOW(mmap((void *)0xffff800000000000, PAGE, 3, FIXED, -1, 0));
    char *low = sbrk(0);
    SHOW(sbrk(100000) == low);
    memset(low, 1, 100000);
    SHOW(sbrk(-50000) != 0);
    SHOW((char *)sbrk(0) - low);
    SHOW(brk(low - (1 << 30)));
    SHOW(syscall(SYS_brk, 0) == (long)sbrk(0));
    volatile char big[4 << 20];
    for (int i = 0; i < sizeof big; i += PAGE)
        big[i] = 1;
    SHOW(big[PAGE]);
}

static void files(void) {
    char name[] = "/tmp/mappings-XXXXXX";
    int fd = mkstemp(name);
    int readonly = open(name, O_RDONLY);
    unlink(name);
    ftruncate(fd, 5000);
    char *f = mmap(0, 3 * PAGE, 3, MAP_SHARED, fd, 0);
    TRY(f[4999] = 'x');
    TRY(f[8000] = 1);
    TRY(f[2 * PAGE + 1] = 1);
    char c;
    pread(fd, &c, 1, 4999);
    SHOW(c);
    SHOW(mmap(0, PAGE, 3, MAP_SHARED, readonly, 0));
    char *r = mmap(0, PAGE, 1, MAP_SHARED, readonly, 0);
    SHOW(mprotect(r, PAGE, 3));
    SHOW(mmap(0, PAGE, 1, MAP_PRIVATE, fd, 1));
    SHOW(mmap(0, PAGE, 1, MAP_PRIVATE, 99, 0));
    int id = shmget(IPC_PRIVATE, 10000, 0600 | IPC_CREAT);
    char *s = shmat(id, 0, 0), *t = shmat(id, 0, SHM_RDONLY);
    s[9999] = 7;
    SHOW(t[9999]);
    TRY(t[0] = 1);
    SHOW(shmdt(s));
    SHOW(shmdt(s));
    SHOW(shmdt(t + PAGE));
    SHOW(shmdt(t));
    SHOW(shmat(id, (void *)0x123, 0));
    SHOW(shmctl(id, IPC_RMID, 0));
    TRY(s[0] = 1);
}

// mov eax, 7; ret
static const char SEVEN[] = "\xb8\x07\0\0\0\xc3";

static void generated_code(void) {
    char *x = mmap(0, PAGE, 7, ANON, -1, 0);
    memcpy(x, SEVEN, 6);
    SHOW(CALL(x));
    x[1] = 8;
    SHOW(CALL(x));
    mprotect(x, PAGE, 3);
    TRY(CALL(x));
    mprotect(x, PAGE, 5);
    SHOW(CALL(x));
    TRY(x[1] = 9);
    TRY(CALL(0));
    TRY(*(volatile char *)0xffff800000000000 = 1);
    TRY(*(volatile char *)0x8000000000000000 = 1);
    // The kernel writes the code.
    int ends[2];
    pipe(ends);
    mprotect(x, PAGE, 7);
    SHOW(CALL(x));
    write(ends[1], "\xb8\x33\0\0\0\xc3", 6);
    SHOW(read(ends[0], x, 6));
    SHOW(CALL(x));
    write(ends[1], "a", 1);
    SHOW(read(ends[0], (void *)16, 1));
    SHOW(write(ends[1], (void *)16, 1));
    // It moves.
    char *y = mremap(x, PAGE, 5 * PAGE, MREMAP_MAYMOVE);
    SHOW(CALL(y));
    y[1] = 3;
    SHOW(CALL(y));
    // Another process changes its own copy.
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        y[1] = 50;
        _exit(CALL(y));
    }
    int status;
    waitpid(child, &status, 0);
    SHOW(WEXITSTATUS(status));
    SHOW(CALL(y));
    madvise(y, PAGE, MADV_DONTNEED);
    SHOW(*(int *)y);
}

static void code_with_two_views(void) {
    int fd = memfd_create("code", 0);
    ftruncate(fd, 2 * PAGE);
    char *w = mmap(0, 2 * PAGE, 3, MAP_SHARED, fd, 0), *x = mmap(0, PAGE, 5, MAP_SHARED, fd, PAGE);
    memcpy(w + PAGE, SEVEN, 6);
    SHOW(CALL(x));
    for (int i = 9; i < 12; i++) {
        w[PAGE + 1] = i;
        SHOW(CALL(x));
    }
    char *late = mmap(0, PAGE, 3, MAP_SHARED, fd, PAGE);
    late[1] = 20;
    SHOW(CALL(x));
    munmap(late, PAGE);
    pwrite(fd, "\x21", 1, PAGE + 1);
    w[PAGE + 10] = 1;
    SHOW(CALL(x));
}

// Memory that may lie in huge pages, and what happens to parts of it.
static void huge_pages(void) {
    enum { SIZE = 16 << 20, MIDDLE = SIZE / 2 + 5 * PAGE };
    char *p = mmap(0, SIZE, 3, ANON, -1, 0), *m = p + MIDDLE;
    for (int i = 0; i < SIZE; i += PAGE)
        p[i] = i / PAGE;
    SHOW(m[0]);
    mprotect(m, PAGE, PROT_READ);
    TRY(m[0] = 1);
    TRY(m[PAGE] = 1);
    memcpy(m - PAGE, SEVEN, 6);
    TRY(CALL(m - PAGE));
    mprotect(m - PAGE, PAGE, 5);
    SHOW(CALL(m - PAGE));
    m[-2 * PAGE] = 21;
    SHOW(m[-2 * PAGE]);
    TRY(CALL(m - 2 * PAGE));
    munmap(m + 2 * PAGE, PAGE);
    TRY(m[2 * PAGE] = 1);
    int fd = memfd_create("file", 0);
    ftruncate(fd, PAGE);
    pwrite(fd, "f", 1, 0);
    mmap(m + 2 * PAGE, PAGE, 3, MAP_SHARED | MAP_FIXED, fd, 0);
    SHOW(m[2 * PAGE]);
    m[2 * PAGE] = 'g';
    char c;
    pread(fd, &c, 1, 0);
    SHOW(c);
    madvise(m + 4 * PAGE, PAGE, MADV_DONTNEED);
    SHOW(m[4 * PAGE]);
    char *q = mremap(m + 8 * PAGE, 2 * PAGE, 4 * PAGE, MREMAP_MAYMOVE);
    SHOW(q[PAGE] == (char)(MIDDLE / PAGE + 9));
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        for (int i = 0; i < MIDDLE - 4 * PAGE; i += PAGE)
            p[i] = 1;
        _exit(p[PAGE]);
    }
    int status;
    waitpid(child, &status, 0);
    SHOW(WEXITSTATUS(status));
    int sum = 0;
    for (int i = 0; i < MIDDLE - 4 * PAGE; i += PAGE)
        sum += p[i];
    SHOW(sum);
    munmap(p, SIZE);
    TRY(p[0] = 1);
}

int main(void) {
    struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGBUS, &action, 0);
    protection();
    places();
    files();
    generated_code();
    code_with_two_views();
    huge_pages();
    return 0;
}
