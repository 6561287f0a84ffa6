/* block_status.c: makes the reply to BLOCK_STATUS: the extents of the volume, seen through each context that the client
 * selected.
 *
 * The volume is asked for its extents once for all contexts, in batches. Each context turns an extent into flags, and
 * neighbours with the same flags become one descriptor. The reply ends as soon as one context has no room for more
 * descriptors: the protocol lets a server describe less than the client asked for. */
#include <errno.h>
#include <stdlib.h>

#include "nbd/internal.h"

#define DESCRIPTORS_MAX 2048
#define EXTENTS_AT_ONCE 256

struct descriptors {
    unsigned char *bytes;             /* chunk header, context id, descriptors */
    uint32_t count, length_left_open; /* length_left_open: the last descriptor's length so far */
    uint32_t flags;
};

enum { HEADER = ONION_NBD_CHUNK_BYTES + 4 };

static unsigned char *descriptor_at(const struct descriptors *list, uint32_t i) {
    return list->bytes + HEADER + 8 * (size_t)i;
}

/* Adds a range to a list. Returns 0 if there is no room. */
static int add(struct descriptors *list, uint32_t length, uint32_t flags, uint32_t count_max) {
    if (list->count && list->flags == flags) {
        list->length_left_open += length;
    } else {
        if (list->count == count_max)
            return 0;
        list->count++;
        list->flags = flags;
        list->length_left_open = length;
    }
    onion_put32(descriptor_at(list, list->count - 1), list->length_left_open);
    onion_put32(descriptor_at(list, list->count - 1) + 4, flags);
    return 1;
}

/* The index does not record how deep in the chain a block lies. So depth 1 means a block of the head, and depth 2 means
 * anything below. A ZERO counts as 2, because the index does not tell in which layer it was recorded. */
static uint32_t depth_of(enum onion_extent_kind kind) {
    return kind == ONION_EXTENT_NONE ? 0 : kind == ONION_EXTENT_HEAD ? 1 : 2;
}

static uint32_t allocation_of(enum onion_extent_kind kind) {
    return kind == ONION_EXTENT_NONE || kind == ONION_EXTENT_ZERO ? ONION_NBD_STATE_HOLE | ONION_NBD_STATE_ZERO : 0;
}

/* Returns whether `at` is in a run. Lowers *end to the offset where that changes, if that comes first. */
static int in_runs(const struct onion_nbd_context *context, uint64_t at, uint64_t *end) {
    size_t low = 0, high = context->run_count;
    while (low < high) { /* find the first run that ends after `at` */
        size_t middle = (low + high) / 2;
        if (context->runs[middle][0] + context->runs[middle][1] <= at)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == context->run_count)
        return 0;
    uint64_t start = context->runs[low][0], stop = start + context->runs[low][1];
    int inside = start <= at;
    uint64_t edge = inside ? stop : start;
    *end = edge < *end ? edge : *end;
    return inside;
}

static int written_since(const struct onion_nbd_context *context, const struct onion_extent *extent, int read_only) {
    if (context->all_changed)
        return 1;
    if (read_only)
        return 0;
    /* A trim after the runs were computed leaves a ZERO, which looks like one that is older. So every ZERO counts. */
    return extent->kind == ONION_EXTENT_ZERO || extent->birth >= context->mark;
}

/* Adds an extent as a changed-since context sees it. Returns 0 if there is no room. */
static int add_changed(struct descriptors *list, const struct onion_nbd_context *context,
                       const struct onion_extent *extent, int read_only, uint32_t count_max) {
    if (written_since(context, extent, read_only))
        return add(list, (uint32_t)extent->length, 1, count_max);
    for (uint64_t at = extent->offset, stop = at + extent->length; at < stop;) {
        uint64_t end = stop;
        uint32_t changed = (uint32_t)in_runs(context, at, &end);
        if (!add(list, (uint32_t)(end - at), changed, count_max))
            return 0;
        at = end;
    }
    return 1;
}

static int add_extent(const struct onion_nbd_session *session, uint32_t i, struct descriptors *list,
                      const struct onion_extent *extent, uint32_t count_max) {
    if (session->context_ids[i] == ONION_NBD_ID_ALLOCATION)
        return add(list, (uint32_t)extent->length, allocation_of(extent->kind), count_max);
    if (session->context_ids[i] == ONION_NBD_ID_DEPTH)
        return add(list, (uint32_t)extent->length, depth_of(extent->kind), count_max);
    return add_changed(list, session->contexts[i], extent, session->chosen->read_only, count_max);
}

/* Returns 1 if everything was described, 0 if there was no room for more, or a negative code. */
static int describe(struct onion_volume *volume, const struct onion_nbd_session *session,
                    const struct onion_nbd_request *request, struct descriptors *lists) {
    uint32_t count_max = request->flags & ONION_NBD_FLAG_REQ_ONE ? 1 : DESCRIPTORS_MAX;
    uint64_t at = request->offset, end = at + request->length;
    struct onion_extent extents[EXTENTS_AT_ONCE];
    while (at < end) {
        int64_t count = onion_volume_extents(volume, at, end - at, extents, EXTENTS_AT_ONCE);
        if (count < 0)
            return (int)count;
        for (int64_t k = 0; k < count; k++) {
            int room = 1;
            for (uint32_t i = 0; i < session->context_count; i++)
                room &= add_extent(session, i, &lists[i], &extents[k], count_max);
            if (!room)
                return 0;
            at = extents[k].offset + extents[k].length;
        }
    }
    return 1;
}

/* Adds the headers, and moves the finished lists together as they are sent. Returns the length. */
static size_t pack(const struct onion_nbd_session *session, uint64_t cookie, struct descriptors *lists) {
    unsigned char *to = lists[0].bytes;
    for (uint32_t i = 0; i < session->context_count; i++) {
        uint16_t flags = i + 1 == session->context_count ? ONION_NBD_REPLY_DONE : 0;
        uint32_t length = 4 + 8 * lists[i].count;
        onion_nbd_chunk(lists[i].bytes, cookie, flags, ONION_NBD_REPLY_BLOCK_STATUS, length);
        onion_put32(lists[i].bytes + ONION_NBD_CHUNK_BYTES, session->context_ids[i]);
        __builtin_memmove(to, lists[i].bytes, ONION_NBD_CHUNK_BYTES + length);
        to += ONION_NBD_CHUNK_BYTES + length;
    }
    return (size_t)(to - lists[0].bytes);
}

int onion_nbd_block_status(struct onion_volume *volume, const struct onion_nbd_session *session,
                           const struct onion_nbd_request *request, unsigned char **reply, size_t *reply_length) {
    struct descriptors lists[ONION_NBD_CONTEXTS_MAX] = {0};
    size_t list_bytes = HEADER + 8 * (size_t)(request->flags & ONION_NBD_FLAG_REQ_ONE ? 1 : DESCRIPTORS_MAX);
    unsigned char *bytes = malloc(list_bytes * session->context_count);
    if (!bytes)
        return -ENOMEM;
    for (uint32_t i = 0; i < session->context_count; i++)
        lists[i].bytes = bytes + i * list_bytes;
    int status = describe(volume, session, request, lists);
    if (status < 0) {
        free(bytes);
        return status;
    }
    *reply_length = pack(session, request->cookie, lists);
    *reply = bytes;
    return 0;
}
