/* segment_table.c: the table of an open volume's segments, by their numbers in the index, and the mappings that are set
 * aside for them. */
#include <string.h>

#include "volume/internal.h"

uint32_t onion_volume_find_segment(const struct onion_volume *volume, const unsigned char *uuid) {
    for (uint32_t i = volume->segment_count; i; i--)
        if (!memcmp(volume->segments[i]->uuid, uuid, ONION_UUID_BYTES) && volume->segments[i] != volume->vacant)
            return i;
    return 0;
}

uint32_t onion_volume_numbers_left(const struct onion_volume *volume) {
    return ONION_SEGMENT_LAST - volume->segment_count + volume->vacant_count;
}

/* Takes a vacant number if there is one, otherwise a new one. While a volume is opened there is none, so numbers
 * grow. */
static uint32_t take_number(struct onion_volume *volume) {
    uint32_t number = 1;
    if (!volume->vacant_count)
        return volume->segment_count + 1;
    while (volume->segments[number] != volume->vacant)
        number++;
    volume->vacant_count--;
    return number;
}

uint32_t onion_volume_number_segment(struct onion_volume *volume, struct onion_segment *segment) {
    segment->number = take_number(volume);
    segment->birth = ++volume->births;
    segment->features = volume->wipe_zero ? ONION_FEATURE_WIPE_ZERO : 0;
    __atomic_store_n(&volume->segments[segment->number], segment, __ATOMIC_RELEASE);
    if (segment->number > volume->segment_count)
        __atomic_store_n(&volume->segment_count, segment->number, __ATOMIC_RELEASE);
    return segment->number;
}

int onion_volume_add_segment(struct onion_volume *volume, const unsigned char *uuid, uint32_t *number) {
    struct onion_segment *segment;
    if (!onion_volume_numbers_left(volume))
        return ONION_E_NUMBERS;
    int status = onion_segment_new(&volume->store, volume->segments_directory, uuid, 0, volume->block_shift, &segment);
    if (status == 0)
        *number = onion_volume_number_segment(volume, segment);
    return status;
}

struct onion_segment *onion_volume_vacate(struct onion_volume *volume, uint32_t number) {
    struct onion_segment *segment = volume->segments[number];
    __atomic_store_n(&volume->segments[number], volume->vacant, __ATOMIC_RELEASE);
    volume->vacant_count++;
    if (volume->mappings) {
        volume->mappings--;
        onion_mappings_give_back(1);
    }
    return segment;
}

int onion_volume_take_mappings(struct onion_volume *volume, uint64_t count) {
    int status = onion_mappings_take(count);
    if (status == 0)
        volume->mappings += count;
    return status;
}

uint32_t onion_volume_own_segment_count(const struct onion_volume *volume) {
    uint32_t count = 0, last = __atomic_load_n(&volume->segment_count, __ATOMIC_ACQUIRE); /* a spare may be added */
    for (uint32_t i = 1; i <= last; i++)
        count += (uint32_t)volume->segments[i]->own;
    return count;
}
