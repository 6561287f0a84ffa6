/* write_batch.c: writes that arrived together share system calls.
 *
 * Their payloads lie behind each other in one buffer, in the order of the requests. Requests that continue each other
 * are one write; single blocks at scattered places are one onion_volume_write_blocks, which gives the new ones
 * consecutive slots and so one pwrite. Of a place written twice the later request wins, as if they had come one by one.
 * Where a shared write fails, each of its requests is tried by itself, so that only those get an error which have
 * one. */
#include "nbd/internal.h"

struct batch {
    struct onion_volume *volume;
    const struct onion_nbd_request *requests;
    uint32_t *errors; /* zero, until a request fails */
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

/* Requests from `first` on that are one range. Returns where they end. */
static uint32_t write_range(const struct batch *batch, uint32_t first, uint32_t count, const unsigned char *payload) {
    uint64_t length = batch->requests[first].length;
    uint32_t end = first + 1;
    for (; end < count && continues(batch, end); end++)
        length += batch->requests[end].length;
    if (onion_volume_write(batch->volume, batch->requests[first].offset, length, payload) < 0)
        write_each(batch, first, end, payload);
    return end;
}

/* Single blocks from `first` on, none of which continues the one before. Returns where they end. */
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
