/* copy.h: copies extents between files with several threads, for a merge into the base, flatten, export and the
 * compaction of segments.
 *
 * An extent names open descriptors and byte offsets. The kernel never opens, creates, truncates or syncs a file.
 * Extents that continue each other on both sides are joined first. Each piece is copied by the first way that the
 * two files allow:
 *  - FICLONERANGE, only if both offsets and the length are multiples of the file system's block, or at the end of
 *    both files;
 *  - copy_file_range;
 *  - pread and pwrite through a buffer.
 * The first two ways are used only if ONION_COPY_REFLINK is given, because copy_file_range reflinks too if it can. If
 * blocks cannot be shared, copy_file_range is used only on file servers. Extents are copied in the order of the
 * destination. The copy starts to write the destination out while it goes on. */
#ifndef ONIONSKIN_BULK_COPY_H
#define ONIONSKIN_BULK_COPY_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum onion_copy_flags {
    ONION_COPY_REFLINK = 1,    /* sharing blocks is allowed (never with policy `zero`) */
    ONION_COPY_ZERO_HOLES = 2, /* ranges that are holes in the source file are made zero in the destination by
                                 punching (or writing) instead of copying; without it they are copied as bytes.
                                 The same holds for extents with source -1: without it zeros are always written */
    ONION_COPY_SOLID = 4       /* sources are not searched for holes. Segments have none in slots that a map names, and
                                two seeks for an extent cost half as much as copying 64 KiB */
};

struct onion_copy_extent {
    int source; /* -1: write zeros */
    int destination;
    uint64_t source_offset; /* bytes */
    uint64_t destination_offset;
    uint64_t length; /* bytes, > 0 */
};

/* The fields are read and written with atomics while the copy runs. */
struct onion_copy_progress {
    uint64_t bytes_done;
    uint64_t bytes_reflinked; /* these four add up to bytes_done: the way in which bytes were moved */
    uint64_t bytes_ranged;
    uint64_t bytes_copied;
    uint64_t bytes_zeroed;
    int cancel;                /* set to 1 by another thread: the copy stops within one piece (8 MiB at most) */
    uint64_t bytes_per_second; /* the limit for bytes that are read, written or zeroed; shared bytes do not count.
                                  0: no limit. It may be changed while the copy runs */
};

/* Copies all extents, which must not overlap in the destination, with `threads` threads (1 to 64). Errors: -EIO if a
 * source ends early, -ENOSPC if the destination is full, ONION_E_CANCELLED, or another -errno. After an error, data
 * that was copied stays, and the caller may copy again. Nothing is durable on return. Sorts and joins `extents` in
 * place. */
int onion_copy(struct onion_copy_extent *extents, size_t extent_count, int threads, int flags,
               struct onion_copy_progress *progress);

#endif
