/* threads.c: the threads that serve clients. To begin and to end one takes as long as the handshake of a client, so one
 * whose client has gone waits for a later one. Some are begun before there is a client, and those that wait do so without
 * an end as long as they are no more than these.
 *
 * What must hold: a connection that was given to a thread is served, whatever comes between: so the thread looks for one
 * before it ends, under the lock under which it was given. No client waits for a thread that another one has. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include "nbd/internal.h"

#define STACK_BYTES (512 << 10)

/* A thread that waits, in its own stack. The server's lock guards it, as long as it is in the list. */
struct onion_nbd_kept {
    struct onion_nbd_kept *next;
    struct onion_nbd_connection *connection; /* NULL: none was given to it, and it is in the list */
    uint32_t is_woken;
};

int onion_nbd_has_threads(const struct onion_nbd_server *server) {
    return server->thread_count && server->process == getpid();
}

struct onion_nbd_kept *onion_nbd_hand_over(struct onion_nbd_server *server, struct onion_nbd_connection *connection) {
    struct onion_nbd_kept *kept = server->kept;
    if (!kept || !onion_nbd_has_threads(server))
        return NULL;
    server->kept = kept->next;
    server->kept_count--;
    kept->connection = connection;
    return kept;
}

void onion_nbd_wake_kept(struct onion_nbd_kept *kept) { onion_nbd_say(&kept->is_woken, 1); }

static void take_out(struct onion_nbd_server *server, const struct onion_nbd_kept *own) {
    struct onion_nbd_kept **at = &server->kept;
    while (*at != own)
        at = &(*at)->next;
    *at = own->next;
    server->kept_count--;
}

/* The caller holds the lock, which is given up if a connection is returned. */
static struct onion_nbd_connection *wait_for_connection(struct onion_nbd_server *server) {
    struct timespec until = onion_nbd_in_ms(server->options.kept_ms);
    struct onion_nbd_kept own = {.next = server->kept};
    int is_over = 0;
    server->kept = &own;
    server->kept_count++;
    while (!own.connection && !server->stopping && !(is_over && server->kept_count > server->ready_max)) {
        pthread_mutex_unlock(&server->lock);
        if (onion_nbd_await(&own.is_woken, 0, is_over ? NULL : &until) && own.connection)
            return own.connection;
        is_over = 1;
        pthread_mutex_lock(&server->lock);
    }
    if (!own.connection) {
        take_out(server, &own);
        return NULL;
    }
    pthread_mutex_unlock(&server->lock);
    onion_nbd_await(&own.is_woken, 0, NULL); /* it was given one just now, and is about to be woken */
    return own.connection;
}

struct onion_nbd_connection *onion_nbd_next_connection(struct onion_nbd_server *server) {
    struct onion_nbd_connection *connection = NULL;
    pthread_mutex_lock(&server->lock);
    int is_kept = server->kept_count < (server->options.kept_ms ? ONION_NBD_KEPT_MAX : server->ready_max);
    if (is_kept && !server->stopping)
        connection = wait_for_connection(server);
    if (connection)
        return connection;
    server->thread_count--;
    pthread_cond_broadcast(&server->closed);
    pthread_mutex_unlock(&server->lock);
    return NULL;
}

void onion_nbd_end_kept_threads(struct onion_nbd_server *server) {
    for (struct onion_nbd_kept *at = onion_nbd_has_threads(server) ? server->kept : NULL; at; at = at->next)
        onion_nbd_say(&at->is_woken, 1); /* the lock keeps it there */
}

int onion_nbd_wants_thread(struct onion_nbd_server *server) {
    pthread_mutex_lock(&server->lock);
    int wants = !server->stopping && server->process == getpid() && server->thread_count < server->ready_max;
    pthread_mutex_unlock(&server->lock);
    return wants;
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
