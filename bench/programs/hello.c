/* The smallest program that says something: what it takes to start and to end. */
#include <stdio.h>

int main(void) {
    puts("hello");
    return 0;
}
