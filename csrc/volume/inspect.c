/* inspect.c: lists the contents of a volume: runs of its index, its segments, and the segments to reclaim. See volume.h
 * for what must hold. */
#include <string.h>

#include "volume/internal.h"

int64_t onion_volume_runs(struct onion_volume *volume, uint64_t block_index, uint64_t block_end, struct onion_run *runs,
                          uint64_t capacity, uint64_t *next) {
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    int64_t count = onion_volume_usable(volume);
    while (count >= 0 && (uint64_t)count < capacity && block_index < block_end) {
        if (!onion_map_next(&volume->index, block_index, block_end, &runs[count])) {
            block_index = block_end;
            break;
        }
        block_index = runs[count].block_index + runs[count].block_count;
        count++;
    }
    *next = block_index;
    onion_epoch_leave(&volume->epoch, ticket);
    return count;
}

int onion_volume_wait_for_readers(struct onion_volume *volume) {
    int status = onion_volume_usable(volume);
    if (status == 0)
        onion_epoch_wait(&volume->epoch);
    return status;
}

int onion_volume_reclaim_wanted(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES],
                                uint32_t capacity) {
    uint32_t count = 0;
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return 0;
    __atomic_store_n(&volume->reclaim_wanted, 0, __ATOMIC_SEQ_CST);
    pthread_rwlock_rdlock(&volume->gate);
    for (uint32_t i = 1; i <= volume->segment_count && count < capacity; i++)
        if (!onion_location_is_own(volume, onion_location_make(i, 0)) &&
            __atomic_exchange_n(&volume->segments[i]->reclaim_wanted, 0, __ATOMIC_SEQ_CST))
            memcpy(uuids[count++], volume->segments[i]->uuid, ONION_UUID_BYTES);
    pthread_rwlock_unlock(&volume->gate);
    if (count == capacity)
        __atomic_store_n(&volume->reclaim_wanted, 1, __ATOMIC_SEQ_CST); /* there may be more */
    return (int)count;
}

void onion_volume_reclaim_again(struct onion_volume *volume, const unsigned char (*uuids)[ONION_UUID_BYTES],
                                uint32_t count) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return;
    pthread_rwlock_rdlock(&volume->gate);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = onion_volume_find_segment(volume, uuids[i]);
        if (number)
            onion_volume_want_reclaim(volume, volume->segments[number]);
    }
    pthread_rwlock_unlock(&volume->gate);
}

uint64_t onion_volume_take_unwipeable(struct onion_volume *volume) {
    return __atomic_exchange_n(&volume->bytes_unwipeable, 0, __ATOMIC_RELAXED);
}

int onion_volume_wants_reclaim(struct onion_volume *volume) {
    return __atomic_load_n(&volume->reclaim_wanted, __ATOMIC_SEQ_CST);
}

static struct onion_segment_info info_of(const struct onion_volume *volume, const struct onion_segment *segment) {
    struct onion_segment_info info = {.number = segment->number,
                                      .slots = onion_segment_slots_in_file(segment),
                                      .role = onion_segment_is_head(volume, segment) ? 1 + segment->own : 0};
    memcpy(info.uuid, segment->uuid, ONION_UUID_BYTES);
    return info;
}

uint32_t onion_volume_segments(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return 0;
    pthread_rwlock_rdlock(&volume->gate);
    uint32_t found = 0, count = volume->closed ? 0 : volume->segment_count;
    for (uint32_t i = 1; i <= count; i++) {
        if (volume->segments[i] == volume->vacant)
            continue;
        if (found < capacity)
            infos[found] = info_of(volume, volume->segments[i]);
        found++;
    }
    pthread_rwlock_unlock(&volume->gate);
    return found;
}

uint32_t onion_volume_just_sealed(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return 0;
    pthread_rwlock_rdlock(&volume->gate);
    uint32_t found = 0, count = volume->closed || volume->seal.stage != ONION_SEAL_SYNCED ? 0 : volume->segment_count;
    for (uint32_t i = 1; i <= count; i++) {
        const struct onion_segment *segment = volume->segments[i];
        if (!segment->own || onion_segment_is_head(volume, segment))
            continue;
        if (found < capacity)
            infos[found] = info_of(volume, segment);
        found++;
    }
    pthread_rwlock_unlock(&volume->gate);
    return found;
}
