/* fuzz_nbd.c: any bytes from an NBD client. tools/fuzz.sh builds and runs it.
 *
 * The input is a stream: options until one begins transmission, then requests. Magic numbers are put right first, since
 * a fuzzer does not find them by chance; all the rest is as it comes. Options go through the server's own negotiation,
 * with two exports over a view that holds nothing; requests through decoding, checking, and, for BLOCK_STATUS, all that
 * builds its reply. No socket and no thread take part. */
#include <stdlib.h>
#include <string.h>

#include "nbd/internal.h"

#define SIZE_BYTES (UINT64_C(1) << 30)

static struct onion_nbd_server *server;

static void check(int holds) {
    if (!holds)
        abort();
}

/* More exports than one part of a list holds: x, xx, xxx, ... */
static int list_exports(void *context, const char *after, uint32_t length, struct onion_nbd_listing *listing) {
    static char name[ONION_NBD_NAME_MAX + 1];
    int status = 0;
    (void)context, (void)after;
    memset(name, 'x', sizeof name - 1);
    while (length < ONION_NBD_NAME_MAX && status == 0)
        status = onion_nbd_list(listing, name + ONION_NBD_NAME_MAX - ++length, "described");
    return status;
}

static void set_up(void) {
    struct onion_nbd_options options = {
        .connections_max = 1, .request_bytes_max = 1 << 20, .bytes_in_flight_max = 1 << 20};
    options.hooks.list_exports = list_exports;
    static const uint64_t runs[2][2] = {{0, 4096}, {1 << 20, 100}};
    struct onion_volume *volume;
    check(onion_volume_new(4096, SIZE_BYTES, ".", ".", 0, 0, &volume) == 0);
    check(onion_nbd_new(&options, &server) == 0);
    check(onion_nbd_add_export(server, "a", volume, 0, "described") == 0);
    check(onion_nbd_add_export(server, "b@c", volume, 1, "") == 0);
    check(onion_nbd_set_default(server, "a") == 0);
    check(onion_nbd_set_context(server, "a", "onionskin:changed-since:c", runs, 2, 0) == 0);
}

/* Exactly as large as what is handed over, so that a byte read past it is seen. */
static unsigned char *exactly(const uint8_t *bytes, size_t length) {
    unsigned char *copy = malloc(length + !length);
    check(copy != NULL);
    memcpy(copy, bytes, length);
    return copy;
}

/* Every reply is whole, and its length is what its header says. */
static void check_replies(const struct onion_nbd_out *out, uint32_t option) {
    size_t at = 0;
    while (at < out->length) {
        check(out->length - at >= ONION_NBD_OPTION_REPLY_BYTES);
        check(onion_get64(out->bytes + at) == ONION_NBD_OPTION_REPLY_MAGIC);
        check(onion_get32(out->bytes + at + 8) == option);
        at += ONION_NBD_OPTION_REPLY_BYTES + onion_get32(out->bytes + at + 16);
    }
    check(at == out->length);
}

/* Bytes used, or 0 at the end of the stream. */
static size_t feed_option(struct onion_nbd_session *session, const uint8_t *bytes, size_t length,
                          enum onion_nbd_next *next) {
    struct onion_nbd_option option;
    struct onion_nbd_out out = {0};
    if (length < ONION_NBD_OPTION_BYTES)
        return 0;
    unsigned char *header = exactly(bytes, ONION_NBD_OPTION_BYTES);
    onion_put64(header, ONION_NBD_OPTION_MAGIC);
    check(onion_nbd_option_decode(header, &option) == 0);
    free(header);
    /* Numbers that are known, and data that are there, or nothing else would ever be reached. */
    option.option = option.option % 13;
    option.length %= (uint32_t)(length - ONION_NBD_OPTION_BYTES) + 1;
    if (option.length > ONION_NBD_OPTION_DATA_MAX)
        option.length = ONION_NBD_OPTION_DATA_MAX;
    unsigned char *data = exactly(bytes + ONION_NBD_OPTION_BYTES, option.length);
    /* Of a long list the second part is as good as the last one. */
    *next = onion_nbd_option(session, &option, data, &out);
    if (*next == ONION_NBD_MORE_REPLIES) {
        check(out.length >= ONION_NBD_LIST_BYTES && option.option == ONION_NBD_OPT_LIST);
        check_replies(&out, option.option);
        out.length = 0;
        *next = onion_nbd_option(session, &option, data, &out);
    }
    check(!out.failed && session->context_count <= ONION_NBD_CONTEXTS_MAX);
    check((*next == ONION_NBD_TRANSMISSION) == (session->chosen != NULL));
    if (option.option != ONION_NBD_OPT_EXPORT_NAME)
        check_replies(&out, option.option);
    free(data);
    free(out.bytes);
    return ONION_NBD_OPTION_BYTES + option.length;
}

/* One chunk for each context, of extents that do not pass the range that was asked for. */
static void check_status(const struct onion_nbd_session *session, const struct onion_nbd_request *request) {
    unsigned char *reply = NULL;
    size_t length = 0, at = 0;
    check(onion_nbd_block_status(session->chosen->volume, session, request, &reply, &length) == 0);
    for (uint32_t i = 0; i < session->context_count; i++) {
        uint32_t body = onion_get32(reply + at + 16);
        uint64_t sum = 0;
        check(body >= 12 && body % 8 == 4 && at + ONION_NBD_CHUNK_BYTES + body <= length);
        for (uint32_t k = 4; k < body; k += 8)
            sum += onion_get32(reply + at + ONION_NBD_CHUNK_BYTES + k);
        check(sum > 0 && sum <= request->length);
        at += ONION_NBD_CHUNK_BYTES + body;
    }
    check(at == length);
    free(reply);
}

static void feed_request(const struct onion_nbd_session *session, const uint8_t *bytes) {
    struct onion_nbd_request request;
    struct onion_nbd_limits limits;
    unsigned char *header = exactly(bytes, ONION_NBD_REQUEST_BYTES);
    onion_put32(header, ONION_NBD_REQUEST_MAGIC);
    check(onion_nbd_request_decode(header, &request) == 0);
    free(header);
    request.type %= ONION_NBD_COMMANDS + 1;
    onion_nbd_limits(session, session->chosen->volume, &limits);
    if (onion_nbd_request_check(&request, &limits) == 0) {
        check(request.type < ONION_NBD_COMMANDS);
        check(request.type == ONION_NBD_CMD_FLUSH || request.offset + request.length <= SIZE_BYTES);
        if (request.type == ONION_NBD_CMD_BLOCK_STATUS)
            check_status(session, &request);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!server)
        set_up();
    if (!size)
        return 0;
    struct onion_nbd_session session = {
        .server = server, .tls = data[0] & 1, .require_tls = (data[0] & 6) == 6, .no_zeroes = data[0] >> 3 & 1};
    enum onion_nbd_next next = ONION_NBD_MORE_OPTIONS;
    size_t at = 1, used = 1;
    while (next == ONION_NBD_MORE_OPTIONS && used) {
        used = feed_option(&session, data + at, size - at, &next);
        at += used;
    }
    for (; next == ONION_NBD_TRANSMISSION && size - at >= ONION_NBD_REQUEST_BYTES; at += ONION_NBD_REQUEST_BYTES)
        feed_request(&session, data + at);
    onion_nbd_session_end(&session);
    check(server->exports->references == 1 && server->exports->next->references == 1);
    return 0;
}
