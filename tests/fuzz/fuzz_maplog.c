/* fuzz_maplog.c: any bytes as a map file. tools/fuzz.sh builds and runs it.
 *
 * A fuzzer does not find CRCs by chance. So each input is taken twice: as it is, and, with the first byte telling how,
 * as a header that holds and frames made from the rest, each with the chain and the CRC that make it hold. What loads
 * must come out the same when it is written compactly and loaded again. */
#include <stdlib.h>
#include <string.h>

#include "base/crc32c.h"
#include "layer/layer_map.h"

#define BLOCK_SHIFT 16
#define BLOCKS 200
#define SIZE_BYTES_MAX (UINT64_C(1) << 32) /* larger ones, up to 64 TiB, only take time */

static void check(int holds) {
    if (!holds)
        abort();
}

static int load(struct onion_layer *layer, const unsigned char *bytes, uint64_t length) {
    struct onion_log_cursor cursor = {.offset = ONION_HEADER_BYTES};
    uint64_t fault = 0;
    check(onion_layer_init(layer, BLOCKS, BLOCK_SHIFT) == 0);
    int status = onion_layer_load(layer, bytes, length, &cursor, &fault);
    check(cursor.offset <= length && fault <= length);
    check(status != 0 || cursor.offset == length);
    return status;
}

static uint64_t write_compactly(const struct onion_layer *layer, unsigned char *out) {
    struct onion_record records[7];
    struct onion_layer_writer *writer = calloc(1, sizeof *writer);
    uint64_t length = ONION_HEADER_BYTES, sequence = 0;
    uint32_t crc = 0, count;
    check(writer != NULL);
    while ((count = onion_layer_records(layer, writer, records, 7)) > 0) {
        crc = onion_frame_encode(records, count, ++sequence, 3, crc, out + length);
        length += onion_frame_bytes(count);
    }
    free(writer);
    return length;
}

static void check_same(const struct onion_layer *a, const struct onion_layer *b) {
    uint64_t count = onion_layer_runs(a, NULL);
    struct onion_layer_run *runs_a = calloc(count + 1, sizeof *runs_a), *runs_b = calloc(count + 1, sizeof *runs_b);
    check(runs_a && runs_b && onion_layer_runs(b, NULL) == count);
    onion_layer_runs(a, runs_a);
    onion_layer_runs(b, runs_b);
    for (uint64_t i = 0; i < count; i++) {
        check(runs_a[i].block_index == runs_b[i].block_index && runs_a[i].block_count == runs_b[i].block_count);
        check(runs_a[i].state == runs_b[i].state && runs_a[i].slot == runs_b[i].slot);
        check(runs_a[i].state != 1 || memcmp(a->segment_ids[runs_a[i].segment - 1],
                                             b->segment_ids[runs_b[i].segment - 1], ONION_UUID_BYTES) == 0);
    }
    free(runs_a);
    free(runs_b);
}

static void check_round_trip(const struct onion_layer *layer) {
    struct onion_layer again;
    uint64_t runs = onion_layer_runs(layer, NULL);
    /* a frame for each record at worst; a run is more than one record only where it is longer than 2^32 blocks */
    unsigned char *log = calloc(1, ONION_HEADER_BYTES + (2 * runs + 64) * onion_frame_bytes(1));
    check(log != NULL);
    uint64_t length = write_compactly(layer, log);
    struct onion_log_cursor cursor = {.offset = ONION_HEADER_BYTES};
    uint64_t fault;
    check(onion_layer_init(&again, layer->map.block_count, BLOCK_SHIFT) == 0);
    check(onion_layer_load(&again, log, length, &cursor, &fault) == 0);
    check_same(layer, &again);
    struct onion_stretch *stretches = calloc(runs + 1, sizeof *stretches);
    check(stretches != NULL);
    for (uint32_t number = 1; number <= layer->segment_count && number <= 4; number++)
        onion_stretches_join(stretches, onion_layer_slots(layer, number, stretches));
    check(onion_layer_drop_zero(&again) == 0);
    free(stretches);
    free(log);
    onion_layer_destroy(&again);
}

static int names_a_large_size(const unsigned char *bytes, size_t length) {
    for (size_t at = 0; at + ONION_RECORD_BYTES <= length; at += 8) {
        struct onion_record record;
        if (onion_record_decode(bytes + at, 0, &record) == 0 && record.kind == ONION_RECORD_SIZE &&
            record.block_index > SIZE_BYTES_MAX)
            return 1;
    }
    return 0;
}

static void load_and_check(const unsigned char *bytes, size_t length) {
    struct onion_layer layer;
    if (names_a_large_size(bytes, length))
        return;
    int status = load(&layer, bytes, length);
    if (status == 0 || status == ONION_E_TORN)
        check_round_trip(&layer);
    onion_layer_destroy(&layer);
}

/* Frames of 1 to 8 records out of the input; the bytes that a sound record has at zero or small are made so. */
static size_t make_log(const uint8_t *data, size_t size, unsigned char *out) {
    size_t length = ONION_HEADER_BYTES;
    uint64_t sequence = 0;
    uint32_t crc = 0, per_frame = 1 + (data[0] & 7);
    struct onion_record records[8];
    for (data++, size--; size >= 12;) {
        uint32_t count = 0;
        for (; count < per_frame && size >= 12; count++, data += 12, size -= 12) {
            records[count] = (struct onion_record){.kind = data[0] % 7, .segment = data[1], .block_index = data[2]};
            records[count].block_count = data[3];
            memcpy(&records[count].slot, data + 4, 4);
            if (data[8] & 1)
                memcpy(&records[count].block_index, data + 4, 8);
            if (records[count].kind != ONION_RECORD_DATA && !(data[8] & 2))
                records[count].slot = records[count].segment = 0;
            if (records[count].kind == ONION_RECORD_SEGMENT)
                records[count].segment = data[1];
            if (records[count].kind == ONION_RECORD_SIZE && !(data[8] & 2))
                records[count].block_count = 0;
        }
        crc = onion_frame_encode(records, count, ++sequence, 1, crc, out + length);
        length += onion_frame_bytes(count);
    }
    return length;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct onion_header header = {0};
    onion_header_decode(data, size, ONION_MAGIC_MAP, &header);
    header.block_size = 1 << BLOCK_SHIFT;
    onion_header_is_torn(data, size, ONION_MAGIC_MAP, &header);
    if (size >= ONION_HEADER_BYTES)
        load_and_check(data, size);
    if (size == 0)
        return 0;
    /* exactly as large as the log, so that a byte read past it is seen */
    unsigned char *room = calloc(1, ONION_HEADER_BYTES + (size / 12 + 1) * onion_frame_bytes(1));
    check(room != NULL);
    size_t length = make_log(data, size, room);
    size_t cut = data[0] & 8 && size > 1 ? data[size - 1] : 0;
    length -= cut < length - ONION_HEADER_BYTES ? cut : 0;
    if (data[0] & 16 && length > ONION_HEADER_BYTES)
        room[ONION_HEADER_BYTES + data[size - 1] % (length - ONION_HEADER_BYTES)] ^= data[size / 2];
    unsigned char *log = malloc(length);
    check(log != NULL);
    memcpy(log, room, length);
    free(room);
    load_and_check(log, length);
    free(log);
    return 0;
}
