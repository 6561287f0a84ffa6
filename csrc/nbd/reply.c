/* reply.c: lays out replies and sends them.
 *
 * Several replies are sent with one system call: their headers from memory, their data straight from the segments'
 * mappings. A reply is sent chunk by chunk:
 *
 *   header | data (planned anew for each system call) | tail
 *
 * A simple reply is one chunk without a tail. A structured read may consist of several chunks: holes of the disk are
 * sent as holes, and data that is too scattered for one plan is divided.
 *
 * If data cannot be read, the possible answer depends on what was sent already:
 *   nothing of the chunk's header      the header becomes an error
 *   a header that promises nothing     zeros complete the data, and the tail is an error chunk
 *   a header that promises success     none: the connection is closed
 * So before a header that promises success is sent (a simple reply, or the last chunk), one byte of each page of its
 * data is loaded. The third case then happens only if a file is truncated between this load and the send. A large
 * structured read promises success in its tail instead, so no page is loaded twice. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "nbd/internal.h"

#define IOV_MAX_USED 512
#define PIECES_MAX 256
#define SEND_BYTES (2u << 20)       /* about the largest number of bytes for one system call */
#define TOUCH_BYTES_MAX (64u << 10) /* structured reads up to this length promise success in their header */
#define HOLE_BYTES_MIN (32u << 10)  /* shorter zeros are sent as bytes, because a chunk costs the client more */

static char zeros[64 << 10]; /* never written */

/* ---- in flight ---- */

void onion_nbd_connection_enter(struct onion_nbd_connection *connection) {
    if (connection->in_flight)
        return;
    connection->volume = onion_nbd_enter(connection->session.chosen, &connection->generation);
    connection->in_flight = connection->volume != NULL;
    connection->gone = ONION_NBD_ESHUTDOWN;
}

void onion_nbd_connection_leave(struct onion_nbd_connection *connection) {
    if (connection->in_flight)
        onion_nbd_leave(connection->session.chosen);
    connection->in_flight = 0;
    connection->volume = NULL;
}

/* ---- waiting for a slow client ---- */

static int wait_for_room(struct onion_nbd_connection *connection) {
    uint32_t seconds = connection->negotiating ? ONION_NBD_HANDSHAKE_SECONDS : connection->server->options.idle_seconds;
    struct pollfd wait = {.fd = connection->fd, .events = POLLOUT};
    if (__atomic_load_n(&connection->broken, __ATOMIC_SEQ_CST))
        return -EPIPE;
    int ready = poll(&wait, 1, seconds && seconds < 1u << 20 ? (int)seconds * 1000 : -1);
    if (ready == 0) {
        onion_nbd_event(connection->server, "%s: takes no replies for %u s", connection->peer, seconds);
        return -ETIMEDOUT;
    }
    return ready < 0 && errno != EINTR ? -errno : 0;
}

static int give_up(struct onion_nbd_connection *connection, int status) {
    __atomic_store_n(&connection->broken, 1, __ATOMIC_SEQ_CST);
    shutdown(connection->fd, SHUT_RDWR); /* wakes the connection's other thread, which may be waiting for the socket */
    return status;
}

int onion_nbd_send_all(struct onion_nbd_connection *connection, const void *bytes, size_t length) {
    const char *from = bytes;
    while (length) {
        if (__atomic_load_n(&connection->broken, __ATOMIC_SEQ_CST))
            return -EPIPE;
        ssize_t n = send(connection->fd, from, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        int status = n >= 0 || errno == EINTR ? 0 : errno == EAGAIN ? wait_for_room(connection) : -errno;
        if (status < 0)
            return give_up(connection, status);
        if (n > 0)
            from += n, length -= (size_t)n;
    }
    onion_nbd_counter_add(&connection->counters.sends, 1);
    return 0;
}

/* ---- replies ---- */

size_t onion_nbd_encode_status(const struct onion_nbd_session *session, uint64_t cookie, uint32_t error,
                               unsigned char *out) {
    if (!session->structured)
        return onion_nbd_simple_reply(out, cookie, error);
    return error ? onion_nbd_chunk_error(out, cookie, error)
                 : onion_nbd_chunk(out, cookie, ONION_NBD_REPLY_DONE, ONION_NBD_REPLY_NONE, 0);
}

/* Returns a place for one more reply, or NULL if the connection cannot be used any more. */
static struct onion_nbd_reply *next_reply(struct onion_nbd_connection *connection) {
    if (connection->reply_count == ONION_NBD_REPLIES_MAX) {
        if (onion_nbd_send_replies(connection) < 0)
            return NULL;
        onion_nbd_connection_enter(connection);
    }
    struct onion_nbd_reply *reply = &connection->replies[connection->reply_count++];
    memset(reply, 0, sizeof *reply);
    return reply;
}

int onion_nbd_reply_status(struct onion_nbd_connection *connection, uint64_t cookie, uint32_t error) {
    struct onion_nbd_reply *reply = next_reply(connection);
    if (!reply)
        return -EPIPE;
    if (error)
        onion_nbd_counter_add(&connection->counters.errors, 1);
    reply->cookie = cookie;
    reply->header_length = (uint8_t)onion_nbd_encode_status(&connection->session, cookie, error, reply->header);
    return 0;
}

int onion_nbd_reply_read(struct onion_nbd_connection *connection, const struct onion_nbd_request *request) {
    if (!request->length)
        return onion_nbd_reply_status(connection, request->cookie, 0);
    struct onion_nbd_reply *reply = next_reply(connection);
    if (!reply)
        return -EPIPE;
    reply->cookie = request->cookie;
    reply->offset = request->offset;
    reply->left = request->length;
    reply->flags = request->flags;
    reply->is_read = 1;
    return 0;
}

/* Makes a reply report that its data cannot be read. -ECONNABORTED: it is too late to report it. */
static int fail(struct onion_nbd_connection *connection, struct onion_nbd_reply *reply, uint32_t error) {
    onion_nbd_counter_add(&connection->counters.errors, 1);
    onion_nbd_event(connection->server, "%s: read of %u bytes at %llu failed with error %u", connection->peer,
                    reply->left + reply->data_left, (unsigned long long)(reply->data_left ? reply->at : reply->offset),
                    error);
    reply->left = 0;
    if (!reply->header_sent) {
        reply->header_length =
            (uint8_t)onion_nbd_encode_status(&connection->session, reply->cookie, error, reply->header);
        reply->data_left = 0;
        reply->tail_length = 0;
        return 0;
    }
    if (reply->promised || reply->tail_sent)
        return -ECONNABORTED;
    reply->padding = 1;
    reply->tail_length = (uint8_t)onion_nbd_chunk_error(reply->tail, reply->cookie, error);
    return 0;
}

/* ---- laying out a chunk ---- */

/* The arguments of one system call. */
struct gathering {
    struct iovec iov[IOV_MAX_USED];
    uint32_t used;
    size_t bytes;
    struct onion_piece pieces[PIECES_MAX]; /* the pieces of the present chunk's data */
    int64_t piece_count;
    uint64_t planned;
};

/* Loads a byte of each page of a range. The caller holds a ticket. */
static int touch_range(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    struct onion_piece pieces[PIECES_MAX / 4];
    while (length) {
        uint64_t planned;
        int64_t count = onion_volume_plan(volume, offset, length, pieces, PIECES_MAX / 4, &planned);
        int status = count < 0 ? (int)count : onion_pieces_touch(pieces, (uint64_t)count);
        if (status < 0)
            return status;
        offset += planned, length -= planned;
    }
    return 0;
}

/* Returns the length of the next chunk of data. It ends before zeros that are long enough for a chunk of their own. */
static uint32_t data_chunk_length(const struct gathering *g, const struct onion_nbd_reply *reply) {
    uint64_t length = 0;
    if (reply->flags & ONION_NBD_FLAG_DF)
        return reply->left;
    for (int64_t i = 0; i < g->piece_count; i++) {
        if (i && !g->pieces[i].address && g->pieces[i].length >= HOLE_BYTES_MIN)
            break;
        length += g->pieces[i].length;
    }
    return (uint32_t)length;
}

static int lay_out_simple(struct onion_nbd_connection *connection, struct onion_nbd_reply *reply, struct gathering *g) {
    int status = g->planned == reply->left ? onion_pieces_touch(g->pieces, (uint64_t)g->piece_count)
                                           : touch_range(connection->volume, reply->offset, reply->left);
    reply->header_length = (uint8_t)onion_nbd_simple_reply(reply->header, reply->cookie, 0);
    reply->data_left = reply->left;
    reply->promised = 1;
    return status;
}

static int lay_out_data(struct onion_nbd_reply *reply, struct gathering *g) {
    uint32_t length = data_chunk_length(g, reply);
    int last = length == reply->left, status = 0;
    reply->promised = last && length <= TOUCH_BYTES_MAX && g->planned >= length;
    if (reply->promised)
        status = onion_pieces_touch(g->pieces, (uint64_t)g->piece_count);
    reply->header_length = (uint8_t)onion_nbd_chunk_data(
        reply->header, reply->cookie, reply->promised ? ONION_NBD_REPLY_DONE : 0, reply->offset, length);
    if (last && !reply->promised)
        reply->tail_length =
            (uint8_t)onion_nbd_chunk(reply->tail, reply->cookie, ONION_NBD_REPLY_DONE, ONION_NBD_REPLY_NONE, 0);
    reply->data_left = length;
    return status;
}

static void lay_out_hole(struct onion_nbd_reply *reply, uint32_t length) {
    uint16_t flags = length == reply->left ? ONION_NBD_REPLY_DONE : 0;
    reply->header_length = (uint8_t)onion_nbd_chunk_hole(reply->header, reply->cookie, flags, reply->offset, length);
    reply->offset += length;
    reply->left -= length;
}

/* Lays out the next chunk of a read: its header, and in g the first pieces of its data. */
static int lay_out(struct onion_nbd_connection *connection, struct onion_nbd_reply *reply, struct gathering *g) {
    reply->header_sent = reply->tail_length = reply->tail_sent = 0;
    if (!connection->volume)
        return fail(connection, reply, connection->gone);
    g->piece_count =
        onion_volume_plan(connection->volume, reply->offset, reply->left, g->pieces, PIECES_MAX, &g->planned);
    if (g->piece_count < 0)
        return fail(connection, reply, onion_nbd_error(g->piece_count));
    const struct onion_piece *first = &g->pieces[0];
    int is_hole = !first->address && (first->length >= HOLE_BYTES_MIN || first->length == reply->left);
    if (connection->session.structured && is_hole && !(reply->flags & ONION_NBD_FLAG_DF)) {
        lay_out_hole(reply, (uint32_t)first->length);
        return 0;
    }
    reply->at = reply->offset;
    int status = connection->session.structured ? lay_out_data(reply, g) : lay_out_simple(connection, reply, g);
    if (status < 0)
        return fail(connection, reply, onion_nbd_error(status));
    reply->offset += reply->data_left;
    reply->left -= reply->data_left;
    return 0;
}

/* ---- gathering ---- */

static void push(struct gathering *g, const void *address, size_t length) {
    g->iov[g->used++] = (struct iovec){(void *)address, length};
    g->bytes += length;
}

/* Adds up to `length` zeros. Returns how many were added. */
static uint64_t push_zeros(struct gathering *g, uint64_t length) {
    uint64_t pushed = 0;
    while (pushed < length && g->used < IOV_MAX_USED && g->bytes < SEND_BYTES) {
        uint64_t part = length - pushed < sizeof zeros ? length - pushed : sizeof zeros;
        push(g, zeros, part);
        pushed += part;
    }
    return pushed;
}

/* Adds as much of the chunk's data as there is room for. Returns whether that is all of it. */
static int push_data(struct gathering *g, const struct onion_nbd_reply *reply) {
    uint64_t left = reply->data_left;
    if (reply->padding)
        return push_zeros(g, left) == left;
    for (int64_t i = 0; i < g->piece_count && left; i++) {
        uint64_t length = g->pieces[i].length < left ? g->pieces[i].length : left;
        if (!g->pieces[i].address) {
            uint64_t pushed = push_zeros(g, length);
            if (pushed < length)
                return 0;
        } else {
            if (g->used == IOV_MAX_USED || g->bytes >= SEND_BYTES)
                return 0;
            push(g, g->pieces[i].address, length);
        }
        left -= length;
    }
    return left == 0;
}

/* Plans the rest of the data of a chunk that was laid out before. */
static int plan_rest(struct onion_nbd_connection *connection, struct onion_nbd_reply *reply, struct gathering *g) {
    g->piece_count = 0;
    if (!reply->data_left || reply->padding)
        return 0;
    if (!connection->volume)
        return fail(connection, reply, connection->gone);
    g->piece_count =
        onion_volume_plan(connection->volume, reply->at, reply->data_left, g->pieces, PIECES_MAX, &g->planned);
    return g->piece_count < 0 ? fail(connection, reply, onion_nbd_error(g->piece_count)) : 0;
}

/* Adds a reply's next bytes. Returns 1 if the next reply may follow in the same call, 0 if not, or a negative code. */
static int gather_one(struct onion_nbd_connection *connection, struct onion_nbd_reply *reply, struct gathering *g) {
    int status = reply->header_length ? plan_rest(connection, reply, g) : lay_out(connection, reply, g);
    if (status < 0)
        return status;
    if (reply->header_sent < reply->header_length)
        push(g, reply->header + reply->header_sent, (size_t)(reply->header_length - reply->header_sent));
    if (reply->data_left && !push_data(g, reply))
        return 0;
    if (reply->tail_sent < reply->tail_length) {
        if (g->used == IOV_MAX_USED)
            return 0;
        push(g, reply->tail + reply->tail_sent, (size_t)(reply->tail_length - reply->tail_sent));
    }
    return !reply->left;
}

static int gather(struct onion_nbd_connection *connection, uint32_t first, struct gathering *g) {
    int more = 1;
    g->used = 0;
    g->bytes = 0;
    for (uint32_t i = first;
         more > 0 && i < connection->reply_count && g->used < IOV_MAX_USED - 2 && g->bytes < SEND_BYTES; i++)
        more = gather_one(connection, &connection->replies[i], g);
    return more < 0 ? more : 0;
}

/* ---- sending ---- */

static size_t take(uint8_t *sent, uint8_t length, size_t bytes) {
    size_t part = (size_t)(length - *sent) < bytes ? (size_t)(length - *sent) : bytes;
    *sent = (uint8_t)(*sent + part);
    return part;
}

/* Notes that `bytes` more bytes are in the socket. Returns the first reply that is not done. */
static uint32_t advance(struct onion_nbd_connection *connection, uint32_t first, size_t bytes) {
    while (first < connection->reply_count) {
        struct onion_nbd_reply *reply = &connection->replies[first];
        reply->begun |= bytes > 0;
        bytes -= take(&reply->header_sent, reply->header_length, bytes);
        size_t data = reply->data_left < bytes ? reply->data_left : bytes;
        reply->data_left -= (uint32_t)data;
        reply->at += data;
        bytes -= data;
        if (!reply->data_left)
            bytes -= take(&reply->tail_sent, reply->tail_length, bytes);
        if (!reply->header_length || reply->header_sent < reply->header_length || reply->data_left ||
            reply->tail_sent < reply->tail_length)
            return first;
        if (reply->left) { /* the next call of gather_one lays out its next chunk */
            reply->header_length = reply->header_sent = 0;
            return first;
        }
        first++;
    }
    return first;
}

/* sendmsg could not read some mapping and sent nothing. Finds the replies whose data cannot be read, and fails them. */
static int settle_faults(struct onion_nbd_connection *connection, uint32_t first) {
    struct onion_nbd_reply *suspect = NULL;
    struct onion_ticket ticket;
    uint32_t failed = 0;
    for (uint32_t i = first; i < connection->reply_count; i++) {
        struct onion_nbd_reply *reply = &connection->replies[i];
        if (!reply->data_left || reply->padding)
            continue;
        suspect = suspect ? suspect : reply;
        int status = connection->volume ? onion_volume_plan_begin(connection->volume, &ticket) : ONION_E_CLOSED;
        if (status == 0) {
            status = touch_range(connection->volume, reply->at, reply->data_left);
            onion_volume_plan_end(connection->volume, ticket);
        }
        if (status < 0 && fail(connection, reply, onion_nbd_error(status)) < 0)
            return -ECONNABORTED;
        failed += status < 0;
    }
    /* If all data can be read again by now, fail the first reply that has data, so that a retry cannot loop for
     * ever. */
    return failed ? 0 : suspect ? fail(connection, suspect, ONION_NBD_EIO) : -EFAULT;
}

/* The volume was replaced or is gone. A reply that was sent in part must not go on with the bytes of another volume. */
static int fail_begun(struct onion_nbd_connection *connection, uint32_t first) {
    int status = 0;
    for (uint32_t i = first; i < connection->reply_count && status == 0; i++) {
        struct onion_nbd_reply *reply = &connection->replies[i];
        if (!reply->is_read || (!reply->data_left && !reply->left) || reply->padding)
            continue;
        if (reply->begun || !connection->volume)
            status = fail(connection, reply, connection->volume ? ONION_NBD_EIO : connection->gone);
        else if (reply->data_left) { /* it was laid out and nothing was sent: lay it out again */
            reply->offset -= reply->data_left;
            reply->left += reply->data_left;
            reply->data_left = reply->header_length = 0;
        }
    }
    return status;
}

/* Goes in flight again after a wait. If the volume is another one by now, replies that have begun fail. */
static int reenter(struct onion_nbd_connection *connection, uint32_t first, uint64_t generation) {
    onion_nbd_connection_enter(connection);
    return connection->generation == generation && connection->volume ? 0 : fail_begun(connection, first);
}

static int wait_and_reenter(struct onion_nbd_connection *connection, uint32_t first) {
    uint64_t generation = connection->generation;
    onion_nbd_connection_leave(connection);
    int status = wait_for_room(connection);
    return status < 0 ? status : reenter(connection, first, generation);
}

/* Sends as much as one system call takes. Moves *first to the first reply that is not done. */
static int send_some(struct onion_nbd_connection *connection, uint32_t *first) {
    struct gathering g;
    struct onion_ticket ticket;
    int status = connection->volume ? onion_volume_plan_begin(connection->volume, &ticket) : 0;
    if (status < 0) { /* the volume was closed or poisoned meanwhile, so reads fail */
        onion_nbd_connection_leave(connection);
        connection->gone = onion_nbd_error(status);
    }
    status = gather(connection, *first, &g);
    struct msghdr message = {.msg_iov = g.iov, .msg_iovlen = g.used};
    ssize_t n = status < 0 ? -1 : sendmsg(connection->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    int error = status < 0 ? -status : n < 0 ? errno : 0;
    if (connection->volume)
        onion_volume_plan_end(connection->volume, ticket);
    if (n >= 0) {
        *first = advance(connection, *first, (size_t)n);
        onion_nbd_counter_add(&connection->counters.sends, 1);
        return 0;
    }
    return error == EAGAIN   ? wait_and_reenter(connection, *first)
           : error == EFAULT ? settle_faults(connection, *first)
           : error == EINTR  ? 0
                             : -error;
}

/* The helper may hold the lock while it waits for the client. So this thread is not in flight while it waits. */
static int lock_for_sending(struct onion_nbd_connection *connection) {
    if (pthread_mutex_trylock(&connection->send_lock) == 0)
        return 0;
    uint64_t generation = connection->generation;
    onion_nbd_connection_leave(connection);
    pthread_mutex_lock(&connection->send_lock);
    return reenter(connection, 0, generation);
}

int onion_nbd_send_replies(struct onion_nbd_connection *connection) {
    if (!connection->reply_count)
        return 0;
    uint32_t first = 0;
    int status = lock_for_sending(connection);
    while (first < connection->reply_count && status == 0)
        status = __atomic_load_n(&connection->broken, __ATOMIC_SEQ_CST) ? -EPIPE : send_some(connection, &first);
    pthread_mutex_unlock(&connection->send_lock);
    connection->reply_count = 0;
    if (status == -ECONNABORTED)
        onion_nbd_event(connection->server, "%s: closed: a file failed under a reply that was sent in part",
                        connection->peer);
    return status < 0 ? give_up(connection, status) : 0;
}
