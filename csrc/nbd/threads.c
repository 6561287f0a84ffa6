/* threads.c: the threads that serve clients. To begin and to end one takes as long as the handshake of a client, so one
 * whose client has gone waits for a later one.
 *
 * What must hold: a connection that was given to a thread is served, whatever comes between: so the thread looks for one
 * before it ends, under the lock under which it was given. No client waits for a thread that another one has. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include "nbd/internal.h"

#define STACK_BYTES (512 << 10)

/* A thread that waits, in its own stack. The server's lock guards it. */
struct onion_nbd_kept {
    struct onion_nbd_kept *next;
    struct onion_nbd_connection *connection; /* NULL: none was given to it yet */
    pthread_cond_t changed;
};

int onion_nbd_has_threads(const struct onion_nbd_server *server) {
    return server->thread_count && server->process == getpid();
}

int onion_nbd_hand_over(struct onion_nbd_server *server, struct onion_nbd_connection *connection) {
    struct onion_nbd_kept *kept = server->kept;
    if (!kept || !onion_nbd_has_threads(server))
        return 0;
    server->kept = kept->next;
    server->kept_count--;
    kept->connection = connection;
    pthread_cond_signal(&kept->changed); /* under the lock: behind it, the thread may be gone already */
    return 1;
}

static void take_out(struct onion_nbd_server *server, const struct onion_nbd_kept *own) {
    struct onion_nbd_kept **at = &server->kept;
    while (*at != own)
        at = &(*at)->next;
    *at = own->next;
    server->kept_count--;
}

/* The caller holds the lock. */
static struct onion_nbd_connection *wait_for_connection(struct onion_nbd_server *server) {
    struct timespec until = onion_nbd_in_ms(server->options.kept_ms);
    struct onion_nbd_kept own = {.next = server->kept};
    int status = 0;
    onion_nbd_init_condition(&own.changed);
    server->kept = &own;
    server->kept_count++;
    while (!own.connection && !server->stopping && status != ETIMEDOUT)
        status = pthread_cond_timedwait(&own.changed, &server->lock, &until);
    if (!own.connection)
        take_out(server, &own);
    pthread_cond_destroy(&own.changed);
    return own.connection;
}

struct onion_nbd_connection *onion_nbd_next_connection(struct onion_nbd_server *server) {
    struct onion_nbd_connection *connection = NULL;
    pthread_mutex_lock(&server->lock);
    if (server->options.kept_ms && server->kept_count < ONION_NBD_KEPT_MAX && !server->stopping)
        connection = wait_for_connection(server);
    if (!connection) {
        server->thread_count--;
        pthread_cond_broadcast(&server->closed);
    }
    pthread_mutex_unlock(&server->lock);
    return connection;
}

void onion_nbd_end_kept_threads(struct onion_nbd_server *server) {
    for (struct onion_nbd_kept *at = onion_nbd_has_threads(server) ? server->kept : NULL; at; at = at->next)
        pthread_cond_signal(&at->changed);
}

static void count_thread(struct onion_nbd_server *server, uint32_t by) {
    pthread_mutex_lock(&server->lock);
    server->thread_count += by;
    pthread_cond_broadcast(&server->closed);
    pthread_mutex_unlock(&server->lock);
}

int onion_nbd_start_thread(struct onion_nbd_server *server, void *(*run)(void *), void *argument) {
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    count_thread(server, 1); /* first: it may have ended before the call that starts it returns */
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* raised by the thread's own loads: base/sigbus.h */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = -pthread_create(&thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (status < 0)
        count_thread(server, (uint32_t)-1);
    return status;
}
