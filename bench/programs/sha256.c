/* SHA-256 (FIPS 180-4) of a buffer, over and over. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t k[64];
static uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The constants are the first 32 bits of the fractional parts of cube roots of the first 64 primes. */
static void constants(void) {
    int n = 0;
    for (int p = 2; n < 64; p++) {
        int prime = 1;
        for (int d = 2; d * d <= p; d++) prime &= p % d != 0;
        if (!prime) continue;
        unsigned __int128 target = (unsigned __int128)p << 96;
        uint64_t lo = 0, hi = (uint64_t)7 << 32;
        while (lo + 1 < hi) {
            uint64_t mid = lo + (hi - lo) / 2;
            unsigned __int128 sq = (unsigned __int128)mid * mid;
            int over = sq >> 64 ? ((sq >> 32) * mid >> 64) >= (unsigned __int128)p : sq * mid > target;
            if (over) hi = mid; else lo = mid;
        }
        k[n++] = (uint32_t)lo;
    }
}

static void block(uint32_t h[8], const uint8_t *p) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)p[4 * i] << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7]
             + (rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ w[i - 2] >> 10);
    for (int i = 0; i < 8; i++) s[i] = h[i];
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = s[7] + (rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
        uint32_t t2 = (rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        for (int j = 7; j > 0; j--) s[j] = s[j - 1];
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

int main(int argc, char **argv) {
    int megabytes = argc > 1 ? atoi(argv[1]) : 120;
    static uint8_t data[1 << 16];
    constants();
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    for (int i = 0; i < megabytes * 16; i++) {
        data[0] = (uint8_t)i;
        for (int j = 0; j < 1 << 16; j += 64) block(h, data + j);
    }
    for (int i = 0; i < 8; i++) printf("%08x", h[i]);
    puts("");
    return 0;
}
