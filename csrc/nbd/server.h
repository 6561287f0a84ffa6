/* server.h: an NBD server over open volumes. It needs no Python, and any thread may call it.
 *
 * The caller listens and accepts. The server takes connected stream sockets, speaks the fixed newstyle protocol on
 * them, each in a thread of its own, and hands requests to the volumes. Functions return 0 (or what their comment
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
    ONION_NBD_EVENT_BYTES = 512, /* of one event, with its terminating zero */
    ONION_NBD_VERBS = 8,         /* numbered as the protocol's commands */
};

struct onion_nbd_listing;
struct onion_nbd_context_listing;

/* Asked without any lock, and with nothing in flight on behalf of the asker. Each may be NULL. Names with a length are
 * not terminated; those of the first four are any bytes that a client sent.
 *
 * still_export, still_context: a client names what is there. 1: it still is what that name means, 0: the next two are
 * asked as if it were not there. NULL: it always is.
 *
 * find_export, find_context: a client names what is not there; they may add it. 1: look again, 0: it does not exist.
 *
 * make_room: a flush of that export found the disk full. 1: it was made after all, with room that was found for it, 0:
 * there is none to be made.
 *
 * freed: a flush of that export left work for onion_volume_reclaim_wanted.
 *
 * list_exports: a client wants to know all names, more than are open. Hands those that come behind `after` (none: all)
 * to onion_nbd_list, in an order of its own that is always the same, until there are no more or that returns 1; then it
 * is asked again with the last one. Negative: the list ends in an error. NULL: the exports that are there are listed.
 *
 * list_contexts: likewise the metadata contexts that find_context could add to the export `name`, which is terminated, to
 * onion_nbd_list_context. NULL: those that were added are listed.
 * */
struct onion_nbd_hooks {
    int (*still_export)(void *context, const char *name, uint32_t length);
    int (*still_context)(void *context, const char *name, uint32_t length, const char *meta, uint32_t meta_length);
    int (*find_export)(void *context, const char *name, uint32_t length);
    int (*find_context)(void *context, const char *name, uint32_t length, const char *meta, uint32_t meta_length);
    int (*make_room)(void *context, const char *name);
    void (*freed)(void *context, const char *name);
    int (*list_exports)(void *context, const char *after, uint32_t length, struct onion_nbd_listing *listing);
    int (*list_contexts)(void *context, const char *name, const char *after, uint32_t length,
                         struct onion_nbd_context_listing *listing);
    void *context;
};

struct onion_nbd_options {
    uint32_t connections_max;   /* where they are open, the oldest that still negotiates gives way to a new one */
    uint32_t idle_seconds;      /* a connection without a request is closed after so long; 0: never */
    uint32_t request_bytes_max; /* of a read or a write: 65,536 to ONION_NBD_REQUEST_BYTES_MAX */
    uint64_t bytes_in_flight_max;
    struct onion_nbd_hooks hooks;
};

/* Requests, bytes and errors of one connection, of one export, or of all. */
struct onion_nbd_counters {
    uint64_t requests[ONION_NBD_VERBS];
    uint64_t bytes[ONION_NBD_VERBS];
    uint64_t latency_ns[ONION_NBD_VERBS]; /* summed up: from a request's last byte to its reply's handing over */
    uint64_t errors;
    uint64_t sends; /* system calls that sent replies: requests over this is how many were answered together */
};

struct onion_nbd_connection_info {
    uint64_t id;
    char peer[128];
    char export_name[256]; /* cut where it is longer; empty while negotiating */
    int tls, negotiating;
    struct onion_nbd_counters counters;
};

enum onion_nbd_serve_flags {
    ONION_NBD_SERVE_TLS = 1,            /* the socket carries what came out of TLS */
    ONION_NBD_SERVE_REQUIRE_TLS = 2,    /* nothing but STARTTLS and ABORT is answered */
    ONION_NBD_SERVE_RESUME_OPTIONS = 4, /* greeting and client flags were exchanged by the caller */
};

int onion_nbd_new(const struct onion_nbd_options *options, struct onion_nbd_server **out);
/* Stops, with no grace. */
void onion_nbd_free(struct onion_nbd_server *server);

/* The volume must stay allocated until the export was removed or its volume replaced, or the server is stopped.
 * -EEXIST: the name is taken. -EINVAL: longer than the protocol allows. */
int onion_nbd_add_export(struct onion_nbd_server *server, const char *name, struct onion_volume *volume, int read_only,
                         const char *description);
/* Answers to the empty name. -ENOENT. */
int onion_nbd_set_default(struct onion_nbd_server *server, const char *name);
/* Connections that have the export open go on; later ones ask for the new name. -ENOENT, -EEXIST, -EINVAL. */
int onion_nbd_rename_export(struct onion_nbd_server *server, const char *name, const char *new_name,
                            const char *description);
/* Waits for requests in flight; later ones, on connections that are open, get ESHUTDOWN. With `if_unused` nothing is
 * done where a connection has the export, or is just coming to it: -EBUSY. -ENOENT. */
int onion_nbd_remove_export(struct onion_nbd_server *server, const char *name, int if_unused);
/* Waits for requests in flight; later ones use the new volume. A reply that was sent in part ends in an error. The
 * export's changed-since contexts say from then on that everything changed. -ENOENT. */
int onion_nbd_replace_volume(struct onion_nbd_server *server, const char *name, struct onion_volume *volume);
/* hold waits for requests in flight; later ones wait until as many releases were made. -ENOENT. */
int onion_nbd_hold(struct onion_nbd_server *server, const char *name);
int onion_nbd_release(struct onion_nbd_server *server, const char *name);
/* The mark to take before the runs of a changed-since context are computed: see onion_volume_birth. -ENOENT. */
int64_t onion_nbd_change_mark(struct onion_nbd_server *server, const char *name);
/* Adds or replaces a metadata context that answers flag 1 for what changed: the runs (offset, length; sorted, apart),
 * which are copied, and, on a writable export, whatever was written since `mark` and whatever is ZERO. -ENOENT,
 * -EINVAL. */
int onion_nbd_set_context(struct onion_nbd_server *server, const char *name, const char *meta,
                          const uint64_t (*runs)[2], size_t run_count, uint64_t mark);

/* For list_exports: adds a name. 1: there is no room for more now. -EINVAL: longer than the protocol allows. */
int onion_nbd_list(struct onion_nbd_listing *listing, const char *name, const char *description);
/* For list_contexts, likewise. */
int onion_nbd_list_context(struct onion_nbd_context_listing *listing, const char *name);

/* Takes over the socket, and serves it in a thread of its own. Returns the connection's id; on an error the socket is
 * closed. -EMFILE: connections_max are open. -ESHUTDOWN: stopped. */
int64_t onion_nbd_serve(struct onion_nbd_server *server, int fd, const char *peer, int flags, uint32_t client_flags);

/* How many there are; fills as many as fit. */
uint32_t onion_nbd_connections(struct onion_nbd_server *server, struct onion_nbd_connection_info *infos,
                               uint32_t capacity);
/* Of all connections since the start. */
void onion_nbd_count(struct onion_nbd_server *server, struct onion_nbd_counters *out);
/* Of all connections to one export since it was added. -ENOENT. */
int onion_nbd_count_export(struct onion_nbd_server *server, const char *name, struct onion_nbd_counters *out);

/* What happened: a queue of lines that never blocks a connection. Where nobody reads, the oldest are dropped and
 * counted. The descriptor is an eventfd, readable while there are any. */
int onion_nbd_event_fd(const struct onion_nbd_server *server);
/* The oldest event, terminated; returns its length, or 0 where there is none. */
uint32_t onion_nbd_next_event(struct onion_nbd_server *server, char out[ONION_NBD_EVENT_BYTES], uint64_t *dropped);

/* Takes no more requests, finishes those that arrived, closes what is not done after grace_ms, then flushes each
 * writable export. Returns the first failure of a flush. Idempotent. */
int onion_nbd_stop(struct onion_nbd_server *server, uint64_t grace_ms);

#endif
