/* Code that rewrites itself: N stores into a function, then one call of it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int main(int argc, char **argv) {
    int stores = argc > 1 ? atoi(argv[1]) : 10;
    long rounds = argc > 2 ? atol(argv[2]) : 100000;
    /* mov eax, imm32; ret */
    static const unsigned char code[] = {0xb8, 0, 0, 0, 0, 0xc3};
    unsigned char *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return 1;
    memcpy(page, code, sizeof code);
    volatile unsigned *immediate = (volatile unsigned *)(page + 1);
    unsigned sum = 0;
    for (long r = 0; r < rounds; r++) {
        for (int i = 0; i < stores; i++) *immediate = (unsigned)r + i;
        sum += ((unsigned (*)(void))page)();
    }
    printf("%u\n", sum);
    return 0;
}
