/* protocol.c: implements protocol.h. The host is little-endian, as everywhere in onionskin, so the bytes of each number
 * are swapped. */
#include "nbd/protocol.h"

#include <errno.h>
#include <string.h>

/* ---- decoding ---- */

int onion_nbd_option_decode(const unsigned char *bytes, struct onion_nbd_option *option) {
    option->option = onion_get32(bytes + 8);
    option->length = onion_get32(bytes + 12);
    return onion_get64(bytes) == ONION_NBD_OPTION_MAGIC ? 0 : ONION_E_FORMAT;
}

int onion_nbd_request_decode(const unsigned char *bytes, struct onion_nbd_request *request) {
    request->flags = onion_get16(bytes + 4);
    request->type = onion_get16(bytes + 6);
    request->cookie = onion_get64(bytes + 8);
    request->offset = onion_get64(bytes + 16);
    request->length = onion_get32(bytes + 24);
    return onion_get32(bytes) == ONION_NBD_REQUEST_MAGIC ? 0 : ONION_E_FORMAT;
}

/* Decodes a length of 32 bits and as many bytes. Moves *at behind them, but not if the string does not fit. */
static int take_string(const unsigned char **at, const unsigned char *end, struct onion_nbd_string *out) {
    if (end - *at < 4)
        return ONION_E_FORMAT;
    uint32_t length = onion_get32(*at);
    if (length > ONION_NBD_NAME_MAX || length > (size_t)(end - *at - 4))
        return ONION_E_FORMAT;
    *out = (struct onion_nbd_string){(const char *)*at + 4, length};
    *at += 4 + length;
    return 0;
}

int onion_nbd_info_decode(const unsigned char *data, uint32_t length, struct onion_nbd_info_query *query) {
    const unsigned char *at = data, *end = data + length;
    if (take_string(&at, end, &query->name) < 0 || end - at < 2)
        return ONION_E_FORMAT;
    query->info_count = onion_get16(at);
    query->infos = at + 2;
    return (size_t)(end - query->infos) == 2 * (size_t)query->info_count ? 0 : ONION_E_FORMAT;
}

int onion_nbd_info_asked(const struct onion_nbd_info_query *query, uint16_t info) {
    for (uint32_t i = 0; i < query->info_count; i++)
        if (onion_get16(query->infos + 2 * i) == info)
            return 1;
    return 0;
}

int onion_nbd_meta_decode(const unsigned char *data, uint32_t length, struct onion_nbd_meta_query *query) {
    const unsigned char *at = data, *end = data + length;
    struct onion_nbd_string string;
    if (take_string(&at, end, &query->name) < 0 || end - at < 4)
        return ONION_E_FORMAT;
    query->query_count = onion_get32(at);
    query->next = at += 4;
    query->end = end;
    /* Each query takes at least four bytes, so the loop ends soon even if the count is too large. */
    for (uint32_t i = 0; i < query->query_count; i++)
        if (take_string(&at, end, &string) < 0)
            return ONION_E_FORMAT;
    return at == end ? 0 : ONION_E_FORMAT;
}

int onion_nbd_meta_next(struct onion_nbd_meta_query *query, struct onion_nbd_string *out) {
    return query->next < query->end && take_string(&query->next, query->end, out) == 0;
}

/* ---- checking ---- */

static uint16_t flags_allowed(uint16_t type, int structured) {
    switch (type) {
    case ONION_NBD_CMD_READ:
        return ONION_NBD_FLAG_FUA | (structured ? ONION_NBD_FLAG_DF : 0);
    case ONION_NBD_CMD_WRITE_ZEROES:
        return ONION_NBD_FLAG_FUA | ONION_NBD_FLAG_NO_HOLE | ONION_NBD_FLAG_FAST_ZERO;
    case ONION_NBD_CMD_BLOCK_STATUS:
        return ONION_NBD_FLAG_FUA | ONION_NBD_FLAG_REQ_ONE;
    default:
        return ONION_NBD_FLAG_FUA; /* "the server MUST accept all commands with this bit set" */
    }
}

static int changes_the_disk(uint16_t type) {
    return type == ONION_NBD_CMD_WRITE || type == ONION_NBD_CMD_TRIM || type == ONION_NBD_CMD_WRITE_ZEROES;
}

uint32_t onion_nbd_request_check(const struct onion_nbd_request *request, const struct onion_nbd_limits *limits) {
    uint16_t type = request->type;
    if (type >= ONION_NBD_COMMANDS || request->flags & ~flags_allowed(type, limits->structured))
        return ONION_NBD_EINVAL;
    if (limits->read_only && changes_the_disk(type))
        return ONION_NBD_EPERM;
    if (type == ONION_NBD_CMD_FLUSH)
        return request->offset || request->length ? ONION_NBD_EINVAL : 0;
    if (type == ONION_NBD_CMD_BLOCK_STATUS && (!limits->structured || !limits->context_count || !request->length))
        return ONION_NBD_EINVAL;
    if ((type == ONION_NBD_CMD_READ || type == ONION_NBD_CMD_WRITE) && request->length > limits->request_bytes_max)
        return ONION_NBD_EINVAL;
    if (request->offset > limits->size_bytes || request->length > limits->size_bytes - request->offset)
        return type == ONION_NBD_CMD_WRITE || type == ONION_NBD_CMD_WRITE_ZEROES ? ONION_NBD_ENOSPC : ONION_NBD_EINVAL;
    /* With NO_HOLE the zeros are written as data, which is slow, and FAST_ZERO asks for an error in that case. */
    if (request->flags & ONION_NBD_FLAG_FAST_ZERO && request->flags & ONION_NBD_FLAG_NO_HOLE)
        return ONION_NBD_ENOTSUP;
    return 0;
}

uint32_t onion_nbd_error(int64_t status) {
    switch (status) {
    case 0:
        return 0;
    case -ENOSPC:
    case -EDQUOT:
    case -EFBIG:
    case ONION_E_FULL_SEGMENT:
        return ONION_NBD_ENOSPC;
    case -ENOMEM:
        return ONION_NBD_ENOMEM;
    case ONION_E_BOUNDS: /* the disk became smaller since the request was checked */
        return ONION_NBD_EINVAL;
    case ONION_E_READ_ONLY:
        return ONION_NBD_EPERM;
    case ONION_E_CLOSED:
    case -ESHUTDOWN:
        return ONION_NBD_ESHUTDOWN;
    default:
        return status > 0 ? 0 : ONION_NBD_EIO;
    }
}

/* ---- encoding ---- */

size_t onion_nbd_greeting(unsigned char *out) {
    onion_put64(out, ONION_NBD_MAGIC);
    onion_put64(out + 8, ONION_NBD_OPTION_MAGIC);
    onion_put16(out + 16, ONION_NBD_FIXED_NEWSTYLE | ONION_NBD_NO_ZEROES);
    return ONION_NBD_GREETING_BYTES;
}

size_t onion_nbd_option_reply(unsigned char *out, uint32_t option, uint32_t type, uint32_t length) {
    onion_put64(out, ONION_NBD_OPTION_REPLY_MAGIC);
    onion_put32(out + 8, option);
    onion_put32(out + 12, type);
    onion_put32(out + 16, length);
    return ONION_NBD_OPTION_REPLY_BYTES;
}

size_t onion_nbd_simple_reply(unsigned char *out, uint64_t cookie, uint32_t error) {
    onion_put32(out, ONION_NBD_SIMPLE_REPLY_MAGIC);
    onion_put32(out + 4, error);
    onion_put64(out + 8, cookie);
    return ONION_NBD_SIMPLE_REPLY_BYTES;
}

size_t onion_nbd_chunk(unsigned char *out, uint64_t cookie, uint16_t flags, uint16_t type, uint32_t length) {
    onion_put32(out, ONION_NBD_CHUNK_MAGIC);
    onion_put16(out + 4, flags);
    onion_put16(out + 6, type);
    onion_put64(out + 8, cookie);
    onion_put32(out + 16, length);
    return ONION_NBD_CHUNK_BYTES;
}

size_t onion_nbd_chunk_data(unsigned char *out, uint64_t cookie, uint16_t flags, uint64_t offset, uint32_t length) {
    size_t used = onion_nbd_chunk(out, cookie, flags, ONION_NBD_REPLY_OFFSET_DATA, length + 8);
    onion_put64(out + used, offset);
    return used + 8;
}

size_t onion_nbd_chunk_hole(unsigned char *out, uint64_t cookie, uint16_t flags, uint64_t offset, uint32_t length) {
    size_t used = onion_nbd_chunk(out, cookie, flags, ONION_NBD_REPLY_OFFSET_HOLE, 12);
    onion_put64(out + used, offset);
    onion_put32(out + used + 8, length);
    return used + 12;
}

size_t onion_nbd_chunk_error(unsigned char *out, uint64_t cookie, uint32_t error) {
    size_t used = onion_nbd_chunk(out, cookie, ONION_NBD_REPLY_DONE, ONION_NBD_REPLY_ERROR, 6);
    onion_put32(out + used, error);
    onion_put16(out + used + 4, 0);
    return used + 6;
}
