/* Two threads that take turns: a mutex and a condition. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long turn, last;

static void *play(void *me) {
    long side = (long)me;
    pthread_mutex_lock(&mutex);
    while (turn < last) {
        if ((turn & 1) == side) {
            turn++;
            pthread_cond_signal(&changed);
        } else {
            pthread_cond_wait(&changed, &mutex);
        }
    }
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&mutex);
    return 0;
}

int main(int argc, char **argv) {
    last = argc > 1 ? atol(argv[1]) : 20000;
    pthread_t other;
    if (pthread_create(&other, 0, play, (void *)1)) return 1;
    play(0);
    pthread_join(other, 0);
    printf("%ld\n", turn);
    return 0;
}
