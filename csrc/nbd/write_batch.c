/* write_batch.c: writes that arrived together share system calls.
 *
 * Their payloads are consecutive in one buffer, in the order of the requests. Requests that continue each other become
 * one write. Single blocks at scattered offsets become one onion_volume_write_blocks, which gives new blocks
 * consecutive slots and so needs one pwrite for them. If two requests write the same range, the later one wins, as if
 * they had come one by one. If a shared write fails, each of its requests is tried by itself, so that only the requests
 * that fail get an error. */
#include "nbd/internal.h"

struct batch {
    struct onion_volume *volume;
    const struct onion_nbd_request *requests;
    uint32_t *errors; /* zero for each request that has not failed */
};

static void write_each(const struct batch *batch, uint32_t first, uint32_t end, const unsigned char *payload) {
    for (uint32_t i = first; i < end; i++) {
        const struct onion_nbd_request *request = &batch->requests[i];
        batch->errors[i] =
            onion_nbd_error(onion_volume_write(batch->volume, request->offset, request->length, payload));
        payload += request->length;
    }
}

static int is_one_block(const struct batch *batch, uint32_t i) {
    uint32_t block_size = onion_volume_block_size(batch->volume);
    return batch->requests[i].length == block_size && batch->requests[i].offset % block_size == 0;
}

static int continues(const struct batch *batch, uint32_t i) {
    const struct onion_nbd_request *before = &batch->requests[i - 1];
    return before->offset + before->length == batch->requests[i].offset;
}

/* Writes the requests from `first` on that make up one range. Returns the request after them. */
static uint32_t write_range(const struct batch *batch, uint32_t first, uint32_t count, const unsigned char *payload) {
    uint64_t length = batch->requests[first].length;
    uint32_t end = first + 1;
    for (; end < count && continues(batch, end); end++)
        length += batch->requests[end].length;
    if (onion_volume_write(batch->volume, batch->requests[first].offset, length, payload) < 0)
        write_each(batch, first, end, payload);
    return end;
}

/* Writes the single blocks from `first` on, none of which continues the one before. Returns the request after them. */
static uint32_t write_scattered(const struct batch *batch, uint32_t first, uint32_t count,
                                const unsigned char *payload) {
    uint64_t block_indices[ONION_NBD_BATCH_MAX];
    uint32_t block_size = onion_volume_block_size(batch->volume), end = first;
    for (; end < count && is_one_block(batch, end) && (end == first || !continues(batch, end)); end++)
        block_indices[end - first] = batch->requests[end].offset / block_size;
    if (onion_volume_write_blocks(batch->volume, block_indices, end - first, payload) < 0)
        write_each(batch, first, end, payload);
    return end;
}

void onion_nbd_write_batch(struct onion_volume *volume, const struct onion_nbd_request *requests, uint32_t count,
                           const unsigned char *payloads, uint32_t *errors) {
    struct batch batch = {volume, requests, errors};
    const unsigned char *payload = payloads;
    for (uint32_t i = 0, end; i < count; i = end) {
        int starts_range = i + 1 == count || continues(&batch, i + 1) || !is_one_block(&batch, i);
        end = starts_range ? write_range(&batch, i, count, payload) : write_scattered(&batch, i, count, payload);
        for (uint32_t k = i; k < end; k++)
            payload += requests[k].length;
    }
}
