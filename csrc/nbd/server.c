/* server.c: starts and stops the server and its connections. See server.h for what must hold. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "base/site.h"
#include "base/turns.h"
#include "nbd/internal.h"

#define LEAVING_MS 2000       /* for so long a new connection waits for one that gives way to be gone */
#define ACCEPTING_NS 10000000 /* behind so long, no further client is taken by the same call */

/* ---- life ---- */

int onion_nbd_new(const struct onion_nbd_options *options, struct onion_nbd_server **out) {
    if (!options->connections_max || options->request_bytes_max < 65536 ||
        options->request_bytes_max > ONION_NBD_REQUEST_BYTES_MAX ||
        options->bytes_in_flight_max < options->request_bytes_max)
        return -EINVAL;
    int status = onion_fault_install();
    struct onion_nbd_server *server = calloc(1, sizeof *server);
    if (status < 0 || !server) {
        free(server);
        return status < 0 ? status : -ENOMEM;
    }
    server->options = *options;
    server->last = &server->exports;
    server->process = getpid();
    server->events = calloc(ONION_NBD_EVENTS_MAX, sizeof *server->events);
    server->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!server->events || server->event_fd < 0) {
        status = server->events ? -errno : -ENOMEM;
        if (server->event_fd >= 0)
            close(server->event_fd);
        free(server->events);
        free(server);
        return status;
    }
    pthread_mutex_init(&server->lock, NULL);
    pthread_mutex_init(&server->event_lock, NULL);
    onion_nbd_init_condition(&server->closed);
    *out = server;
    return 0;
}

void onion_nbd_free(struct onion_nbd_server *server) {
    if (!server)
        return;
    onion_nbd_stop(server, 0);
    pthread_mutex_destroy(&server->lock);
    pthread_mutex_destroy(&server->event_lock);
    pthread_cond_destroy(&server->closed);
    close(server->event_fd);
    free(server->events);
    free(server->default_name);
    free(server);
}

/* ---- connections ---- */

static void free_connection(struct onion_nbd_connection *connection) {
    close(connection->fd);
    pthread_mutex_destroy(&connection->send_lock);
    pthread_mutex_destroy(&connection->helper.lock);
    pthread_cond_destroy(&connection->helper.changed);
    free(connection->in);
    free(connection->payload);
    free(connection->batch);
    free(connection);
}

static void link_connection(struct onion_nbd_server *server, struct onion_nbd_connection *connection) {
    connection->link = &server->connections;
    connection->next = server->connections;
    if (connection->next)
        connection->next->link = &connection->next;
    server->connections = connection;
    server->connection_count++;
}

/* After the count is decremented, the server may be freed by all but its threads. */
static void end_connection(struct onion_nbd_connection *connection) {
    struct onion_nbd_server *server = connection->server;
    pthread_mutex_lock(&server->lock);
    *connection->link = connection->next;
    if (connection->next)
        connection->next->link = connection->link;
    onion_nbd_add_counters(&server->past, &connection->counters);
    if (connection->session.chosen)
        onion_nbd_add_counters(&connection->session.chosen->past, &connection->counters);
    pthread_mutex_unlock(&server->lock);
    onion_nbd_session_end(&connection->session);
    pthread_mutex_lock(&server->lock);
    free_connection(connection);
    server->connection_count--;
    pthread_cond_broadcast(&server->closed);
    pthread_mutex_unlock(&server->lock);
}

static void run_connection(struct onion_nbd_connection *connection) {
    if (onion_nbd_negotiate(connection)) {
        const char *name = onion_nbd_label(connection->session.chosen)->name;
        onion_nbd_event(connection->server, "%s: connected to %s%s", connection->peer, *name ? name : "(default)",
                        connection->session.tls ? " over TLS" : "");
        onion_nbd_transmit(connection);
        onion_nbd_event(connection->server, "%s: closed", connection->peer);
    }
    end_connection(connection);
}

/* A thread serves one client, and then later ones. It holds nothing of a former one: the connection is freed, and the
 * place of its last error is forgotten. */
static void serve_clients(struct onion_nbd_server *server, struct onion_nbd_connection *connection) {
    (void)onion_turns_take_short(); /* a client waits for each of its turns; the helper gets them too */
    for (; connection; connection = onion_nbd_next_connection(server)) {
        run_connection(connection);
        onion_site_clear();
    }
}

static void *run_thread(void *argument) {
    struct onion_nbd_connection *connection = argument;
    serve_clients(connection->server, connection);
    return NULL;
}

static void *run_ready_thread(void *argument) {
    struct onion_nbd_server *server = argument;
    serve_clients(server, onion_nbd_next_connection(server));
    return NULL;
}

void onion_nbd_begin_threads(struct onion_nbd_server *server, uint32_t count) {
    onion_nbd_start_ready_threads(server, count < ONION_NBD_KEPT_MAX ? count : ONION_NBD_KEPT_MAX, run_ready_thread);
}

static struct onion_nbd_connection *new_connection(struct onion_nbd_server *server, int fd, const char *peer, int flags,
                                                   uint32_t client_flags) {
    struct onion_nbd_connection *connection = calloc(1, sizeof *connection);
    unsigned char *in = malloc(ONION_NBD_IN_BYTES);
    if (!connection || !in) {
        free(connection);
        free(in);
        return NULL;
    }
    connection->in = in;
    connection->server = server;
    connection->fd = fd;
    connection->flags = flags;
    connection->client_flags = client_flags;
    connection->negotiating = 1;
    snprintf(connection->peer, sizeof connection->peer, "%s", peer);
    connection->session.server = server;
    connection->session.tls = !!(flags & ONION_NBD_SERVE_TLS);
    connection->session.require_tls = !!(flags & ONION_NBD_SERVE_REQUIRE_TLS);
    pthread_mutex_init(&connection->send_lock, NULL);
    pthread_mutex_init(&connection->helper.lock, NULL);
    pthread_cond_init(&connection->helper.changed, NULL);
    return connection;
}

/* Waits until fewer than so many connections are left, or the time is over. The caller holds the server's lock. */
static void wait_for_fewer(struct onion_nbd_server *server, uint64_t count, uint64_t grace_ms) {
    struct timespec until = onion_nbd_in_ms(grace_ms);
    while (server->connection_count >= count && pthread_cond_timedwait(&server->closed, &server->lock, &until) == 0)
        ;
}

/* Returns whether there is room for one more connection. If not, the oldest connection that still negotiates is ended
 * to make room: otherwise a few silent clients would keep all others out until their time is over. Those that are being
 * ended still count, and there are at most as many of them: behind that, a new one waits for the first of them to be gone,
 * which a busy machine may not have let run yet. The caller holds the server's lock, which is released meanwhile. */
static int has_room(struct onion_nbd_server *server) {
    struct onion_nbd_connection *oldest = NULL;
    uint64_t max = server->options.connections_max;
    wait_for_fewer(server, 2 * max, LEAVING_MS);
    if (server->connection_count < max)
        return 1;
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next)
        if (at->negotiating && !at->gives_way && (!oldest || at->id < oldest->id))
            oldest = at;
    if (!oldest || server->connection_count >= 2 * max)
        return 0;
    oldest->gives_way = 1;
    shutdown(oldest->fd, SHUT_RDWR);
    return 1;
}

int64_t onion_nbd_serve(struct onion_nbd_server *server, int fd, const char *peer, int flags, uint32_t client_flags) {
    struct onion_nbd_connection *connection = new_connection(server, fd, peer, flags, client_flags);
    if (!connection) {
        close(fd);
        return -ENOMEM;
    }
    pthread_mutex_lock(&server->lock);
    int room = has_room(server); /* it may be stopped while it waits */
    int64_t id = server->stopping ? -ESHUTDOWN : room ? (int64_t)++server->next_id : -EMFILE;
    struct onion_nbd_kept *taken_by = NULL;
    if (id > 0) {
        connection->id = (uint64_t)id;
        link_connection(server, connection);
        taken_by = onion_nbd_hand_over(server, connection);
    }
    pthread_mutex_unlock(&server->lock);
    if (id < 0) {
        free_connection(connection);
    } else if (taken_by) {
        onion_nbd_wake_kept(taken_by); /* from now on, the connection may have ended */
    } else {
        /* Without the lock, for which the new thread would wait first of all. */
        int status = onion_nbd_start_thread(server, run_thread, connection);
        if (status < 0) {
            end_connection(connection);
            id = status;
        }
    }
    if (id == -EMFILE)
        onion_nbd_event(server, "%s: refused: %u connections are open", peer, server->options.connections_max);
    return id;
}

int onion_nbd_accept(struct onion_nbd_server *server, int listener) {
    int64_t until = onion_nbd_now_ns() + ACCEPTING_NS;
    int count = 0;
    do {
        char peer[64];
        struct ucred other = {0};
        socklen_t length = sizeof other;
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0)
            return errno == EAGAIN ? count : -errno;
        count++;
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &other, &length);
        snprintf(peer, sizeof peer, "process %d of user %u", (int)other.pid, (unsigned)other.uid);
        int64_t id = onion_nbd_serve(server, fd, peer, 0, 0);
        if (id == -EMFILE)
            onion_nbd_event(server, "%s: refused: %u clients are connected; raise --connections to let more in", peer,
                            server->options.connections_max);
        else if (id < 0)
            onion_nbd_event(server, "%s: refused: %s", peer, strerror((int)-id));
    } while (onion_nbd_now_ns() < until);
    return count;
}

uint32_t onion_nbd_connections(struct onion_nbd_server *server, struct onion_nbd_connection_info *infos,
                               uint32_t capacity) {
    uint32_t count = 0;
    pthread_mutex_lock(&server->lock);
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next, count++) {
        if (count >= capacity)
            continue;
        struct onion_nbd_connection_info *info = &infos[count];
        memset(info, 0, sizeof *info);
        info->id = at->id;
        snprintf(info->peer, sizeof info->peer, "%s", at->peer);
        info->tls = at->session.tls;
        info->negotiating = at->negotiating;
        if (!at->negotiating)
            snprintf(info->export_name, sizeof info->export_name, "%s", onion_nbd_label(at->session.chosen)->name);
        onion_nbd_add_counters(&info->counters, &at->counters);
    }
    pthread_mutex_unlock(&server->lock);
    return count;
}

void onion_nbd_count(struct onion_nbd_server *server, struct onion_nbd_counters *out) {
    pthread_mutex_lock(&server->lock);
    *out = server->past;
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next)
        onion_nbd_add_counters(out, &at->counters);
    pthread_mutex_unlock(&server->lock);
}

int onion_nbd_count_export(struct onion_nbd_server *server, const char *name, struct onion_nbd_counters *out) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = onion_nbd_named(server, name, strlen(name));
    if (export)
        *out = export->past;
    for (struct onion_nbd_connection *at = server->connections; export && at; at = at->next)
        if (!at->negotiating && at->session.chosen == export)
            onion_nbd_add_counters(out, &at->counters);
    pthread_mutex_unlock(&server->lock);
    return export ? 0 : -ENOENT;
}

/* ---- stop ---- */

static void shut_all(struct onion_nbd_server *server, int how) {
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next) {
        if (how == SHUT_RDWR)
            __atomic_store_n(&at->broken, 1, __ATOMIC_SEQ_CST);
        /* A connection that negotiates has nothing in flight, so it is shut down at once. */
        shutdown(at->fd, at->negotiating ? SHUT_RDWR : how);
    }
}

/* Flushes and removes all exports. No export is added any more. A volume that is closed already was flushed when it was
 * closed. */
static int flush_exports(struct onion_nbd_server *server) {
    int status = 0;
    for (;;) {
        pthread_mutex_lock(&server->lock);
        struct onion_nbd_export *export = server->exports;
        if (export)
            onion_nbd_unlink_export(server, export);
        pthread_mutex_unlock(&server->lock);
        if (!export)
            return status;
        int one = onion_nbd_flush(server, export);
        status = status < 0 || one == ONION_E_CLOSED || one == -ESHUTDOWN ? status : one;
        onion_nbd_take_volume_away(export);
        onion_nbd_unref(server, export);
    }
}

int onion_nbd_stop(struct onion_nbd_server *server, uint64_t grace_ms) {
    if (server->process != getpid())
        return 0; /* in the child of a fork: the threads, the locks that they hold and the clients are its parent's */
    pthread_mutex_lock(&server->lock);
    server->stopping = 1;
    onion_nbd_end_kept_threads(server);
    /* The connections still read and answer what has arrived, and then find the end of the stream. */
    shut_all(server, SHUT_RD);
    wait_for_fewer(server, 1, grace_ms);
    shut_all(server, SHUT_RDWR);
    for (struct onion_nbd_export *export = server->exports; export; export = export->next) {
        pthread_mutex_lock(&export->lock);
        export->holds = 0; /* otherwise a waiting connection would never end, and the flush below would not begin */
        pthread_cond_broadcast(&export->changed);
        pthread_mutex_unlock(&export->lock);
    }
    while (server->connection_count || onion_nbd_has_threads(server))
        pthread_cond_wait(&server->closed, &server->lock);
    pthread_mutex_unlock(&server->lock);
    return flush_exports(server);
}
