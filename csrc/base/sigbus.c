/* sigbus.c: see sigbus.h. */
#define _GNU_SOURCE
#include "base/sigbus.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

/* Of another library before glibc 2.34. */
extern int dladdr(const void *, Dl_info *) __attribute__((weak));

__thread volatile struct onion_fault_range onion_fault_watched;
static __thread sigjmp_buf landing;
static __thread const char *fault_address;
static __thread volatile uintptr_t outer_frame; /* of the handler that passed a signal on and has not returned */
static __thread volatile unsigned nested;

/* What our handler replaced when it was installed first, and last. */
static struct sigaction replaced_first, replaced_last;
static int installs;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

static void let_it_kill(void) {
    /* Let the faulting instruction run again under the default action, so that the core dump shows the true place. */
    struct sigaction standard;
    memset(&standard, 0, sizeof standard);
    standard.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &standard, NULL);
}

/* What was installed over ours, and then had ours over it, may hand a signal on to us again: by a call, or by raising
 * it anew. Then it goes to what was there before both. A handler that is entered from within itself stands lower on the
 * stack. */
static void pass_on(int signal_number, siginfo_t *info, void *ucontext) {
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0), outer = outer_frame;
    nested = frame < outer ? nested + 1 : 0;
    outer_frame = frame;
    struct sigaction next = nested ? replaced_first : replaced_last;
    int is_a_circle = nested > (installs > 1);
    if (is_a_circle || (!(next.sa_flags & SA_SIGINFO) && (next.sa_handler == SIG_DFL || next.sa_handler == SIG_IGN)))
        let_it_kill();
    else if (next.sa_flags & SA_SIGINFO)
        next.sa_sigaction(signal_number, info, ucontext);
    else
        next.sa_handler(signal_number);
    outer_frame = outer;
}

/* Of the load that is watched: the kernel reports the page or the byte, depending on the fault, so whole pages are. A
 * handler that was installed over ours, as that of Python's faulthandler, may have got the signal first and raised it
 * anew: then it has no address, and comes in the middle of the load. */
static int is_watched(const siginfo_t *info) {
    if (!onion_fault_watched.high)
        return 0;
    if (info->si_code <= 0)
        return 1;
    uintptr_t address = (uintptr_t)info->si_addr;
    return address >= (onion_fault_watched.low & ~(uintptr_t)4095) && address < onion_fault_watched.high;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *ucontext) {
    if (is_watched(info)) {
        fault_address = info->si_code > 0 ? info->si_addr : (const char *)onion_fault_watched.low;
        onion_fault_unwatch();
        siglongjmp(landing, 1);
    }
    pass_on(signal_number, info, ucontext);
}

/* How much of a path names the package that an extension module lies in: it is in a folder of it. */
static size_t package_of(const char *path) {
    const char *file = strrchr(path, '/');
    const char *folder = file ? memrchr(path, '/', (size_t)(file - path)) : NULL;
    return folder ? (size_t)(folder - path) : 0;
}

/* Ours, or that of another extension module with this code, which hands on to ours once it was installed over it. */
static int is_ours(const struct sigaction *action) {
    Dl_info of_theirs, of_ours;
    if (!(action->sa_flags & SA_SIGINFO))
        return 0;
    if (action->sa_sigaction == on_sigbus)
        return 1;
    if (!installs || !dladdr || !dladdr((void *)(uintptr_t)action->sa_sigaction, &of_theirs) ||
        !dladdr((void *)(uintptr_t)on_sigbus, &of_ours) || !of_theirs.dli_fname || !of_ours.dli_fname)
        return 0;
    size_t package = package_of(of_ours.dli_fname);
    return package && package_of(of_theirs.dli_fname) == package &&
           !memcmp(of_theirs.dli_fname, of_ours.dli_fname, package);
}

int onion_fault_install(void) {
    struct sigaction now, action;
    int status = 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_sigbus;
    /* NODEFER: the jump leaves the handler without a return, and SIGBUS must not stay blocked after it. */
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    pthread_mutex_lock(&install_lock);
    if (sigaction(SIGBUS, NULL, &now))
        status = -errno;
    if (status == 0 && !is_ours(&now)) {
        replaced_last = now; /* before ours can be called */
        if (!installs++)
            replaced_first = now;
        status = sigaction(SIGBUS, &action, NULL) ? -errno : 0;
    }
    pthread_mutex_unlock(&install_lock);
    return status;
}

int onion_fault_run(int (*work)(void *), void *context) {
    if (sigsetjmp(landing, 0))
        return -EIO;
    return work(context);
}

const char *onion_fault_address(void) {
    const char *address = fault_address;
    fault_address = NULL;
    return address;
}
