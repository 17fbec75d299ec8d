/* Counts the loads from one protected page: SIGSEGV opens the page and sets the trap flag, SIGTRAP
   after the one instruction closes it again. Reports (offset in page, times). */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

static uint8_t *page;
static unsigned counts[4096];

static void on_fault(int sig, siginfo_t *info, void *context) {
    ucontext_t *c = context;
    uintptr_t offset = (uintptr_t)info->si_addr - (uintptr_t)page;
    if (offset >= 4096) {
        signal(sig, SIG_DFL);
        return;
    }
    counts[offset]++;
    mprotect(page, 4096, PROT_READ | PROT_WRITE);
    c->uc_mcontext.gregs[REG_EFL] |= 0x100;
}

static void on_step(int sig, siginfo_t *info, void *context) {
    ucontext_t *c = context;
    c->uc_mcontext.gregs[REG_EFL] &= ~0x100ll;
    mprotect(page, 4096, PROT_NONE);
}

void watch(void *address) {
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    struct sigaction step = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO};
    page = address;
    sigaction(SIGSEGV, &fault, 0);
    sigaction(SIGTRAP, &step, 0);
    mprotect(page, 4096, PROT_NONE);
}

unsigned unwatch(unsigned *offsets, unsigned *times, unsigned most) {
    unsigned n = 0;
    mprotect(page, 4096, PROT_READ | PROT_WRITE);
    for (unsigned i = 0; i < 4096 && n < most; i++)
        if (counts[i]) {
            offsets[n] = i;
            times[n++] = counts[i];
        }
    return n;
}
