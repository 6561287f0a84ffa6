/* transmission.c: the transmission phase: it receives requests, runs them or gives them to the helper, and answers
 * them.
 *
 * One receive takes what has arrived. All complete requests are run, and their replies are sent together. Then the next
 * receive waits. At queue depth 1 this takes two system calls for each request, and no other thread takes part. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "nbd/internal.h"

#define SOCKET_BUFFER_BYTES (1 << 20) /* with more, data leaves the caches before the client has read it */
#define SLOW_ZERO_BYTES (32u << 20)   /* the helper zeroes and trims ranges longer than this */
#define SLOW_WRITE_BYTES (1u << 20)   /* the helper writes zeros as data if they are longer than this */
#define SLOW_STATUS_BYTES (128u << 20)
#define PAYLOAD_BYTES_KEPT (4u << 20)
#define SPIN_NS 50000 /* the time that a receive may poll without sleeping */

enum verdict { GO_ON, NEEDS_MORE, ENDED };

/* ---- receiving ---- */

/* Sets the socket's options. A larger buffer lets more of a large reply be sent at a time. If the system limits it, the
 * smaller buffer is used. */
static void prepare_socket(struct onion_nbd_connection *connection) {
    int bytes = SOCKET_BUFFER_BYTES, one = 1;
    struct timeval idle = {.tv_sec = connection->server->options.idle_seconds};
    if (setsockopt(connection->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes))
        setsockopt(connection->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* a Unix socket refuses, and needs none */
    setsockopt(connection->fd, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof idle);
}

/* Receives. If several requests are under way and the last ones came fast, it first polls for a short time without
 * sleeping, because waking up costs more than a request. At queue depth 1 it does not poll: the client often needs this
 * very processor to send its next request, so polling would delay it. Measured, polling halved the rate of reads. */
static ssize_t receive_soon(struct onion_nbd_connection *connection, void *out, size_t length, int several) {
    int64_t began = onion_nbd_now_ns(), waited = 0;
    ssize_t n = -1;
    while (several && connection->requests_come_fast && waited < SPIN_NS && n < 0) {
        n = recv(connection->fd, out, length, MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN)
            break;
        waited = onion_nbd_now_ns() - began;
    }
    if (n < 0)
        n = recv(connection->fd, out, length, 0);
    connection->received_ns = onion_nbd_now_ns();
    connection->requests_come_fast = connection->received_ns - began < SPIN_NS;
    return n;
}

/* Counts the latency of the requests whose replies are in the socket now. They arrived together, so they have the same
 * latency. */
static void count_latency(struct onion_nbd_connection *connection) {
    uint64_t ns = (uint64_t)(onion_nbd_now_ns() - connection->received_ns);
    for (int verb = 0; verb < ONION_NBD_VERBS; verb++)
        if (connection->waiting[verb]) {
            onion_nbd_counter_add(&connection->counters.latency_ns[verb], ns * connection->waiting[verb]);
            connection->waiting[verb] = 0;
        }
}

/* Sends all replies and waits for bytes, while nothing is in flight. all_answered: every request that was begun has its
 * reply, so the latency is counted. Returns the number of bytes, 0 at the end, or -errno. */
static ssize_t receive(struct onion_nbd_connection *connection, void *out, size_t length, int all_answered) {
    int several = connection->reply_count > 1;
    int status = onion_nbd_send_replies(connection);
    onion_nbd_connection_leave(connection);
    if (all_answered)
        count_latency(connection);
    while (status == 0) {
        ssize_t n = receive_soon(connection, out, length, several);
        if (n >= 0)
            return n;
        if (errno == EINTR || (errno == EAGAIN && !onion_nbd_helper_idle(connection)))
            continue;
        if (errno == EAGAIN)
            onion_nbd_event(connection->server, "%s: idle for %u s", connection->peer,
                            connection->server->options.idle_seconds);
        status = -errno;
    }
    return status;
}

/* Receives more bytes into the buffer, after those that are in it. */
static enum verdict fill(struct onion_nbd_connection *connection) {
    size_t held = connection->in_to - connection->in_from;
    if (connection->in_from) {
        memmove(connection->in, connection->in + connection->in_from, held);
        connection->in_from = 0;
        connection->in_to = held;
    }
    ssize_t n = receive(connection, connection->in + held, ONION_NBD_IN_BYTES - held, 1);
    if (n <= 0)
        return ENDED;
    connection->in_to += (size_t)n;
    return GO_ON;
}

/* Takes exactly `length` bytes: first those that were received already, then the rest. out NULL: they are skipped. */
static int take_bytes(struct onion_nbd_connection *connection, unsigned char *out, uint64_t length) {
    size_t held = connection->in_to - connection->in_from;
    size_t part = held < length ? held : (size_t)length;
    if (out)
        memcpy(out, connection->in + connection->in_from, part);
    connection->in_from += part;
    for (uint64_t done = part; done < length;) {
        /* The buffer is empty by now, so skipped bytes can go there. */
        uint64_t room = out || length - done < ONION_NBD_IN_BYTES ? length - done : ONION_NBD_IN_BYTES;
        ssize_t n = receive(connection, out ? out + done : connection->in, (size_t)room, 0);
        if (n <= 0)
            return -ECONNRESET;
        done += (uint64_t)n;
    }
    return 0;
}

/* ---- running ---- */

void onion_nbd_limits(const struct onion_nbd_session *session, const struct onion_volume *volume,
                      struct onion_nbd_limits *limits) {
    limits->size_bytes = onion_volume_size(volume);
    limits->request_bytes_max = session->server->options.request_bytes_max;
    limits->read_only = session->chosen->read_only;
    limits->structured = session->structured;
    limits->context_count = session->context_count;
}

static int is_slow(const struct onion_nbd_request *request) {
    uint32_t length = request->length;
    switch (request->type) {
    case ONION_NBD_CMD_WRITE:
        return request->flags & ONION_NBD_FLAG_FUA;
    case ONION_NBD_CMD_TRIM:
        return request->flags & ONION_NBD_FLAG_FUA || length > SLOW_ZERO_BYTES;
    case ONION_NBD_CMD_WRITE_ZEROES:
        return request->flags & ONION_NBD_FLAG_FUA ||
               length > (request->flags & ONION_NBD_FLAG_NO_HOLE ? SLOW_WRITE_BYTES : SLOW_ZERO_BYTES);
    case ONION_NBD_CMD_BLOCK_STATUS:
        return length > SLOW_STATUS_BYTES;
    default:
        return request->type == ONION_NBD_CMD_FLUSH || request->type == ONION_NBD_CMD_CACHE;
    }
}

static void count(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    if (request->type >= ONION_NBD_VERBS)
        return;
    onion_nbd_counter_add(&connection->counters.requests[request->type], 1);
    onion_nbd_counter_add(&connection->counters.bytes[request->type], request->length);
    connection->waiting[request->type]++;
}

static int changes(const struct onion_nbd_request *request) {
    return request->type == ONION_NBD_CMD_WRITE || request->type == ONION_NBD_CMD_TRIM ||
           request->type == ONION_NBD_CMD_WRITE_ZEROES;
}

/* Whether a request needs the head itself. All others find in the layer below an unwritten one what it would say. */
static int needs_head(const struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    int tells_depth_or_changes = 0;
    for (uint32_t i = 0; i < connection->session.context_count; i++)
        tells_depth_or_changes |= connection->session.context_ids[i] != ONION_NBD_ID_ALLOCATION;
    return changes(request) || (request->type == ONION_NBD_CMD_BLOCK_STATUS && tells_depth_or_changes);
}

/* A hook is called with no request of this connection in flight: another thread may wait for those. */
static int leave_for_hook(struct onion_nbd_connection *connection) {
    int status = onion_nbd_send_replies(connection);
    onion_nbd_connection_leave(connection);
    return status;
}

/* Has the head of the export opened: 0 or the error value for the client. The hook replaces the volume and waits for the
 * requests in flight on the old one. */
static uint32_t begin_writing(struct onion_nbd_connection *connection) {
    const struct onion_nbd_hooks *hooks = &connection->server->options.hooks;
    int status = leave_for_hook(connection);
    if (status == 0)
        status = hooks->begin_writing
                     ? hooks->begin_writing(hooks->context, onion_nbd_label(connection->session.chosen)->name)
                     : -EIO;
    return onion_nbd_error(status);
}

/* Tells of the first change of the export, which is there to be written. */
static uint32_t tell_written(struct onion_nbd_connection *connection) {
    const struct onion_nbd_hooks *hooks = &connection->server->options.hooks;
    struct onion_nbd_export *export = connection->session.chosen;
    if (__atomic_load_n(&export->is_written, __ATOMIC_RELAXED) || export->read_only || !hooks->written)
        return 0;
    int status = leave_for_hook(connection);
    if (status == 0 && !__atomic_exchange_n(&export->is_written, 1, __ATOMIC_RELAXED))
        hooks->written(hooks->context, onion_nbd_label(export)->name);
    return onion_nbd_error(status);
}

/* Checks a request: 0 or the error value for the client. The connection is in flight from here on, unless its head could
 * not be opened. */
static uint32_t check(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    struct onion_nbd_limits limits;
    uint32_t error = 0;
    /* The hook finds the export by its name, which may be another one by then: it is asked again. */
    while (!error && onion_nbd_is_unwritten(connection->session.chosen) && needs_head(connection, request))
        error = begin_writing(connection);
    if (!error && changes(request))
        error = tell_written(connection);
    if (error)
        return error;
    onion_nbd_connection_enter(connection);
    if (!connection->volume)
        return ONION_NBD_ESHUTDOWN;
    onion_nbd_limits(&connection->session, connection->volume, &limits);
    return onion_nbd_request_check(request, &limits);
}

static int run_block_status(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    unsigned char *reply = NULL;
    size_t length = 0;
    int status = onion_nbd_block_status(connection->volume, &connection->session, request, &reply, &length);
    if (status < 0)
        return onion_nbd_reply_status(connection, request->cookie, onion_nbd_error(status));
    status = onion_nbd_send_replies(connection);
    onion_nbd_connection_leave(connection);
    if (status == 0) {
        pthread_mutex_lock(&connection->send_lock);
        status = onion_nbd_send_all(connection, reply, length);
        pthread_mutex_unlock(&connection->send_lock);
    }
    free(reply);
    return status;
}

/* Runs a request without payload, which is in flight and checked. */
static int run(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    if (is_slow(request))
        return onion_nbd_queue(connection, request, NULL);
    switch (request->type) {
    case ONION_NBD_CMD_READ:
        return onion_nbd_reply_read(connection, request);
    case ONION_NBD_CMD_BLOCK_STATUS:
        return run_block_status(connection, request);
    default:
        return onion_nbd_reply_status(connection, request->cookie, onion_nbd_run_zero(connection->volume, request));
    }
}

/* ---- writes ---- */

static int write_now(struct onion_nbd_connection *connection, const struct onion_nbd_request *request,
                     const unsigned char *payload) {
    onion_nbd_connection_enter(connection);
    uint32_t error =
        connection->volume
            ? onion_nbd_error(onion_volume_write(connection->volume, request->offset, request->length, payload))
            : ONION_NBD_ESHUTDOWN;
    return onion_nbd_reply_status(connection, request->cookie, error);
}

/* Returns room for a payload that does not fit the receive buffer, or NULL if there is no memory. */
static unsigned char *payload_room(struct onion_nbd_connection *connection, uint32_t length) {
    if (connection->payload_capacity < length) {
        free(connection->payload);
        connection->payload = malloc(length);
        connection->payload_capacity = connection->payload ? length : 0;
    }
    return connection->payload;
}

static int write_large(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    unsigned char *payload = payload_room(connection, request->length);
    int status = take_bytes(connection, payload, request->length);
    if (status < 0)
        return status;
    status = payload ? write_now(connection, request, payload)
                     : onion_nbd_reply_status(connection, request->cookie, ONION_NBD_ENOMEM);
    if (connection->payload_capacity > PAYLOAD_BYTES_KEPT) {
        free(connection->payload);
        connection->payload = NULL;
        connection->payload_capacity = 0;
    }
    return status;
}

static int write_slowly(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    unsigned char *payload = malloc(request->length + !request->length);
    int status = take_bytes(connection, payload, request->length);
    if (status < 0) {
        free(payload);
        return status;
    }
    return payload ? onion_nbd_queue(connection, request, payload)
                   : onion_nbd_reply_status(connection, request->cookie, ONION_NBD_ENOMEM);
}

/* Takes the next request out of the buffer if it is a write that can be run together with those before it. */
static int take_fellow(struct onion_nbd_connection *connection, struct onion_nbd_request *request, size_t room) {
    struct onion_nbd_limits limits;
    size_t held = connection->in_to - connection->in_from;
    if (held < ONION_NBD_REQUEST_BYTES || onion_nbd_request_decode(connection->in + connection->in_from, request) < 0 ||
        request->type != ONION_NBD_CMD_WRITE || request->flags || request->length > room ||
        held - ONION_NBD_REQUEST_BYTES < request->length)
        return 0;
    onion_nbd_limits(&connection->session, connection->volume, &limits);
    if (onion_nbd_request_check(request, &limits))
        return 0;
    connection->in_from += ONION_NBD_REQUEST_BYTES;
    count(connection, request);
    return 1;
}

/* Runs a write together with the writes that follow it in the buffer. The first is in flight and checked, and its
 * payload is in the buffer. */
static int write_together(struct onion_nbd_connection *connection, const struct onion_nbd_request *first) {
    struct onion_nbd_request requests[ONION_NBD_BATCH_MAX] = {*first};
    uint32_t errors[ONION_NBD_BATCH_MAX] = {0}, taken = 1, done = 0;
    const unsigned char *payload = connection->in + connection->in_from;
    size_t used = first->length;
    int status = 0;
    connection->in_from += first->length;
    if (!connection->batch)
        connection->batch = malloc(ONION_NBD_IN_BYTES);
    while (connection->batch && taken < ONION_NBD_BATCH_MAX &&
           take_fellow(connection, &requests[taken], ONION_NBD_IN_BYTES - used)) {
        if (taken == 1)
            memcpy(connection->batch, payload, first->length);
        memcpy(connection->batch + used, connection->in + connection->in_from, requests[taken].length);
        connection->in_from += requests[taken].length;
        used += requests[taken++].length;
    }
    onion_nbd_write_batch(connection->volume, requests, taken, taken > 1 ? connection->batch : payload, errors);
    for (; done < taken && status == 0; done++)
        status = onion_nbd_reply_status(connection, requests[done].cookie, errors[done]);
    return status;
}

/* Runs a write whose header was taken out of the buffer, but not its payload. */
static enum verdict run_write(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    size_t held = connection->in_to - connection->in_from;
    uint32_t error = check(connection, request);
    int status;
    if (error) {
        status = take_bytes(connection, NULL, request->length);
        if (status == 0)
            status = onion_nbd_reply_status(connection, request->cookie, error);
    } else if (is_slow(request)) {
        status = write_slowly(connection, request);
    } else if (held >= request->length) {
        status = write_together(connection, request);
    } else {
        status = write_large(connection, request);
    }
    return status < 0 ? ENDED : GO_ON;
}

/* ---- requests ---- */

static enum verdict next_request(struct onion_nbd_connection *connection) {
    struct onion_nbd_request request;
    size_t held = connection->in_to - connection->in_from;
    if (held < ONION_NBD_REQUEST_BYTES)
        return NEEDS_MORE;
    if (onion_nbd_request_decode(connection->in + connection->in_from, &request) < 0) {
        onion_nbd_event(connection->server, "%s: closed: bad magic in a request", connection->peer);
        return ENDED;
    }
    /* If the payload fits the buffer, wait until it is complete there. It is then written straight from the buffer. */
    if (request.type == ONION_NBD_CMD_WRITE && request.length <= ONION_NBD_IN_BYTES - ONION_NBD_REQUEST_BYTES &&
        held < ONION_NBD_REQUEST_BYTES + request.length)
        return NEEDS_MORE;
    connection->in_from += ONION_NBD_REQUEST_BYTES;
    if (request.type == ONION_NBD_CMD_DISC)
        return ENDED;
    count(connection, &request);
    if (request.type == ONION_NBD_CMD_WRITE)
        return run_write(connection, &request);
    uint32_t error = check(connection, &request);
    int status = error ? onion_nbd_reply_status(connection, request.cookie, error) : run(connection, &request);
    return status < 0 ? ENDED : GO_ON;
}

void onion_nbd_transmit(struct onion_nbd_connection *connection) {
    enum verdict verdict = GO_ON;
    connection->in_from = connection->in_to = 0;
    prepare_socket(connection);
    while (verdict != ENDED)
        verdict = (verdict = next_request(connection)) == NEEDS_MORE ? fill(connection) : verdict;
    onion_nbd_send_replies(connection);
    onion_nbd_connection_leave(connection);
    count_latency(connection);
    onion_nbd_helper_end(connection);
}
