/* map_log.c: headers, frames and records; map_log.h has the byte tables.
 *
 * What must hold: nothing outside the given bytes is read, whatever they say; the work is linear in their length; and
 * a log is called torn only where that is what a crash leaves, because the caller cuts off a torn frame for good.
 *
 * A frame can never be found inside the records of another one. A position of a record that could pass for the
 * beginning of a frame (they all lie on multiples of 8) has, where a frame has its salt, the kind, the segment and the
 * reserved field of the record, or the block index of the next one: the top bit is clear in both and set in every
 * salt. Otherwise a guest could choose its blocks so that a torn frame looks like damage. */
#include "layer/map_log.h"

#include <string.h>

#include "base/crc32c.h"

#define HEADER_CRC_OFFSET 4092u
#define HEADER_ZERO_OFFSET 48u
#define FRAME_CRC_OFFSET 28u
#define SALT_MARK (UINT64_C(1) << 63)

/* How often the search behind a bad frame computes a CRC. Of an honest log the first or the second position
 * that looks like a frame is one. */
#define SEARCH_ATTEMPTS_MAX 1024u

_Static_assert(ONION_HEADER_BYTES % 8 == 0 && ONION_FRAME_HEADER_BYTES % 8 == 0 && ONION_RECORD_BYTES % 8 == 0,
               "frames begin on multiples of 8, which the search behind a bad one relies on");

static void put16(unsigned char *p, uint16_t value) {
    p[0] = (unsigned char)value;
    p[1] = (unsigned char)(value >> 8);
}

static void put32(unsigned char *p, uint32_t value) {
    put16(p, (uint16_t)value);
    put16(p + 2, (uint16_t)(value >> 16));
}

static void put64(unsigned char *p, uint64_t value) {
    put32(p, (uint32_t)value);
    put32(p + 4, (uint32_t)(value >> 32));
}

static uint16_t get16(const unsigned char *p) { return (uint16_t)(p[0] | p[1] << 8); }

static uint32_t get32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get64(const unsigned char *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }

static int all_zero(const unsigned char *p, size_t length) {
    unsigned char any = 0;
    for (size_t i = 0; i < length; i++)
        any |= p[i];
    return any == 0;
}

static int block_size_is_possible(uint32_t block_size) {
    return block_size >= 1u << ONION_BLOCK_SHIFT_MIN && block_size <= 1u << ONION_BLOCK_SHIFT_MAX &&
           (block_size & (block_size - 1)) == 0;
}

/* ---- headers ---- */

void onion_header_encode(const struct onion_header *header, const char *magic, unsigned char *out) {
    memset(out, 0, ONION_HEADER_BYTES);
    memcpy(out, magic, 8);
    put32(out + 8, header->version);
    put32(out + 12, header->block_size);
    put64(out + 16, header->incompatible);
    put64(out + 24, header->compatible);
    memcpy(out + 32, header->uuid, ONION_UUID_BYTES);
    put32(out + HEADER_CRC_OFFSET, onion_crc32c(0, out, HEADER_CRC_OFFSET));
}

/* A version or an incompatible feature may change all that follows it but the place of the CRC: so the CRC is checked
 * first, the version next, and only then the rest. */
int onion_header_decode(const unsigned char *bytes, size_t length, const char *magic, struct onion_header *out) {
    if (length < ONION_HEADER_BYTES || memcmp(bytes, magic, 8) != 0)
        return ONION_E_FORMAT;
    if (get32(bytes + HEADER_CRC_OFFSET) != onion_crc32c(0, bytes, HEADER_CRC_OFFSET))
        return ONION_E_CHECKSUM;
    if (get32(bytes + 8) != ONION_FORMAT_VERSION || get64(bytes + 16) != 0)
        return ONION_E_VERSION;
    if (!block_size_is_possible(get32(bytes + 12)) ||
        !all_zero(bytes + HEADER_ZERO_OFFSET, HEADER_CRC_OFFSET - HEADER_ZERO_OFFSET))
        return ONION_E_FORMAT;
    out->version = get32(bytes + 8);
    out->block_size = get32(bytes + 12);
    out->incompatible = get64(bytes + 16);
    out->compatible = get64(bytes + 24);
    memcpy(out->uuid, bytes + 32, ONION_UUID_BYTES);
    return 0;
}

int onion_header_is_torn(const unsigned char *bytes, size_t length, const char *magic,
                         const struct onion_header *expected) {
    struct onion_header header = *expected;
    unsigned char whole[ONION_HEADER_BYTES];
    size_t present = length < ONION_HEADER_BYTES ? length : ONION_HEADER_BYTES;
    for (header.compatible = 0; header.compatible <= ONION_FEATURE_WIPE_ZERO; header.compatible++) {
        size_t i = 0;
        onion_header_encode(&header, magic, whole);
        while (i < present && (bytes[i] == 0 || bytes[i] == whole[i]))
            i++;
        if (i == present)
            return length < ONION_HEADER_BYTES || memcmp(bytes, whole, ONION_HEADER_BYTES) != 0;
    }
    return 0;
}

/* ---- records ---- */

struct onion_record onion_record_segment(uint16_t number, const unsigned char uuid[ONION_UUID_BYTES]) {
    struct onion_record record = {.kind = ONION_RECORD_SEGMENT, .segment = number};
    record.block_index = get64(uuid);
    record.block_count = get32(uuid + 8);
    record.slot = get32(uuid + 12);
    return record;
}

void onion_record_uuid(const struct onion_record *record, unsigned char uuid[ONION_UUID_BYTES]) {
    put64(uuid, record->block_index);
    put32(uuid + 8, record->block_count);
    put32(uuid + 12, record->slot);
}

static void record_encode(const struct onion_record *record, unsigned char *out) {
    put64(out, record->block_index);
    put32(out + 8, record->block_count);
    put32(out + 12, record->slot);
    put16(out + 16, record->kind);
    put16(out + 18, record->segment);
    put32(out + 20, 0);
}

static int blocks_are_inside(const struct onion_record *record, uint64_t block_limit) {
    return record->block_count > 0 && record->block_count <= block_limit &&
           record->block_index <= block_limit - record->block_count;
}

static int segment_is_possible(const struct onion_record *record) {
    return record->segment >= ONION_SEGMENT_FIRST && record->segment <= ONION_SEGMENT_LAST;
}

static int slots_are_possible(const struct onion_record *record) {
    return (uint64_t)record->slot + record->block_count - 1 <= ONION_SLOT_LAST;
}

int onion_record_is_sound(const struct onion_record *record, uint64_t block_limit) {
    switch (record->kind) {
    case ONION_RECORD_HOLE:
    case ONION_RECORD_ZERO:
        return blocks_are_inside(record, block_limit) && record->slot == 0 && record->segment == 0;
    case ONION_RECORD_DATA:
        return blocks_are_inside(record, block_limit) && segment_is_possible(record) && slots_are_possible(record);
    case ONION_RECORD_SEGMENT:
        return segment_is_possible(record);
    case ONION_RECORD_SIZE:
        return record->block_index <= ONION_VOLUME_BYTES_MAX && record->block_count == 0 && record->slot == 0 &&
               record->segment == 0;
    default:
        return 0;
    }
}

int onion_record_decode(const unsigned char *bytes, uint64_t block_limit, struct onion_record *out) {
    struct onion_record record = {
        .block_index = get64(bytes),
        .block_count = get32(bytes + 8),
        .slot = get32(bytes + 12),
        .kind = get16(bytes + 16),
        .segment = get16(bytes + 18),
    };
    if (get32(bytes + 20) != 0 || !onion_record_is_sound(&record, block_limit))
        return ONION_E_FORMAT;
    *out = record;
    return 0;
}

/* ---- frames ---- */

size_t onion_frame_bytes(size_t record_count) { return ONION_FRAME_HEADER_BYTES + record_count * ONION_RECORD_BYTES; }

static uint32_t frame_crc(const unsigned char *frame, uint64_t frame_bytes) {
    static const unsigned char zero[4];
    uint32_t crc = onion_crc32c(0, frame, FRAME_CRC_OFFSET);
    crc = onion_crc32c(crc, zero, sizeof zero);
    return onion_crc32c(crc, frame + ONION_FRAME_HEADER_BYTES, (size_t)(frame_bytes - ONION_FRAME_HEADER_BYTES));
}

uint32_t onion_frame_encode(const struct onion_record *records, uint32_t record_count, uint64_t sequence, uint64_t salt,
                            uint32_t previous_crc, unsigned char *out) {
    put32(out, ONION_FRAME_MAGIC);
    put32(out + 4, record_count);
    put64(out + 8, sequence);
    put64(out + 16, salt | SALT_MARK);
    put32(out + 24, previous_crc);
    for (size_t i = 0; i < record_count; i++)
        record_encode(&records[i], out + onion_frame_bytes(i));
    uint32_t crc = frame_crc(out, onion_frame_bytes(record_count));
    put32(out + FRAME_CRC_OFFSET, crc);
    return crc;
}

/* Bytes of the frame whose header seems to stand at `frame`, by its own word; 0 where none can, within `room`. */
static uint64_t frame_stated_bytes(const unsigned char *frame, uint64_t room) {
    if (room < ONION_FRAME_HEADER_BYTES || get32(frame) != ONION_FRAME_MAGIC || !(get64(frame + 16) & SALT_MARK))
        return 0;
    uint64_t frame_bytes = ONION_FRAME_HEADER_BYTES + (uint64_t)get32(frame + 4) * ONION_RECORD_BYTES;
    return frame_bytes <= room ? frame_bytes : 0;
}

/* Is there, behind the bad frame at cursor->offset, a whole frame that this log can hold: 1, or 0. A later
 * sequence number can have grown only by as many frames as fit in between. The bytes under CRC are limited
 * to twice those searched, and the attempts too: what asks for more was made to, and is no torn frame. */
static int later_frame_exists(const unsigned char *bytes, uint64_t length, const struct onion_log_cursor *cursor) {
    uint64_t expected = cursor->sequence + 1;
    uint64_t crc_bytes_left = 2 * (length - cursor->offset);
    uint32_t attempts_left = SEARCH_ATTEMPTS_MAX;
    for (uint64_t at = cursor->offset + 8; length - at >= ONION_FRAME_HEADER_BYTES; at += 8) {
        uint64_t frame_bytes = frame_stated_bytes(bytes + at, length - at);
        if (frame_bytes == 0)
            continue;
        uint64_t sequence = get64(bytes + at + 8);
        uint64_t frames_between = (at - cursor->offset) / ONION_FRAME_HEADER_BYTES + 1;
        if (sequence <= expected || sequence - expected > frames_between)
            continue;
        if (attempts_left == 0 || frame_bytes > crc_bytes_left)
            return 1;
        attempts_left--;
        crc_bytes_left -= frame_bytes;
        if (get32(bytes + at + FRAME_CRC_OFFSET) == frame_crc(bytes + at, frame_bytes))
            return 1;
    }
    return 0;
}

int onion_log_next(const unsigned char *bytes, uint64_t length, struct onion_log_cursor *cursor,
                   const unsigned char **records, uint32_t *record_count) {
    if (cursor->offset > length || cursor->offset % 8 != 0)
        return ONION_E_FORMAT;
    uint64_t room = length - cursor->offset;
    if (room == 0)
        return 0;
    const unsigned char *frame = bytes + cursor->offset;
    uint64_t frame_bytes = frame_stated_bytes(frame, room);
    if (frame_bytes == 0)
        return room > ONION_FRAME_HEADER_BYTES && later_frame_exists(bytes, length, cursor) ? ONION_E_FORMAT
                                                                                            : ONION_E_TORN;
    uint32_t crc = get32(frame + FRAME_CRC_OFFSET);
    if (crc != frame_crc(frame, frame_bytes))
        return later_frame_exists(bytes, length, cursor) ? ONION_E_CHECKSUM : ONION_E_TORN;
    /* It holds but does not follow: no crash puts another frame's bytes here. */
    if (get64(frame + 8) != cursor->sequence + 1 || get32(frame + 24) != cursor->crc)
        return ONION_E_FORMAT;
    cursor->offset += frame_bytes;
    cursor->sequence += 1;
    cursor->salt = get64(frame + 16);
    cursor->crc = crc;
    *records = frame + ONION_FRAME_HEADER_BYTES;
    *record_count = get32(frame + 4);
    return 1;
}

int onion_log_passes(const unsigned char *bytes, uint64_t end, uint64_t frames, uint32_t crc) {
    uint64_t offset = ONION_HEADER_BYTES, frame_bytes;
    for (uint64_t at = 1; at <= frames; at++, offset += frame_bytes) {
        frame_bytes = offset < end ? frame_stated_bytes(bytes + offset, end - offset) : 0;
        if (!frame_bytes)
            return 0;
        if (at == frames)
            return get64(bytes + offset + 8) == frames && get32(bytes + offset + FRAME_CRC_OFFSET) == crc;
    }
    return 1;
}

int onion_log_has_holes(const unsigned char *bytes, uint64_t length, uint64_t offset) {
    uint64_t frame_bytes;
    while (offset < length && (frame_bytes = frame_stated_bytes(bytes + offset, length - offset))) {
        const unsigned char *record = bytes + offset + ONION_FRAME_HEADER_BYTES;
        for (offset += frame_bytes; record < bytes + offset; record += ONION_RECORD_BYTES)
            if (get16(record + 16) == ONION_RECORD_HOLE)
                return 1;
    }
    return 0;
}

uint64_t onion_log_frame_end(const unsigned char *bytes, uint64_t length, uint64_t frame, uint32_t *crc) {
    uint64_t offset = ONION_HEADER_BYTES, frame_bytes;
    for (uint64_t i = 1; offset < length && (frame_bytes = frame_stated_bytes(bytes + offset, length - offset)); i++) {
        *crc = get32(bytes + offset + FRAME_CRC_OFFSET);
        offset += frame_bytes;
        if (i == frame)
            return offset;
    }
    return 0;
}

/* The largest value that `measure` finds in a record. */
static uint64_t largest(const unsigned char *bytes, uint64_t length,
                        uint64_t (*measure)(const unsigned char *, uint32_t), uint32_t block_shift) {
    uint64_t offset = ONION_HEADER_BYTES, frame_bytes, most = 0;
    while (offset < length && (frame_bytes = frame_stated_bytes(bytes + offset, length - offset))) {
        const unsigned char *record = bytes + offset + ONION_FRAME_HEADER_BYTES;
        for (offset += frame_bytes; record < bytes + offset; record += ONION_RECORD_BYTES) {
            uint64_t found = measure(record, block_shift);
            most = found > most ? found : most;
        }
    }
    return most;
}

static uint64_t bytes_of_size(const unsigned char *record, uint32_t block_shift) {
    (void)block_shift;
    return get16(record + 16) == ONION_RECORD_SIZE ? get64(record) : 0;
}

static uint64_t blocks_of_record(const unsigned char *record, uint32_t block_shift) {
    uint64_t most = ONION_VOLUME_BYTES_MAX >> block_shift, mask = ((uint64_t)1 << block_shift) - 1,
             first = get64(record);
    switch (get16(record + 16)) {
    case ONION_RECORD_SEGMENT:
        return 0;
    case ONION_RECORD_SIZE:
        return first < ONION_VOLUME_BYTES_MAX ? (first + mask) >> block_shift : most;
    default:
        return first < most && get32(record + 8) < most - first ? first + get32(record + 8) : most;
    }
}

uint64_t onion_log_blocks(const unsigned char *bytes, uint64_t length, uint32_t block_shift) {
    return largest(bytes, length, blocks_of_record, block_shift);
}

uint64_t onion_log_size_bytes(const unsigned char *bytes, uint64_t length) {
    uint64_t size = largest(bytes, length, bytes_of_size, 0);
    return size < ONION_VOLUME_BYTES_MAX ? size : ONION_VOLUME_BYTES_MAX;
}
