/* provenance.c: see provenance.h.
 *
 * The segment number of a location is the layer; the slot is the block's index within its window of 2^30 blocks, plus
 * 2^31 for ZERO. So a layer's runs that touch have consecutive slots and share an entry of the index, DATA never
 * continues as ZERO, and no slot is too large. */
#include "layer/provenance.h"

#include <string.h>

#define WINDOW_BLOCKS ((uint64_t)1 << 30)
#define ZERO_SLOTS ((uint32_t)1 << 31)

int onion_provenance_init(struct onion_provenance *provenance, uint64_t block_count, uint32_t block_shift) {
    memset(provenance, 0, sizeof *provenance);
    int status = onion_map_init(&provenance->map, block_count, block_shift);
    return status < 0 ? status : onion_build_init(&provenance->build, &provenance->map);
}

void onion_provenance_destroy(struct onion_provenance *provenance) {
    onion_build_destroy(&provenance->build);
    onion_map_destroy(&provenance->map);
}

static int put(struct onion_provenance *provenance, uint64_t at, uint64_t block_count, uint32_t layer,
               uint32_t first_slot) {
    for (uint64_t end = at + block_count, piece_end; at < end; at = piece_end) {
        uint64_t window_end = (at / WINDOW_BLOCKS + 1) * WINDOW_BLOCKS;
        piece_end = window_end < end ? window_end : end;
        onion_location location = onion_location_make(layer, first_slot + (uint32_t)(at % WINDOW_BLOCKS));
        int status = onion_build_put(&provenance->build, at, piece_end - at, location);
        if (status < 0)
            return status;
    }
    return 0;
}

int onion_provenance_lay(struct onion_provenance *provenance, const struct onion_map *upper, uint32_t layer) {
    struct onion_run run = {0, 0, 0};
    while (onion_map_next(upper, run.block_index + run.block_count, upper->block_count, &run)) {
        uint32_t first_slot = onion_location_is_data(run.location) ? 0 : ZERO_SLOTS;
        int status = put(provenance, run.block_index, run.block_count, layer, first_slot);
        if (status < 0)
            return status;
    }
    return 0;
}

static int lay_record(struct onion_provenance *provenance, const struct onion_record *record, uint32_t layer,
                      uint64_t *size_bytes) {
    switch (record->kind) {
    case ONION_RECORD_SEGMENT:
        return 0;
    case ONION_RECORD_SIZE:
        *size_bytes = record->block_index;
        return 0;
    case ONION_RECORD_HOLE:
        return onion_build_put(&provenance->build, record->block_index, record->block_count, ONION_LOCATION_HOLE);
    default:
        return put(provenance, record->block_index, record->block_count, layer,
                   record->kind == ONION_RECORD_DATA ? 0 : ZERO_SLOTS);
    }
}

int onion_provenance_lay_log(struct onion_provenance *provenance, const unsigned char *bytes, uint64_t length,
                             struct onion_log_cursor *cursor, uint32_t layer, uint64_t *size_bytes,
                             uint64_t *fault_offset) {
    for (;;) {
        const unsigned char *records;
        uint32_t count;
        *fault_offset = cursor->offset;
        int status = onion_log_next(bytes, length, cursor, &records, &count);
        if (status != 1)
            return status;
        for (uint32_t i = 0; i < count; i++) {
            struct onion_record record;
            *fault_offset = (uint64_t)(records - bytes) + (uint64_t)i * ONION_RECORD_BYTES;
            status = onion_record_decode(bytes + *fault_offset, provenance->map.block_count, &record);
            if (status == 0)
                status = lay_record(provenance, &record, layer, size_bytes);
            if (status < 0)
                return status;
        }
    }
}

int onion_provenance_resolve(struct onion_provenance *provenance) { return onion_build_apply(&provenance->build); }

static int continues(const struct onion_provenance_run *before, const struct onion_provenance_run *run) {
    return before->block_index + before->block_count == run->block_index && before->layer == run->layer &&
           before->state == run->state;
}

uint64_t onion_provenance_runs(const struct onion_provenance *provenance, struct onion_provenance_run *out) {
    uint64_t count = 0, end = provenance->map.block_count;
    struct onion_provenance_run last = {0};
    struct onion_run run = {0, 0, 0};
    while (onion_map_next(&provenance->map, run.block_index + run.block_count, end, &run)) {
        struct onion_provenance_run next = {
            .block_index = run.block_index,
            .block_count = run.block_count,
            .layer = onion_location_segment(run.location),
            .state = onion_location_slot(run.location) < ZERO_SLOTS ? 1 : 2,
        };
        if (count && continues(&last, &next)) {
            last.block_count += next.block_count;
        } else {
            last = next;
            count++;
        }
        if (out)
            out[count - 1] = last;
    }
    return count;
}
