/* protocol.h: the bytes of the NBD protocol, as pure functions over (bytes, length).
 *
 * Decoders read nothing past the length that they are given, allocate nothing, and hand out pointers into the
 * input. All numbers on the wire are big-endian. The names are those of the protocol's document (doc/proto.md of
 * the NetworkBlockDevice project), with ONION_ in front. */
#ifndef ONIONSKIN_NBD_PROTOCOL_H
#define ONIONSKIN_NBD_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define ONION_NBD_MAGIC UINT64_C(0x4e42444d41474943)
#define ONION_NBD_OPTION_MAGIC UINT64_C(0x49484156454F5054)
#define ONION_NBD_OPTION_REPLY_MAGIC UINT64_C(0x3e889045565a9)
#define ONION_NBD_REQUEST_MAGIC UINT32_C(0x25609513)
#define ONION_NBD_SIMPLE_REPLY_MAGIC UINT32_C(0x67446698)
#define ONION_NBD_CHUNK_MAGIC UINT32_C(0x668e33ef)

enum {
    ONION_NBD_NAME_MAX = 4096, /* the longest name that the protocol allows, in bytes */
    ONION_NBD_GREETING_BYTES = 18,
    ONION_NBD_OPTION_BYTES = 16, /* the header of an option */
    ONION_NBD_OPTION_REPLY_BYTES = 20,
    ONION_NBD_REQUEST_BYTES = 28,
    ONION_NBD_SIMPLE_REPLY_BYTES = 16,
    ONION_NBD_CHUNK_BYTES = 20,        /* the header of a structured reply chunk */
    ONION_NBD_EXPORT_REPLY_BYTES = 10, /* the reply to EXPORT_NAME, without the zeroes */
    ONION_NBD_EXPORT_ZEROES = 124,
};

/* Handshake flags, of the server and of the client alike. */
enum { ONION_NBD_FIXED_NEWSTYLE = 1, ONION_NBD_NO_ZEROES = 2 };

/* Transmission flags. */
enum {
    ONION_NBD_HAS_FLAGS = 1 << 0,
    ONION_NBD_READ_ONLY = 1 << 1,
    ONION_NBD_SEND_FLUSH = 1 << 2,
    ONION_NBD_SEND_FUA = 1 << 3,
    ONION_NBD_SEND_TRIM = 1 << 5,
    ONION_NBD_SEND_WRITE_ZEROES = 1 << 6,
    ONION_NBD_SEND_DF = 1 << 7,
    ONION_NBD_CAN_MULTI_CONN = 1 << 8,
    ONION_NBD_SEND_CACHE = 1 << 10,
    ONION_NBD_SEND_FAST_ZERO = 1 << 11,
};

enum {
    ONION_NBD_OPT_EXPORT_NAME = 1,
    ONION_NBD_OPT_ABORT = 2,
    ONION_NBD_OPT_LIST = 3,
    ONION_NBD_OPT_STARTTLS = 5,
    ONION_NBD_OPT_INFO = 6,
    ONION_NBD_OPT_GO = 7,
    ONION_NBD_OPT_STRUCTURED_REPLY = 8,
    ONION_NBD_OPT_LIST_META_CONTEXT = 9,
    ONION_NBD_OPT_SET_META_CONTEXT = 10,
};

#define ONION_NBD_REP_ACK UINT32_C(1)
#define ONION_NBD_REP_SERVER UINT32_C(2)
#define ONION_NBD_REP_INFO UINT32_C(3)
#define ONION_NBD_REP_META_CONTEXT UINT32_C(4)
#define ONION_NBD_REP_ERR_UNSUP UINT32_C(0x80000001)
#define ONION_NBD_REP_ERR_POLICY UINT32_C(0x80000002)
#define ONION_NBD_REP_ERR_INVALID UINT32_C(0x80000003)
#define ONION_NBD_REP_ERR_TLS_REQD UINT32_C(0x80000005)
#define ONION_NBD_REP_ERR_UNKNOWN UINT32_C(0x80000006)
#define ONION_NBD_REP_ERR_SHUTDOWN UINT32_C(0x80000007)
#define ONION_NBD_REP_ERR_TOO_BIG UINT32_C(0x80000009)

enum { ONION_NBD_INFO_EXPORT, ONION_NBD_INFO_NAME, ONION_NBD_INFO_DESCRIPTION, ONION_NBD_INFO_BLOCK_SIZE };

enum {
    ONION_NBD_CMD_READ,
    ONION_NBD_CMD_WRITE,
    ONION_NBD_CMD_DISC,
    ONION_NBD_CMD_FLUSH,
    ONION_NBD_CMD_TRIM,
    ONION_NBD_CMD_CACHE,
    ONION_NBD_CMD_WRITE_ZEROES,
    ONION_NBD_CMD_BLOCK_STATUS,
    ONION_NBD_COMMANDS,
};

enum {
    ONION_NBD_FLAG_FUA = 1 << 0,
    ONION_NBD_FLAG_NO_HOLE = 1 << 1,
    ONION_NBD_FLAG_DF = 1 << 2,
    ONION_NBD_FLAG_REQ_ONE = 1 << 3,
    ONION_NBD_FLAG_FAST_ZERO = 1 << 4,
};

enum { ONION_NBD_REPLY_DONE = 1 };
enum {
    ONION_NBD_REPLY_NONE = 0,
    ONION_NBD_REPLY_OFFSET_DATA = 1,
    ONION_NBD_REPLY_OFFSET_HOLE = 2,
    ONION_NBD_REPLY_BLOCK_STATUS = 5,
    ONION_NBD_REPLY_ERROR = 0x8001,
};

enum { ONION_NBD_STATE_HOLE = 1, ONION_NBD_STATE_ZERO = 2 };

/* Error values on the wire. They are defined by the protocol, though most have the same numbers as errno on Linux. */
enum {
    ONION_NBD_EPERM = 1,
    ONION_NBD_EIO = 5,
    ONION_NBD_ENOMEM = 12,
    ONION_NBD_EINVAL = 22,
    ONION_NBD_ENOSPC = 28,
    ONION_NBD_EOVERFLOW = 75,
    ONION_NBD_ENOTSUP = 95,
    ONION_NBD_ESHUTDOWN = 108,
};

struct onion_nbd_option {
    uint32_t option;
    uint32_t length; /* length of the data that follow */
};

struct onion_nbd_request {
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
};

struct onion_nbd_string {
    const char *bytes; /* not terminated */
    uint32_t length;
};

/* Data of INFO and GO: an export's name and the information for which the client asks. */
struct onion_nbd_info_query {
    struct onion_nbd_string name;
    const unsigned char *infos; /* info_count numbers of 16 bits */
    uint32_t info_count;
};

/* Data of LIST_META_CONTEXT and SET_META_CONTEXT. */
struct onion_nbd_meta_query {
    struct onion_nbd_string name;
    uint32_t query_count;
    const unsigned char *next, *end; /* the range that onion_nbd_meta_next reads */
};

/* Each decodes a header of fixed length, and returns 0, or ONION_E_FORMAT if the magic is wrong. */
int onion_nbd_option_decode(const unsigned char *bytes, struct onion_nbd_option *option);
int onion_nbd_request_decode(const unsigned char *bytes, struct onion_nbd_request *request);
/* Each decodes all data of an option: 0, or ONION_E_FORMAT if lengths do not add up or a name is too long. The meta
 * query is checked to its end, so onion_nbd_meta_next cannot fail. */
int onion_nbd_info_decode(const unsigned char *data, uint32_t length, struct onion_nbd_info_query *query);
int onion_nbd_info_asked(const struct onion_nbd_info_query *query, uint16_t info);
int onion_nbd_meta_decode(const unsigned char *data, uint32_t length, struct onion_nbd_meta_query *query);
int onion_nbd_meta_next(struct onion_nbd_meta_query *query, struct onion_nbd_string *out);

/* The facts about an export and a session that a request is checked against. */
struct onion_nbd_limits {
    uint64_t size_bytes;
    uint32_t request_bytes_max;
    int read_only, structured;
    uint32_t context_count;
};
/* Returns 0 if a request may be run, or the error value for the client. */
uint32_t onion_nbd_request_check(const struct onion_nbd_request *request, const struct onion_nbd_limits *limits);
/* Returns the error value on the wire for a negative code of base/status.h. */
uint32_t onion_nbd_error(int64_t status);

/* Encoders return the number of bytes that they wrote. */
size_t onion_nbd_greeting(unsigned char *out);
size_t onion_nbd_option_reply(unsigned char *out, uint32_t option, uint32_t type, uint32_t length);
size_t onion_nbd_simple_reply(unsigned char *out, uint64_t cookie, uint32_t error);
size_t onion_nbd_chunk(unsigned char *out, uint64_t cookie, uint16_t flags, uint16_t type, uint32_t length);
size_t onion_nbd_chunk_data(unsigned char *out, uint64_t cookie, uint16_t flags, uint64_t offset, uint32_t length);
size_t onion_nbd_chunk_hole(unsigned char *out, uint64_t cookie, uint16_t flags, uint64_t offset, uint32_t length);
size_t onion_nbd_chunk_error(unsigned char *out, uint64_t cookie, uint32_t error);

static inline void onion_put16(unsigned char *out, uint16_t value) {
    value = __builtin_bswap16(value);
    __builtin_memcpy(out, &value, 2);
}
static inline void onion_put32(unsigned char *out, uint32_t value) {
    value = __builtin_bswap32(value);
    __builtin_memcpy(out, &value, 4);
}
static inline void onion_put64(unsigned char *out, uint64_t value) {
    value = __builtin_bswap64(value);
    __builtin_memcpy(out, &value, 8);
}
static inline uint16_t onion_get16(const unsigned char *bytes) {
    uint16_t value;
    __builtin_memcpy(&value, bytes, 2);
    return __builtin_bswap16(value);
}
static inline uint32_t onion_get32(const unsigned char *bytes) {
    uint32_t value;
    __builtin_memcpy(&value, bytes, 4);
    return __builtin_bswap32(value);
}
static inline uint64_t onion_get64(const unsigned char *bytes) {
    uint64_t value;
    __builtin_memcpy(&value, bytes, 8);
    return __builtin_bswap64(value);
}

#endif
