/* Two threads fault on one mapping that was cut off. The first is held where it counts the loss: the
   second, which reads zeros meanwhile, must find the loss counted all the same. guard.h is the C of
   vring/_guard.pxd and _guard.pyx. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile int held, go_on;

static void hold_the_first(void) {
    if (!__atomic_exchange_n(&held, 1, __ATOMIC_SEQ_CST))
        while (!__atomic_load_n(&go_on, __ATOMIC_SEQ_CST))
            usleep(1000); /* polls: nothing else may wait in a signal handler */
}

#define __atomic_fetch_add(at, n, order) (hold_the_first(), __atomic_fetch_add(at, n, order))
#pragma GCC diagnostic ignored "-Wunused-function"
#include "guard.h"

static volatile char *pages;

static void *first(void *unused) {
    (void)pages[0];
    return unused;
}

int main(void) {
    pthread_t thread;
    int fd = memfd_create("guest", 0), byte;
    if (fd < 0 || ftruncate(fd, 8192))
        return 2;
    pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (pages == MAP_FAILED)
        return 2;
    pages[4096] = 1;
    vr_guard_set(vr_guard_free_slot(), (uintptr_t)pages, 8192, -1);
    if (vr_guard_install() < 0 || ftruncate(fd, 0))
        return 2;
    if (pthread_create(&thread, NULL, first, NULL))
        return 2;
    while (!__atomic_load_n(&held, __ATOMIC_SEQ_CST))
        usleep(1000); /* polls: a signal handler can wake nobody */
    byte = pages[4096];
    printf("read %d, losses %d\n", byte, vr_guard_count() != 0);
    __atomic_store_n(&go_on, 1, __ATOMIC_SEQ_CST);
    pthread_join(thread, NULL);
    return 0;
}
