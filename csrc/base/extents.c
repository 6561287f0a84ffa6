/* extents.c: see extents.h. Each table is walked once, from its first extent to its last. */
#include "base/extents.h"

#include <errno.h>
#include <stdlib.h>

#define FIRST_ROOM ((size_t)64)

static uint64_t end_of(const struct onion_extent_row *row) { return row->offset + row->length; }

void onion_extents_destroy(struct onion_extents *extents) {
    free(extents->rows);
    *extents = (struct onion_extents){0};
}

int onion_extents_add(struct onion_extents *extents, const struct onion_extent_row *row) {
    if (extents->count == extents->room) {
        size_t room = extents->room ? 2 * extents->room : FIRST_ROOM;
        struct onion_extent_row *rows = reallocarray(extents->rows, room, sizeof *rows);
        if (!rows)
            return -ENOMEM;
        extents->rows = rows;
        extents->room = room;
    }
    extents->rows[extents->count++] = *row;
    return 0;
}

/* Adds the parts of a table that lie from `first` to `end`. *next is the first extent that may reach behind `first`; it is
 * moved on, because the ranges of calls for one table come in order. */
static int add_between(struct onion_extents *out, const struct onion_extents *from, size_t *next, uint64_t first,
                       uint64_t end) {
    for (; first < end && *next < from->count && from->rows[*next].offset < end; ++*next) {
        struct onion_extent_row row = from->rows[*next];
        uint64_t row_end = end_of(&row);
        if (row_end <= first)
            continue;
        if (row.offset < first) {
            row.place += row.state == ONION_EXTENT_STATE_DATA ? first - row.offset : 0;
            row.offset = first;
        }
        row.length = (row_end < end ? row_end : end) - row.offset;
        int status = onion_extents_add(out, &row);
        if (status < 0)
            return status;
        if (row_end > end)
            break; /* what is left of it may lie in the next range */
    }
    return 0;
}

int onion_extents_over(const struct onion_extents *upper, const struct onion_extents *lower,
                       struct onion_extents *out) {
    size_t next = 0;
    uint64_t shown = 0; /* all before it is in `out` */
    int status = 0;
    for (size_t i = 0; status == 0 && i < upper->count; i++) {
        status = add_between(out, lower, &next, shown, upper->rows[i].offset);
        if (status == 0)
            status = onion_extents_add(out, &upper->rows[i]);
        shown = end_of(&upper->rows[i]);
    }
    return status < 0 ? status : add_between(out, lower, &next, shown, ONION_EXTENTS_END);
}

int onion_extents_within(const struct onion_extents *extents, const struct onion_extents *within,
                         struct onion_extents *out) {
    size_t next = 0;
    int status = 0;
    for (size_t i = 0; status == 0 && i < within->count; i++)
        status = add_between(out, extents, &next, within->rows[i].offset, end_of(&within->rows[i]));
    return status;
}

static int continues(const struct onion_extent_row *before, const struct onion_extent_row *row) {
    return end_of(before) == row->offset && before->state == row->state && before->source == row->source &&
           (row->state != ONION_EXTENT_STATE_DATA || before->place + before->length == row->place);
}

void onion_extents_join(struct onion_extents *extents) {
    size_t count = 0;
    for (size_t i = 0; i < extents->count; i++) {
        if (count && continues(&extents->rows[count - 1], &extents->rows[i]))
            extents->rows[count - 1].length += extents->rows[i].length;
        else
            extents->rows[count++] = extents->rows[i];
    }
    extents->count = count;
}

void onion_extents_pack(struct onion_extents *extents, uint64_t offset, uint64_t unit) {
    for (size_t i = 0; i < extents->count; i++) {
        extents->rows[i].offset = offset;
        offset += (extents->rows[i].length + unit - 1) / unit * unit;
    }
}

uint64_t onion_extents_bytes_before(const struct onion_extents *extents, uint64_t offset) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < extents->count && extents->rows[i].offset < offset; i++) {
        uint64_t end = end_of(&extents->rows[i]);
        bytes += (end < offset ? end : offset) - extents->rows[i].offset;
    }
    return bytes;
}

uint64_t onion_extents_offset_after(const struct onion_extents *extents, uint64_t bytes) {
    size_t i = 0;
    for (; bytes > extents->rows[i].length; i++)
        bytes -= extents->rows[i].length;
    return extents->rows[i].offset + bytes;
}
