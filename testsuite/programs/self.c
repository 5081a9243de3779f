// What a program sees of itself: arguments, environment, auxiliary vector, /proc, descriptors, prctl.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SHOW(x) \
    do { \
        errno = 0; \
        long r = (long)(x); \
        printf("%d %s = %ld %s\n", __LINE__, #x, r, r == -1 ? strerror(errno) : ""); \
        fflush(stdout); \
    } while (0)

static void content(const char *label, const char *path) {
    static char text[100000];
    int fd = open(path, O_RDONLY);
    long n, total = 0;
    while ((n = read(fd, text + total, sizeof text - 1 - total)) > 0)
        total += n;
    for (long i = 0; i < total; i++)
        if (!text[i])
            text[i] = '|';
    text[total] = 0;
    printf("%s: %s\n", label, fd < 0 ? strerror(errno) : text);
    close(fd);
}

static void link_of(const char *label, const char *path) {
    char text[300];
    long n = readlink(path, text, sizeof text - 1);
    text[n > 0 ? n : 0] = 0;
    printf("%s -> %s\n", label, n < 0 ? strerror(errno) : strrchr(text, '/'));
}

static void *thread(void *unused) {
    char path[100];
    sprintf(path, "/proc/self/task/%ld/comm", syscall(SYS_gettid));
    content("thread", path);
    link_of("thread-self", "/proc/thread-self/exe");
    prctl(PR_SET_NAME, "other");
    content("thread", path);
    return 0;
}

static void program_file(void) {
    char path[100];
    link_of("self", "/proc/self/exe");
    sprintf(path, "/proc/%d/exe", getpid());
    link_of("pid", path);
    SHOW(open("/proc/self/exe", O_RDONLY));
    SHOW(open("/proc/self/exe", O_RDONLY | O_NOFOLLOW));
    struct stat a, b;
    stat("/proc/self/exe", &a);
    stat(path, &b);
    SHOW(a.st_ino == b.st_ino && a.st_size == b.st_size);
    lstat("/proc/self/exe", &a);
    SHOW(S_ISLNK(a.st_mode));
    SHOW(access("/proc/self/exe", X_OK));
    int dir = open("/proc/self", O_RDONLY | O_DIRECTORY);
    char text[300];
    text[readlinkat(dir, "exe", text, 299)] = 0;
    puts(strrchr(text, '/'));
    SHOW(faccessat(dir, "exe", X_OK, 0));
    fstatat(dir, "exe", &a, 0);
    SHOW(a.st_ino == b.st_ino);
    close(dir);
    SHOW(readlink("/proc/self/exe", text, 3));
    SHOW(readlink("/proc/self/exe", text, 0));
    SHOW(readlink("/proc/self/exe", (void *)16, 30));
}

static void maps(void) {
    FILE *f = fopen("/proc/self/maps", "r");
    char line[500];
    int stack = 0, heap = 0, vdso = 0, own = 0, foreign = 0, inside = 0;
    unsigned long from, to;
    char rights[5];
    while (fgets(line, sizeof line, f)) {
        stack += strstr(line, "[stack]") != 0;
        heap += strstr(line, "[heap]") != 0;
        vdso += strstr(line, "[vdso]") != 0;
        own += strstr(line, "/self\n") != 0;
        foreign += strstr(line, "bivisor\n") != 0;
        if (sscanf(line, "%lx-%lx %4s", &from, &to, rights) == 3 && (unsigned long)maps >= from && (unsigned long)maps < to)
            puts(rights), inside++;
    }
    printf("%d %d %d %d %d %d\n", stack, heap, vdso, own, foreign, inside);
    fclose(f);
}

static void auxiliary(void) {
    printf("%s\n", (char *)getauxval(AT_PLATFORM));
    SHOW(getauxval(AT_PAGESZ));
    SHOW(getauxval(AT_CLKTCK));
    SHOW(getauxval(AT_SECURE));
    SHOW(getauxval(AT_MINSIGSTKSZ));
    SHOW(getauxval(AT_UID) == getuid());
    SHOW(getauxval(AT_SYSINFO_EHDR) != 0);
    SHOW(getauxval(AT_RANDOM) != 0);
    unsigned long seen[200];
    int fd = open("/proc/self/auxv", O_RDONLY), same = 1;
    long n = read(fd, seen, sizeof seen) / 16;
    for (int i = 0; i < n; i++)
        if (getauxval(seen[2 * i]) != seen[2 * i + 1])
            same = 0;
    SHOW(same);
    close(fd);
}

static void controls(void) {
    unsigned long value;
    SHOW(prctl(PR_SET_NAME, "a name that is too long"));
    content("comm", "/proc/self/comm");
    SHOW(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    SHOW(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    SHOW(prctl(999));
    SHOW(syscall(SYS_arch_prctl, ARCH_GET_FS, &value));
    SHOW(value == pthread_self());
    SHOW(syscall(SYS_arch_prctl, ARCH_SET_GS, 0x1234));
    SHOW(syscall(SYS_arch_prctl, ARCH_GET_GS, &value));
    SHOW(value);
    SHOW(syscall(SYS_arch_prctl, ARCH_SET_GS, -1L));
    SHOW(syscall(SYS_arch_prctl, 0x9999, 0));
    SHOW(syscall(SYS_arch_prctl, ARCH_GET_GS, 16));
    SHOW(syscall(9999));
    SHOW(syscall(-1));
    SHOW(syscall(400));
    SHOW(syscall(SYS_uselib, 0));
    SHOW(syscall(0xffffffff00000000 | SYS_getpid) == getpid());
    SHOW(personality(0xffffffff));
}

static void descriptors(void) {
    for (int i = 3; i < 900; i++)
        close(i);
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;
    int count = 0;
    while ((entry = readdir(dir)))
        count += entry->d_name[0] != '.' && atoi(entry->d_name) < 900;
    SHOW(count);
    closedir(dir);
    SHOW(close(899));
    SHOW(dup2(1, 899));
    SHOW(syscall(SYS_close_range, 3, ~0U, 0));
    SHOW(open("/dev/null", O_RDONLY));
    struct rlimit limit;
    SHOW(getrlimit(RLIMIT_STACK, &limit));
    SHOW(limit.rlim_cur);
    SHOW(getrlimit(RLIMIT_CORE, &limit));
    SHOW(limit.rlim_cur);
}

int main(int argc, char **argv, char **env) {
    if (argc == 1) {
        char *args[] = {"argument zero", "x y", "", 0}, *vars[] = {"A=1", "PATH=/bin:/usr/bin", "=odd", "none", "LD_X=2", 0};
        char path[300];
        path[readlink("/proc/self/exe", path, 299)] = 0;
        execve(path, args, vars);
        perror("execve");
        return 1;
    }
    printf("%d", argc);
    for (int i = 0; i < argc; i++)
        printf(" [%s]", argv[i]);
    for (int i = 0; env[i]; i++)
        printf(" {%s}", env[i]);
    puts("");
    content("cmdline", "/proc/self/cmdline");
    content("environ", "/proc/self/environ");
    content("comm", "/proc/self/comm");
    program_file();
    maps();
    auxiliary();
    controls();
    pthread_t id;
    pthread_create(&id, 0, thread, 0);
    pthread_join(id, 0);
    descriptors();
    int status;
    if (!fork())
        _exit(5);
    wait(&status);
    SHOW(WEXITSTATUS(status));
    execl("/bin/sh", "sh", "-c", "echo $0 $A; cat /proc/$$/comm; tr '\\0' ' ' </proc/$$/cmdline; echo; basename $(readlink /proc/$$/exe)", NULL);
}
