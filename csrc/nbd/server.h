/* server.h: an NBD server over open volumes. It needs no Python, and any thread may call it.
 *
 * The caller listens. The server takes connected stream sockets, speaks the fixed newstyle protocol on
 * them, each in a thread that it has alone, and hands requests to the volumes. Functions return 0 (or what their comment
 * says) or a negative code of base/status.h.
 *
 * What must hold
 *  - Lengths from the wire are bounded before memory is allocated for them: an option's data by 64 KiB, a write's
 *    payload by request_bytes_max, and the payloads that wait for the helper thread by bytes_in_flight_max for each
 *    connection.
 *  - A request is in flight from the moment at which all of it has arrived until its reply is in the socket, or the
 *    socket is full. An export's volume is taken away (remove, replace, stop) only when nothing is in flight on it.
 *    So no reply mixes two volumes. No client, however slow, delays this, because a thread that waits for a socket
 *    is not in flight.
 *  - A write's payload is complete before any of it is written.
 *  - A read is sent from the segments' mappings, under a ticket that is held for one system call that does not
 *    block. When the socket is full, the ticket is given back and the rest is planned anew.
 *  - A flush, or a request with FUA, is answered after an onion_volume_flush that began after the request has
 *    ended. So the flush covers every write that was acknowledged before, on any connection.
 *  - If a mapping fails, the client gets EIO for that request. The connection is closed only if the bytes were
 *    promised already by a header that cannot be taken back.
 * Order of locks: a connection's send lock, server lock, export lock. None is held while a hook is called. */
#ifndef ONIONSKIN_NBD_SERVER_H
#define ONIONSKIN_NBD_SERVER_H

#include <stddef.h>
#include <stdint.h>

#include "volume/volume.h"

struct onion_nbd_server;

enum {
    ONION_NBD_REQUEST_BYTES_MAX = 32 << 20,
    ONION_NBD_EVENT_BYTES = 512, /* the size of an event, with its terminating zero */
    ONION_NBD_VERBS = 8,         /* they are numbered like the protocol's commands */
};

struct onion_nbd_listing;
struct onion_nbd_context_listing;

/* Functions of the caller that the server calls. It holds no lock during a call, and the calling thread has nothing in
 * flight. Each function may be NULL. Names with a length are not terminated. Those of the first four functions may be
 * any bytes that a client sent.
 *
 * still_export, still_context: a client asks for a name that the server has. 1: the name still means the same thing. 0:
 * it does not, and the server calls find_export or find_context as if it did not have the name. NULL: always 1.
 *
 * find_export, find_context: a client asks for a name that the server does not have. The function may add it. 1: the
 * server looks again, and asks again where it is gone. 0: the name does not exist. Negative: that cannot be told now, or
 * it cannot be opened; -ESHUTDOWN: since the caller is ending. Of several clients, one after the other calls find_export, unless one
 * takes longer than turn_ms: see onion_nbd_found.
 *
 * make_room: a flush of that export found the disk full. 1: the function found room and flushed the volume. 0: there is
 * no room.
 *
 * freed: a flush of that export left work for onion_volume_reclaim_wanted.
 *
 * begin_writing: a request needs the head of that export, which was added as unwritten. The function opens the head and
 * calls onion_nbd_replace_volume; of several threads that ask at once, each waits for that. 0, or the error: then nothing
 * was changed, and the request is answered with it. If no export has the name any more, it returns 0 and is asked again.
 *
 * written: a client is about to change that export, for the first time since it was added. The request waits for it, and
 * goes on whatever it does.
 *
 * list_exports: a client wants a list of all names, not only of those that are open. The function passes the names that
 * come after `after` (length 0: all names) to onion_nbd_list, in an order of its own that is always the same. It
 * returns when there are no more names, or when onion_nbd_list returns 1; then it is called again with the last name.
 * Negative: the list ends with an error. NULL: the server lists the exports that it has.
 *
 * list_contexts: the function does the same with onion_nbd_list_context, for the metadata contexts that find_context
 * could add to the export `name`, which is terminated. NULL: the server lists the contexts that it has. */
struct onion_nbd_hooks {
    int (*still_export)(void *context, const char *name, uint32_t length);
    int (*still_context)(void *context, const char *name, uint32_t length, const char *meta, uint32_t meta_length);
    int (*find_export)(void *context, const char *name, uint32_t length);
    int (*find_context)(void *context, const char *name, uint32_t length, const char *meta, uint32_t meta_length);
    int (*make_room)(void *context, const char *name);
    void (*freed)(void *context, const char *name);
    int (*begin_writing)(void *context, const char *name);
    void (*written)(void *context, const char *name);
    int (*list_exports)(void *context, const char *after, uint32_t length, struct onion_nbd_listing *listing);
    int (*list_contexts)(void *context, const char *name, const char *after, uint32_t length,
                         struct onion_nbd_context_listing *listing);
    void *context;
};

struct onion_nbd_options {
    uint32_t connections_max;   /* if so many are open, the oldest that still negotiates is ended for a new one */
    uint32_t idle_seconds;      /* a connection without a request is closed after this time; 0: never */
    uint32_t request_bytes_max; /* the limit of a read or a write: 65,536 to ONION_NBD_REQUEST_BYTES_MAX */
    uint64_t bytes_in_flight_max;
    uint32_t turn_ms; /* for so long a client waits for the find_export of another */
    uint32_t kept_ms; /* for so long a thread whose client has gone waits for a later one; 0: it ends at once */
    struct onion_nbd_hooks hooks;
};

/* Requests, bytes and errors of one connection, of one export, or of all. */
struct onion_nbd_counters {
    uint64_t requests[ONION_NBD_VERBS];
    uint64_t bytes[ONION_NBD_VERBS];
    uint64_t latency_ns[ONION_NBD_VERBS]; /* the sum of times from a request's last byte until its reply was sent */
    uint64_t errors;
    uint64_t sends; /* system calls that sent replies; requests / sends is how many were answered together */
};

struct onion_nbd_connection_info {
    uint64_t id;
    char peer[128];
    char export_name[256]; /* cut off if it is longer; empty while negotiating */
    int tls, negotiating;
    struct onion_nbd_counters counters;
};

enum onion_nbd_serve_flags {
    ONION_NBD_SERVE_TLS = 1,            /* the caller carries the client's TLS, and the socket has the plain bytes */
    ONION_NBD_SERVE_REQUIRE_TLS = 2,    /* nothing but STARTTLS and ABORT is answered */
    ONION_NBD_SERVE_RESUME_OPTIONS = 4, /* the caller has exchanged greeting and client flags */
};

int onion_nbd_new(const struct onion_nbd_options *options, struct onion_nbd_server **out);
/* Stops the server without grace, and frees it. */
void onion_nbd_free(struct onion_nbd_server *server);

/* UNWRITTEN: the volume is that of the layer below a head to which nothing was written, and reads as the head does. The
 * hook begin_writing is called before the first request that needs the head itself. */
enum onion_nbd_access { ONION_NBD_TO_WRITE, ONION_NBD_TO_READ, ONION_NBD_UNWRITTEN };

/* The volume must stay allocated until the export is removed, its volume is replaced, or the server is stopped.
 * -EEXIST: the name is taken. -EINVAL: the name or the description is longer than the protocol allows. */
int onion_nbd_add_export(struct onion_nbd_server *server, const char *name, struct onion_volume *volume,
                         enum onion_nbd_access access, const char *description);
/* Copies the names for which clients wait until it is their turn to call find_export, each with a terminating zero: any
 * bytes that they sent. The caller frees them. Returns their length, or -ENOMEM. `until` is set to a moment: all that wait
 * now have asked before it. */
int64_t onion_nbd_asked(struct onion_nbd_server *server, char **out, uint64_t *until);
/* Tells those clients that asked before that moment that exports of these names were added. They do not call find_export.
 * Who asked later still does: what the caller knows of a name may be older than that question. */
void onion_nbd_found(struct onion_nbd_server *server, const char *const *names, size_t count, uint64_t until);
/* Makes the export of that name the one that clients get by the empty name. -ENOENT. */
int onion_nbd_set_default(struct onion_nbd_server *server, const char *name);
/* Connections that have the export open go on. Later clients ask for the new name. -ENOENT, -EEXIST, -EINVAL. */
int onion_nbd_rename_export(struct onion_nbd_server *server, const char *name, const char *new_name,
                            const char *description);
/* Waits for requests in flight. Later requests on open connections get ESHUTDOWN. With `if_unused`, nothing is done if
 * a connection has the export open or is about to open it: -EBUSY. -ENOENT. */
int onion_nbd_remove_export(struct onion_nbd_server *server, const char *name, int if_unused);
/* Waits for requests in flight. Later requests use the new volume. A reply that was sent in part ends with an error.
 * The export's changed-since contexts say from then on that everything changed. -ENOENT. */
int onion_nbd_replace_volume(struct onion_nbd_server *server, const char *name, struct onion_volume *volume);
/* hold waits for requests in flight. Later requests wait until release was called as often as hold. -ENOENT. */
int onion_nbd_hold(struct onion_nbd_server *server, const char *name);
int onion_nbd_release(struct onion_nbd_server *server, const char *name);
/* Returns a mark, which the caller takes before it computes the runs of a changed-since context: see
 * onion_volume_birth.
 * -ENOENT. */
int64_t onion_nbd_change_mark(struct onion_nbd_server *server, const char *name);
/* Adds or replaces a metadata context that answers flag 1 for ranges that changed. These are the runs (offset, length;
 * sorted, without overlap), which are copied. On a writable export, ranges that were written since `mark` and ranges
 * that are ZERO count as changed too. -ENOENT, -EINVAL. */
int onion_nbd_set_context(struct onion_nbd_server *server, const char *name, const char *meta,
                          const uint64_t (*runs)[2], size_t run_count, uint64_t mark);

/* list_exports calls it to add a name. 1: there is no room for more now. -EINVAL: longer than the protocol allows. */
int onion_nbd_list(struct onion_nbd_listing *listing, const char *name, const char *description);
/* list_contexts calls it in the same way. */
int onion_nbd_list_context(struct onion_nbd_context_listing *listing, const char *name);

/* Takes over the socket, and serves it in a thread that no other client has meanwhile. Returns the connection's id; on an error the socket is
 * closed. -EMFILE: connections_max are open. -ESHUTDOWN: stopped. */
int64_t onion_nbd_serve(struct onion_nbd_server *server, int fd, const char *peer, int flags, uint32_t client_flags);

/* Takes clients that wait at a listening Unix socket, which does not block, and serves each. Returns how many came, or
 * the error of accept; one for whom there is no room, memory or thread is sent away, with an event. It returns when none
 * waits any more, and soon where more and more come or one had to wait for room: the caller may want to end. */
int onion_nbd_accept(struct onion_nbd_server *server, int listener);

/* Starts threads until `count` are there, for clients that come, and keeps as many however long none comes: a hundred
 * that come at once would wait for each other's threads to be started. Where the system gives few threads, most are left to
 * the rest of the process, for whoever snapshots a volume, and fewer are begun, or none. */
void onion_nbd_begin_threads(struct onion_nbd_server *server, uint32_t count);

/* Returns the number of connections, and describes as many of them as fit. */
uint32_t onion_nbd_connections(struct onion_nbd_server *server, struct onion_nbd_connection_info *infos,
                               uint32_t capacity);
/* Returns the counters of all connections since the start. */
void onion_nbd_count(struct onion_nbd_server *server, struct onion_nbd_counters *out);
/* Returns the counters of all connections to one export since it was added. -ENOENT. */
int onion_nbd_count_export(struct onion_nbd_server *server, const char *name, struct onion_nbd_counters *out);

/* Events are lines of a log. They go into a queue that never blocks a connection. If nobody reads it, the oldest events
 * are dropped and counted. The descriptor is an eventfd, which is readable while there are events. */
int onion_nbd_event_fd(const struct onion_nbd_server *server);
/* Copies the oldest event, with a terminating zero. Returns its length, or 0 if there is none. */
uint32_t onion_nbd_next_event(struct onion_nbd_server *server, char out[ONION_NBD_EVENT_BYTES], uint64_t *dropped);

/* Takes no more requests and finishes those that have arrived. After grace_ms it closes the connections that are not
 * done. Then it flushes each writable export. Returns the first failure of a flush. Idempotent. */
int onion_nbd_stop(struct onion_nbd_server *server, uint64_t grace_ms);

#endif
