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
#define LEFT_TO_OTHERS 32 /* threads that can still be started by the rest of the process behind those for clients */

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

static void count_thread(struct onion_nbd_server *server, uint32_t by) {
    pthread_mutex_lock(&server->lock);
    server->thread_count += by;
    pthread_cond_broadcast(&server->closed);
    pthread_mutex_unlock(&server->lock);
}

/* Starts a thread to which no signal is delivered that is meant for the process. 0 or -errno. */
static int start(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* raised by the thread's own loads: base/sigbus.h */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = -pthread_create(thread, attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

int onion_nbd_start_thread(struct onion_nbd_server *server, void *(*run)(void *), void *argument) {
    pthread_attr_t attributes;
    pthread_t thread;
    count_thread(server, 1); /* first: it may have ended before the call that starts it returns */
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    int status = start(&thread, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
    if (status < 0)
        count_thread(server, (uint32_t)-1);
    return status;
}

static int wants_thread(struct onion_nbd_server *server) {
    pthread_mutex_lock(&server->lock);
    int wants = !server->stopping && server->process == getpid() && server->thread_count < server->ready_max;
    pthread_mutex_unlock(&server->lock);
    return wants;
}

static void *pass(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* Those that are left to others have the stacks that others get. They are held meanwhile, since there is no other way to
 * know how many the system gives: it may count those of a user, of a container, or the memory of the process. */
void onion_nbd_start_ready_threads(struct onion_nbd_server *server, uint32_t count, void *(*run)(void *)) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t held[LEFT_TO_OTHERS];
    int held_count = 0, status = 0;
    pthread_mutex_lock(&server->lock);
    server->ready_max = count;
    pthread_mutex_unlock(&server->lock);
    pthread_mutex_lock(&gate);
    while (status == 0 && held_count < LEFT_TO_OTHERS && wants_thread(server))
        if ((status = start(&held[held_count], NULL, pass, &gate)) == 0)
            held_count++;
    while (status == 0 && wants_thread(server))
        status = onion_nbd_start_thread(server, run, server);
    pthread_mutex_unlock(&gate);
    while (held_count)
        pthread_join(held[--held_count], NULL);
    if (status == 0)
        return;
    pthread_mutex_lock(&server->lock); /* those that begin with clients later are not kept without an end either */
    server->ready_max = server->thread_count < count ? server->thread_count : count;
    pthread_mutex_unlock(&server->lock);
}
