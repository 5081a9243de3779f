/* CoreMark-like work: a linked list sorted and searched, small integer matrices, a state machine over text, CRC-16 over it all. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct node { struct node *next; int16_t key, data; };

static uint16_t crc(uint16_t c, uint16_t v) {
    for (int i = 0; i < 16; i++) {
        uint16_t bit = (c ^ v) & 1;
        c >>= 1;
        v >>= 1;
        if (bit) c ^= 0xa001;
    }
    return c;
}

static struct node *merge(struct node *a, struct node *b, int by_key) {
    struct node head, *tail = &head;
    while (a && b) {
        int less = by_key ? a->key <= b->key : (a->data ^ 0x55) <= (b->data ^ 0x55);
        struct node **from = less ? &a : &b;
        tail->next = *from;
        tail = *from;
        *from = (*from)->next;
    }
    tail->next = a ? a : b;
    return head.next;
}

static struct node *sort(struct node *l, int by_key) {
    if (!l || !l->next) return l;
    struct node *slow = l, *fast = l->next;
    while (fast && fast->next) { slow = slow->next; fast = fast->next->next; }
    struct node *half = slow->next;
    slow->next = 0;
    return merge(sort(l, by_key), sort(half, by_key), by_key);
}

static uint16_t lists(struct node *nodes, int n, uint16_t c) {
    for (int i = 0; i < n; i++) {
        nodes[i].key = (int16_t)(i * 7919 + c);
        nodes[i].data = (int16_t)(i * 31);
        nodes[i].next = i + 1 < n ? &nodes[i + 1] : 0;
    }
    struct node *l = sort(nodes, 1);
    for (int wanted = 0; wanted < 40; wanted++) {
        struct node *p = l;
        while (p && (p->data & 0xff) != wanted) p = p->next;
        if (p) c = crc(c, (uint16_t)p->key);
    }
    for (struct node *p = l = sort(l, 0); p; p = p->next) c = crc(c, (uint16_t)p->data);
    return c;
}

#define N 12
static uint16_t matrix(int16_t a[N][N], int16_t b[N][N], uint16_t c) {
    int32_t r[N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) { a[i][j] = (int16_t)(i * j + c); b[i][j] = (int16_t)(i - j + c); }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            int32_t s = 0;
            for (int k = 0; k < N; k++) s += a[i][k] * b[k][j];
            r[i][j] = s;
        }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) c = crc(c, (uint16_t)(r[i][j] >> 2 & 0x7f));
    return c;
}

enum state { START, INT, DOT, EXPONENT, BAD, STATES };
static uint16_t numbers(const char *s, uint16_t c) {
    unsigned count[STATES] = {0};
    enum state st = START;
    for (; *s; s++) {
        char ch = *s;
        if (ch == ',') { count[st]++; st = START; continue; }
        switch (st) {
        case START: st = (ch >= '0' && ch <= '9') || ch == '-' || ch == '+' ? INT : ch == '.' ? DOT : BAD; break;
        case INT: st = ch >= '0' && ch <= '9' ? INT : ch == '.' ? DOT : ch == 'e' ? EXPONENT : BAD; break;
        case DOT: st = ch >= '0' && ch <= '9' ? DOT : ch == 'e' ? EXPONENT : BAD; break;
        case EXPONENT: st = (ch >= '0' && ch <= '9') || ch == '-' ? EXPONENT : BAD; break;
        default: break;
        }
    }
    for (int i = 0; i < STATES; i++) c = crc(c, (uint16_t)count[i]);
    return c;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 4000;
    static struct node nodes[200];
    static int16_t a[N][N], b[N][N];
    const char *text = "5012,1234,-874,+122,35.54400,.1234500,-110.700,+0.64400,5.500e+3,-.123e-2,-87e+832,+0.6e-12,T0.3e-1F,-T.T++Tq,1T3.4e4z,34.0e-T^,";
    uint16_t c = 0;
    for (int i = 0; i < rounds; i++) {
        c = lists(nodes, 200, c);
        c = matrix(a, b, c);
        for (int k = 0; k < 8; k++) c = numbers(text, c);
    }
    printf("%04x\n", c);
    return 0;
}
