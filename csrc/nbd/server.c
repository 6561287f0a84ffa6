/* server.c: exports, connections and events: what lives as long as the server. See server.h for what must hold.
 *
 * An export is taken out of the list at once and freed with its last reference. Whether its volume may be used is a
 * question of its own: requests count themselves in flight (onion_nbd_enter), and who wants to take the volume away
 * holds the export, so that no more come in, and waits for those that are inside. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "nbd/internal.h"

#define STACK_BYTES (512 << 10)

/* ---- life ---- */

static void init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

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
    init_condition(&server->closed);
    *out = server;
    return 0;
}

static void free_label(struct onion_nbd_label *label) {
    if (label) {
        free(label->name);
        free(label->description);
        free(label);
    }
}

static struct onion_nbd_label *make_label(const char *name, const char *description) {
    struct onion_nbd_label *label = calloc(1, sizeof *label);
    if (label) {
        label->name = strdup(name);
        label->description = strdup(description);
    }
    if (label && label->name && label->description)
        return label;
    free_label(label);
    return NULL;
}

static void free_export(struct onion_nbd_export *export) {
    while (export->contexts) {
        struct onion_nbd_context *context = export->contexts;
        export->contexts = context->next;
        free(context->name);
        free(context->runs);
        free(context);
    }
    pthread_mutex_destroy(&export->lock);
    pthread_cond_destroy(&export->changed);
    while (export->label) {
        struct onion_nbd_label *label = export->label;
        export->label = label->former;
        free_label(label);
    }
    free(export);
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

/* ---- events ---- */

void onion_nbd_event(struct onion_nbd_server *server, const char *format, ...) {
    va_list arguments;
    uint64_t one = 1;
    va_start(arguments, format);
    pthread_mutex_lock(&server->event_lock);
    if (server->event_count == ONION_NBD_EVENTS_MAX) {
        server->event_head = (server->event_head + 1) % ONION_NBD_EVENTS_MAX;
        server->event_count--;
        server->events_dropped++;
    }
    uint32_t at = (server->event_head + server->event_count++) % ONION_NBD_EVENTS_MAX;
    vsnprintf(server->events[at], ONION_NBD_EVENT_BYTES, format, arguments);
    pthread_mutex_unlock(&server->event_lock);
    va_end(arguments);
    /* Fails only where the counter is full, and then it is readable anyway. */
    if (write(server->event_fd, &one, sizeof one) < 0)
        return;
}

int onion_nbd_event_fd(const struct onion_nbd_server *server) { return server->event_fd; }

uint32_t onion_nbd_next_event(struct onion_nbd_server *server, char out[ONION_NBD_EVENT_BYTES], uint64_t *dropped) {
    uint32_t length = 0;
    uint64_t count;
    pthread_mutex_lock(&server->event_lock);
    *dropped = server->events_dropped;
    server->events_dropped = 0;
    if (server->event_count) {
        memcpy(out, server->events[server->event_head], ONION_NBD_EVENT_BYTES);
        length = (uint32_t)strlen(out);
        server->event_head = (server->event_head + 1) % ONION_NBD_EVENTS_MAX;
        server->event_count--;
    }
    if (!server->event_count && read(server->event_fd, &count, sizeof count) < 0)
        count = 0;
    pthread_mutex_unlock(&server->event_lock);
    return length;
}

/* ---- exports ---- */

static struct onion_nbd_export **place_of(struct onion_nbd_server *server, const char *name, size_t length) {
    struct onion_nbd_export **at = &server->exports;
    while (*at && (strlen((*at)->label->name) != length || memcmp((*at)->label->name, name, length)))
        at = &(*at)->next;
    return at;
}

struct onion_nbd_export *onion_nbd_find(struct onion_nbd_server *server, const char *name, uint32_t length) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = *place_of(server, name, length);
    if (!export && !length && server->default_name)
        export = *place_of(server, server->default_name, strlen(server->default_name));
    if (export)
        export->references++;
    pthread_mutex_unlock(&server->lock);
    return export;
}

void onion_nbd_unref(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    if (!export)
        return;
    pthread_mutex_lock(&server->lock);
    int last = --export->references == 0;
    pthread_mutex_unlock(&server->lock);
    if (last)
        free_export(export);
}

int onion_nbd_add_export(struct onion_nbd_server *server, const char *name, struct onion_volume *volume, int read_only,
                         const char *description) {
    if (strlen(name) > ONION_NBD_NAME_MAX || strlen(description) > ONION_NBD_NAME_MAX)
        return -EINVAL;
    struct onion_nbd_export *export = calloc(1, sizeof *export);
    if (!export)
        return -ENOMEM;
    export->references = 1;
    export->label = make_label(name, description);
    export->read_only = read_only;
    export->volume = volume;
    export->generation = 1;
    export->next_context_id = ONION_NBD_ID_CHANGED;
    pthread_mutex_init(&export->lock, NULL);
    pthread_cond_init(&export->changed, NULL);
    int status = export->label ? 0 : -ENOMEM;
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export **at = place_of(server, name, strlen(name));
    if (status == 0)
        status = server->stopping ? -ESHUTDOWN : *at ? -EEXIST : 0;
    if (status == 0)
        *at = export; /* last, so that LIST keeps the order in which they came */
    pthread_mutex_unlock(&server->lock);
    if (status < 0)
        free_export(export);
    return status;
}

int onion_nbd_rename_export(struct onion_nbd_server *server, const char *name, const char *new_name,
                            const char *description) {
    if (strlen(new_name) > ONION_NBD_NAME_MAX || strlen(description) > ONION_NBD_NAME_MAX)
        return -EINVAL;
    struct onion_nbd_label *label = make_label(new_name, description);
    char *default_name = strdup(new_name);
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = *place_of(server, name, strlen(name));
    int status = !label || !default_name ? -ENOMEM : !export ? -ENOENT : 0;
    if (status == 0 && *place_of(server, new_name, strlen(new_name)))
        status = -EEXIST;
    if (status == 0) {
        label->former = export->label; /* connections may be reading it */
        __atomic_store_n(&export->label, label, __ATOMIC_RELEASE);
        label = NULL;
    }
    if (status == 0 && server->default_name && !strcmp(server->default_name, name)) {
        char *old = server->default_name;
        server->default_name = default_name;
        default_name = old;
    }
    pthread_mutex_unlock(&server->lock);
    free_label(label);
    free(default_name);
    return status;
}

int onion_nbd_set_default(struct onion_nbd_server *server, const char *name) {
    char *copy = strdup(name);
    if (!copy)
        return -ENOMEM;
    pthread_mutex_lock(&server->lock);
    int status = *place_of(server, name, strlen(name)) ? 0 : -ENOENT;
    if (status == 0) {
        char *old = server->default_name;
        server->default_name = copy;
        copy = old;
    }
    pthread_mutex_unlock(&server->lock);
    free(copy);
    return status;
}

/* ---- in flight ---- */

struct onion_volume *onion_nbd_enter(struct onion_nbd_export *export, uint64_t *generation) {
    pthread_mutex_lock(&export->lock);
    while (export->holds && export->volume)
        pthread_cond_wait(&export->changed, &export->lock);
    struct onion_volume *volume = export->volume;
    if (volume)
        export->in_flight++;
    *generation = export->generation;
    pthread_mutex_unlock(&export->lock);
    return volume;
}

void onion_nbd_leave(struct onion_nbd_export *export) {
    pthread_mutex_lock(&export->lock);
    if (--export->in_flight == 0 && (export->holds || !export->volume))
        pthread_cond_broadcast(&export->changed);
    pthread_mutex_unlock(&export->lock);
}

static int flush_once(struct onion_nbd_export *export, int *wants_scrub) {
    uint64_t generation;
    struct onion_volume *volume = onion_nbd_enter(export, &generation);
    if (!volume)
        return -ESHUTDOWN;
    int status = onion_volume_flush(volume);
    *wants_scrub = onion_volume_wants_scrub(volume) || onion_volume_may_want_compaction(volume);
    onion_nbd_leave(export);
    return status;
}

int onion_nbd_flush(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    int wants_scrub = 0;
    int status = export->read_only ? 0 : flush_once(export, &wants_scrub);
    if ((status == -ENOSPC || status == -EDQUOT) && hooks->make_room && hooks->make_room(hooks->context, onion_nbd_label(export)->name))
        status = 0;
    if (wants_scrub && hooks->freed)
        hooks->freed(hooks->context, onion_nbd_label(export)->name);
    return status;
}

/* With the export's lock. */
static void hold(struct onion_nbd_export *export) {
    export->holds++;
    while (export->in_flight)
        pthread_cond_wait(&export->changed, &export->lock);
}

static void release(struct onion_nbd_export *export) {
    export->holds--;
    pthread_cond_broadcast(&export->changed);
}

/* A volume that is gone stays gone: who is held sees it, and later requests get ESHUTDOWN. */
static void take_volume_away(struct onion_nbd_export *export) {
    pthread_mutex_lock(&export->lock);
    export->volume = NULL;
    pthread_cond_broadcast(&export->changed);
    while (export->in_flight)
        pthread_cond_wait(&export->changed, &export->lock);
    pthread_mutex_unlock(&export->lock);
}

static struct onion_nbd_export *find_named(struct onion_nbd_server *server, const char *name) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = *place_of(server, name, strlen(name));
    if (export)
        export->references++;
    pthread_mutex_unlock(&server->lock);
    return export;
}

int onion_nbd_remove_export(struct onion_nbd_server *server, const char *name, int if_unused) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export **at = place_of(server, name, strlen(name)), *export = *at;
    int status = !export ? -ENOENT : if_unused && export->references > 1 ? -EBUSY : 0; /* one is that of the list */
    if (status == 0)
        *at = export->next;
    pthread_mutex_unlock(&server->lock);
    if (status < 0)
        return status;
    take_volume_away(export);
    onion_nbd_unref(server, export);
    return 0;
}

int onion_nbd_replace_volume(struct onion_nbd_server *server, const char *name, struct onion_volume *volume) {
    struct onion_nbd_export *export = find_named(server, name);
    if (!export)
        return -ENOENT;
    pthread_mutex_lock(&export->lock);
    hold(export);
    if (export->volume)
        export->volume = volume;
    export->generation++;
    for (struct onion_nbd_context *context = export->contexts; context; context = context->next)
        context->all_changed = 1;
    release(export);
    pthread_mutex_unlock(&export->lock);
    onion_nbd_unref(server, export);
    return 0;
}

int onion_nbd_hold(struct onion_nbd_server *server, const char *name) {
    struct onion_nbd_export *export = find_named(server, name);
    if (!export)
        return -ENOENT;
    pthread_mutex_lock(&export->lock);
    hold(export);
    pthread_mutex_unlock(&export->lock);
    onion_nbd_unref(server, export);
    return 0;
}

int onion_nbd_release(struct onion_nbd_server *server, const char *name) {
    struct onion_nbd_export *export = find_named(server, name);
    if (!export)
        return -ENOENT;
    pthread_mutex_lock(&export->lock);
    if (export->holds)
        release(export);
    pthread_mutex_unlock(&export->lock);
    onion_nbd_unref(server, export);
    return 0;
}

/* ---- changed-since contexts ---- */

int64_t onion_nbd_change_mark(struct onion_nbd_server *server, const char *name) {
    struct onion_nbd_export *export = find_named(server, name);
    uint64_t generation;
    struct onion_volume *volume = export ? onion_nbd_enter(export, &generation) : NULL;
    int64_t mark = volume ? (int64_t)onion_volume_birth(volume) : -ENOENT;
    if (volume)
        onion_nbd_leave(export);
    onion_nbd_unref(server, export);
    return mark;
}

static int runs_are_sorted(const uint64_t (*runs)[2], size_t count) {
    for (size_t i = 0; i < count; i++)
        if (runs[i][1] == 0 || runs[i][0] + runs[i][1] < runs[i][0] ||
            (i && runs[i - 1][0] + runs[i - 1][1] > runs[i][0]))
            return 0;
    return 1;
}

/* The context of that name, made if it is not there. With the export's lock. NULL: no memory. */
static struct onion_nbd_context *context_named(struct onion_nbd_export *export, const char *meta) {
    struct onion_nbd_context **at = &export->contexts;
    while (*at && strcmp((*at)->name, meta))
        at = &(*at)->next;
    if (*at)
        return *at;
    struct onion_nbd_context *context = calloc(1, sizeof *context);
    char *name = strdup(meta);
    if (!context || !name) {
        free(context);
        free(name);
        return NULL;
    }
    context->name = name;
    context->id = export->next_context_id++;
    return *at = context;
}

int onion_nbd_set_context(struct onion_nbd_server *server, const char *name, const char *meta,
                          const uint64_t (*runs)[2], size_t run_count, uint64_t mark) {
    if (strlen(meta) > ONION_NBD_NAME_MAX || !runs_are_sorted(runs, run_count))
        return -EINVAL;
    uint64_t (*copy)[2] = malloc((run_count + 1) * sizeof *copy);
    if (!copy)
        return -ENOMEM;
    if (run_count)
        memcpy(copy, runs, run_count * sizeof *copy);
    struct onion_nbd_export *export = find_named(server, name);
    int status = export ? 0 : -ENOENT;
    if (export) {
        pthread_mutex_lock(&export->lock);
        hold(export);
        struct onion_nbd_context *context = context_named(export, meta);
        if (context) {
            uint64_t (*old)[2] = context->runs;
            context->runs = copy;
            context->run_count = run_count;
            context->mark = mark;
            context->all_changed = 0;
            copy = old;
        } else {
            status = -ENOMEM;
        }
        release(export);
        pthread_mutex_unlock(&export->lock);
    }
    free(copy);
    onion_nbd_unref(server, export);
    return status;
}

/* ---- connections ---- */

static void add_counters(struct onion_nbd_counters *sum, const struct onion_nbd_counters *one) {
    for (int i = 0; i < ONION_NBD_VERBS; i++) {
        sum->requests[i] += __atomic_load_n(&one->requests[i], __ATOMIC_RELAXED);
        sum->bytes[i] += __atomic_load_n(&one->bytes[i], __ATOMIC_RELAXED);
        sum->latency_ns[i] += __atomic_load_n(&one->latency_ns[i], __ATOMIC_RELAXED);
    }
    sum->errors += __atomic_load_n(&one->errors, __ATOMIC_RELAXED);
    sum->sends += __atomic_load_n(&one->sends, __ATOMIC_RELAXED);
}

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

/* The last that a connection's thread does: once the count is down the server may be freed. */
static void end_connection(struct onion_nbd_connection *connection) {
    struct onion_nbd_server *server = connection->server;
    pthread_mutex_lock(&server->lock);
    *connection->link = connection->next;
    if (connection->next)
        connection->next->link = connection->link;
    add_counters(&server->past, &connection->counters);
    if (connection->session.chosen)
        add_counters(&connection->session.chosen->past, &connection->counters);
    pthread_mutex_unlock(&server->lock);
    onion_nbd_session_end(&connection->session);
    pthread_mutex_lock(&server->lock);
    free_connection(connection);
    server->connection_count--;
    pthread_cond_broadcast(&server->closed);
    pthread_mutex_unlock(&server->lock);
}

static void *run_connection(void *argument) {
    struct onion_nbd_connection *connection = argument;
    struct onion_nbd_server *server = connection->server;
    if (onion_nbd_negotiate(connection)) {
        const char *name = onion_nbd_label(connection->session.chosen)->name;
        onion_nbd_event(server, "%s: connected to %s%s", connection->peer, *name ? name : "(default)",
                        connection->session.tls ? " over TLS" : "");
        onion_nbd_transmit(connection);
        onion_nbd_event(server, "%s: closed", connection->peer);
    }
    end_connection(connection);
    return NULL;
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

static int start_thread(struct onion_nbd_connection *connection) {
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* of this thread's own loads: base/sigbus.h */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = -pthread_create(&thread, &attributes, run_connection, connection);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return status;
}

/* Whether there is room for one more. Who has not come to use an export yet gives way to who may, the oldest first: else a
 * few silent clients would keep all others out until their time is over. With the server's lock. */
static int has_room(struct onion_nbd_server *server) {
    struct onion_nbd_connection *oldest = NULL;
    uint64_t max = server->options.connections_max;
    if (server->connection_count < max)
        return 1;
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next)
        if (at->negotiating && !at->gives_way && (!oldest || at->id < oldest->id))
            oldest = at;
    if (!oldest || server->connection_count >= 2 * max) /* those that give way are on their way out */
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
    int64_t id = server->stopping ? -ESHUTDOWN
                 : has_room(server) ? (int64_t)++server->next_id
                                    : -EMFILE;
    if (id > 0) {
        connection->id = (uint64_t)id;
        link_connection(server, connection);
        int status = start_thread(connection);
        if (status < 0) {
            server->connections = connection->next;
            if (connection->next)
                connection->next->link = &server->connections;
            server->connection_count--;
            id = status;
        }
    }
    pthread_mutex_unlock(&server->lock);
    if (id < 0)
        free_connection(connection);
    if (id == -EMFILE)
        onion_nbd_event(server, "%s: refused: %u connections are open", peer, server->options.connections_max);
    return id;
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
        add_counters(&info->counters, &at->counters);
    }
    pthread_mutex_unlock(&server->lock);
    return count;
}

void onion_nbd_count(struct onion_nbd_server *server, struct onion_nbd_counters *out) {
    pthread_mutex_lock(&server->lock);
    *out = server->past;
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next)
        add_counters(out, &at->counters);
    pthread_mutex_unlock(&server->lock);
}

int onion_nbd_count_export(struct onion_nbd_server *server, const char *name, struct onion_nbd_counters *out) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = *place_of(server, name, strlen(name));
    if (export)
        *out = export->past;
    for (struct onion_nbd_connection *at = server->connections; export && at; at = at->next)
        if (!at->negotiating && at->session.chosen == export)
            add_counters(out, &at->counters);
    pthread_mutex_unlock(&server->lock);
    return export ? 0 : -ENOENT;
}

/* ---- stop ---- */

/* Until no connection is left, or the time is over. With the server's lock. */
static void wait_for_connections(struct onion_nbd_server *server, uint64_t grace_ms) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(grace_ms / 1000);
    until.tv_nsec += (long)(grace_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    while (server->connection_count && pthread_cond_timedwait(&server->closed, &server->lock, &until) == 0)
        ;
}

static void shut_all(struct onion_nbd_server *server, int how) {
    for (struct onion_nbd_connection *at = server->connections; at; at = at->next) {
        if (how == SHUT_RDWR)
            __atomic_store_n(&at->broken, 1, __ATOMIC_SEQ_CST);
        /* While it negotiates nothing is in flight. */
        shutdown(at->fd, at->negotiating ? SHUT_RDWR : how);
    }
}

/* No export is added any more. A volume that was closed already has been flushed by who closed it. */
static int flush_exports(struct onion_nbd_server *server) {
    int status = 0;
    for (;;) {
        pthread_mutex_lock(&server->lock);
        struct onion_nbd_export *export = server->exports;
        if (export)
            server->exports = export->next;
        pthread_mutex_unlock(&server->lock);
        if (!export)
            return status;
        int one = onion_nbd_flush(server, export);
        status = status < 0 || one == ONION_E_CLOSED || one == -ESHUTDOWN ? status : one;
        take_volume_away(export);
        onion_nbd_unref(server, export);
    }
}

int onion_nbd_stop(struct onion_nbd_server *server, uint64_t grace_ms) {
    pthread_mutex_lock(&server->lock);
    server->stopping = 1;
    /* What has arrived is still read and answered; then the end of the stream is found. */
    shut_all(server, SHUT_RD);
    wait_for_connections(server, grace_ms);
    shut_all(server, SHUT_RDWR);
    for (struct onion_nbd_export *export = server->exports; export; export = export->next) {
        pthread_mutex_lock(&export->lock);
        export->holds = 0; /* else a connection that is held would never end, nor the flush below begin */
        pthread_cond_broadcast(&export->changed);
        pthread_mutex_unlock(&export->lock);
    }
    while (server->connection_count)
        pthread_cond_wait(&server->closed, &server->lock);
    pthread_mutex_unlock(&server->lock);
    return flush_exports(server);
}
