/* cells.h: a disk cut into cells of equal size, and which extents of a table each cell shows.
 *
 * The function works on memory only, does no I/O, and is for one thread. */
#ifndef ONIONSKIN_BASE_CELLS_H
#define ONIONSKIN_BASE_CELLS_H

#include "base/extents.h"

#define ONION_CELLS_MAX ((size_t)1 << 31) /* products of two numbers of cells do not overflow */

struct onion_cell {
    uint64_t offset; /* of the disk, in bytes, as all that follows */
    uint64_t length;
    uint64_t shown; /* how much of the cell has the state and the source that it shows */
    uint32_t source;
    uint32_t state;
};

/* Cuts the bytes before the end of the last extent into `count` cells, whose lengths differ by one byte at most. Of the
 * extents in a cell, DATA goes before ZERO and ZERO before HOLE; of those of that state the cell shows the source that has
 * most bytes in it, and the lowest of equal ones. A cell without extents is a HOLE of source 0.
 *
 * There are as many bytes as cells at least, and no more cells than ONION_CELLS_MAX. Returns 0 or -ENOMEM. */
int onion_cells_cut(const struct onion_extents *extents, struct onion_cell *cells, size_t count);

#endif
