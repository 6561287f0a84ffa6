/* check_extents.c: base/extents.c and base/cells.c alone, without Python, for the sanitizers: random tables against arrays that have what
 * each byte of a small disk shows. Exits 0 if all holds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cells.h"
#include "base/extents.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

enum { DISK_BYTES = 300, ROUNDS = 20000 };

/* What a byte shows: nothing, or its state, source and place. */
struct byte {
    int is_shown;
    uint32_t state, source;
    uint64_t place;
};

static struct onion_extents random_table(void) {
    struct onion_extents table = {0};
    for (uint64_t at = (uint64_t)rand() % 40; at < DISK_BYTES; at += (uint64_t)(rand() % 3 ? 0 : rand() % 60)) {
        struct onion_extent_row row = {.offset = at, .length = 1 + (uint64_t)rand() % 20};
        if (at + row.length > DISK_BYTES)
            row.length = DISK_BYTES - at;
        row.state = (uint32_t)(rand() % 3);
        row.source = (uint32_t)(rand() % 2);
        if (row.state == ONION_EXTENT_STATE_DATA)
            row.place = rand() % 2 ? at : (uint64_t)rand() % 100;
        CHECK(onion_extents_add(&table, &row) == 0);
        at += row.length;
    }
    return table;
}

/* Checks that a table is in order, too. */
static void show(const struct onion_extents *table, struct byte *bytes) {
    uint64_t end = 0;
    memset(bytes, 0, DISK_BYTES * sizeof *bytes);
    for (size_t i = 0; i < table->count; i++) {
        const struct onion_extent_row *row = &table->rows[i];
        CHECK(row->length > 0 && row->offset >= end);
        end = row->offset + row->length;
        CHECK(end <= DISK_BYTES);
        for (uint64_t at = row->offset; at < end; at++) {
            int is_data = row->state == ONION_EXTENT_STATE_DATA;
            bytes[at] = (struct byte){1, row->state, row->source, is_data ? row->place + (at - row->offset) : 0};
        }
    }
}

static int are_same(const struct byte *a, const struct byte *b) {
    return a->is_shown == b->is_shown && a->state == b->state && a->source == b->source && a->place == b->place;
}

static void check_two(const struct onion_extents *upper, const struct onion_extents *lower) {
    static struct byte of_upper[DISK_BYTES], of_lower[DISK_BYTES], found[DISK_BYTES];
    static const struct byte nothing;
    struct onion_extents over = {0}, within = {0};
    show(upper, of_upper);
    show(lower, of_lower);
    CHECK(onion_extents_over(upper, lower, &over) == 0);
    show(&over, found);
    for (int at = 0; at < DISK_BYTES; at++)
        CHECK(are_same(&found[at], of_upper[at].is_shown ? &of_upper[at] : &of_lower[at]));
    CHECK(onion_extents_within(upper, lower, &within) == 0);
    show(&within, found);
    for (int at = 0; at < DISK_BYTES; at++)
        CHECK(are_same(&found[at], of_lower[at].is_shown ? &of_upper[at] : &nothing));
    onion_extents_destroy(&over);
    onion_extents_destroy(&within);
}

static void check_sums(const struct onion_extents *table) {
    uint64_t bytes = 0;
    static struct byte shown[DISK_BYTES];
    show(table, shown);
    for (uint64_t at = 0; at < DISK_BYTES; at++) {
        CHECK(onion_extents_bytes_before(table, at) == bytes);
        bytes += (uint64_t)shown[at].is_shown;
        if (shown[at].is_shown)
            CHECK(onion_extents_offset_after(table, bytes) == at + 1);
    }
    CHECK(onion_extents_bytes_before(table, ONION_EXTENTS_END) == bytes);
}

/* Checks a cell against the bytes that each state and source has in it. */
static void check_cell(const struct onion_cell *cell, const struct byte *shown) {
    static const uint32_t by_rank[] = {ONION_EXTENT_STATE_DATA, ONION_EXTENT_STATE_ZERO, ONION_EXTENT_STATE_HOLE};
    uint64_t bytes[3][2] = {0};
    for (uint64_t at = cell->offset; at < cell->offset + cell->length; at++)
        if (shown[at].is_shown)
            bytes[shown[at].state][shown[at].source]++;
    for (int rank = 0; rank < 3; rank++) {
        const uint64_t *of = bytes[by_rank[rank]];
        if (!of[0] && !of[1])
            continue;
        uint32_t source = of[1] > of[0];
        CHECK(cell->state == by_rank[rank] && cell->source == source && cell->shown == of[source]);
        return;
    }
    CHECK(cell->state == ONION_EXTENT_STATE_HOLE && cell->source == 0 && cell->shown == 0);
}

static void check_cells(const struct onion_extents *table) {
    static struct byte shown[DISK_BYTES];
    static struct onion_cell cells[DISK_BYTES];
    show(table, shown);
    uint64_t size = table->count ? table->rows[table->count - 1].offset + table->rows[table->count - 1].length : 0;
    size_t count = size ? 1 + (size_t)rand() % size : 0;
    uint64_t end = 0;
    CHECK(onion_cells_cut(table, cells, count) == 0);
    for (size_t i = 0; i < count; i++) {
        CHECK(cells[i].offset == end && (cells[i].length == size / count || cells[i].length == size / count + 1));
        end += cells[i].length;
        check_cell(&cells[i], shown);
    }
    CHECK(end == size);
}

static void check_join(struct onion_extents *table) {
    static struct byte before[DISK_BYTES], after[DISK_BYTES];
    show(table, before);
    onion_extents_join(table);
    show(table, after);
    for (int at = 0; at < DISK_BYTES; at++)
        CHECK(are_same(&before[at], &after[at]));
    for (size_t i = 1; i < table->count; i++) {
        const struct onion_extent_row *one = &table->rows[i - 1], *next = &table->rows[i];
        int goes_on = one->state != ONION_EXTENT_STATE_DATA || one->place + one->length == next->place;
        CHECK(one->offset + one->length < next->offset || one->state != next->state || one->source != next->source ||
              !goes_on);
    }
}

static void check_pack(struct onion_extents *table) {
    uint64_t next = 4096;
    onion_extents_pack(table, 4096, 8);
    for (size_t i = 0; i < table->count; i++) {
        CHECK(table->rows[i].offset == next);
        next += table->rows[i].length + 7;
        next -= next % 8;
    }
}

int main(void) {
    srand(1);
    for (int round = 0; round < ROUNDS; round++) {
        struct onion_extents one = random_table(), other = random_table();
        check_two(&one, &other);
        check_sums(&one);
        check_cells(&one);
        check_join(&one);
        check_pack(&one);
        onion_extents_destroy(&one);
        onion_extents_destroy(&one);
        onion_extents_destroy(&other);
    }
    puts("tables of extents: all holds");
    return 0;
}
