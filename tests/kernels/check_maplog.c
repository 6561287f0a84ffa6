/* check_maplog.c: the map log and the block map of a layer without Python, for the sanitizers:
 * tools/check_kernels.sh builds and runs it.
 *
 * Every log is handed over in an allocation of exactly its length, so that one byte too many is an error. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/crc32c.h"
#include "layer/layer_map.h"

#define BLOCKS 2000u
#define FRAMES 4u
#define RECORDS 5u
#define FRAME_BYTES (ONION_FRAME_HEADER_BYTES + RECORDS * ONION_RECORD_BYTES)
#define LOG_BYTES (ONION_HEADER_BYTES + FRAMES * FRAME_BYTES)

#define CHECK(holds)                                                                   \
    do {                                                                               \
        if (!(holds)) {                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #holds); \
            exit(1);                                                                   \
        }                                                                              \
    } while (0)

static const unsigned char map_id[ONION_UUID_BYTES] = "map-map-map-map";
static const unsigned char segment_id[ONION_UUID_BYTES] = "seg-seg-seg-seg";

static void make_log(unsigned char *log) {
    struct onion_header header = {.version = ONION_FORMAT_VERSION, .block_size = 4096};
    uint32_t crc = 0;
    memcpy(header.uuid, map_id, sizeof map_id);
    onion_header_encode(&header, ONION_MAGIC_MAP, log);
    for (uint32_t frame = 0; frame < FRAMES; frame++) {
        struct onion_record records[RECORDS] = {
            onion_record_segment(7, segment_id),
            {.kind = ONION_RECORD_DATA, .block_index = 100 * frame, .block_count = 9, .slot = 50 * frame, .segment = 7},
            {.kind = ONION_RECORD_ZERO, .block_index = 100 * frame + 50, .block_count = 3},
            {.kind = ONION_RECORD_HOLE, .block_index = 100 * frame + 51, .block_count = 1},
            {.kind = ONION_RECORD_SIZE, .block_index = BLOCKS * 4096 + frame},
        };
        unsigned char *at = log + ONION_HEADER_BYTES + frame * FRAME_BYTES;
        crc = onion_frame_encode(records, RECORDS, frame + 1, 99, crc, at);
    }
}

/* What a load of the first `length` bytes, with the bit `flipped` (or -1) turned, says. */
static int load_part(const unsigned char *log, size_t length, long flipped, struct onion_log_cursor *cursor) {
    unsigned char *part = malloc(length ? length : 1);
    struct onion_layer layer;
    uint64_t fault;
    CHECK(part != NULL);
    memcpy(part, log, length);
    if (flipped >= 0)
        part[flipped / 8] ^= (unsigned char)(1 << flipped % 8);
    memset(cursor, 0, sizeof *cursor);
    cursor->offset = ONION_HEADER_BYTES;
    CHECK(onion_layer_init(&layer, BLOCKS, 12) == 0);
    int status = onion_layer_load(&layer, part, length, cursor, &fault);
    onion_layer_destroy(&layer);
    free(part);
    return status;
}

static void check_header(const unsigned char *log) {
    struct onion_header header;
    CHECK(onion_header_decode(log, LOG_BYTES, ONION_MAGIC_MAP, &header) == 0);
    CHECK(header.block_size == 4096 && memcmp(header.uuid, map_id, sizeof map_id) == 0);
    CHECK(onion_header_decode(log, LOG_BYTES, ONION_MAGIC_SEGMENT, &header) == ONION_E_FORMAT);
    CHECK(!onion_header_is_torn(log, ONION_HEADER_BYTES, ONION_MAGIC_MAP, &header));
    unsigned char *part = malloc(ONION_HEADER_BYTES);
    CHECK(part != NULL);
    for (size_t cut = 0; cut < ONION_HEADER_BYTES; cut += 5) {
        memset(part, 0, ONION_HEADER_BYTES);
        memcpy(part, log, cut);
        CHECK(onion_header_decode(part, cut, ONION_MAGIC_MAP, &header) == ONION_E_FORMAT);
        CHECK(onion_header_is_torn(part, ONION_HEADER_BYTES, ONION_MAGIC_MAP, &header));
        part[0] = 'x';
        CHECK(!onion_header_is_torn(part, ONION_HEADER_BYTES, ONION_MAGIC_MAP, &header));
    }
    free(part);
}

static void check_every_cut(const unsigned char *log) {
    struct onion_log_cursor cursor;
    for (size_t length = ONION_HEADER_BYTES; length <= LOG_BYTES; length++) {
        size_t tail = (length - ONION_HEADER_BYTES) % FRAME_BYTES;
        CHECK(load_part(log, length, -1, &cursor) == (tail ? ONION_E_TORN : 0));
        CHECK(cursor.sequence == (length - ONION_HEADER_BYTES) / FRAME_BYTES);
        CHECK(cursor.offset == length - tail);
    }
}

static void check_every_bit(const unsigned char *log) {
    struct onion_log_cursor cursor;
    for (long bit = 8L * ONION_HEADER_BYTES; bit < 8L * LOG_BYTES; bit++) {
        uint64_t frame = (uint64_t)(bit / 8 - ONION_HEADER_BYTES) / FRAME_BYTES;
        int status = load_part(log, LOG_BYTES, bit, &cursor);
        if (frame == FRAMES - 1)
            CHECK(status == ONION_E_TORN);
        else
            CHECK(status == ONION_E_FORMAT || status == ONION_E_CHECKSUM);
        CHECK(cursor.sequence == frame);
    }
}

static void check_layer(const unsigned char *log) {
    struct onion_layer layer;
    struct onion_log_cursor cursor = {.offset = ONION_HEADER_BYTES};
    uint64_t fault, data, zero;
    CHECK(onion_layer_init(&layer, 10, 12) == 0);
    CHECK(onion_layer_load(&layer, log, LOG_BYTES, &cursor, &fault) == 0);
    CHECK(layer.map.block_count == BLOCKS + 1 && layer.segment_count == 1);
    onion_layer_count(&layer, &data, &zero);
    CHECK(data == 9 * FRAMES && zero == 2 * FRAMES);
    struct onion_stretch slots[FRAMES];
    CHECK(onion_layer_slots(&layer, 1, slots) == FRAMES && onion_stretches_join(slots, FRAMES) == FRAMES);
    uint64_t new_first[FRAMES] = {0, 9, 18, 27};
    unsigned char other[ONION_UUID_BYTES] = "another segment";
    CHECK(onion_layer_add_segment(&layer, other) == 2);
    CHECK(onion_layer_replace(&layer, 1, slots, new_first, FRAMES, 2) == 9 * FRAMES);
    CHECK(onion_layer_slots(&layer, 1, NULL) == 0 && onion_layer_slots(&layer, 2, slots) == FRAMES);
    CHECK(onion_stretches_join(slots, FRAMES) == 1 && slots[0].first == 0 && slots[0].count == 9 * FRAMES);
    CHECK(onion_layer_drop_zero(&layer) == 0);
    onion_layer_count(&layer, &data, &zero);
    CHECK(data == 9 * FRAMES && zero == 0);
    onion_layer_destroy(&layer);
    onion_layer_destroy(&layer);
}

static void check_crc(void) {
    unsigned char *bytes = malloc(5000);
    CHECK(bytes != NULL);
    for (size_t i = 0; i < 5000; i++)
        bytes[i] = (unsigned char)(i * 131 >> 3);
    for (size_t length = 0; length < 5000; length += length < 64 ? 1 : 37)
        for (size_t begin = 0; begin < 8 && begin + length <= 5000; begin++)
            CHECK(onion_crc32c(5, bytes + begin, length) == onion_crc32c_reference(5, bytes + begin, length));
    CHECK(onion_crc32c(0, "123456789", 9) == 0xE3069283u);
    free(bytes);
}

int main(void) {
    unsigned char *log = malloc(LOG_BYTES);
    CHECK(log != NULL);
    make_log(log);
    check_header(log);
    check_every_cut(log);
    check_every_bit(log);
    check_layer(log);
    check_crc();
    free(log);
    puts("maplog: all holds");
    return 0;
}
