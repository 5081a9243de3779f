/* A bytecode interpreter with computed goto: indirect jumps. */
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    long left = argc > 1 ? atol(argv[1]) : 60000000;
    static const unsigned char program[] = {0, 1, 2, 0, 3, 1, 4, 2, 0, 1, 3, 5};
    static void *const table[] = {&&add, &&xor, &&mul, &&shift, &&dec, &&loop};
    unsigned long a = 1, b = 3;
    const unsigned char *pc = program;
#define NEXT goto *table[*pc++]
    NEXT;
add: a += b; NEXT;
xor: b ^= a >> 3; NEXT;
mul: a *= 0x9e3779b1; NEXT;
shift: b = b << 1 | b >> 63; NEXT;
dec: a -= 7; NEXT;
loop: left -= 12; if (left > 0) { pc = program; NEXT; }
    printf("%lx %lx\n", a, b);
    return 0;
}
