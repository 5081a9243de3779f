/* Records, strings and small procedures, in the way of Dhrystone (Weicker 1984). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { RED, GREEN, BLUE, WHITE };
struct record { struct record *next; enum kind kind; int number; char text[32]; };

static struct record *head;
static int total;
static char letter_1, letter_2;

__attribute__((noinline)) static enum kind step(enum kind k, int n) {
    switch (k) {
    case RED: return n > 100 ? GREEN : BLUE;
    case GREEN: return total > 10 ? RED : WHITE;
    case BLUE: return n & 1 ? WHITE : GREEN;
    default: return RED;
    }
}

__attribute__((noinline)) static int differ(const char *a, const char *b) {
    int i = 2;
    while (i <= 2 && a[i] == b[i + 1]) i++;
    if (letter_1 == 'W' && i > 2) i = 7;
    return strcmp(a, b) > 0 ? i + 7 : i;
}

__attribute__((noinline)) static void visit(struct record *r) {
    struct record *n = r->next;
    *n = *head;
    r->number = 5;
    n->number = r->number;
    n->next = r->next == n ? head : r->next;
    n->kind = step(r->kind, n->number + total);
    n->number += 10;
    if (n->kind == RED) n->number = step(n->kind, total) + r->number;
    else *r = *n;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 10000000;
    head = calloc(1, sizeof *head);
    struct record *second = calloc(1, sizeof *second);
    head->next = second;
    second->next = head;
    strcpy(head->text, "A PROGRAM OF RECORDS, 1 OF 2");
    for (int i = 1; i <= rounds; i++) {
        char text[32];
        strcpy(text, "A PROGRAM OF RECORDS, 2 OF 2");
        letter_1 = 'A';
        letter_2 = letter_1 + (i & 3);
        int a = 2, b = 3, c = 0;
        c = differ(head->text, text) ? 7 * a - b : a;
        while (a < b) { c = 5 * a - b; a++; }
        total = (total + c + i) & 0xff;
        head->next = second;
        visit(head);
        for (char l = 'A'; l <= letter_2; l++)
            if (l == 'C') total += step(BLUE, i);
        b = (b * a) / (c ? c : 1);
        total ^= b;
    }
    printf("%d %d %s\n", total, head->number, second->text);
    return 0;
}
