/* wipe.h: overwrites ranges of a file with zeros on the medium, and only then gives them back.
 *
 * The order is the promise: zeros are written with ordinary pwrite in large runs, then made durable by fdatasync,
 * then (ONION_WIPE_VERIFY) read back past the page cache, and only then may the range be punched. ZERO_RANGE, hole
 * punching and reflinks never stand in for the zeros, because they leave the old bytes on the medium. Holes in the
 * range are skipped (FIEMAP, or SEEK_DATA where there is none): they hold nothing. Extents that are allocated but
 * unwritten are overwritten too: they read zero, but after a crash (or a ZERO_RANGE) old bytes can lie under them.
 *
 * Where overwriting cannot reach the old bytes, the result says so: extents that are shared by reflink (FIEMAP,
 * looked up before the overwriting), and copy-on-write file systems (btrfs without NOCOW). */
#ifndef ONIONSKIN_BULK_WIPE_H
#define ONIONSKIN_BULK_WIPE_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum onion_wipe_flags {
    ONION_WIPE_ZERO = 1,   /* overwrite and sync */
    ONION_WIPE_VERIFY = 2, /* read back from the medium after the sync: O_DIRECT, or dropped cache where refused */
    ONION_WIPE_PUNCH = 4   /* give the space back at the end: holes, the file's size stays */
};

struct onion_byte_range {
    uint64_t offset;
    uint64_t length;
};

struct onion_wipe_result {
    uint64_t bytes_wiped;   /* overwritten with zeros and made durable */
    uint64_t bytes_skipped; /* holes: nothing to overwrite */
    uint64_t bytes_verified;
    uint64_t bytes_punched;
    uint64_t bytes_unreachable; /* overwritten, but the old bytes are (also) elsewhere: shared or copy-on-write */
    uint32_t filesystem_magic;  /* statfs f_type */
    int sync_failed;            /* 1: the fdatasync failed, so other bytes written to this file may be lost too */
    int copy_on_write;          /* 1: the file system does not overwrite in place */
};

/* Does what the flags say to each range of fd (open for writing), with `threads` threads for the zeros (1 to 64).
 * Ranges must be sorted and must not overlap; they may pass the end of the file, where there is nothing to do.
 * *progress (may be NULL) counts bytes with atomics; *cancel (may be NULL) stops it when it becomes non-zero:
 * ONION_E_CANCELLED. ONION_E_VERIFY if a byte read back is not zero. -EINVAL for bad arguments and for anything but
 * a regular file; else -errno of the call that failed. Each byte of the ranges within the file counts as progress
 * once. The counts in *result are of phases that were completed; they hold on errors as well. A file system
 * that cannot punch is no error: bytes_punched stays 0. On an error nothing of what was not yet synced is punched. */
int onion_wipe(int fd, const struct onion_byte_range *ranges, size_t range_count, int flags, int threads,
               struct onion_wipe_result *result, uint64_t *progress, const int *cancel);

#endif
