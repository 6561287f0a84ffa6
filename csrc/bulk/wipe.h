/* wipe.h: overwrites ranges of a file with zeros on the medium, and only then gives their space back.
 *
 * The order is what matters. Zeros are written with ordinary pwrite in large runs. Then fdatasync makes them
 * durable. Then (ONION_WIPE_VERIFY) they are read back past the page cache. Only then may the range be punched.
 * ZERO_RANGE, hole punching and reflinks never stand in for the zeros, because they leave the old bytes on the
 * medium. Holes in the range are skipped (found with FIEMAP, or else with SEEK_DATA), because they hold nothing.
 * Extents that are allocated but unwritten are overwritten too. They read zero, but after a crash (or a ZERO_RANGE)
 * old bytes can lie under them.
 *
 * If overwriting cannot reach the old bytes, the result says so. This is true for extents that are shared by
 * reflink (FIEMAP, looked up before the overwriting), and for copy-on-write file systems (btrfs without NOCOW). */
#ifndef ONIONSKIN_BULK_WIPE_H
#define ONIONSKIN_BULK_WIPE_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum onion_wipe_flags {
    ONION_WIPE_ZERO = 1,   /* overwrite and sync */
    ONION_WIPE_VERIFY = 2, /* read back from the medium after the sync, with O_DIRECT or after dropping the cache */
    ONION_WIPE_PUNCH = 4   /* punch holes at the end; the file's size stays */
};

struct onion_byte_range {
    uint64_t offset;
    uint64_t length;
};

struct onion_wipe_result {
    uint64_t bytes_wiped;   /* overwritten with zeros and made durable */
    uint64_t bytes_skipped; /* holes, which need no overwriting */
    uint64_t bytes_verified;
    uint64_t bytes_punched;
    uint64_t bytes_unwipeable; /* overwritten, but the old bytes still lie elsewhere: shared or copy-on-write */
    uint32_t filesystem_magic; /* statfs f_type */
    int sync_failed;           /* 1: the fdatasync failed, so other bytes written to this file may be lost too */
    int copy_on_write;         /* 1: the file system does not overwrite in place */
};

/* Does what the flags say to each range of fd (open for writing), with `threads` threads for the zeros (1 to 64).
 * Ranges must be sorted and must not overlap. They may pass the end of the file; nothing is done there.
 * *progress (may be NULL) counts bytes with atomics. Each byte of the ranges within the file counts once. *cancel
 * (may be NULL) stops the work when it becomes non-zero: ONION_E_CANCELLED.
 *
 * Errors: ONION_E_VERIFY if a byte that was read back is not zero, -EINVAL for bad arguments and for files that are not
 * regular, otherwise -errno of the call that failed. The counts in *result cover the phases that were completed; they
 * are valid after errors too. A file system that cannot punch is no error: bytes_punched stays 0. After an error, no
 * range is punched that was not synced. */
int onion_wipe(int fd, const struct onion_byte_range *ranges, size_t range_count, int flags, int threads,
               struct onion_wipe_result *result, uint64_t *progress, const int *cancel);

/* Slots of a file that are in use, one behind the other. */
struct onion_used_slots {
    uint64_t first;
    uint64_t count;
};
/* Finds the ranges of a file of `file_bytes` that are behind its header and in no used slot. Slots have `slot_bytes`
 * each, and the first begins behind the header; `used` is sorted, and apart. Returns how many ranges it wrote to `out`,
 * which has room for count + 1. */
size_t onion_unused_ranges(const struct onion_used_slots *used, size_t count, uint64_t header_bytes,
                           uint64_t slot_bytes, uint64_t file_bytes, struct onion_byte_range *out);

#endif
