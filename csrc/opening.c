/* opening.c: the files of a volume, and the index that is made of them. See volume.h for what must hold.
 *
 * The logs of all layers are replayed, lowest first, into one list of changes, which becomes the index at once
 * (mapbuild.h). HOLE in a log means "look below": where something lies below, the layer's own map is made first and laid
 * over what is there. The one case in which logs hold such records is a volume over nothing, whose lowest layer they
 * are in. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "layermap.h"
#include "volume_state.h"

#define NUMBERS_LEFT_MIN 256 /* that a head's log must have for segments to come */
#define AGAIN_BYTES (1u << 20) /* read and written again at a time */

/* ---- the base ---- */

int onion_base_map(const char *path, uint64_t size_bytes, struct onion_mapping **out) {
    struct onion_mapping *mapping = calloc(1, sizeof *mapping);
    if (!mapping)
        return -ENOMEM;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    int status = fd < 0 || fstat(fd, &info) ? -errno : 0;
    if (status == 0 && (uint64_t)info.st_size < size_bytes)
        status = ONION_E_FORMAT;
    if (status == 0 && size_bytes) {
        mapping->length = size_bytes;
        mapping->address = mmap(NULL, size_bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (mapping->address == MAP_FAILED)
            status = -errno;
    }
    if (status < 0) {
        if (fd >= 0)
            close(fd);
        free(mapping);
        return status;
    }
    mapping->fd = fd;
    *out = mapping;
    return 0;
}

int onion_volume_set_base(struct onion_volume *volume, const char *path, uint64_t size_bytes) {
    int status = onion_base_map(path, size_bytes, &volume->base);
    if (status == 0) {
        volume->base_bytes = size_bytes;
        volume->nothing_below = 0;
    }
    return status;
}

/* ---- segments ---- */

uint32_t onion_volume_find_segment(const struct onion_volume *volume, const unsigned char *uuid) {
    for (uint32_t i = volume->segment_count; i; i--)
        if (!memcmp(volume->segments[i]->uuid, uuid, ONION_UUID_BYTES))
            return i;
    return 0;
}

int onion_volume_add_segment(struct onion_volume *volume, const unsigned char *uuid, uint32_t *number) {
    if (volume->segment_count == ONION_SEGMENT_LAST)
        return -EMFILE;
    struct onion_segment *segment;
    int status =
        onion_segment_new(volume->segments_directory, uuid, volume->segment_count + 1, volume->block_shift, &segment);
    if (status < 0)
        return status;
    segment->features = volume->wipe_zero ? ONION_FEATURE_WIPE_ZERO : 0;
    volume->segments[segment->number] = segment;
    __atomic_store_n(&volume->segment_count, segment->number, __ATOMIC_RELEASE);
    *number = segment->number;
    return 0;
}

static int site_error(struct onion_fault_site *site, const char *path, uint64_t offset, int status) {
    snprintf(site->path, sizeof site->path, "%s", path);
    site->offset = offset;
    return status;
}

/* No slot that the index names may lie behind the end of its file. */
static int check_slots(const struct onion_volume *volume, struct onion_fault_site *site) {
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        const struct onion_segment *segment = volume->segments[i];
        if (volume->build.slots_end[i] > segment->next_slot)
            return site_error(site, segment->path, onion_slot_offset(volume->block_shift, segment->next_slot),
                              ONION_E_FORMAT);
    }
    return 0;
}

/* ---- replaying a log ---- */

/* A log while it is replayed. */
struct replay {
    struct onion_volume *volume;
    uint32_t segment_first; /* the layer's segments in the index: this number and those above it */
    uint16_t *number_of;    /* by number in the log: number in the index, 0 none yet */
    uint32_t numbers_given;
    int has_size;
    uint64_t size_bytes;
};

static int replay_segment(struct replay *replay, const struct onion_record *record) {
    struct onion_volume *volume = replay->volume;
    unsigned char uuid[ONION_UUID_BYTES];
    onion_record_uuid(record, uuid);
    uint32_t number = onion_volume_find_segment(volume, uuid);
    uint16_t *known = &replay->number_of[record->segment];
    /* What the map names must be among what the catalog lists, and a number never means two segments. */
    if (number < replay->segment_first || (*known && *known != number))
        return ONION_E_FORMAT;
    if (*known)
        return 0;
    *known = (uint16_t)number;
    if (volume->segments[number]->log_number) /* nor has a segment two numbers */
        return ONION_E_FORMAT;
    volume->segments[number]->log_number = record->segment;
    if (record->segment > replay->numbers_given)
        replay->numbers_given = record->segment;
    return 0;
}

static int replay_record(struct replay *replay, const struct onion_record *record) {
    onion_place place;
    switch (record->kind) {
    case ONION_RECORD_SEGMENT:
        return replay_segment(replay, record);
    case ONION_RECORD_SIZE:
        replay->has_size = 1;
        replay->size_bytes = record->block_index;
        return 0;
    case ONION_RECORD_DATA:
        if (!replay->number_of[record->segment])
            return ONION_E_FORMAT;
        place = onion_place_make(replay->number_of[record->segment], record->slot);
        break;
    default:
        place = record->kind == ONION_RECORD_ZERO ? ONION_PLACE_ZERO : ONION_PLACE_HOLE;
    }
    return onion_build_put(&replay->volume->build, record->block_index, record->block_count, place);
}

/* Puts all whole frames into the build. As onion_layer_load: 0 at a clean end, or ONION_E_TORN, or what is wrong. */
static int replay_log(struct replay *replay, const unsigned char *bytes, uint64_t length,
                      struct onion_log_cursor *cursor, uint64_t *fault_offset) {
    uint64_t block_limit = ONION_VOLUME_BYTES_MAX >> replay->volume->block_shift;
    const unsigned char *records;
    uint32_t count;
    int status;
    while ((*fault_offset = cursor->offset, status = onion_log_next(bytes, length, cursor, &records, &count)) == 1)
        for (uint32_t i = 0; i < count; i++, records += ONION_RECORD_BYTES) {
            struct onion_record record;
            status = onion_record_decode(records, block_limit, &record);
            if (status == 0)
                status = replay_record(replay, &record);
            if (status < 0) {
                *fault_offset = (uint64_t)(records - bytes);
                return status;
            }
        }
    return status;
}

/* The SEGMENT records between two offsets, all of frames that are sound. */
static int replay_segments(struct replay *replay, const unsigned char *bytes, uint64_t offset, uint64_t end) {
    struct onion_log_cursor cursor = {.offset = offset};
    const unsigned char *records;
    uint32_t count;
    int status = 0;
    while (status == 0 && onion_log_next(bytes, end, &cursor, &records, &count) == 1)
        for (uint32_t i = 0; i < count && status == 0; i++, records += ONION_RECORD_BYTES) {
            struct onion_record record;
            if (onion_record_decode(records, UINT64_MAX, &record) == 0 && record.kind == ONION_RECORD_SEGMENT)
                status = replay_segment(replay, &record);
        }
    return status;
}

/* Puts all runs of a layer into the build. */
static int replay_runs(struct replay *replay, const struct onion_layer *layer) {
    struct onion_volume *volume = replay->volume;
    uint32_t *index_of = calloc(layer->segment_count + 1, sizeof *index_of);
    if (!index_of)
        return -ENOMEM;
    for (uint32_t k = 0; k < layer->segment_count; k++)
        index_of[k + 1] = onion_volume_find_segment(volume, layer->segment_ids[k]);
    struct onion_run run = {0, 0, 0};
    int status = 0;
    while (status == 0 &&
           onion_map_next(&layer->map, run.block_index + run.block_count, layer->map.block_count, &run)) {
        onion_place place = run.place;
        if (onion_place_is_data(place))
            place = onion_place_make(index_of[onion_place_segment(place)], onion_place_slot(place));
        status = onion_build_put(&volume->build, run.block_index, run.block_count, place);
    }
    free(index_of);
    return status;
}

/* The same for a log with HOLE records that stands over something. */
static int replay_layer(struct replay *replay, const unsigned char *bytes, uint64_t length,
                        struct onion_log_cursor *cursor, uint64_t *fault_offset) {
    struct onion_volume *volume = replay->volume;
    struct onion_layer layer;
    uint64_t first = cursor->offset;
    int status = onion_layer_init(&layer, ONION_VOLUME_BYTES_MAX >> volume->block_shift, volume->block_shift);
    int end = status == 0 ? onion_layer_load(&layer, bytes, length, cursor, fault_offset) : status;
    status = end == ONION_E_TORN ? 0 : end;
    if (status == 0) /* by the log's own numbers, which a head goes on with */
        status = replay_segments(replay, bytes, first, cursor->offset);
    if (status == 0)
        status = replay_runs(replay, &layer);
    replay->has_size = layer.has_size;
    replay->size_bytes = layer.size_bytes;
    onion_layer_destroy(&layer);
    return status == 0 ? end : status;
}

static int replay_bytes(struct replay *replay, const unsigned char *bytes, uint64_t length,
                        struct onion_log_cursor *cursor, uint64_t *fault_offset) {
    replay->number_of = calloc(ONION_SEGMENT_LAST + 1, sizeof *replay->number_of);
    if (!replay->number_of)
        return -ENOMEM;
    int over_something = !replay->volume->nothing_below;
    int status = over_something && onion_log_has_holes(bytes, length, cursor->offset)
                     ? replay_layer(replay, bytes, length, cursor, fault_offset)
                     : replay_log(replay, bytes, length, cursor, fault_offset);
    free(replay->number_of);
    replay->number_of = NULL;
    return status;
}

/* ---- map files ---- */

/* Whether a crash left this file before its header was synced: the header is a part of what it should be, and only the
 * zeros that were written with it stand behind. */
static int is_unborn(const struct onion_volume *volume, const unsigned char *map_id, const unsigned char *bytes,
                     uint64_t length) {
    struct onion_header expected = {.version = ONION_FORMAT_VERSION, .block_size = volume->block_size};
    memcpy(expected.uuid, map_id, ONION_UUID_BYTES);
    for (uint64_t i = ONION_HEADER_BYTES; i < length; i++)
        if (bytes[i])
            return 0;
    return onion_header_is_torn(bytes, length, ONION_MAGIC_MAP, &expected);
}

/* The whole of a map file, its header checked. length_min: bytes that must be there (a sealed layer's), or 0. *torn_header:
 * a file that a crash left before its first flush. */
static int read_map_file(struct onion_volume *volume, int fd, const unsigned char *map_id, uint64_t length_min,
                         unsigned char **bytes, uint64_t *length, int *torn_header) {
    struct stat info;
    *bytes = NULL;
    *torn_header = 0;
    if (fstat(fd, &info))
        return -errno;
    if ((uint64_t)info.st_size < length_min)
        return ONION_E_FORMAT;
    *length = length_min ? length_min : (uint64_t)info.st_size;
    *bytes = malloc(*length + 1);
    if (!*bytes)
        return -ENOMEM;
    int status = onion_pread_all(fd, *bytes, *length, 0);
    struct onion_header header;
    if (status == 0)
        status = onion_header_decode(*bytes, *length, ONION_MAGIC_MAP, &header);
    if ((status == ONION_E_FORMAT || status == ONION_E_CHECKSUM) && !length_min)
        *torn_header = is_unborn(volume, map_id, *bytes, *length);
    if (status == 0 && (header.block_size != volume->block_size || memcmp(header.uuid, map_id, ONION_UUID_BYTES)))
        status = ONION_E_FORMAT;
    return status;
}

static int replay_sealed_map(struct replay *replay, const struct onion_layer_source *source,
                             struct onion_fault_site *site) {
    struct onion_log_cursor cursor = {.offset = ONION_HEADER_BYTES};
    unsigned char *bytes = NULL;
    uint64_t length, fault = 0;
    int torn;
    int fd = open(source->map_path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return site_error(site, source->map_path, 0, -errno);
    int status = read_map_file(replay->volume, fd, source->map_id, source->map_length, &bytes, &length, &torn);
    close(fd);
    if (status == 0)
        status = replay_bytes(replay, bytes, length, &cursor, &fault);
    if (status == ONION_E_TORN)
        status = ONION_E_FORMAT;
    if (status == 0 && (cursor.sequence != source->map_frames || cursor.crc != source->map_crc))
        status = ONION_E_CHECKSUM;
    free(bytes);
    return status < 0 ? site_error(site, source->map_path, fault, status) : 0;
}

int onion_volume_add_layer(struct onion_volume *volume, const struct onion_layer_source *source,
                           struct onion_fault_site *site) {
    struct replay replay = {.volume = volume, .segment_first = volume->segment_count + 1};
    for (uint32_t i = 0; i < source->segment_count; i++) {
        uint32_t number;
        int status = onion_volume_add_segment(volume, source->segments[i].uuid, &number);
        if (status < 0)
            return status;
        status = onion_segment_check(volume->segments[number], source->segments[i].slots);
        if (status < 0)
            return site_error(site, volume->segments[number]->path, 0, status);
    }
    int status = source->map_length ? replay_sealed_map(&replay, source, site) : 0;
    for (uint32_t i = replay.segment_first; i <= volume->segment_count; i++)
        volume->segments[i]->log_number = 0; /* these count for the head's log only */
    volume->nothing_below = 0;
    return status;
}

/* ---- the head ---- */

/* Writes a part of a file again, so that its pages are dirty: where a sync failed, the kernel may have marked them clean although
 * they never reached the disk, and the syncs of an opening would prove nothing. What cannot be read is left to whoever reads
 * it. */
static int write_again(int fd, uint64_t offset, uint64_t length) {
    char *bytes = malloc(AGAIN_BYTES);
    int status = bytes ? 0 : -ENOMEM;
    while (length && status == 0) {
        uint64_t part = length < AGAIN_BYTES ? length : AGAIN_BYTES;
        if (onion_pread_all(fd, bytes, part, offset) == 0)
            status = onion_pwrite_all(fd, bytes, part, offset);
        offset += part, length -= part;
    }
    free(bytes);
    return status;
}

/* An overwrite in place leaves no record, so it is all that the segment holds. */
static int write_segment_again(struct onion_volume *volume, const struct onion_segment *segment) {
    int status = write_again(segment->fd, 0, ONION_HEADER_BYTES);
    uint64_t at = 0;
    struct onion_run run;
    while (status == 0 && onion_map_next(&volume->index, at, volume->index.block_count, &run)) {
        at = run.block_index + run.block_count;
        if (onion_place_is_data(run.place) && onion_place_segment(run.place) == segment->number)
            status = write_again(segment->fd, onion_slot_offset(volume->block_shift, onion_place_slot(run.place)),
                                 run.block_count << volume->block_shift);
    }
    return status;
}

/* What was pending when a process died goes over what its log says. */
static int replay_journal(struct replay *replay, const unsigned char *bytes) {
    struct onion_volume *volume = replay->volume;
    const struct onion_head_log *log = &volume->log;
    struct onion_journal_owner owner = {.frames = log->cursor.sequence, .crc = log->cursor.crc};
    memcpy(owner.map_id, log->map_id, ONION_UUID_BYTES);
    onion_journal_begin_at(volume, &owner);
    int status = onion_journal_find(volume, bytes, log->cursor.offset, replay->segment_first);
    for (size_t i = 0; i < volume->pending.record_count && status == 0; i++) {
        const struct onion_record *record = &volume->pending.records[i];
        onion_place place = record->kind == ONION_RECORD_DATA ? onion_place_make(record->segment, record->slot)
                            : record->kind == ONION_RECORD_ZERO ? ONION_PLACE_ZERO
                                                                : ONION_PLACE_HOLE;
        status = onion_build_put(&volume->build, record->block_index, record->block_count, place);
    }
    return status;
}

/* Opens the head's log and replays it; cuts off a torn frame. A missing file is an empty log. */
static int open_log(struct replay *replay, const struct onion_head_source *source, struct onion_fault_site *site) {
    struct onion_head_log *log = &replay->volume->log;
    log->path = strdup(source->map_path);
    memcpy(log->map_id, source->map_id, ONION_UUID_BYTES);
    log->cursor = (struct onion_log_cursor){.offset = ONION_HEADER_BYTES};
    if (!log->path)
        return -ENOMEM;
    int fd = open(source->map_path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? replay_journal(replay, NULL) : site_error(site, source->map_path, 0, -errno);
    unsigned char *bytes = NULL;
    uint64_t length = 0, fault = 0;
    int torn_header;
    int status = read_map_file(replay->volume, fd, source->map_id, 0, &bytes, &length, &torn_header);
    if (torn_header) { /* made again, by name, at the first flush */
        free(bytes);
        close(fd);
        return unlink(source->map_path) ? site_error(site, source->map_path, 0, -errno) : replay_journal(replay, NULL);
    }
    if (status == 0)
        status = replay_bytes(replay, bytes, length, &log->cursor, &fault);
    if ((status == 0 || status == ONION_E_TORN) && replay->numbers_given > ONION_SEGMENT_LAST - NUMBERS_LEFT_MIN)
        status = ONION_E_FORMAT; /* no log of ours: it would have no numbers for the segments to come */
    if (status == ONION_E_TORN)
        status = ftruncate(fd, (off_t)log->cursor.offset) ? -errno : 0;
    if (status == 0)
        status = replay_journal(replay, bytes);
    free(bytes);
    if (status == 0 && replay->volume->journal.found_poisoned)
        status = write_again(fd, 0, log->cursor.offset);
    if (status == 0)
        status = onion_sync_file(fd); /* BARRIER: opened map */
    if (status < 0) {
        close(fd);
        return site_error(site, source->map_path, fault, status);
    }
    log->fd = fd;
    replay->volume->log_bytes = log->cursor.offset;
    log->cursor.salt = 0; /* drawn anew before the first frame of this opening */
    log->numbers_given = replay->numbers_given;
    return 0;
}

/* Gives the head's segments their numbers; their files are opened when it is known what the log names in them. */
static int add_head_segments(struct onion_volume *volume, const struct onion_head_source *source) {
    for (uint32_t i = 0; i < source->adopted_count + source->own_count; i++) {
        int own = i >= source->adopted_count;
        uint32_t number;
        int status = onion_volume_add_segment(
            volume, own ? source->own[i - source->adopted_count] : source->adopted[i].uuid, &number);
        if (status < 0)
            return status;
        volume->segments[number]->generation = volume->generation;
        volume->segments[number]->own = own;
        if (own && !volume->own)
            volume->own = number;
    }
    return 0;
}

static int open_head_segments(struct onion_volume *volume, const struct onion_head_source *source, uint32_t first,
                              struct onion_fault_site *site) {
    for (uint32_t i = 0; i < source->adopted_count + source->own_count; i++) {
        struct onion_segment *segment = volume->segments[first + i];
        int status = segment->own ? onion_segment_open_own(segment, volume->build.slots_end[segment->number])
                                  : onion_segment_check(segment, source->adopted[i].slots);
        if (status == 0 && segment->fd >= 0 && volume->journal.found_poisoned)
            status = write_segment_again(volume, segment);
        if (status == 0 && segment->fd >= 0)
            status = onion_sync_file(segment->fd); /* BARRIER: opened segment */
        if (status < 0)
            return site_error(site, segment->path, 0, status);
    }
    return 0;
}

int onion_volume_open_head(struct onion_volume *volume, const struct onion_head_source *source,
                           struct onion_fault_site *site) {
    struct replay replay = {.volume = volume, .segment_first = volume->segment_count + 1};
    int status = onion_journal_set_path(volume, source->dirty_path);
    if (status == 0)
        status = add_head_segments(volume, source);
    if (status == 0)
        status = open_log(&replay, source, site);
    if (status == 0 && replay.has_size)
        volume->size_bytes = replay.size_bytes;
    if (status == 0)
        status = onion_build_apply(&volume->build);
    if (status == 0)
        status = open_head_segments(volume, source, replay.segment_first, site);
    if (status == 0)
        status = onion_volume_fold_layers(volume, site);
    if (status == 0)
        status = onion_volume_add_segment(volume, source->spare, &volume->spare);
    if (status == 0)
        status = onion_sync_directory(volume->segments_directory); /* BARRIER: opened segments directory */
    if (status == 0)
        status = onion_sync_directory(volume->layers_directory); /* BARRIER: opened layers directory */
    if (status == 0 && volume->journal.found_poisoned)
        onion_journal_clear_poisoned(volume);
    return status;
}

int onion_volume_fold_layers(struct onion_volume *volume, struct onion_fault_site *site) {
    int status = onion_build_apply(&volume->build);
    if (status == 0)
        status = check_slots(volume, site);
    onion_build_destroy(&volume->build);
    /* From here on others read while we write. */
    volume->index.retire_context = volume;
    volume->index.retire = onion_volume_retire_leaf;
    return status;
}
