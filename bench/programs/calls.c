/* Calls through tables of function pointers, as of virtual methods. */
#include <stdio.h>
#include <stdlib.h>

struct shape;
struct methods { unsigned (*area)(const struct shape *); unsigned (*edge)(const struct shape *, unsigned); };
struct shape { const struct methods *methods; unsigned w, h; };

static unsigned square_area(const struct shape *s) { return s->w * s->w; }
static unsigned square_edge(const struct shape *s, unsigned n) { return s->w + n; }
static unsigned oblong_area(const struct shape *s) { return s->w * s->h; }
static unsigned oblong_edge(const struct shape *s, unsigned n) { return n & 1 ? s->w : s->h; }
static unsigned wedge_area(const struct shape *s) { return s->w * s->h / 2; }
static unsigned wedge_edge(const struct shape *s, unsigned n) { return s->w ^ s->h ^ n; }

static const struct methods all[] = {
    {square_area, square_edge}, {oblong_area, oblong_edge}, {wedge_area, wedge_edge},
};

int main(int argc, char **argv) {
    long rounds = argc > 1 ? atol(argv[1]) : 1000000;
    enum { N = 64 };
    struct shape *shapes[N];
    for (unsigned i = 0; i < N; i++) {
        shapes[i] = malloc(sizeof **shapes);
        *shapes[i] = (struct shape){&all[(i * 7 + i / 5) % 3], i + 1, 2 * i + 3};
    }
    unsigned sum = 0;
    for (long r = 0; r < rounds; r++)
        for (unsigned i = 0; i < N; i++) {
            sum += shapes[i]->methods->area(shapes[i]);
            sum ^= shapes[i]->methods->edge(shapes[i], sum);
        }
    printf("%u\n", sum);
    return 0;
}
