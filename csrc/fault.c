/* fault.c: see fault.h. */
#define _GNU_SOURCE
#include "fault.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

__thread volatile struct onion_fault_range onion_fault_watched;
static __thread sigjmp_buf landing;

static struct sigaction previous;
static int install_result;
static pthread_once_t install_once = PTHREAD_ONCE_INIT;

static void pass_on(int signal_number, siginfo_t *info, void *ucontext) {
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal_number, info, ucontext);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal_number);
    } else {
        /* Nobody wanted it: let the faulting instruction run again under the default action, so that the core
         * dump shows the true place. */
        struct sigaction standard;
        memset(&standard, 0, sizeof standard);
        standard.sa_handler = SIG_DFL;
        sigaction(SIGBUS, &standard, NULL);
    }
}

static void on_sigbus(int signal_number, siginfo_t *info, void *ucontext) {
    uintptr_t address = (uintptr_t)info->si_addr;
    /* The kernel reports the page or the byte, depending on the fault: watch whole pages. */
    if (onion_fault_watched.high && address >= (onion_fault_watched.low & ~(uintptr_t)4095) &&
        address < onion_fault_watched.high) {
        onion_fault_unwatch();
        siglongjmp(landing, 1);
    }
    pass_on(signal_number, info, ucontext);
}

static void install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_sigbus;
    /* NODEFER: the jump leaves the handler without a return, and SIGBUS must not stay blocked after it. */
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    install_result = sigaction(SIGBUS, &action, &previous) ? -errno : 0;
}

int onion_fault_install(void) {
    pthread_once(&install_once, install);
    return install_result;
}

int onion_fault_run(int (*work)(void *), void *context) {
    if (sigsetjmp(landing, 0))
        return -EIO;
    return work(context);
}
