/* replace_below.c: replaces the lowest parts of an open volume: its base, its lowest layers, and segments in which no
 * block is left. volume.h says what it promises.
 *
 * Reads and writes go on meanwhile. The steps, and why each is right while they go on:
 *   1. Each block that the new layer has, and that was in a dropped segment or nowhere, gets its location in the new
 layer.
 *      Both read the same. The stripe of a range keeps its writers out, and the flush gate keeps flushes, resizes and
 seals
 *      out.
 *   2. Wait until all reads have ended that found a block nowhere before step 1, because they go on to load the base.
 *   3. The new base takes the old one's place. A block that is nowhere reads the same from both, or has got a location.
 *   4. Blocks that are still in dropped segments become HOLE. From here on they read from the base, or zero.
 *   5. Wait until all reads have ended that found a location in a dropped segment, or loaded the old base.
 *   6. The dropped segments are removed, and their numbers may be used again.
 * Only steps 1 and 4 need memory. If it is missing, everything reads as before, and the steps may be taken again. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layer/layer_map.h"
#include "volume/internal.h"

struct onion_below {
    int keep_base;
    uint64_t base_bytes;
    struct onion_mapping *base, *old_base;
    int base_is_swapped;
    int is_begun; /* blocks may have their new locations */
    int has_layer;
    struct onion_layer source;    /* the new lowest layer, with its own segment numbers */
    struct onion_map layer;       /* its map, with the volume's segment numbers */
    struct onion_segment **added; /* its segments that the volume does not have yet; they get numbers in this order */
    uint32_t added_count, numbered_count;
    unsigned char *gone; /* by number: 1 if the segment is dropped */
    uint32_t *dropped;
    uint32_t dropped_count;
};

static int needs_memory(const void *memory) { return memory ? 0 : -ENOMEM; }

/* ---- the new layer ---- */

static int by_uuid(const void *a, const void *b) { return memcmp(a, b, ONION_UUID_BYTES); }

/* Checks that no block of the layer lies behind the end of its segment, or in a segment that the catalog does not
 * list. */
static int check_locations(const struct onion_below *below, const char *map_path) {
    const struct onion_layer *layer = &below->source;
    uint64_t *slots = calloc(layer->segment_count + 1, sizeof *slots);
    if (!slots)
        return -ENOMEM;
    int status = 0;
    for (uint32_t k = 0; k < layer->segment_count; k++)
        for (uint32_t i = 0; i < below->added_count; i++)
            if (!by_uuid(layer->segment_ids[k], below->added[i]->uuid))
                slots[k + 1] = below->added[i]->next_slot;
    struct onion_run run = {0, 0, 0};
    while (status == 0 && onion_map_next(&layer->map, run.block_index + run.block_count, layer->map.block_count, &run))
        if (onion_location_is_data(run.location) &&
            onion_location_slot(run.location) + run.block_count > slots[onion_location_segment(run.location)])
            status = onion_site_set(ONION_E_FORMAT, map_path, 0);
    free(slots);
    return status;
}

static int load_layer(struct onion_volume *volume, struct onion_below *below, const struct onion_layer_source *source) {
    below->has_layer = 1;
    below->added = calloc(source->segment_count + 1, sizeof(struct onion_segment *));
    int status = needs_memory(below->added);
    for (uint32_t i = 0; i < source->segment_count && status == 0; i++) {
        status = onion_segment_new(&volume->store, volume->segments_directory, source->segments[i].uuid, 0,
                                   volume->block_shift, &below->added[i]);
        if (status == 0) {
            below->added_count++;
            status = onion_segment_check(below->added[i], source->segments[i].slots);
        }
    }
    if (status == 0)
        status = onion_layer_init(&below->source, volume->index.block_count, volume->block_shift);
    if (status == 0 && source->map_length)
        status = onion_volume_load_sealed_map(volume, source, &below->source);
    return status < 0 ? status : check_locations(below, source->map_path);
}

/* If the volume has a segment of the layer open already, the segment keeps its number. -EINVAL: such a segment is to be
 * dropped. The caller holds the gate. */
static int use_open_segments(struct onion_volume *volume, struct onion_below *below, uint16_t *number_of) {
    uint32_t left = 0;
    int status = 0;
    for (uint32_t i = 0; i < below->added_count; i++) {
        struct onion_segment *segment = below->added[i];
        uint32_t number = onion_volume_find_segment(volume, segment->uuid);
        if (!number) {
            below->added[left++] = segment;
            continue;
        }
        if (below->gone[number])
            status = -EINVAL;
        for (uint32_t k = 0; k < below->source.segment_count; k++)
            if (!by_uuid(below->source.segment_ids[k], segment->uuid))
                number_of[k + 1] = (uint16_t)number;
        onion_segment_free(segment);
    }
    below->added_count = left;
    return status;
}

/* Gives the layer's segments their numbers, and makes the layer's map with them. The caller has closed the flush
 * gate. */
static int number_layer(struct onion_volume *volume, struct onion_below *below) {
    uint16_t *number_of = calloc(below->source.segment_count + 1, sizeof *number_of);
    int status = number_of ? onion_map_init(&below->layer, volume->index.block_count, volume->block_shift) : -ENOMEM;
    pthread_rwlock_wrlock(&volume->gate);
    if (status == 0)
        status = use_open_segments(volume, below, number_of);
    if (status == 0 && onion_volume_numbers_left(volume) < below->added_count + 1)
        status = ONION_E_NUMBERS;
    if (status == 0)
        status = onion_volume_take_mappings(volume, below->added_count);
    for (; status == 0 && below->numbered_count < below->added_count; below->numbered_count++) {
        struct onion_segment *segment = below->added[below->numbered_count];
        onion_volume_number_segment(volume, segment);
        for (uint32_t k = 0; k < below->source.segment_count; k++)
            if (!by_uuid(below->source.segment_ids[k], segment->uuid))
                number_of[k + 1] = (uint16_t)segment->number;
    }
    pthread_rwlock_unlock(&volume->gate);
    if (status == 0)
        status = onion_map_fold(&below->layer, &below->source.map, number_of);
    free(number_of);
    onion_layer_destroy(&below->source);
    return status;
}

/* ---- dropped segments ---- */

/* Finds the numbers of the dropped segments, in one pass over all segments, however many are dropped. */
static int find_dropped(struct onion_volume *volume, struct onion_below *below,
                        const struct onion_below_source *source) {
    size_t count = source->dropped_count;
    unsigned char(*sorted)[ONION_UUID_BYTES] = malloc((count + 1) * sizeof *sorted);
    below->gone = calloc(ONION_SEGMENT_LAST + 1, 1);
    below->dropped = calloc(count + 1, sizeof *below->dropped);
    int status = sorted && below->gone && below->dropped ? 0 : -ENOMEM;
    if (status == 0 && count) {
        memcpy(sorted, source->dropped, count * sizeof *sorted);
        qsort(sorted, count, sizeof *sorted, by_uuid);
    }
    for (uint32_t i = 1; i <= volume->segment_count && status == 0; i++) {
        if (volume->segments[i] == volume->vacant ||
            !bsearch(volume->segments[i]->uuid, sorted, count, sizeof *sorted, by_uuid))
            continue;
        if (i == volume->own || i == volume->spare || below->dropped_count == count)
            status = -EBUSY;
        else
            below->gone[below->dropped[below->dropped_count++] = i] = 1;
    }
    free(sorted);
    return status == 0 && below->dropped_count < count ? -ENOENT : status;
}

/* Marks, by number, the segments that a block, or a change that is not durable, needs. The caller keeps writers out. */
static void mark_used(struct onion_volume *volume, unsigned char *used) {
    struct onion_run run = {0, 0, 0};
    while (onion_map_next(&volume->index, run.block_index + run.block_count, volume->index.block_count, &run))
        if (onion_location_is_data(run.location))
            used[onion_location_segment(run.location)] = 1;
    pthread_mutex_lock(&volume->dirty_lock);
    for (size_t i = 0; i < volume->dirty_records.record_count; i++)
        used[volume->dirty_records.records[i].segment] = 1;
    for (size_t i = 0; i < volume->dirty_records.freed_count; i++)
        used[volume->dirty_records.freed[i].segment] = 1;
    pthread_mutex_unlock(&volume->dirty_lock);
}

/* Checks that no dropped segment of the head is needed. Unlike the segments below, those that the head wrote or
 * inherited may be named in its log. */
static int check_unused(struct onion_volume *volume, const struct onion_below *below) {
    int of_head = 0, status = 0;
    for (uint32_t i = 0; i < below->dropped_count; i++) {
        const struct onion_segment *segment = volume->segments[below->dropped[i]];
        of_head |= onion_segment_is_head(volume, segment) || segment->own || segment->log_number;
    }
    if (!of_head)
        return 0;
    unsigned char *used = calloc(ONION_SEGMENT_LAST + 1, 1);
    if (!used)
        return -ENOMEM;
    mark_used(volume, used);
    for (uint32_t i = 0; i < below->dropped_count; i++) {
        const struct onion_segment *segment = volume->segments[below->dropped[i]];
        int is_ours = onion_segment_is_head(volume, segment) || segment->own;
        if (segment->log_number || (is_ours && used[segment->number]))
            status = -EBUSY;
    }
    free(used);
    return status;
}

int64_t onion_volume_unused_segments(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES],
                                     uint32_t capacity) {
    int64_t found = onion_volume_close_flush_gate(volume);
    if (found < 0)
        return found;
    unsigned char *used = calloc(ONION_SEGMENT_LAST + 1, 1);
    found = used ? onion_volume_flush_behind_gate(volume) : -ENOMEM;
    pthread_rwlock_wrlock(&volume->gate);
    if (found == 0)
        mark_used(volume, used);
    for (uint32_t i = 1; i <= volume->segment_count && found >= 0; i++) {
        const struct onion_segment *segment = volume->segments[i];
        if (segment == volume->vacant || i == volume->own || i == volume->spare || used[i] || segment->log_number)
            continue;
        if (found < capacity)
            memcpy(uuids[found], segment->uuid, ONION_UUID_BYTES);
        found++;
    }
    pthread_rwlock_unlock(&volume->gate);
    free(used);
    onion_volume_open_flush_gate(volume);
    return found;
}

/* ---- prepare and abort ---- */

/* Frees the parts of a preparation that are not in the volume. */
void onion_below_free(struct onion_below *below) {
    if (!below)
        return;
    for (uint32_t i = below->numbered_count; i < below->added_count; i++)
        onion_segment_free(below->added[i]);
    if (below->base)
        onion_base_release(NULL, below->base);
    if (below->old_base)
        onion_base_release(NULL, below->old_base);
    onion_layer_destroy(&below->source);
    onion_map_destroy(&below->layer);
    free(below->added);
    free(below->gone);
    free(below->dropped);
    free(below);
}

/* Takes the segments of a layer out of the volume again. No block has a location in them yet. */
static void forget_layer(struct onion_volume *volume, struct onion_below *below) {
    pthread_rwlock_wrlock(&volume->gate);
    while (below->numbered_count) {
        struct onion_segment *segment = below->added[--below->numbered_count];
        onion_volume_vacate(volume, segment->number);
    }
    pthread_rwlock_unlock(&volume->gate);
}

static int prepare_behind_gate(struct onion_volume *volume, struct onion_below *below,
                               const struct onion_below_source *source) {
    if (volume->below)
        return -EBUSY;
    /* Over nothing, the head's trimmed blocks are HOLE, so they would show whatever is put below. */
    if (volume->nothing_below && (source->layer || (!source->keep_base && source->base_fd >= 0)))
        return -EINVAL;
    pthread_rwlock_wrlock(&volume->gate);
    int status = find_dropped(volume, below, source);
    if (status == 0)
        status = check_unused(volume, below);
    pthread_rwlock_unlock(&volume->gate);
    if (status == 0 && below->has_layer)
        status = number_layer(volume, below);
    if (status < 0)
        forget_layer(volume, below);
    return status;
}

int onion_volume_prepare_below(struct onion_volume *volume, const struct onion_below_source *source) {
    struct onion_below *below = calloc(1, sizeof *below);
    int status = below ? onion_volume_usable(volume) : -ENOMEM;
    if (status == 0) {
        below->keep_base = source->keep_base;
        below->base_bytes = source->base_fd < 0 ? 0 : source->base_bytes;
    }
    if (status == 0 && !source->keep_base && source->base_fd >= 0)
        status = onion_base_map(source->base_fd, source->base_bytes, 0, &below->base);
    if (status == 0 && source->layer)
        status = load_layer(volume, below, source->layer);
    if (status == 0 && (status = onion_volume_close_flush_gate(volume)) == 0) {
        status = prepare_behind_gate(volume, below, source);
        if (status == 0)
            volume->below = below;
        onion_volume_open_flush_gate(volume);
    }
    if (status < 0)
        onion_below_free(below);
    return status;
}

void onion_volume_abort_below(struct onion_volume *volume) {
    if (onion_volume_close_flush_gate(volume) < 0)
        return; /* it is freed with the volume */
    struct onion_below *below = volume->below;
    if (below && !below->is_begun) {
        forget_layer(volume, below);
        onion_below_free(below);
        volume->below = NULL;
    }
    onion_volume_open_flush_gate(volume);
}

/* ---- commit ---- */

/* Runs onion_map_put_below over all ranges of `of`, each with its stripe held. */
static int put_ranges(struct onion_volume *volume, const struct onion_map *of, const struct onion_map *layer,
                      const unsigned char *gone, int drop) {
    int status = 0;
    for (uint64_t range = 0; status == 0 && (range = onion_map_next_range(of, range)) != UINT64_MAX; range++) {
        pthread_mutex_t *stripe = &volume->stripes[range % ONION_STRIPES];
        pthread_mutex_lock(stripe);
        status = onion_map_put_below(&volume->index, range, layer, gone, drop);
        pthread_mutex_unlock(stripe);
    }
    return status;
}

/* Sets the births that block status uses. From now on the new layer, or HOLE, stands for the dropped segments, so it
 * gets the birth of the youngest of them. If the base stays, the layer has all blocks of the dropped segments, and the
 * birth of HOLE does not change. */
static void inherit_birth(struct onion_volume *volume, const struct onion_below *below) {
    uint64_t birth = below->keep_base ? 0 : volume->below_birth;
    if (below->keep_base && !below->has_layer)
        return; /* no block was left in the dropped segments */
    for (uint32_t i = 0; i < below->dropped_count; i++) {
        const struct onion_segment *segment = volume->segments[below->dropped[i]];
        birth = segment->birth > birth ? segment->birth : birth;
    }
    for (uint32_t i = 0; i < below->added_count; i++)
        __atomic_store_n(&below->added[i]->birth, birth, __ATOMIC_RELEASE);
    if (!below->keep_base)
        __atomic_store_n(&volume->below_birth, birth, __ATOMIC_RELEASE);
}

static void swap_base(struct onion_volume *volume, struct onion_below *below) {
    if (below->base_is_swapped || below->keep_base)
        return;
    below->old_base = volume->base;
    __atomic_store_n(&volume->base, below->base, __ATOMIC_RELEASE);
    volume->base_bytes = below->base_bytes;
    below->base = NULL;
    below->base_is_swapped = 1;
}

/* Forgets the freed slots of dropped segments. They need not be given back, and other segments may get the numbers. */
static void forget_freed(struct onion_volume *volume, const unsigned char *gone) {
    struct onion_dirty_records *dirty = &volume->dirty_records;
    size_t kept = 0;
    pthread_mutex_lock(&volume->dirty_lock);
    for (size_t i = 0; i < dirty->freed_count; i++)
        if (!gone[dirty->freed[i].segment])
            dirty->freed[kept++] = dirty->freed[i];
    dirty->freed_count = kept;
    pthread_mutex_unlock(&volume->dirty_lock);
}

static void drop_segments(struct onion_volume *volume, struct onion_below *below) {
    struct onion_segment *segment = NULL;
    forget_freed(volume, below->gone);
    for (uint32_t i = 0; i < below->dropped_count; i++) {
        pthread_rwlock_wrlock(&volume->gate);
        segment = onion_volume_vacate(volume, below->dropped[i]);
        pthread_rwlock_unlock(&volume->gate);
        onion_segment_free(segment);
    }
    below->numbered_count = below->added_count; /* they belong to the volume now */
}

int onion_volume_commit_below(struct onion_volume *volume) {
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    struct onion_below *below = volume->below;
    if (!below)
        status = -EINVAL;
    if (status == 0) {
        below->is_begun = 1;
        inherit_birth(volume, below);
        if (below->has_layer)
            status = put_ranges(volume, &below->layer, &below->layer, below->gone, 0);
    }
    if (status == 0) {
        onion_epoch_wait(&volume->epoch);
        swap_base(volume, below);
        status = put_ranges(volume, &volume->index, below->has_layer ? &below->layer : NULL, below->gone, 1);
    }
    if (status == 0) {
        onion_epoch_wait(&volume->epoch);
        drop_segments(volume, below);
        onion_below_free(below);
        volume->below = NULL;
    }
    onion_volume_open_flush_gate(volume);
    return status;
}
