/* layer_map.c: see layer_map.h. Everything here walks the runs of the block map; nothing looks at single blocks. */
#include "layer/layer_map.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int onion_layer_init(struct onion_layer *layer, uint64_t block_count, uint32_t block_shift) {
    memset(layer, 0, sizeof *layer);
    layer->block_shift = block_shift;
    return onion_map_init(&layer->map, block_count, block_shift);
}

void onion_layer_destroy(struct onion_layer *layer) {
    onion_map_destroy(&layer->map);
    free(layer->segment_ids);
    memset(layer, 0, sizeof *layer);
}

int onion_layer_grow(struct onion_layer *layer, uint64_t block_count) {
    return block_count > layer->map.block_count ? onion_map_resize(&layer->map, block_count) : 0;
}

int onion_layer_add_segment(struct onion_layer *layer, const unsigned char uuid[ONION_UUID_BYTES]) {
    if (layer->segment_count == ONION_SEGMENT_LAST)
        return ONION_E_FORMAT;
    if (layer->segment_count == layer->segment_capacity) {
        uint32_t capacity = layer->segment_capacity ? 2 * layer->segment_capacity : 16;
        void *grown = realloc(layer->segment_ids, capacity * sizeof *layer->segment_ids);
        if (!grown)
            return -ENOMEM;
        layer->segment_ids = grown;
        layer->segment_capacity = capacity;
    }
    memcpy(layer->segment_ids[layer->segment_count], uuid, ONION_UUID_BYTES);
    return (int)++layer->segment_count;
}

/* The run at or after block_index, of the whole layer. */
static int next_run(const struct onion_layer *layer, uint64_t block_index, struct onion_run *run) {
    return block_index < layer->map.block_count &&
           onion_map_next(&layer->map, block_index, layer->map.block_count, run);
}

/* ---- reading a log ---- */

/* number_of[n]: the layer's number of the segment that the log calls n. The same record may come again (a log that
 * was opened twice), another segment under the same number may not. */
static int apply_segment(struct onion_layer *layer, const struct onion_record *record, uint16_t *number_of) {
    unsigned char uuid[ONION_UUID_BYTES];
    onion_record_uuid(record, uuid);
    uint32_t known = number_of[record->segment];
    if (known)
        return memcmp(uuid, layer->segment_ids[known - 1], sizeof uuid) == 0 ? 0 : ONION_E_FORMAT;
    int number = onion_layer_add_segment(layer, uuid);
    if (number < 0)
        return number;
    number_of[record->segment] = (uint16_t)number;
    return 0;
}

static int apply_record(struct onion_layer *layer, const struct onion_record *record, uint16_t *number_of) {
    onion_location location;
    switch (record->kind) {
    case ONION_RECORD_SEGMENT:
        return apply_segment(layer, record, number_of);
    case ONION_RECORD_SIZE:
        layer->has_size = 1;
        layer->size_bytes = record->block_index;
        return 0;
    case ONION_RECORD_DATA:
        if (!number_of[record->segment])
            return ONION_E_FORMAT;
        location = onion_location_make(number_of[record->segment], record->slot);
        break;
    default:
        location = record->kind == ONION_RECORD_ZERO ? ONION_LOCATION_ZERO : ONION_LOCATION_HOLE;
    }
    return onion_map_set(&layer->map, record->block_index, record->block_count, location);
}

/* The records of a grown part may stand before or behind the SIZE record of their frame: make room first. */
static int grow_for_frame(struct onion_layer *layer, const unsigned char *records, uint32_t count,
                          const unsigned char **bad) {
    uint64_t blocks = 0;
    for (uint32_t i = 0; i < count; i++) {
        const unsigned char *at = records + (size_t)i * ONION_RECORD_BYTES;
        struct onion_record record;
        if (at[16] != ONION_RECORD_SIZE || at[17] != 0)
            continue;
        *bad = at;
        if (onion_record_decode(at, 0, &record) < 0)
            return ONION_E_FORMAT;
        uint64_t needed = (record.block_index >> layer->block_shift) +
                          ((record.block_index & ((UINT64_C(1) << layer->block_shift) - 1)) != 0);
        blocks = needed > blocks ? needed : blocks;
    }
    return onion_layer_grow(layer, blocks);
}

static int apply_frame(struct onion_layer *layer, const unsigned char *records, uint32_t count, uint16_t *number_of,
                       const unsigned char **bad) {
    int status = grow_for_frame(layer, records, count, bad);
    for (uint32_t i = 0; status == 0 && i < count; i++) {
        struct onion_record record;
        *bad = records + (size_t)i * ONION_RECORD_BYTES;
        status = onion_record_decode(*bad, layer->map.block_count, &record);
        if (status == 0)
            status = apply_record(layer, &record, number_of);
    }
    return status;
}

int onion_layer_load(struct onion_layer *layer, const unsigned char *bytes, uint64_t length,
                     struct onion_log_cursor *cursor, uint64_t *fault_offset) {
    uint16_t *number_of = calloc(ONION_SEGMENT_LAST + 1, sizeof *number_of);
    if (!number_of)
        return -ENOMEM;
    for (;;) {
        const unsigned char *records, *bad = bytes;
        uint32_t count;
        *fault_offset = cursor->offset;
        int status = onion_log_next(bytes, length, cursor, &records, &count);
        if (status == 1) {
            status = apply_frame(layer, records, count, number_of, &bad);
            if (status == 0)
                continue;
            *fault_offset = (uint64_t)(bad - bytes);
        }
        free(number_of);
        return status;
    }
}

/* ---- writing one ---- */

uint32_t onion_layer_records(const struct onion_layer *layer, struct onion_layer_writer *writer,
                             struct onion_record *records, uint32_t capacity) {
    uint32_t used = 0;
    struct onion_run run;
    /* two entries: a DATA record may need a SEGMENT record before it */
    while (capacity - used >= 2 && next_run(layer, writer->block_index, &run)) {
        struct onion_record record = {.block_index = run.block_index, .kind = ONION_RECORD_ZERO};
        record.block_count = run.block_count < UINT32_MAX ? (uint32_t)run.block_count : UINT32_MAX;
        if (onion_location_is_data(run.location)) {
            uint32_t number = onion_location_segment(run.location);
            if (!writer->number_of[number]) {
                writer->number_of[number] = (uint16_t)++writer->numbers_given;
                records[used++] = onion_record_segment(writer->number_of[number], layer->segment_ids[number - 1]);
            }
            record.kind = ONION_RECORD_DATA;
            record.segment = writer->number_of[number];
            record.slot = onion_location_slot(run.location);
        }
        records[used++] = record;
        writer->block_index = run.block_index + record.block_count;
    }
    return used;
}

/* ---- what is in it ---- */

uint64_t onion_layer_runs(const struct onion_layer *layer, struct onion_layer_run *out) {
    uint64_t count = 0;
    struct onion_run run;
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count, count++) {
        int is_data = onion_location_is_data(run.location);
        if (out)
            out[count] = (struct onion_layer_run){
                .block_index = run.block_index,
                .block_count = run.block_count,
                .state = is_data ? 1 : 2,
                .segment = is_data ? (uint16_t)onion_location_segment(run.location) : 0,
                .slot = is_data ? onion_location_slot(run.location) : 0,
            };
    }
    return count;
}

uint64_t onion_layer_slots(const struct onion_layer *layer, uint32_t segment, struct onion_stretch *out) {
    uint64_t count = 0;
    struct onion_run run;
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count) {
        if (!onion_location_is_data(run.location) || onion_location_segment(run.location) != segment)
            continue;
        if (out)
            out[count] = (struct onion_stretch){onion_location_slot(run.location), run.block_count};
        count++;
    }
    return count;
}

static int stretch_order(const void *a, const void *b) {
    uint64_t first_a = ((const struct onion_stretch *)a)->first, first_b = ((const struct onion_stretch *)b)->first;
    return (first_a > first_b) - (first_a < first_b);
}

uint64_t onion_stretches_join(struct onion_stretch *stretches, uint64_t count) {
    if (count == 0)
        return 0;
    qsort(stretches, count, sizeof *stretches, stretch_order);
    uint64_t last = 0;
    for (uint64_t i = 1; i < count; i++) {
        uint64_t end = stretches[last].first + stretches[last].count;
        if (stretches[i].first > end)
            stretches[++last] = stretches[i];
        else if (stretches[i].first + stretches[i].count > end)
            stretches[last].count = stretches[i].first + stretches[i].count - stretches[last].first;
    }
    return last + 1;
}

void onion_layer_count(const struct onion_layer *layer, uint64_t *data_blocks, uint64_t *zero_blocks) {
    struct onion_run run;
    *data_blocks = *zero_blocks = 0;
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count)
        *(onion_location_is_data(run.location) ? data_blocks : zero_blocks) += run.block_count;
}

uint64_t onion_stretches_of_bits(const unsigned char *bitmap, uint64_t bits, struct onion_stretch *out) {
    uint64_t count = 0, first = 0;
    int was_set = 0;
    for (uint64_t i = 0; i <= bits; i++) {
        int is_set = i < bits && bitmap[i >> 3] >> (i & 7) & 1;
        if (is_set && !was_set)
            first = i;
        if (was_set && !is_set) {
            if (out)
                out[count] = (struct onion_stretch){first, i - first};
            count++;
        }
        was_set = is_set;
    }
    return count;
}

void onion_layer_slots_by_segment(const struct onion_layer *layer, uint64_t *starts, struct onion_stretch *out) {
    struct onion_run run;
    uint64_t last = layer->segment_count + 1;
    if (!out)
        memset(starts, 0, (last + 1) * sizeof *starts);
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count) {
        if (!onion_location_is_data(run.location))
            continue;
        uint32_t segment = onion_location_segment(run.location);
        if (out)
            out[starts[segment]++] = (struct onion_stretch){onion_location_slot(run.location), run.block_count};
        else
            starts[segment + 1]++;
    }
    if (out) /* each start went on to the next one */
        memmove(starts + 1, starts, last * sizeof *starts);
    starts[0] = 0;
    for (uint64_t n = 1; !out && n <= last; n++)
        starts[n] += starts[n - 1];
}

void onion_layer_segment_use(const struct onion_layer *layer, uint64_t *blocks, uint64_t *ends) {
    struct onion_run run;
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count) {
        if (!onion_location_is_data(run.location))
            continue;
        uint32_t segment = onion_location_segment(run.location);
        uint64_t end = onion_location_slot(run.location) + run.block_count;
        blocks[segment] += run.block_count;
        ends[segment] = end > ends[segment] ? end : ends[segment];
    }
}

/* ---- changing it ---- */

int onion_layer_drop_zero(struct onion_layer *layer) {
    struct onion_run run;
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count) {
        if (run.location != ONION_LOCATION_ZERO)
            continue;
        int status = onion_map_set(&layer->map, run.block_index, run.block_count, ONION_LOCATION_HOLE);
        if (status < 0)
            return status;
    }
    return 0;
}

/* The first of the sorted stretches that ends behind `slot`, or count. */
static uint64_t stretch_at(const struct onion_stretch *slots, uint64_t count, uint64_t slot) {
    uint64_t low = 0, high = count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (slots[middle].first + slots[middle].count <= slot)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The part of one run that lies in the stretches. Returns blocks moved or -ENOMEM. */
static int64_t replace_run(struct onion_layer *layer, const struct onion_run *run, const struct onion_stretch *slots,
                           const uint64_t *new_first, uint64_t count, uint32_t new_segment) {
    uint64_t slot = onion_location_slot(run->location), slot_end = slot + run->block_count;
    int64_t moved = 0;
    for (uint64_t i = stretch_at(slots, count, slot); i < count && slots[i].first < slot_end; i++) {
        uint64_t from = slots[i].first > slot ? slots[i].first : slot;
        uint64_t to = slots[i].first + slots[i].count < slot_end ? slots[i].first + slots[i].count : slot_end;
        onion_location location = onion_location_make(new_segment, (uint32_t)(new_first[i] + (from - slots[i].first)));
        int status = onion_map_set(&layer->map, run->block_index + (from - slot), to - from, location);
        if (status < 0)
            return status;
        moved += (int64_t)(to - from);
    }
    return moved;
}

int64_t onion_layer_replace(struct onion_layer *layer, uint32_t segment, const struct onion_stretch *slots,
                            const uint64_t *new_first, uint64_t count, uint32_t new_segment) {
    int64_t total = 0;
    struct onion_run run;
    for (uint64_t at = 0; next_run(layer, at, &run); at = run.block_index + run.block_count) {
        if (!onion_location_is_data(run.location) || onion_location_segment(run.location) != segment)
            continue;
        int64_t moved = replace_run(layer, &run, slots, new_first, count, new_segment);
        if (moved < 0)
            return moved;
        total += moved;
    }
    return total;
}
