/* handshake.c: option haggling. onion_nbd_option depends on the session and the option's bytes alone, so that it can be
 * checked and fuzzed without a socket. The end of this file moves the bytes over the socket. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "nbd/internal.h"

#define ASK_TRIES 3

static const char ALLOCATION[] = "base:allocation";
static const char DEPTH[] = "qemu:allocation-depth";
static const char CHANGED[] = "onionskin:changed-since:";
static const char BITMAP[] = "qemu:dirty-bitmap:"; /* the same context under QEMU's name */

/* ---- answers ---- */

static void put(struct onion_nbd_out *out, const void *bytes, size_t length) {
    if (out->failed || !length)
        return;
    if (out->capacity - out->length < length) {
        size_t capacity = (out->length + length) * 2 + 256;
        unsigned char *more = realloc(out->bytes, capacity);
        if (!more) {
            out->failed = 1;
            return;
        }
        out->bytes = more;
        out->capacity = capacity;
    }
    memcpy(out->bytes + out->length, bytes, length);
    out->length += length;
}

static void put_reply(struct onion_nbd_out *out, uint32_t option, uint32_t type, size_t length) {
    unsigned char header[ONION_NBD_OPTION_REPLY_BYTES];
    put(out, header, onion_nbd_option_reply(header, option, type, (uint32_t)length));
}

/* An error with a sentence for the user of the client. */
static enum onion_nbd_next refuse(struct onion_nbd_out *out, uint32_t option, uint32_t type, const char *message) {
    put_reply(out, option, type, strlen(message));
    put(out, message, strlen(message));
    return ONION_NBD_MORE_OPTIONS;
}

static enum onion_nbd_next acknowledge(struct onion_nbd_out *out, uint32_t option) {
    put_reply(out, option, ONION_NBD_REP_ACK, 0);
    return ONION_NBD_MORE_OPTIONS;
}

/* ---- exports ---- */

/* Returns the export of that name with a reference, or NULL. Then `status` says whether there is none (0), or that it
 * cannot be told (anything else). Between the answer and the look, the export may have got another name, as that was
 * given to another volume: so it is asked for again. */
static struct onion_nbd_export *find_or_ask(struct onion_nbd_server *server, const struct onion_nbd_string *name,
                                            int *status) {
    struct onion_nbd_export *export = onion_nbd_find(server, name->bytes, name->length);
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    *status = export != NULL;
    if (export && hooks->still_export && !hooks->still_export(hooks->context, name->bytes, name->length)) {
        onion_nbd_unref(server, export);
        export = NULL;
        *status = 0;
    }
    for (int left = ASK_TRIES; !export && left && hooks->find_export; left--) {
        if ((*status = onion_nbd_ask(server, name)) <= 0)
            break;
        export = onion_nbd_find(server, name->bytes, name->length);
    }
    return export;
}

/* Says why a client does not get an export or a context: a program that is told that there is none may make one in its
 * place, or go on without. `status` is 0 where there is none. Positive: it was there a moment ago, and was taken away
 * before this client had it. */
static enum onion_nbd_next refuse_missing(const struct onion_nbd_server *server, uint32_t option, int status,
                                          const char *none, struct onion_nbd_out *out) {
    if (status == -ESHUTDOWN || __atomic_load_n(&server->stopping, __ATOMIC_RELAXED))
        return refuse(out, option, ONION_NBD_REP_ERR_SHUTDOWN, "the server is stopping");
    if (status)
        return refuse(out, option, ONION_NBD_REP_ERR_POLICY,
                      status < 0
                          ? "it cannot be opened now; the log of the server says why; ask again when that is mended"
                          : "it was just being closed; ask again");
    return refuse(out, option, ONION_NBD_REP_ERR_UNKNOWN, none);
}

struct onion_nbd_listing {
    struct onion_nbd_session *session;
    struct onion_nbd_out *out;
    int full;
};

static void put_export(struct onion_nbd_out *out, const char *name, const char *description) {
    unsigned char length[4];
    put_reply(out, ONION_NBD_OPT_LIST, ONION_NBD_REP_SERVER, 4 + strlen(name) + strlen(description));
    onion_put32(length, (uint32_t)strlen(name));
    put(out, length, sizeof length);
    put(out, name, strlen(name));
    put(out, description, strlen(description));
}

int onion_nbd_list(struct onion_nbd_listing *listing, const char *name, const char *description) {
    size_t length = strlen(name);
    if (!length || length > ONION_NBD_NAME_MAX || strlen(description) > ONION_NBD_NAME_MAX)
        return -EINVAL;
    put_export(listing->out, name, description);
    memcpy(listing->session->listed, name, length);
    listing->session->listed_length = (uint32_t)length;
    return listing->full = listing->out->length >= ONION_NBD_LIST_BYTES;
}

/* Goes on after a hook has listed a part: with the next part if this one is full, otherwise the list ends. */
static enum onion_nbd_next end_part(struct onion_nbd_session *session, uint32_t option, int status, int full,
                                    const char *failure, struct onion_nbd_out *out) {
    if (status >= 0 && full)
        return ONION_NBD_MORE_REPLIES;
    session->listed_length = 0;
    return status < 0 ? refuse(out, option, ONION_NBD_REP_ERR_POLICY, failure) : acknowledge(out, option);
}

/* Lists the exports in parts, so that thousands of names take no more memory than a few. */
static enum onion_nbd_next list_exports(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                        struct onion_nbd_out *out) {
    struct onion_nbd_server *server = session->server;
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    if (option->length)
        return refuse(out, option->option, ONION_NBD_REP_ERR_INVALID, "LIST takes no data");
    if (hooks->list_exports) {
        struct onion_nbd_listing listing = {session, out, 0};
        uint32_t after = session->listed_length;
        int status = hooks->list_exports(hooks->context, session->listed, after, &listing);
        return end_part(session, option->option, status, listing.full,
                        "the exports cannot be listed now; the log of the server says why", out);
    }
    pthread_mutex_lock(&server->lock);
    for (struct onion_nbd_export *export = server->exports; export; export = export->next)
        put_export(out, onion_nbd_label(export)->name, onion_nbd_label(export)->description);
    pthread_mutex_unlock(&server->lock);
    return acknowledge(out, option->option);
}

static uint16_t transmission_flags(const struct onion_nbd_session *session, const struct onion_nbd_export *export) {
    /* CAN_MULTI_CONN: all connections use the same volume, and a flush covers the writes of all. */
    uint16_t flags = ONION_NBD_HAS_FLAGS | ONION_NBD_SEND_FLUSH | ONION_NBD_SEND_FUA | ONION_NBD_CAN_MULTI_CONN |
                     ONION_NBD_SEND_CACHE;
    if (session->structured)
        flags |= ONION_NBD_SEND_DF;
    if (export->read_only)
        return flags | ONION_NBD_READ_ONLY;
    return flags | ONION_NBD_SEND_TRIM | ONION_NBD_SEND_WRITE_ZEROES | ONION_NBD_SEND_FAST_ZERO;
}

/* Returns the present size and block size, or -1 if the export is gone. It waits while the export is held. This is
 * intended: a client that connects during a revert gets the size that is right afterwards. */
static int export_facts(struct onion_nbd_export *export, uint64_t *size_bytes, uint32_t *block_size) {
    uint64_t generation;
    struct onion_volume *volume = onion_nbd_enter(export, &generation);
    if (!volume)
        return -1;
    *size_bytes = onion_volume_size(volume);
    *block_size = onion_volume_block_size(volume);
    onion_nbd_leave(export);
    return 0;
}

static void put_info(struct onion_nbd_out *out, uint32_t option, uint16_t info, const void *bytes, size_t length) {
    unsigned char type[2];
    put_reply(out, option, ONION_NBD_REP_INFO, 2 + length);
    onion_put16(type, info);
    put(out, type, 2);
    put(out, bytes, length);
}

static int put_infos(struct onion_nbd_session *session, uint32_t option, const struct onion_nbd_info_query *query,
                     struct onion_nbd_export *export, struct onion_nbd_out *out) {
    const struct onion_nbd_label *label = onion_nbd_label(export);
    uint64_t size_bytes;
    uint32_t block_size;
    unsigned char bytes[12];
    if (export_facts(export, &size_bytes, &block_size) < 0)
        return -1;
    onion_put64(bytes, size_bytes);
    onion_put16(bytes + 8, transmission_flags(session, export));
    put_info(out, option, ONION_NBD_INFO_EXPORT, bytes, 10);
    if (onion_nbd_info_asked(query, ONION_NBD_INFO_NAME))
        put_info(out, option, ONION_NBD_INFO_NAME, label->name, strlen(label->name));
    if (onion_nbd_info_asked(query, ONION_NBD_INFO_DESCRIPTION) && *label->description)
        put_info(out, option, ONION_NBD_INFO_DESCRIPTION, label->description, strlen(label->description));
    /* Sent even to a client that does not ask, because it may need the largest request. The minimum is 1, since single
     * bytes may be read and written. */
    onion_put32(bytes, 1);
    onion_put32(bytes + 4, block_size);
    onion_put32(bytes + 8, session->server->options.request_bytes_max);
    put_info(out, option, ONION_NBD_INFO_BLOCK_SIZE, bytes, 12);
    return 0;
}

/* Sets the export of the session. Contexts that were selected for another export do not apply to it. */
static void choose(struct onion_nbd_session *session, struct onion_nbd_export *export) {
    session->chosen = export;
    if (session->meta_export != export)
        session->context_count = 0;
}

static enum onion_nbd_next info_or_go(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                      const unsigned char *data, struct onion_nbd_out *out) {
    struct onion_nbd_info_query query;
    if (onion_nbd_info_decode(data, option->length, &query) < 0)
        return refuse(out, option->option, ONION_NBD_REP_ERR_INVALID,
                      "the lengths in this option do not add up, so nothing was looked up");
    int status;
    struct onion_nbd_export *export = find_or_ask(session->server, &query.name, &status);
    if (!export || put_infos(session, option->option, &query, export, out) < 0) {
        onion_nbd_unref(session->server, export);
        return refuse_missing(session->server, option->option, status, "no such export", out);
    }
    acknowledge(out, option->option);
    if (option->option == ONION_NBD_OPT_INFO) {
        onion_nbd_unref(session->server, export);
        return ONION_NBD_MORE_OPTIONS;
    }
    choose(session, export);
    return ONION_NBD_TRANSMISSION;
}

/* EXPORT_NAME has no error reply, so a name that does not exist closes the connection. */
static enum onion_nbd_next export_name(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                       const unsigned char *data, struct onion_nbd_out *out) {
    static const unsigned char zeroes[ONION_NBD_EXPORT_ZEROES];
    struct onion_nbd_string name = {(const char *)data, option->length};
    unsigned char bytes[ONION_NBD_EXPORT_REPLY_BYTES];
    uint64_t size_bytes;
    uint32_t block_size;
    int status;
    struct onion_nbd_export *export =
        option->length > ONION_NBD_NAME_MAX ? NULL : find_or_ask(session->server, &name, &status);
    if (!export || export_facts(export, &size_bytes, &block_size) < 0) {
        onion_nbd_unref(session->server, export);
        return ONION_NBD_CLOSE;
    }
    onion_put64(bytes, size_bytes);
    onion_put16(bytes + 8, transmission_flags(session, export));
    put(out, bytes, sizeof bytes);
    if (!session->no_zeroes)
        put(out, zeroes, sizeof zeroes);
    choose(session, export);
    return ONION_NBD_TRANSMISSION;
}

/* ---- metadata contexts ---- */

static int string_is(const struct onion_nbd_string *string, const char *text) {
    return string->length == strlen(text) && !memcmp(string->bytes, text, string->length);
}

/* A listing query is the name of a context, or ends in a colon and matches all names that begin with it. */
static int listed_by(const struct onion_nbd_string *query, const char *name) {
    if (query->length && query->bytes[query->length - 1] == ':')
        return strlen(name) >= query->length && !memcmp(query->bytes, name, query->length);
    return string_is(query, name);
}

static void put_context(struct onion_nbd_out *out, uint32_t option, uint32_t id, const char *name) {
    unsigned char bytes[4];
    put_reply(out, option, ONION_NBD_REP_META_CONTEXT, 4 + strlen(name));
    onion_put32(bytes, id);
    put(out, bytes, 4);
    put(out, name, strlen(name));
}

struct onion_nbd_context_listing {
    struct onion_nbd_session *session;
    const struct onion_nbd_meta_query *query;
    struct onion_nbd_out *out;
    int full;
};

/* Lists a context once, even if several queries match it, so that the answer is no longer than the list of contexts. */
static void list_context(struct onion_nbd_context_listing *listing, const char *name) {
    struct onion_nbd_meta_query query = *listing->query;
    struct onion_nbd_string string;
    int listed = !query.query_count;
    while (!listed && onion_nbd_meta_next(&query, &string))
        listed = listed_by(&string, name);
    if (listed)
        put_context(listing->out, ONION_NBD_OPT_LIST_META_CONTEXT, 0, name);
}

int onion_nbd_list_context(struct onion_nbd_context_listing *listing, const char *name) {
    size_t length = strlen(name);
    if (!length || length > ONION_NBD_NAME_MAX)
        return -EINVAL;
    list_context(listing, name);
    memcpy(listing->session->listed, name, length);
    listing->session->listed_length = (uint32_t)length;
    return listing->full = listing->out->length >= ONION_NBD_LIST_BYTES;
}

static int begins_with(const struct onion_nbd_string *string, const char *prefix) {
    return string->length > strlen(prefix) && !memcmp(string->bytes, prefix, strlen(prefix));
}

static struct onion_nbd_context *find_context(struct onion_nbd_export *export, const struct onion_nbd_string *name) {
    pthread_mutex_lock(&export->lock);
    struct onion_nbd_context *context = export->contexts;
    while (context && !string_is(name, context->name))
        context = context->next;
    pthread_mutex_unlock(&export->lock);
    return context;
}

/* `status` is set to a negative code if it cannot be told whether there is such a context, and left as it is otherwise. */
static struct onion_nbd_context *find_or_ask_context(struct onion_nbd_server *server, struct onion_nbd_export *export,
                                                     const struct onion_nbd_string *name, int *status) {
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    const char *export_name = onion_nbd_label(export)->name;
    uint32_t length = (uint32_t)strlen(export_name);
    struct onion_nbd_context *context = find_context(export, name);
    if (context && hooks->still_context &&
        !hooks->still_context(hooks->context, export_name, length, name->bytes, name->length))
        context = NULL;
    if (!context && hooks->find_context && (begins_with(name, CHANGED) || begins_with(name, BITMAP))) {
        int found = hooks->find_context(hooks->context, export_name, length, name->bytes, name->length);
        context = found > 0 ? find_context(export, name) : NULL;
        *status = found < 0 ? found : *status;
    }
    return context;
}

static void select_context(struct onion_nbd_session *session, const struct onion_nbd_string *query,
                           struct onion_nbd_out *out, int *status) {
    struct onion_nbd_context *context = NULL;
    uint32_t id = string_is(query, ALLOCATION) ? ONION_NBD_ID_ALLOCATION
                  : string_is(query, DEPTH)    ? ONION_NBD_ID_DEPTH
                                               : 0;
    const char *name = id == ONION_NBD_ID_ALLOCATION ? ALLOCATION : DEPTH;
    if (!id && (context = find_or_ask_context(session->server, session->meta_export, query, status))) {
        id = context->id;
        name = context->name;
    }
    if (!id || session->context_count == ONION_NBD_CONTEXTS_MAX)
        return;
    for (uint32_t i = 0; i < session->context_count; i++)
        if (session->context_ids[i] == id)
            return;
    session->context_ids[session->context_count] = id;
    session->contexts[session->context_count++] = context;
    put_context(out, ONION_NBD_OPT_SET_META_CONTEXT, id, name);
}

/* Lists the contexts that were computed already, for a server without the hook list_contexts. A context that a query
 * names is computed first, so the client learns whether it can be had. */
static void list_computed(struct onion_nbd_context_listing *listing, struct onion_nbd_export *export) {
    struct onion_nbd_meta_query query = *listing->query;
    struct onion_nbd_string string;
    int status = 0; /* what cannot be told is not listed */
    while (onion_nbd_meta_next(&query, &string))
        find_or_ask_context(listing->session->server, export, &string, &status);
    pthread_mutex_lock(&export->lock);
    for (struct onion_nbd_context *context = export->contexts; context; context = context->next)
        list_context(listing, context->name);
    pthread_mutex_unlock(&export->lock);
}

/* Lists the contexts in parts, like the exports. */
static enum onion_nbd_next list_contexts(struct onion_nbd_session *session, const struct onion_nbd_meta_query *query,
                                         struct onion_nbd_export *export, struct onion_nbd_out *out) {
    const uint32_t option = ONION_NBD_OPT_LIST_META_CONTEXT;
    const struct onion_nbd_hooks *hooks = &session->server->options.hooks;
    struct onion_nbd_context_listing listing = {session, query, out, 0};
    uint32_t after = session->listed_length;
    if (!after) {
        list_context(&listing, ALLOCATION);
        list_context(&listing, DEPTH);
    }
    if (!hooks->list_contexts) {
        list_computed(&listing, export);
        return acknowledge(out, option);
    }
    const char *name = onion_nbd_label(export)->name;
    int status = hooks->list_contexts(hooks->context, name, session->listed, after, &listing);
    return end_part(session, option, status, listing.full,
                    "the contexts cannot be listed now; the log of the server says why", out);
}

static enum onion_nbd_next meta_context(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                        const unsigned char *data, struct onion_nbd_out *out) {
    struct onion_nbd_meta_query query;
    struct onion_nbd_string string;
    int listing = option->option == ONION_NBD_OPT_LIST_META_CONTEXT;
    if (!listing)
        session->context_count = 0;
    if (!session->structured)
        return refuse(out, option->option, ONION_NBD_REP_ERR_INVALID, "ask for structured replies before contexts");
    if (onion_nbd_meta_decode(data, option->length, &query) < 0)
        return refuse(out, option->option, ONION_NBD_REP_ERR_INVALID,
                      "the lengths in this option do not add up, so nothing was looked up");
    int status;
    struct onion_nbd_export *export = find_or_ask(session->server, &query.name, &status);
    if (!export)
        return refuse_missing(session->server, option->option, status, "no such export", out);
    if (listing) {
        enum onion_nbd_next next = list_contexts(session, &query, export, out);
        onion_nbd_unref(session->server, export);
        return next;
    }
    onion_nbd_unref(session->server, session->meta_export);
    session->meta_export = export;
    while (status >= 0 && onion_nbd_meta_next(&query, &string))
        select_context(session, &string, out, &status);
    if (status < 0) {
        session->context_count = 0; /* an error selects none ... */
        out->length = 0;            /* ... and some clients would take those that it told of all the same */
        return refuse_missing(session->server, option->option, status, "", out);
    }
    return acknowledge(out, option->option);
}

/* ---- one option ---- */

static enum onion_nbd_next start_tls(const struct onion_nbd_session *session, struct onion_nbd_out *out) {
    return session->tls ? refuse(out, ONION_NBD_OPT_STARTTLS, ONION_NBD_REP_ERR_INVALID, "TLS has begun already")
                        : refuse(out, ONION_NBD_OPT_STARTTLS, ONION_NBD_REP_ERR_POLICY, "TLS is not offered here");
}

static enum onion_nbd_next structured_reply(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                            struct onion_nbd_out *out) {
    if (option->length)
        return refuse(out, option->option, ONION_NBD_REP_ERR_INVALID, "STRUCTURED_REPLY takes no data");
    session->structured = 1;
    return acknowledge(out, option->option);
}

enum onion_nbd_next onion_nbd_option(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                     const unsigned char *data, struct onion_nbd_out *out) {
    uint32_t number = option->option;
    if (session->require_tls && !session->tls && number != ONION_NBD_OPT_STARTTLS && number != ONION_NBD_OPT_ABORT)
        return number == ONION_NBD_OPT_EXPORT_NAME ? ONION_NBD_CLOSE
                                                   : refuse(out, number, ONION_NBD_REP_ERR_TLS_REQD,
                                                            "this server takes TLS alone; connect with nbds://");
    switch (number) {
    case ONION_NBD_OPT_EXPORT_NAME:
        return export_name(session, option, data, out);
    case ONION_NBD_OPT_ABORT:
        acknowledge(out, number);
        return ONION_NBD_CLOSE;
    case ONION_NBD_OPT_LIST:
        return list_exports(session, option, out);
    case ONION_NBD_OPT_STARTTLS:
        return start_tls(session, out);
    case ONION_NBD_OPT_INFO:
    case ONION_NBD_OPT_GO:
        return info_or_go(session, option, data, out);
    case ONION_NBD_OPT_STRUCTURED_REPLY:
        return structured_reply(session, option, out);
    case ONION_NBD_OPT_LIST_META_CONTEXT:
    case ONION_NBD_OPT_SET_META_CONTEXT:
        return meta_context(session, option, data, out);
    default:
        return refuse(out, number, ONION_NBD_REP_ERR_UNSUP, "not known here");
    }
}

void onion_nbd_session_end(struct onion_nbd_session *session) {
    onion_nbd_unref(session->server, session->chosen);
    onion_nbd_unref(session->server, session->meta_export);
    session->chosen = session->meta_export = NULL;
}

/* ---- on a socket ---- */

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

/* Waits until the socket may be read or written, or the deadline has passed, which is -ETIMEDOUT. */
static int wait_until(struct onion_nbd_connection *connection, short events, int64_t deadline_ms) {
    struct pollfd wait = {.fd = connection->fd, .events = events};
    int64_t left = deadline_ms - now_ms();
    return left <= 0 || (poll(&wait, 1, (int)left) < 0 && errno != EINTR) ? -ETIMEDOUT : 0;
}

/* Receives exactly `length` bytes before the deadline, so that a slow client cannot hold a connection for ever. */
static int receive(struct onion_nbd_connection *connection, void *out, size_t length, int64_t deadline_ms) {
    char *to = out;
    while (length) {
        if (now_ms() >= deadline_ms) /* whoever sends without an end is never waited for */
            return -ETIMEDOUT;
        ssize_t n = recv(connection->fd, to, length, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN && wait_until(connection, POLLIN, deadline_ms) < 0)
            return -ETIMEDOUT;
        if (n == 0)
            return -ECONNRESET;
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (n > 0)
            to += n, length -= (size_t)n;
    }
    return 0;
}

/* Sends all bytes before the deadline, so that a client that does not read cannot hold a connection for ever. */
static int send_in_time(struct onion_nbd_connection *connection, const void *bytes, size_t length,
                        int64_t deadline_ms) {
    const char *from = bytes;
    while (length) {
        if (now_ms() >= deadline_ms)
            return -ETIMEDOUT;
        ssize_t n = send(connection->fd, from, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN && wait_until(connection, POLLOUT, deadline_ms) < 0)
            return -ETIMEDOUT;
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (n > 0)
            from += n, length -= (size_t)n;
    }
    return 0;
}

static int greet(struct onion_nbd_connection *connection, int64_t deadline_ms) {
    unsigned char bytes[ONION_NBD_GREETING_BYTES];
    if (!(connection->flags & ONION_NBD_SERVE_RESUME_OPTIONS)) {
        int status = send_in_time(connection, bytes, onion_nbd_greeting(bytes), deadline_ms);
        if (status == 0)
            status = receive(connection, bytes, 4, deadline_ms);
        if (status < 0)
            return status;
        connection->client_flags = onion_get32(bytes);
    }
    connection->session.no_zeroes = !!(connection->client_flags & ONION_NBD_NO_ZEROES);
    return connection->client_flags & ~(uint32_t)(ONION_NBD_FIXED_NEWSTYLE | ONION_NBD_NO_ZEROES) ? ONION_E_FORMAT : 0;
}

static int skip(struct onion_nbd_connection *connection, uint32_t length, int64_t deadline_ms) {
    int status = 0;
    while (length && status == 0) {
        uint32_t part = length < ONION_NBD_IN_BYTES ? length : ONION_NBD_IN_BYTES;
        status = receive(connection, connection->in, part, deadline_ms);
        length -= part;
    }
    return status;
}

static int send_out(struct onion_nbd_connection *connection, struct onion_nbd_out *out, int64_t deadline_ms) {
    int status = out->failed ? -ENOMEM : send_in_time(connection, out->bytes, out->length, deadline_ms);
    out->length = 0;
    return status;
}

/* Ends the negotiation, before the client is told that it may use its export. From then on the connection is not ended
 * to make room for another. -ECONNABORTED: it is being ended already. */
static int come_in(struct onion_nbd_connection *connection) {
    pthread_mutex_lock(&connection->server->lock);
    if (!connection->gives_way)
        connection->negotiating = 0;
    pthread_mutex_unlock(&connection->server->lock);
    return connection->negotiating ? -ECONNABORTED : 0;
}

/* Receives and answers one option. Returns how to go on (enum onion_nbd_next), or a negative code. */
static int take_option(struct onion_nbd_connection *connection, int64_t deadline_ms) {
    unsigned char header[ONION_NBD_OPTION_BYTES];
    struct onion_nbd_option option;
    struct onion_nbd_out out = {0};
    enum onion_nbd_next next;
    int status = receive(connection, header, sizeof header, deadline_ms);
    if (status == 0)
        status = onion_nbd_option_decode(header, &option);
    if (status == 0 && option.length > ONION_NBD_OPTION_SKIP_MAX)
        status = -EMSGSIZE;
    if (status < 0)
        return status;
    if (option.length > ONION_NBD_OPTION_DATA_MAX) {
        status = skip(connection, option.length, deadline_ms);
        if (status == 0)
            refuse(&out, option.option, ONION_NBD_REP_ERR_TOO_BIG, "this option has more than 65536 bytes; send less");
        next = ONION_NBD_MORE_OPTIONS;
    } else {
        status = receive(connection, connection->in, option.length, deadline_ms);
        next = ONION_NBD_MORE_REPLIES;
    }
    while (status == 0 && next == ONION_NBD_MORE_REPLIES) {
        next = onion_nbd_option(&connection->session, &option, connection->in, &out);
        if (next == ONION_NBD_MORE_REPLIES)
            status = send_out(connection, &out, deadline_ms);
    }
    if (status == 0 && next == ONION_NBD_TRANSMISSION)
        status = come_in(connection);
    if (status == 0)
        status = send_out(connection, &out, deadline_ms);
    free(out.bytes);
    return status < 0 ? status : (int)next;
}

int onion_nbd_negotiate(struct onion_nbd_connection *connection) {
    int64_t deadline_ms = now_ms() + ONION_NBD_HANDSHAKE_SECONDS * 1000;
    int next = greet(connection, deadline_ms);
    if (next == 0)
        next = ONION_NBD_MORE_OPTIONS;
    while (next == ONION_NBD_MORE_OPTIONS)
        next = take_option(connection, deadline_ms);
    if (next == ONION_E_FORMAT)
        onion_nbd_event(connection->server, "%s: not an NBD client: bad magic or flags", connection->peer);
    else if (next == -EMSGSIZE)
        onion_nbd_event(connection->server, "%s: an option longer than 1 MiB", connection->peer);
    else if (next == -ETIMEDOUT)
        onion_nbd_event(connection->server, "%s: negotiation took longer than %d s", connection->peer,
                        ONION_NBD_HANDSHAKE_SECONDS);
    return next == ONION_NBD_TRANSMISSION;
}
