/* read_plan.c: tells a server where the bytes of a range lie in memory, so that it can send them without copying, and
 * which extents a range has. See volume.h for what must hold. */
#define _GNU_SOURCE
#include "base/linux_io.h"
#include "base/sigbus.h"
#include "volume/internal.h"

int onion_volume_plan_begin(struct onion_volume *volume, struct onion_ticket *ticket) {
    *ticket = onion_epoch_enter(&volume->epoch);
    /* It is checked after entering, because a close waits for the readers that have entered. */
    int status = onion_volume_usable(volume);
    if (status < 0)
        onion_epoch_leave(&volume->epoch, *ticket);
    return status;
}

void onion_volume_plan_end(struct onion_volume *volume, struct onion_ticket ticket) {
    onion_epoch_leave(&volume->epoch, ticket);
}

/* ---- addresses of bytes ---- */

struct plan {
    struct onion_piece *pieces;
    uint32_t count, capacity;
};

/* Adds a piece, joined to the last one if possible. Returns 0 if there is no room. */
static int add_piece(struct plan *plan, const char *address, uint64_t length) {
    if (plan->count) {
        struct onion_piece *last = &plan->pieces[plan->count - 1];
        if (address ? last->address && last->address + last->length == address : !last->address) {
            last->length += length;
            return 1;
        }
    }
    if (plan->count == plan->capacity)
        return 0;
    plan->pieces[plan->count++] = (struct onion_piece){address, length};
    return 1;
}

int64_t onion_volume_plan(struct onion_volume *volume, uint64_t offset, uint64_t length, struct onion_piece *pieces,
                          uint32_t capacity, uint64_t *planned) {
    struct plan plan = {pieces, 0, capacity};
    *planned = 0;
    if (!onion_volume_in_bounds(volume, offset, length))
        return ONION_E_BOUNDS;
    while (*planned < length) {
        struct onion_source source;
        const char *address;
        onion_volume_next_run(volume, offset + *planned, length - *planned, &source);
        int status = onion_source_address(&source, &volume->epoch, &address);
        if (status < 0)
            return status;
        if (!add_piece(&plan, address, source.length))
            break;
        *planned += source.length;
    }
    return plan.count;
}

struct touch_request {
    const struct onion_piece *pieces;
    uint64_t count;
};

static int touch_pages(void *context) {
    const struct touch_request *request = context;
    for (uint64_t i = 0; i < request->count; i++) {
        const struct onion_piece *piece = &request->pieces[i];
        if (!piece->address || !piece->length)
            continue;
        const volatile char *at = piece->address, *last = piece->address + piece->length - 1;
        onion_fault_watch(piece->address, piece->length);
        for (; at < last; at += 4096)
            (void)*at;
        (void)*last;
        onion_fault_unwatch();
    }
    return 0;
}

int onion_pieces_touch(const struct onion_piece *pieces, uint64_t count) {
    struct touch_request request = {pieces, count};
    return onion_fault_run(touch_pages, &request);
}

/* ---- extents ---- */

/* Finds the extent of the base from `offset` on, which ends where its file changes between data and hole. If the file
 * was cut short, nothing in it counts as a hole: a client must ask for the missing part and get an error, and not skip
 * it as zeros. */
static struct onion_extent base_extent(const struct onion_volume *volume, uint64_t offset, uint64_t length) {
    struct onion_extent extent = {.offset = offset,
                                  .length = length,
                                  .kind = ONION_EXTENT_NONE,
                                  .birth = __atomic_load_n(&volume->below_birth, __ATOMIC_ACQUIRE)};
    const struct onion_mapping *base = __atomic_load_n(&volume->base, __ATOMIC_ACQUIRE);
    if (!base || offset >= base->length)
        return extent;
    if (length > base->length - offset)
        extent.length = length = base->length - offset;
    struct onion_data_span span;
    int found = onion_seek_data(base->fd, offset, offset + length, &span);
    if (found < 0 || ((!found || span.offset > offset) && onion_was_cut(base->fd, base->length))) {
        /* it is not known, so it counts as data */
        extent.kind = ONION_EXTENT_BASE;
    } else if (found && span.offset <= offset) {
        extent.kind = ONION_EXTENT_BASE;
        extent.length = span.offset + span.length - offset;
    } else if (found) {
        extent.length = span.offset - offset;
    }
    return extent;
}

static struct onion_extent extent_at(const struct onion_volume *volume, uint64_t offset, uint64_t length) {
    uint64_t block = offset >> volume->block_shift, start = offset & (volume->block_size - 1);
    uint64_t end = (offset + length + volume->block_size - 1) >> volume->block_shift;
    struct onion_run run;
    /* onion_map_run_at shows at most 2 MiB. The next run that is not HOLE shows how far a hole goes. */
    if (!onion_map_next(&volume->index, block, end, &run))
        return base_extent(volume, offset, length);
    if (run.block_index > block) {
        uint64_t hole = ((run.block_index - block) << volume->block_shift) - start;
        return base_extent(volume, offset, hole < length ? hole : length);
    }
    uint64_t bytes = (run.block_count << volume->block_shift) - start;
    struct onion_extent extent = {
        .offset = offset, .length = bytes < length ? bytes : length, .kind = ONION_EXTENT_ZERO};
    if (onion_location_is_data(run.location)) {
        const struct onion_segment *segment = volume->segments[onion_location_segment(run.location)];
        extent.birth = segment->birth;
        extent.kind = onion_segment_is_head(volume, segment) ? ONION_EXTENT_HEAD : ONION_EXTENT_BELOW;
    }
    return extent;
}

int64_t onion_volume_extents(struct onion_volume *volume, uint64_t offset, uint64_t length,
                             struct onion_extent *extents, uint32_t capacity) {
    struct onion_ticket ticket;
    int64_t count = onion_volume_plan_begin(volume, &ticket);
    if (count < 0)
        return count;
    if (!onion_volume_in_bounds(volume, offset, length))
        count = ONION_E_BOUNDS;
    while (count >= 0 && length && (uint64_t)count < capacity) {
        extents[count] = extent_at(volume, offset, length);
        offset += extents[count].length;
        length -= extents[count].length;
        count++;
    }
    onion_volume_plan_end(volume, ticket);
    return count;
}

uint64_t onion_volume_birth(struct onion_volume *volume) {
    pthread_rwlock_rdlock(&volume->gate);
    uint64_t birth = volume->own ? volume->segments[volume->own]->birth : 0;
    pthread_rwlock_unlock(&volume->gate);
    return birth;
}
