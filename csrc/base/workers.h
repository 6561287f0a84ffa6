/* workers.h: runs one function on several threads at once, the calling thread among them.
 *
 * The function must take its work from something shared (a counter, a cursor), so that the number of threads does
 * not matter. If the system refuses a thread, the others do its work. Signals stay with the threads of the caller, but
 * for SIGBUS, which a thread's own loads raise (base/sigbus.h). */
#ifndef ONIONSKIN_BASE_WORKERS_H
#define ONIONSKIN_BASE_WORKERS_H

#include <pthread.h>
#include <signal.h>

enum { ONION_WORKERS_MAX = 64 };

/* Calls work(argument) on `threads` threads (1 to 64) and returns when the last has returned. */
static inline void onion_run_workers(void *(*work)(void *), void *argument, int threads) {
    pthread_t started[ONION_WORKERS_MAX];
    int started_count = 0;
    sigset_t all, before;

    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started_count < threads - 1 && started_count < ONION_WORKERS_MAX &&
           pthread_create(&started[started_count], NULL, work, argument) == 0)
        started_count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    work(argument);
    for (int i = 0; i < started_count; i++)
        pthread_join(started[i], NULL);
}

#endif
