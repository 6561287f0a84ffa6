/* linux_io.h: the calls that only Linux has and that copy and wipe need. A port replaces linux_io.c.
 *
 * Each function asks a file system one question or makes one request. It distinguishes "cannot" from "failed". */
#ifndef ONIONSKIN_BASE_LINUX_IO_H
#define ONIONSKIN_BASE_LINUX_IO_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { ONION_WALK_EXTENTS = 64 };

struct onion_data_span {
    uint64_t offset;
    uint64_t length;
    int shared; /* 1: other files, or other places of this one, use the same blocks */
};

/* Finds the allocated parts of a file. onion_data_walk_begin fills it in. One walk belongs to one thread at a time. */
struct onion_data_walk {
    int fd;
    int has_fiemap;
    uint64_t known_from, known_to; /* the spans below are all there are between these offsets */
    uint32_t span_count;
    struct onion_data_span spans[ONION_WALK_EXTENTS];
};

/* Begins a walk over the blocks of fd. Where the file system has FIEMAP, the file's dirty pages are written out (not
 * synced) first, so that every block has its place. 0 or -errno. */
int onion_data_walk_begin(struct onion_data_walk *walk, int fd);

/* The first allocated span at or after `offset`, cut at `end`: 1, or 0 if there is none, or -errno. With FIEMAP,
 * unwritten extents count as allocated; without it, SEEK_DATA answers (which may move the file position of fd), and
 * a file system that knows neither is taken to be all data. */
int onion_data_walk_next(struct onion_data_walk *walk, uint64_t offset, uint64_t end, struct onion_data_span *span);

/* The first range at or after `offset` that SEEK_DATA calls data, cut at `end`: 1, 0 or -errno as above. */
int onion_seek_data(int fd, uint64_t offset, uint64_t end, struct onion_data_span *span);
/* The same, of data that begins below `before`; it may reach past that, and is cut at `end`. */
int onion_seek_data_to(int fd, uint64_t offset, uint64_t before, uint64_t end, struct onion_data_span *span);

/* Whether something from `offset` up to `end` is data: 1, 0 or -errno. It does not look where that ends. */
int onion_has_data(int fd, uint64_t offset, uint64_t end);

/* Whether fd is a regular file that is shorter than it was when its size was taken: 1, 0 or -errno. Everything
 * beyond the end of a file looks like a hole. So code that lets a hole read zero asks this after onion_seek_data; 0
 * means that the answer of onion_seek_data was true. */
int onion_was_cut(int fd, uint64_t size_bytes);

/* Makes a range a hole; the file's size stays. 1: done, 0: this file cannot be punched, or -errno. */
int onion_punch(int fd, uint64_t offset, uint64_t length);

/* Drops a range from the cache, in whole folios, where it is clean and not mapped. A hint. */
void onion_drop_cached(int fd, uint64_t offset, uint64_t length);

/* Shares the blocks of a range with another file. 1: done, 0: these two files cannot, or -errno. */
int onion_reflink(int source, uint64_t source_offset, int destination, uint64_t destination_offset, uint64_t length);

/* Copies up to `length` bytes inside the kernel: bytes copied (> 0), 0 if the source ends here, or -errno;
 * -EOPNOTSUPP stands for every way in which two files can refuse. */
int64_t onion_copy_range(int source, uint64_t source_offset, int destination, uint64_t destination_offset,
                         uint64_t length);

/* Starts to write a range of dirty pages out, and does not wait. A hint: nothing is durable. */
void onion_write_out(int fd, uint64_t offset, uint64_t length);

/* Whether fd is on a file server, which may copy between its files without moving bytes over the network: 1 or 0. */
int onion_is_remote(int fd);

/* Whether writes to fd land beside the old blocks instead of on them: 1 or 0, or -errno. *filesystem_magic is
 * statfs' f_type. btrfs with the NOCOW attribute overwrites in place, except where extents are shared. */
int onion_is_copy_on_write(int fd, uint32_t *filesystem_magic);

#endif
