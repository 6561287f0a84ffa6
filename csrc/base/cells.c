/* cells.c: see cells.h. The extents are walked once, from the first cell to the last. */
#include "base/cells.h"

#include <errno.h>
#include <stdlib.h>

/* The bytes of a source in the cell, of the best state yet. It is 0 if `round` is not the present one: so no sum has to be
 * cleared for a new cell, or for a better state. */
struct sum {
    uint64_t bytes;
    uint64_t round;
};

struct sums {
    struct sum *of_source;
    uint64_t round;
};

static int rank_of(uint32_t state) {
    return state == ONION_EXTENT_STATE_DATA ? 0 : state == ONION_EXTENT_STATE_ZERO ? 1 : 2;
}

static size_t source_count(const struct onion_extents *extents) {
    size_t count = 1;
    for (size_t i = 0; i < extents->count; i++)
        if (extents->rows[i].source >= count)
            count = (size_t)extents->rows[i].source + 1;
    return count;
}

static uint64_t edge(uint64_t size, size_t count, size_t cell) {
    return cell * (size / count) + cell * (size % count) / count;
}

/* Adds bytes of an extent to the cell that they lie in. */
static void add(struct onion_cell *cell, struct sums *sums, const struct onion_extent_row *row, uint64_t bytes) {
    int rank = rank_of(row->state), shown = cell->shown ? rank_of(cell->state) : rank + 1;
    if (rank > shown)
        return;
    if (rank < shown) {
        sums->round++;
        cell->shown = 0;
        cell->state = row->state;
    }
    struct sum *sum = &sums->of_source[row->source];
    if (sum->round != sums->round)
        *sum = (struct sum){0, sums->round};
    sum->bytes += bytes;
    /* Sums only grow, so that each of the largest ones comes by here when it has its last bytes. */
    if (sum->bytes > cell->shown || (sum->bytes == cell->shown && row->source < cell->source)) {
        cell->shown = sum->bytes;
        cell->source = row->source;
    }
}

int onion_cells_cut(const struct onion_extents *extents, struct onion_cell *cells, size_t count) {
    struct sums sums = {calloc(source_count(extents), sizeof *sums.of_source), 0};
    if (!sums.of_source)
        return -ENOMEM;
    uint64_t size =
        extents->count ? extents->rows[extents->count - 1].offset + extents->rows[extents->count - 1].length : 0;
    size_t next = 0; /* the first extent that may reach into the cell */
    for (size_t i = 0; i < count; i++) {
        uint64_t first = edge(size, count, i), end = edge(size, count, i + 1);
        cells[i] = (struct onion_cell){.offset = first, .length = end - first, .state = ONION_EXTENT_STATE_HOLE};
        for (; next < extents->count && extents->rows[next].offset < end; next++) {
            const struct onion_extent_row *row = &extents->rows[next];
            uint64_t row_end = row->offset + row->length;
            add(&cells[i], &sums, row, (row_end < end ? row_end : end) - (row->offset > first ? row->offset : first));
            if (row_end > end)
                break; /* what is left of it lies in the next cell */
        }
    }
    free(sums.of_source);
    return 0;
}
