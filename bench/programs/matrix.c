/* Product of double matrices by the compiler's vectorizer: SSE2, or AVX2 and FMA with -mavx2 -mfma. */
#include <stdio.h>
#include <stdlib.h>

#define N 256
static double a[N][N], b[N][N], c[N][N];

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 30;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) { a[i][j] = i * 0.5 + j; b[i][j] = i - j * 0.25; }
    for (int r = 0; r < rounds; r++)
        for (int i = 0; i < N; i++)
            for (int k = 0; k < N; k++) {
                double x = a[i][k];
                for (int j = 0; j < N; j++) c[i][j] += x * b[k][j];
            }
    printf("%.3f\n", c[17][33]);
    return 0;
}
