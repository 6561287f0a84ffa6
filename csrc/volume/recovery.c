/* recovery.c: opens the files of a volume, and makes the index from them. See volume.h for what must hold.
 *
 * The logs of all layers are replayed, lowest first, into one list of changes, from which the index is made in one step
 * (index/bulk_build.h). HOLE in a log means "look below". So a log with HOLE records that stands over something is
 * first made into a map of its own, and the runs of this map are put into the list. onionskin writes such records only
 * into the lowest layer of a volume without a base. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/store_file.h"
#include "layer/layer_map.h"
#include "volume/internal.h"

#define MAPPINGS_BESIDE 6      /* for the spare, the base, the index, and mappings that are being replaced */
#define NUMBERS_LEFT_MIN 256   /* a head's log must have so many numbers left for later segments */
#define AGAIN_BYTES (1u << 20) /* the largest part that is read and written again at a time */

/* ---- replaying a log ---- */

/* The state of a log that is being replayed. */
struct replay {
    struct onion_volume *volume;
    uint32_t segment_first; /* the layer's segments have this number in the index, or a higher one */
    uint16_t *number_of;    /* by number in the log: the number in the index, or 0 if there is none yet */
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
    /* A segment that the map names must be in the catalog's list, and a number never means two segments. */
    if (number < replay->segment_first || (*known && *known != number))
        return ONION_E_FORMAT;
    if (*known)
        return 0;
    *known = (uint16_t)number;
    if (volume->segments[number]->log_number) /* a segment never has two numbers */
        return ONION_E_FORMAT;
    volume->segments[number]->log_number = record->segment;
    if (record->segment > replay->numbers_given)
        replay->numbers_given = record->segment;
    return 0;
}

static int replay_record(struct replay *replay, const struct onion_record *record) {
    onion_location location;
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
        location = onion_location_make(replay->number_of[record->segment], record->slot);
        break;
    default:
        location = record->kind == ONION_RECORD_ZERO ? ONION_LOCATION_ZERO : ONION_LOCATION_HOLE;
    }
    return onion_build_put(&replay->volume->build, record->block_index, record->block_count, location);
}

/* Puts all whole frames into the build. Returns like onion_layer_load: 0 at a clean end, ONION_E_TORN, or another
 * error. */
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

/* Replays only the SEGMENT records between two offsets, whose frames are known to be sound. */
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
        onion_location location = run.location;
        if (onion_location_is_data(location))
            location = onion_location_make(index_of[onion_location_segment(location)], onion_location_slot(location));
        status = onion_build_put(&volume->build, run.block_index, run.block_count, location);
    }
    free(index_of);
    return status;
}

/* Does the same as replay_log for a log with HOLE records that stands over something. */
static int replay_layer(struct replay *replay, const unsigned char *bytes, uint64_t length,
                        struct onion_log_cursor *cursor, uint64_t *fault_offset) {
    struct onion_volume *volume = replay->volume;
    struct onion_layer layer;
    uint64_t first = cursor->offset;
    int status = onion_layer_init(&layer, onion_log_blocks(bytes, length, volume->block_shift), volume->block_shift);
    int end = status == 0 ? onion_layer_load(&layer, bytes, length, cursor, fault_offset) : status;
    status = end == ONION_E_TORN ? 0 : end;
    if (status == 0) /* a head goes on with the log's own numbers of segments, so they are replayed too */
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

/* Returns whether a crash left this file before its header was synced. Then the header is a part of the expected one,
 * and only the zeros that were written with it follow. */
static int is_unborn(const struct onion_volume *volume, const unsigned char *map_id, const unsigned char *bytes,
                     uint64_t length) {
    struct onion_header expected = {.version = ONION_FORMAT_VERSION, .block_size = volume->block_size};
    memcpy(expected.uuid, map_id, ONION_UUID_BYTES);
    for (uint64_t i = ONION_HEADER_BYTES; i < length; i++)
        if (bytes[i])
            return 0;
    return onion_header_is_torn(bytes, length, ONION_MAGIC_MAP, &expected);
}

static int replay_sealed_map(struct replay *replay, const struct onion_layer_source *source) {
    struct onion_log_cursor cursor = {.offset = ONION_HEADER_BYTES};
    struct onion_map_bytes map = {0};
    uint64_t fault = 0;
    int status = onion_volume_read_sealed_map(replay->volume, source, &map, &fault);
    if (status == 0)
        status = replay_bytes(replay, map.bytes, map.length, &cursor, &fault);
    status = onion_volume_check_sealed_end(source, &cursor, status);
    onion_map_bytes_free(&map);
    return onion_site_set(status, source->map_path, fault);
}

int onion_volume_add_layer(struct onion_volume *volume, const struct onion_layer_source *source) {
    struct replay replay = {.volume = volume, .segment_first = volume->segment_count + 1};
    for (uint32_t i = 0; i < source->segment_count; i++) {
        uint32_t number;
        int status = onion_volume_add_segment(volume, source->segments[i].uuid, &number);
        if (status == 0)
            status = onion_segment_check(volume->segments[number], source->segments[i].slots);
        if (status < 0)
            return status;
    }
    int status = source->map_length ? replay_sealed_map(&replay, source) : 0;
    for (uint32_t i = replay.segment_first; i <= volume->segment_count; i++)
        volume->segments[i]->log_number = 0; /* it is used for the head's log only */
    volume->nothing_below = 0;
    return status;
}

/* ---- the head ---- */

/* Checks that a log, which was replayed up to its last whole frame, passes through the point that the catalog knows. */
static int check_known(const struct onion_head_source *source, const struct onion_map_bytes *map,
                       const struct onion_log_cursor *end, uint64_t *fault) {
    uint32_t crc = 0;
    uint64_t offset =
        source->known_frames ? onion_log_frame_end(map->bytes, map->length, source->known_frames, &crc) : 0;
    if (end->sequence < source->known_frames) {
        *fault = end->offset;
        return ONION_E_CUT_LOG;
    }
    *fault = ONION_HEADER_BYTES;
    return source->known_frames && (offset != source->known_length || crc != source->known_crc) ? ONION_E_CHECKSUM : 0;
}

/* Checks and replays the bytes of a head's log. Sets *torn if a crash left a part of a frame, or of the header, at the
 * cursor. */
static int replay_head(struct replay *replay, const struct onion_head_source *source, const struct onion_map_bytes *map,
                       int *torn, uint64_t *fault) {
    struct onion_volume *volume = replay->volume;
    struct onion_log_cursor *cursor = &volume->log.cursor;
    *torn = 0;
    *fault = 0;
    int status = onion_volume_check_map_header(volume, source->map_id, map);
    if ((status == ONION_E_FORMAT || status == ONION_E_CHECKSUM) && !source->known_frames &&
        is_unborn(volume, source->map_id, map->bytes, map->length)) {
        cursor->offset = 0;
        *torn = 1;
        return 0;
    }
    if (status == 0) /* blocks past the log's size are never shown: a disk that grows over them hides them first */
        status = onion_volume_grow_index(volume, onion_log_size_bytes(map->bytes, map->length));
    if (status == 0)
        status = replay_bytes(replay, map->bytes, map->length, cursor, fault);
    if (status == ONION_E_TORN) {
        *torn = 1;
        status = 0;
    }
    if (status == 0 && replay->numbers_given > ONION_SEGMENT_LAST - NUMBERS_LEFT_MIN)
        status = ONION_E_FORMAT; /* onionskin wrote no such log: it leaves numbers for later segments */
    return status == 0 ? check_known(source, map, cursor, fault) : status;
}

/* Makes the log durable as it was read, without a torn frame. If not even the header is whole, the file is removed, and
 * the first flush makes it again. */
static int make_log_durable(struct onion_head_log *log, int fd, int torn) {
    if (torn && log->cursor.offset == 0) {
        int status = unlink(log->path) ? -errno : 0;
        close(fd);
        log->cursor.offset = ONION_HEADER_BYTES;
        return status;
    }
    int status = torn ? onion_truncate(fd, log->cursor.offset) : 0;
    if (status == 0)
        status = onion_sync_file(fd); /* BARRIER: opened map */
    if (status == 0)
        log->fd = fd;
    else
        close(fd);
    return status;
}

/* Writes a part of a file again, so that its pages are dirty. After a failed sync, the kernel may have marked pages
 * clean although they never reached the disk, and then the syncs of an opening would prove nothing. A part that cannot
 * be read is skipped, and a later read of it fails. */
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

/* Writes everything that a segment holds again, because an overwrite in place leaves no record. */
static int write_segment_again(struct onion_volume *volume, const struct onion_segment *segment) {
    int status = write_again(segment->fd, 0, ONION_HEADER_BYTES);
    uint64_t at = 0;
    struct onion_run run;
    while (status == 0 && onion_map_next(&volume->index, at, volume->index.block_count, &run)) {
        at = run.block_index + run.block_count;
        if (onion_location_is_data(run.location) && onion_location_segment(run.location) == segment->number)
            status = write_again(segment->fd, onion_slot_offset(volume->block_shift, onion_location_slot(run.location)),
                                 run.block_count << volume->block_shift);
    }
    return status;
}

/* Replays the dirty records that a process left when it died, after its log. bytes NULL: there is no log. */
static int replay_journal(struct replay *replay, const unsigned char *bytes) {
    struct onion_volume *volume = replay->volume;
    const struct onion_head_log *log = &volume->log;
    struct onion_journal_owner owner = {.frames = log->cursor.sequence, .crc = log->cursor.crc};
    memcpy(owner.map_id, log->map_id, ONION_UUID_BYTES);
    onion_journal_begin_at(volume, &owner);
    int status = onion_journal_find(volume, bytes, log->cursor.offset, replay->segment_first);
    for (size_t i = 0; i < volume->dirty_records.record_count && status == 0; i++) {
        const struct onion_record *record = &volume->dirty_records.records[i];
        onion_location location = record->kind == ONION_RECORD_DATA ? onion_location_make(record->segment, record->slot)
                                  : record->kind == ONION_RECORD_ZERO ? ONION_LOCATION_ZERO
                                                                      : ONION_LOCATION_HOLE;
        status = onion_build_put(&volume->build, record->block_index, record->block_count, location);
    }
    return status;
}

/* Opens the head's log and replays it. A missing file is an empty log, unless the catalog knows a frame of it. */
static int open_log(struct replay *replay, const struct onion_head_source *source, int to_read) {
    struct onion_head_log *log = &replay->volume->log;
    struct onion_map_bytes map = {0};
    uint64_t fault = 0;
    int torn = 0;
    log->path = strdup(source->map_path);
    memcpy(log->map_id, source->map_id, ONION_UUID_BYTES);
    log->cursor = (struct onion_log_cursor){.offset = ONION_HEADER_BYTES};
    if (!log->path)
        return -ENOMEM;
    int fd = onion_open_file(source->map_path, to_read ? O_RDONLY : O_RDWR);
    if (fd == -ENOENT)
        return source->known_frames ? onion_site_set(ONION_E_CUT_LOG, source->map_path, 0)
                                    : replay_journal(replay, NULL);
    if (fd < 0)
        return onion_site_set(fd, source->map_path, 0);
    int status = onion_map_bytes_read(fd, &map, &fault);
    if (status == 0)
        status = replay_head(replay, source, &map, &torn, &fault);
    if (status == 0)
        status = replay_journal(replay, log->cursor.offset ? map.bytes : NULL);
    onion_map_bytes_free(&map);
    if (status == 0 && !to_read && replay->volume->journal.found_poisoned)
        status = write_again(fd, 0, log->cursor.offset);
    if (status < 0 || to_read)
        close(fd);
    else
        status = make_log_durable(log, fd, torn);
    if (status < 0)
        return onion_site_note(status, source->map_path, fault);
    replay->volume->log_bytes = log->cursor.offset;
    log->cursor.salt = 0; /* a new one is drawn before the first frame of this opening */
    log->numbers_given = replay->numbers_given;
    return 0;
}

/* Gives the head's segments their numbers. Their files are opened after the log was replayed, because it tells which
 * slots it names. */
static int add_head_segments(struct onion_volume *volume, const struct onion_head_source *source) {
    for (uint32_t i = 0; i < source->inherited_count + source->own_count; i++) {
        int own = i >= source->inherited_count;
        uint32_t number;
        int status = onion_volume_add_segment(
            volume, own ? source->own[i - source->inherited_count] : source->inherited[i].uuid, &number);
        if (status < 0)
            return status;
        volume->segments[number]->generation = volume->generation;
        volume->segments[number]->own = own;
        if (own && !volume->own)
            volume->own = number;
    }
    return 0;
}

static int open_head_segments(struct onion_volume *volume, const struct onion_head_source *source, uint32_t first) {
    for (uint32_t i = 0; i < source->inherited_count + source->own_count; i++) {
        struct onion_segment *segment = volume->segments[first + i];
        int status = segment->own ? onion_segment_open_own(segment, volume->build.slots_end[segment->number])
                                  : onion_segment_check(segment, source->inherited[i].slots);
        if (status == 0 && segment->fd >= 0 && volume->journal.found_poisoned)
            status = write_segment_again(volume, segment);
        if (status == 0 && segment->fd >= 0)
            status = onion_sync_file(segment->fd); /* BARRIER: opened segment */
        if (status < 0)
            return onion_site_note(status, segment->path, 0);
    }
    return 0;
}

/* Treats the segments that the head made like those of a sealed layer. So they need no descriptor, and are mapped up to
 * their present end. */
static int check_head_segments(struct onion_volume *volume, const struct onion_head_source *source, uint32_t first) {
    int status = 0;
    for (uint32_t i = 0; i < source->inherited_count + source->own_count && status == 0; i++) {
        struct onion_segment *segment = volume->segments[first + i];
        status = segment->own ? onion_segment_check_own(segment, volume->build.slots_end[segment->number])
                              : onion_segment_check(segment, source->inherited[i].slots);
        segment->own = 0;
    }
    volume->own = 0;
    return status;
}

/* Gives the head's segments their numbers, and replays the head's log into the index. */
static int replay_all(struct replay *replay, const struct onion_head_source *source, int to_read) {
    struct onion_volume *volume = replay->volume;
    int status = add_head_segments(volume, source);
    if (status == 0)
        status = open_log(replay, source, to_read);
    if (status == 0 && replay->has_size)
        volume->size_bytes = replay->size_bytes;
    return status < 0 ? status : onion_build_apply(&volume->build);
}

/* Whether the head has files. A process that made them may have died before their names were durable. */
static int has_files(const struct onion_volume *volume, uint32_t first) {
    int found = volume->log.fd >= 0;
    for (uint32_t i = first; i <= volume->segment_count && !found; i++)
        found = volume->segments[i]->fd >= 0;
    return found;
}

static int sync_directories(const struct onion_volume *volume) {
    const char *path = volume->segments_directory;
    int status = onion_sync_directory(volume->segments_directory); /* BARRIER: opened segments directory */
    if (status == 0) {
        path = volume->layers_directory;
        status = onion_sync_directory(volume->layers_directory); /* BARRIER: opened layers directory */
    }
    return onion_site_set(status, path, 0);
}

int onion_volume_open_head(struct onion_volume *volume, const struct onion_head_source *source) {
    struct replay replay = {.volume = volume, .segment_first = volume->segment_count + 1};
    int status = onion_journal_set_path(volume, source->dirty_path);
    if (status == 0)
        status = replay_all(&replay, source, 0);
    if (status == 0)
        status = open_head_segments(volume, source, replay.segment_first);
    if (status == 0)
        status = onion_volume_fold_layers(volume);
    if (status == 0)
        status = onion_volume_add_segment(volume, source->spare, &volume->spare);
    if (status == 0 && has_files(volume, replay.segment_first))
        status = sync_directories(volume);
    if (status == 0 && volume->journal.found_poisoned)
        onion_journal_clear_poisoned(volume);
    return status;
}

int onion_volume_open_head_to_read(struct onion_volume *volume, const struct onion_head_source *source) {
    struct replay replay = {.volume = volume, .segment_first = volume->segment_count + 1};
    if (volume->writable)
        return -EINVAL;
    int status = onion_journal_set_path(volume, source->dirty_path);
    if (status == 0)
        status = replay_all(&replay, source, 1);
    onion_journal_leave_found(volume);
    if (status == 0)
        status = check_head_segments(volume, source, replay.segment_first);
    return status < 0 ? status : onion_volume_fold_layers(volume);
}

/* ---- the index ---- */

/* Checks that no slot that the index names lies behind the end of its file. */
static int check_slots(const struct onion_volume *volume) {
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        const struct onion_segment *segment = volume->segments[i];
        if (volume->build.slots_end[i] > segment->next_slot)
            return onion_site_set(ONION_E_FORMAT, segment->path,
                                  onion_slot_offset(volume->block_shift, segment->next_slot));
    }
    return 0;
}

int onion_volume_fold_layers(struct onion_volume *volume) {
    int status = onion_build_apply(&volume->build);
    if (status == 0)
        status = check_slots(volume);
    if (status == 0) /* one for each file that may be read, and more: a mapping that is replaced stays for a while */
        status = onion_volume_take_mappings(volume, volume->segment_count + MAPPINGS_BESIDE);
    onion_build_destroy(&volume->build);
    /* From here on, other threads may read while one writes. */
    volume->index.retire_context = volume;
    volume->index.retire = onion_volume_retire_leaf;
    return status;
}
