/* The limit of the address space: who may set it, what it refuses, who inherits it. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(const char *what) {
    struct rlimit l;
    int r = getrlimit(RLIMIT_AS, &l);
    printf("%s: %d %llx %llx\n", what, r, (unsigned long long)l.rlim_cur, (unsigned long long)l.rlim_max);
    fflush(stdout);
}

static void set(const char *what, rlim_t soft, rlim_t hard) {
    struct rlimit l = {soft, hard};
    int r = setrlimit(RLIMIT_AS, &l);
    printf("%s: %d %d\n", what, r, r ? errno : 0);
    show(what);
}

static void *map(const char *what, void *at, size_t size, int flags) {
    void *p = mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    printf("%s: %d\n", what, p == MAP_FAILED ? errno : 0);
    return p;
}

static void *nothing(void *p) { return p; }

int main(int argc, char **argv) {
    const rlim_t MIB = 1 << 20;
    if (argc > 1) {
        show(argv[1]);
        map("200 MiB after exec", NULL, 200 * MIB, 0);
        map("900 MiB after exec", NULL, 900 * MIB, 0);
        return 0;
    }
    struct rlimit first;
    getrlimit(RLIMIT_AS, &first);
    rlim_t hard = first.rlim_max;
    set("soft above hard", 3 * MIB, 2 * MIB);
    struct rlimit old, new = {900 * MIB, hard};
    printf("prlimit %d", prlimit(getpid(), RLIMIT_AS, &new, &old));
    printf(" %d\n", old.rlim_cur == first.rlim_cur && old.rlim_max == first.rlim_max);
    printf("bad address %d", prlimit(0, RLIMIT_AS, (void *)16, NULL));
    printf(" %d\n", errno);
    char *big = map("600 MiB", NULL, 600 * MIB, 0);
    map("600 MiB more", NULL, 600 * MIB, 0);
    map("in the same place", big, 600 * MIB, MAP_FIXED);
    printf("grow: %d\n", mremap(big, 600 * MIB, 1200 * MIB, MREMAP_MAYMOVE) == MAP_FAILED ? errno : 0);
    printf("break: %d\n", sbrk(600 * MIB) == (void *)-1 ? errno : 0);
    printf("a little: %d\n", sbrk(MIB) == (void *)-1 ? errno : 0);
    printf("malloc: %d\n", malloc(600 * MIB) == NULL);
    munmap(big, 600 * MIB);
    pthread_t thread;
    printf("thread: %d\n", pthread_create(&thread, NULL, nothing, NULL));
    pthread_join(thread, NULL);
    fflush(stdout);
    if (!fork()) {
        set("child", 800 * MIB, hard);
        execl("/proc/self/exe", "limits", "child after exec", NULL);
        _exit(1);
    }
    wait(NULL);
    show("parent");
    if (!fork()) {
        set("hard", 700 * MIB, 800 * MIB);
        if (setresuid(12345, 12345, 12345) == 0)
            set("raised", 700 * MIB, 900 * MIB);
        set("lowered", 300 * MIB, 400 * MIB);
        map("350 MiB", NULL, 350 * MIB, 0);
        _exit(0);
    }
    wait(NULL);
    set("no limit", hard, hard);
    map("4 GiB", NULL, 4096 * MIB, MAP_NORESERVE);
    return 0;
}
