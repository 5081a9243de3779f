/* Dependent loads over 32 MiB: the latency of memory. */
#include <stdio.h>
#include <stdlib.h>

#define N (32 << 20 >> 6)
struct line { struct line *next; char rest[56]; };

int main(int argc, char **argv) {
    long steps = argc > 1 ? atol(argv[1]) : 6000000;
    struct line *l = aligned_alloc(64, sizeof(struct line) * N);
    unsigned long at = 0;
    /* A full-period linear congruential walk over a power of two. */
    for (long i = 0; i < N; i++) {
        unsigned long next = (at * 5 + 12345) % N;
        l[at].next = &l[next];
        at = next;
    }
    struct line *p = l;
    for (long i = 0; i < steps; i++) p = p->next;
    printf("%ld\n", (long)(p - l));
    return 0;
}
