/* map_log.h: the bytes of file headers and of the map log; pure functions over (pointer, length), no I/O.
 *
 * All integers are little-endian. Every file of a store begins with a header of 4,096 bytes:
 *
 *   offset size
 *        0    8  magic: "ONIONSEG" or "ONIONMAP"
 *        8    4  version: 1
 *       12    4  block size in bytes (of the volume)
 *       16    8  incompatible feature bits: a reader that does not know one of them must refuse the file
 *       24    8  compatible feature bits: bit 0 = policy `zero`, wipe this file before its space is freed
 *       32   16  UUID: the id of the segment or of the map, as in the catalog
 *       48   16  reserved, zero
 *       64 4028  zero
 *     4092    4  CRC32C of bytes 0 to 4091
 *
 * A map log goes on with frames, one for each flush that changed the map:
 *
 *        0    4  magic: 0x4d52464f ("OFRM")
 *        4    4  number of records
 *        8    8  sequence: 1 for the first frame of the file, one more for each that follows
 *       16    8  salt: random, drawn each time the log is opened for writing; the top bit is always set
 *                (onion_frame_encode sets it), so that no bytes of records can pass for a frame
 *       24    4  CRC32C stored in the frame before (0 in the first): frames are chained
 *       28    4  CRC32C of this frame with this field taken as zero
 *       32 24*n  records
 *
 * and a record is
 *
 *        0    8  block index            (SEGMENT: bytes 0 to 7 of its UUID; SIZE: size in bytes)
 *        8    4  block count            (SEGMENT: bytes 8 to 11; SIZE: zero)
 *       12    4  slot of the first block (SEGMENT: bytes 12 to 15; else zero unless DATA)
 *       16    2  kind
 *       18    2  segment: the number that a SEGMENT record of this file gave it (DATA and SEGMENT; else zero)
 *       20    4  reserved, zero
 *
 * Records apply in order, a later one over an earlier one. Nothing of a frame counts unless its CRC holds. */
#ifndef ONIONSKIN_LAYER_MAP_LOG_H
#define ONIONSKIN_LAYER_MAP_LOG_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "index/blockmap.h"

#define ONION_HEADER_BYTES 4096u
#define ONION_FORMAT_VERSION 1u
#define ONION_MAGIC_SEGMENT "ONIONSEG"
#define ONION_MAGIC_MAP "ONIONMAP"
#define ONION_FEATURE_WIPE_ZERO 1u
#define ONION_FRAME_MAGIC 0x4d52464fu
#define ONION_FRAME_HEADER_BYTES 32u
#define ONION_RECORD_BYTES 24u
#define ONION_UUID_BYTES 16

#define ONION_VOLUME_BYTES_MAX (1ull << 46) /* 64 TiB: no SIZE record names more */

struct onion_header {
    uint32_t version;
    uint32_t block_size;
    uint64_t incompatible;
    uint64_t compatible;
    unsigned char uuid[ONION_UUID_BYTES];
};

enum onion_record_kind {
    ONION_RECORD_HOLE = 1,    /* blocks: look below */
    ONION_RECORD_DATA = 2,    /* blocks: in consecutive slots of a segment */
    ONION_RECORD_ZERO = 3,    /* blocks: read zero */
    ONION_RECORD_SEGMENT = 4, /* gives a segment's UUID a number; comes before the first DATA record that uses it */
    ONION_RECORD_SIZE = 5     /* the layer's size in bytes from here on */
};

struct onion_record {
    uint64_t block_index;
    uint32_t block_count;
    uint32_t slot;
    uint16_t kind;
    uint16_t segment;
};

/* A record with a UUID in it, and its UUID. */
struct onion_record onion_record_segment(uint16_t number, const unsigned char uuid[ONION_UUID_BYTES]);
void onion_record_uuid(const struct onion_record *record, unsigned char uuid[ONION_UUID_BYTES]);

/* Writes ONION_HEADER_BYTES bytes. magic is one of the two above. */
void onion_header_encode(const struct onion_header *header, const char *magic, unsigned char *out);
/* Reads them. ONION_E_FORMAT (too short, another magic, impossible block size, bytes that should be zero are not),
 * ONION_E_CHECKSUM, ONION_E_VERSION (version or incompatible bits). *out is set only on 0. */
int onion_header_decode(const unsigned char *bytes, size_t length, const char *magic, struct onion_header *out);

/* Whether the bytes are what a crash leaves of a header that was written but never synced: each byte is zero or
 * that of `expected`, whatever its compatible bits, and some are missing or differ. 1 or 0. The caller must also
 * check that no frame stands behind it. */
int onion_header_is_torn(const unsigned char *bytes, size_t length, const char *magic,
                         const struct onion_header *expected);

/* Bytes that a frame of record_count records takes. */
size_t onion_frame_bytes(size_t record_count);
/* Writes one frame to out (onion_frame_bytes(record_count) bytes) and returns its CRC, which the next one chains. */
uint32_t onion_frame_encode(const struct onion_record *records, uint32_t record_count, uint64_t sequence, uint64_t salt,
                            uint32_t previous_crc, unsigned char *out);

/* Where a reader of a log stands. Zeroed to begin, with offset = ONION_HEADER_BYTES. After each frame offset is its
 * end, sequence its number (the count of frames so far), crc its CRC. */
struct onion_log_cursor {
    uint64_t offset;
    uint64_t sequence;
    uint64_t salt;
    uint32_t crc;
};

/* Looks at the frame at cursor->offset of a whole file of `length` bytes. Returns
 *   1                 a frame that holds: *records points at its first encoded record, *record_count how many;
 *                     the cursor stands behind it
 *   0                 the log ends cleanly here
 *   ONION_E_TORN      what stands here is not a whole frame and nothing behind it is a frame of this log: what a
 *                     crash leaves of the one unsynced frame. The cursor stays.
 *   ONION_E_FORMAT or ONION_E_CHECKSUM   a bad frame that cannot be the last unsynced one (a frame that holds,
 *                     with a later sequence number, stands behind it; or more that looks like one than is worth trying;
 *                     or a whole frame with another sequence number or chain). The cursor stays.
 * Never reads outside the bytes; never allocates. */
int onion_log_next(const unsigned char *bytes, uint64_t length, struct onion_log_cursor *cursor,
                   const unsigned char **records, uint32_t *record_count);

/* Whether the log, whose frames up to `end` hold, passes through a state: `frames` frames, the last with this CRC. */
int onion_log_passes(const unsigned char *bytes, uint64_t end, uint64_t frames, uint32_t crc);

/* Whether a HOLE record may stand in the frames from `offset` on: by their own word, without their checksums. */
int onion_log_has_holes(const unsigned char *bytes, uint64_t length, uint64_t offset);

/* The blocks of a map that has room for the whole log: as the log itself says, and at most as many as the largest
 * volume has. */
uint64_t onion_log_blocks(const unsigned char *bytes, uint64_t length, uint32_t block_shift);
/* The largest size that a SIZE record of it gives, in the same way; 0 without one. */
uint64_t onion_log_size_bytes(const unsigned char *bytes, uint64_t length);

/* Where the frame with the number `frame` ends, and its CRC: by the frames' own word, of a log that was read beyond it.
 * 0: there are not so many. */
uint64_t onion_log_frame_end(const unsigned char *bytes, uint64_t length, uint64_t frame, uint32_t *crc);

/* Decodes and checks one record: known kind, reserved bytes zero, fields unused by the kind zero, block_count > 0
 * and block_index + block_count <= block_limit, no slot above ONION_SLOT_LAST, segment number 1 to
 * ONION_SEGMENT_LAST where one is used. ONION_E_FORMAT. */
int onion_record_decode(const unsigned char *bytes, uint64_t block_limit, struct onion_record *out);
/* Whether a record that is not encoded meets all this: 1 or 0. */
int onion_record_is_sound(const struct onion_record *record, uint64_t block_limit);

#endif
