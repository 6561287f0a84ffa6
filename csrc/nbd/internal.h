/* internal.h: the types and functions that the files of the NBD server share. They are private to these files,
 * their check and their fuzzer. */
#ifndef ONIONSKIN_NBD_INTERNAL_H
#define ONIONSKIN_NBD_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#include "nbd/protocol.h"
#include "nbd/server.h"

enum {
    ONION_NBD_OPTION_DATA_MAX = 64 << 10, /* an option with more data is answered TOO_BIG */
    ONION_NBD_OPTION_SKIP_MAX = 1 << 20,  /* an option with more data than this closes the connection */
    ONION_NBD_CONTEXTS_MAX = 16,          /* contexts that one connection can select */
    ONION_NBD_LIST_BYTES = 64 << 10,      /* a list of exports or contexts is sent in parts of about this size */
    ONION_NBD_HANDSHAKE_SECONDS = 30,
    ONION_NBD_IN_BYTES = 256 << 10, /* the receive buffer */
    ONION_NBD_REPLIES_MAX = 64,     /* replies that are sent together */
    ONION_NBD_BATCH_MAX = 32,       /* writes that share system calls */
    ONION_NBD_QUEUE_MAX = 64,       /* requests that wait for the helper */
    ONION_NBD_EVENTS_MAX = 1024,
    ONION_NBD_BUCKETS = 1024,
    ONION_NBD_KEPT_MAX = 128, /* threads without a client that wait for later ones */
};

/* Ids of contexts on the wire. Changed-since contexts, under either of their names, get the ids from ID_CHANGED on. */
enum { ONION_NBD_ID_ALLOCATION = 1, ONION_NBD_ID_DEPTH = 2, ONION_NBD_ID_CHANGED = 3 };

/* A changed-since context. It changes only while its export is held, and lives as long as the export. */
struct onion_nbd_context {
    struct onion_nbd_context *next;
    char *name;
    uint32_t id;
    uint64_t mark;
    int all_changed;
    uint64_t (*runs)[2];
    size_t run_count;
};

/* The name and the description of an export. Former labels live as long as the export, because connections may be
 * reading them. */
struct onion_nbd_label {
    struct onion_nbd_label *former;
    char *name, *description;
};

struct onion_nbd_export {
    struct onion_nbd_export *next, **link; /* in the server's list; `same` is the next one in its bucket */
    struct onion_nbd_export *same;
    uint32_t references;            /* one for the list and one for each user; guarded by the server's lock */
    struct onion_nbd_label *label;  /* atomic; set under the server's lock */
    uint32_t key;                   /* of its name; likewise */
    struct onion_nbd_counters past; /* the sum of connections that ended; guarded by the server's lock */
    int read_only;
    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t changed;
    struct onion_volume *volume; /* NULL: removed */
    int unwritten;               /* atomic; the volume is that of the layer below the head, until it is replaced */
    int is_written;              /* atomic; a client has changed it, or is about to, and the hook is told */
    uint64_t generation;         /* counts the volumes; a reply that began with another volume is not continued */
    uint32_t in_flight;
    uint32_t holds;
    struct onion_nbd_context *contexts;
    uint32_t next_context_id;
};

/* A growing buffer for the answers of a negotiation. */
struct onion_nbd_out {
    unsigned char *bytes;
    size_t length, capacity;
    int failed; /* an allocation failed */
};

/* The state of option haggling. It needs no socket. */
struct onion_nbd_session {
    struct onion_nbd_server *server;
    int tls, require_tls, no_zeroes;
    int structured;
    uint32_t listed_length; /* length of the name that was listed last; 0: a list begins */
    char listed[ONION_NBD_NAME_MAX];
    struct onion_nbd_export *chosen;      /* holds a reference */
    struct onion_nbd_export *meta_export; /* the export of the selected contexts; holds a reference */
    uint32_t context_count;
    uint32_t context_ids[ONION_NBD_CONTEXTS_MAX];
    struct onion_nbd_context *contexts[ONION_NBD_CONTEXTS_MAX]; /* NULL for the two fixed ones */
};

/* MORE_REPLIES: the caller sends the answers so far, and calls again with the same option. */
enum onion_nbd_next { ONION_NBD_MORE_OPTIONS, ONION_NBD_TRANSMISSION, ONION_NBD_CLOSE, ONION_NBD_MORE_REPLIES };

/* A request on its way to the helper, with its payload. */
struct onion_nbd_job {
    struct onion_nbd_request request;
    unsigned char *payload; /* NULL: none */
    uint32_t error;
    int flush_wanted;
    int64_t received_ns;
    unsigned char *reply; /* NULL: a reply that only has a status */
    size_t reply_length;
};

struct onion_nbd_helper {
    pthread_t thread;
    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t changed;
    int started, ending;
    uint32_t busy; /* jobs taken and not yet answered */
    uint32_t head, count;
    uint64_t bytes; /* payloads of all jobs queued or busy */
    struct onion_nbd_job queue[ONION_NBD_QUEUE_MAX];
};

/* A reply that is being sent: the present chunk (header, data, tail), and for reads the range of the chunks after it.
 * See reply.c. */
struct onion_nbd_reply {
    uint64_t cookie, offset; /* offset and left: the range that is not laid out yet */
    uint32_t left;
    uint64_t at; /* at and data_left: the range of the chunk's data that is not sent yet */
    uint32_t data_left;
    uint16_t flags;
    unsigned char header[32], tail[32];
    uint8_t header_length, header_sent, tail_length, tail_sent;
    uint8_t is_read;
    uint8_t begun;    /* some of its bytes are in the socket */
    uint8_t padding;  /* the chunk's data could not be read: zeros complete it, and its tail reports the error */
    uint8_t promised; /* the chunk's header says success, and nothing that follows can report an error */
};

struct onion_nbd_connection {
    struct onion_nbd_connection *next, **link; /* in the server's list */
    struct onion_nbd_server *server;
    uint64_t id;
    int fd;
    char peer[128];
    int flags;
    uint32_t client_flags;
    int negotiating;
    int gives_way; /* it is being ended to make room for another connection; under the server's lock */
    int broken;    /* atomic: nothing more can be sent */
    struct onion_nbd_session session;
    struct onion_nbd_counters counters; /* atomic each */

    /* Only the connection's own thread uses these. */
    unsigned char *in;
    size_t in_from, in_to;
    int requests_come_fast;
    int64_t received_ns;               /* when the last bytes came */
    uint32_t waiting[ONION_NBD_VERBS]; /* requests whose latency is not counted yet, without those of the helper */
    unsigned char *payload;            /* kept from one large write to the next */
    size_t payload_capacity;
    unsigned char *batch;        /* ONION_NBD_IN_BYTES for consecutive payloads; NULL until two writes come together */
    struct onion_volume *volume; /* set while in flight; NULL if the export is gone */
    int in_flight;
    uint32_t gone; /* the error to answer while volume is NULL */
    uint64_t generation;
    struct onion_nbd_reply replies[ONION_NBD_REPLIES_MAX];
    uint32_t reply_count;

    pthread_mutex_t send_lock;
    struct onion_nbd_helper helper;
};

struct onion_nbd_server {
    struct onion_nbd_options options;
    pthread_mutex_t lock;
    pthread_cond_t closed;                    /* a connection ended */
    struct onion_nbd_export *exports, **last; /* in the order in which they were added; `last` points to the end */
    struct onion_nbd_export *buckets[ONION_NBD_BUCKETS]; /* the same by their keys: a server may have thousands */
    char *default_name;
    struct onion_nbd_connection *connections;
    uint32_t connection_count;
    uint64_t next_id;
    int stopping;                /* atomic */
    pid_t process;               /* that has its threads: the child of a fork has none */
    struct onion_nbd_kept *kept; /* threads that wait for a client; the last one to begin is the first */
    uint32_t kept_count;
    uint32_t ready_max;              /* so many wait without an end */
    uint32_t thread_count;           /* those with a client included */
    struct onion_nbd_asking *asking; /* connections that wait for their turn, first come first */
    uint64_t askings;                /* how many have waited so far, those of `asking` included */
    int is_asked;                    /* one of them has it */
    struct onion_nbd_counters past;  /* the sum of connections that ended */

    pthread_mutex_t event_lock;
    int event_fd;
    char (*events)[ONION_NBD_EVENT_BYTES];
    uint32_t event_head, event_count;
    uint64_t events_dropped;
};

static inline const struct onion_nbd_label *onion_nbd_label(const struct onion_nbd_export *export) {
    return __atomic_load_n(&export->label, __ATOMIC_ACQUIRE);
}

static inline int onion_nbd_is_unwritten(const struct onion_nbd_export *export) {
    return __atomic_load_n(&export->unwritten, __ATOMIC_ACQUIRE);
}

/* ---- turns.c ---- */

/* Calls find_export when it is this connection's turn, unless the export was found meanwhile. 1: it may be there. 0 or
 * negative: what find_export said. */
int onion_nbd_ask(struct onion_nbd_server *server, const struct onion_nbd_string *name);

/* ---- threads.c ---- */

/* Whether threads are left that use the server. In the child of a fork there are none. The caller holds the lock. */
int onion_nbd_has_threads(const struct onion_nbd_server *server);
/* Gives a connection to a thread that waits for one. Returns it, or NULL if there is none. The caller holds the server's
 * lock, and calls onion_nbd_wake_kept when it has given that up: until then the thread does not begin. */
struct onion_nbd_kept *onion_nbd_hand_over(struct onion_nbd_server *server, struct onion_nbd_connection *connection);
void onion_nbd_wake_kept(struct onion_nbd_kept *kept);
/* Starts a thread, which has to call onion_nbd_next_connection until that returns NULL. The caller does not hold the
 * lock. 0 or -errno. */
int onion_nbd_start_thread(struct onion_nbd_server *server, void *(*run)(void *), void *argument);
/* Starts threads as above, with the server as their argument, until `count` are there, and has as many wait without an end.
 * Where the system would give the rest of the process too few after that, they are fewer, or none. */
void onion_nbd_start_ready_threads(struct onion_nbd_server *server, uint32_t count, void *(*run)(void *));
/* Waits for a later client, for the time of the options; without an end where few wait. NULL: the thread has to end, and the
 * server may be freed. */
struct onion_nbd_connection *onion_nbd_next_connection(struct onion_nbd_server *server);
/* Has all threads that wait end. The server is stopping, and the caller holds its lock. */
void onion_nbd_end_kept_threads(struct onion_nbd_server *server);

/* ---- events.c ---- */

/* Waits until a word is another than this, or until a time by the clock of onion_nbd_now_ns (NULL: for ever), and returns
 * what it is. What was written before it was said is seen then. No lock is needed: who is woken under a lock would wait for
 * that at once. */
uint32_t onion_nbd_await(uint32_t *word, uint32_t than, const struct timespec *until);
/* Changes the word of another thread, and wakes it. The word may be gone as soon as it is changed. */
void onion_nbd_say(uint32_t *word, uint32_t what);
void onion_nbd_event(struct onion_nbd_server *server, const char *format, ...) __attribute__((format(printf, 2, 3)));
int64_t onion_nbd_now_ns(void);
/* A condition whose waits with a limit go by the clock of onion_nbd_now_ns, as onion_nbd_in_ms does. */
void onion_nbd_init_condition(pthread_cond_t *condition);
struct timespec onion_nbd_in_ms(uint64_t ms);

static inline void onion_nbd_counter_add(uint64_t *counter, uint64_t value) {
    __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}
/* Adds the counters `one` to `sum`. Other threads may be incrementing `one` meanwhile. */
void onion_nbd_add_counters(struct onion_nbd_counters *sum, const struct onion_nbd_counters *one);

/* ---- exports.c ---- */

/* Returns the export of that name, or NULL. The caller holds the server's lock. */
struct onion_nbd_export *onion_nbd_named(struct onion_nbd_server *server, const char *name, size_t length);
/* Takes an export out of the list. The caller holds the server's lock. */
void onion_nbd_unlink_export(struct onion_nbd_server *server, struct onion_nbd_export *export);
/* Returns the export of that name with a reference, or NULL. The name may be any bytes. */
struct onion_nbd_export *onion_nbd_find(struct onion_nbd_server *server, const char *name, uint32_t length);
void onion_nbd_unref(struct onion_nbd_server *server, struct onion_nbd_export *export);
/* Counts a request as in flight and returns the volume, or returns NULL if the export is gone. Waits while the export
 * is held. */
struct onion_volume *onion_nbd_enter(struct onion_nbd_export *export, uint64_t *generation);
void onion_nbd_leave(struct onion_nbd_export *export);
/* Makes durable what was written before the call. If the disk is full, the hook make_room may flush again with more
 * room. The caller is not in flight. -ESHUTDOWN: the export is gone. A view has nothing to make durable. */
int onion_nbd_flush(struct onion_nbd_server *server, struct onion_nbd_export *export);
/* Removes the volume for good and waits for the requests in flight. Requests that wait because the export is held, and
 * later requests, get ESHUTDOWN. */
void onion_nbd_take_volume_away(struct onion_nbd_export *export);

/* ---- handshake.c ---- */

/* Takes one option with its data, appends the answer to out, and says how to go on. */
enum onion_nbd_next onion_nbd_option(struct onion_nbd_session *session, const struct onion_nbd_option *option,
                                     const unsigned char *data, struct onion_nbd_out *out);
void onion_nbd_session_end(struct onion_nbd_session *session);
/* Does the whole handshake on a connection's socket. 1: transmission may begin. 0: the connection is to be closed. */
int onion_nbd_negotiate(struct onion_nbd_connection *connection);

/* ---- reply.c ---- */

/* Sends all bytes, and waits for a slow client: 0 or -errno. The caller holds the send lock if other threads may
 * send. */
int onion_nbd_send_all(struct onion_nbd_connection *connection, const void *bytes, size_t length);
/* Adds a reply to the replies that are sent together. If there is no room for it, those are sent first. */
int onion_nbd_reply_status(struct onion_nbd_connection *connection, uint64_t cookie, uint32_t error);
int onion_nbd_reply_read(struct onion_nbd_connection *connection, const struct onion_nbd_request *request);
/* Sends the replies that were added: 0, or -errno if the connection cannot be used any more. */
int onion_nbd_send_replies(struct onion_nbd_connection *connection);
size_t onion_nbd_encode_status(const struct onion_nbd_session *session, uint64_t cookie, uint32_t error,
                               unsigned char *out);

/* Count the connection's own requests as in flight. enter may be called again, and leaves c->volume NULL if the export
 * is gone. Between enter and leave, the thread does not wait for a socket, a queue or another connection's lock. */
void onion_nbd_connection_enter(struct onion_nbd_connection *connection);
void onion_nbd_connection_leave(struct onion_nbd_connection *connection);

/* ---- transmission.c ---- */

void onion_nbd_transmit(struct onion_nbd_connection *connection);
void onion_nbd_limits(const struct onion_nbd_session *session, const struct onion_volume *volume,
                      struct onion_nbd_limits *limits);

/* ---- write_batch.c ---- */

/* Writes `count` (up to ONION_NBD_BATCH_MAX) checked requests, whose payloads are consecutive. The caller sets `errors`
 * to zero before. */
void onion_nbd_write_batch(struct onion_volume *volume, const struct onion_nbd_request *requests, uint32_t count,
                           const unsigned char *payloads, uint32_t *errors);

/* ---- worker.c ---- */

/* Gives a request to the helper, or runs it where there is no thread for one; the payload is freed then. Waits while too
 * much is queued. 0, or -errno where nothing more can be sent. */
int onion_nbd_queue(struct onion_nbd_connection *connection, const struct onion_nbd_request *request,
                    unsigned char *payload);
/* Runs a TRIM or WRITE_ZEROES in the calling thread, and returns the error value for the client. */
uint32_t onion_nbd_run_zero(struct onion_volume *volume, const struct onion_nbd_request *request);
int onion_nbd_helper_idle(struct onion_nbd_connection *connection);
/* Waits until all jobs are answered, and ends the helper's thread. */
void onion_nbd_helper_end(struct onion_nbd_connection *connection);

/* ---- block_status.c ---- */

/* Allocates the reply to BLOCK_STATUS, which the caller frees: 0 or a negative code. */
int onion_nbd_block_status(struct onion_volume *volume, const struct onion_nbd_session *session,
                           const struct onion_nbd_request *request, unsigned char **reply, size_t *reply_length);

#endif
