/* copy.c: copies extents between files. copy.h says what it promises.
 *
 * What must hold:
 * - the threads take pieces from one cursor, so after an error or a cancel each thread finishes at most one piece;
 * - no block is ever shared without ONION_COPY_REFLINK. This includes copy_file_range, because the kernel tries a
 * reflink
 *   first if the file system has one. So copy_file_range too is used only with that flag;
 * - a way that two files refused once is not tried on them again.
 *
 * Little is lost without copy_file_range. Measured on ext4 (Linux 6.18, 2 cores): 1 GiB in shuffled extents of 64 KiB
 * into an existing file, copy + fdatasync, in seconds (two runs, the bare calls in a loop, one call for each extent):
 *
 *                           source in the page cache    source on the disk
 *   pread/pwrite, 1 thread        0.72 0.83                 1.17 1.20
 *   pread/pwrite, 2 threads       0.58 0.62                 0.83 0.83
 *   copy_file_range, 1 thread     0.52 0.53                 0.89 1.74
 *   copy_file_range, 2 threads    0.52 0.54                 1.01 1.65
 *
 * A layer that is merged is seldom in the cache, so two threads with pread/pwrite are the default (_copy.pyx). On a
 * machine with other work, two threads that both write spin at the file's lock (the copy alone takes 0.9 s, and 0.2 s
 * with one thread). So they take turns (begin_writing). */
#define _GNU_SOURCE
#include "bulk/copy.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <time.h>
#include <unistd.h>

#include "base/linux_io.h"
#include "base/whole_io.h"
#include "base/workers.h"

enum {
    PIECE_BYTES = 8 << 20,    /* the largest piece that a thread takes at a time */
    BEHIND_BYTES = 32 << 20,  /* writing out starts when at least so much was copied since it was started last */
    BUFFER_BYTES = 256 << 10, /* one read and one write; a core's cache holds the data in between */
    ALIGNMENT_BYTES = 4096,
    SLEEP_NS_MAX = 50 * 1000 * 1000 /* the longest delay until a waiting thread notices a cancel or a new rate */
};

/* A source and a destination. After sorting, the extents of a pair are neighbours. */
struct copy_pair {
    int source, destination;
    size_t extent_end;    /* the index after the pair's last extent */
    uint64_t block_bytes; /* the block size of the destination's file system */
    uint64_t source_size_bytes;
    int has_reflink, has_range; /* atomics: cleared when the files first refuse it */
};

struct copy_job {
    struct onion_copy_extent *extents;
    size_t extent_count;
    struct copy_pair *pairs;
    int flags;
    struct onion_copy_progress *progress;
    const unsigned char *zeros; /* BUFFER_BYTES */

    int alone;               /* one thread works alone, until a pair turns out to share no blocks */
    pthread_mutex_t writing; /* held while a thread changes a destination */
    pthread_mutex_t lock;    /* guards all below */
    size_t extent_index, pair_index;
    struct copy_pair *behind_pair; /* the pair whose destination is being filled in order */
    uint64_t behind;               /* writing it out was started up to this offset */
    uint64_t position;             /* relative to the offset of the extent at extent_index */
    int status;                    /* the first failure of any thread */
    double tokens_bytes;           /* bytes that may be moved now; negative: too many were moved */
    struct timespec refilled;
};

struct copy_piece {
    struct copy_pair *pair;
    uint64_t source_offset, destination_offset, length;
};

/* A range of a source that has no holes, as one thread found it last. Where an extent lies in it, nobody looks again: on
 * tmpfs the look for the end of the data goes through all pages up to there, so that a copy of a segment whose blocks lie
 * scattered took time with the square of their number. If a hole comes to be in it, that is copied as zeros. */
struct known_data {
    const struct copy_pair *pair;
    uint64_t offset, end;
};

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int is_cancelled(const struct copy_job *job) {
    return __atomic_load_n(&job->progress->cancel, __ATOMIC_RELAXED) != 0;
}

static void count_done(struct copy_job *job, uint64_t *way, uint64_t bytes) {
    __atomic_fetch_add(way, bytes, __ATOMIC_RELAXED);
    __atomic_fetch_add(&job->progress->bytes_done, bytes, __ATOMIC_RELAXED);
}

/* ---- the rate limit: a token bucket that all threads share ---- */

/* Takes `bytes` out of the bucket if it is not empty. The bucket may go below zero, which makes the next wait longer.
 * Returns 0, or the time in ns to sleep before the next try. */
static long take_tokens(struct copy_job *job, double rate, uint64_t bytes) {
    struct timespec now;
    double burst = rate / 8, wait;

    clock_gettime(CLOCK_MONOTONIC, &now);
    job->tokens_bytes +=
        rate * ((double)(now.tv_sec - job->refilled.tv_sec) + (double)(now.tv_nsec - job->refilled.tv_nsec) / 1e9);
    job->refilled = now;
    if (job->tokens_bytes > burst)
        job->tokens_bytes = burst;
    if (job->tokens_bytes >= 0) {
        job->tokens_bytes -= (double)bytes;
        return 0;
    }
    wait = -job->tokens_bytes / rate * 1e9 + 1;
    return wait < SLEEP_NS_MAX ? (long)wait : SLEEP_NS_MAX;
}

/* Waits until some bytes may be moved. Returns how many, at most `wanted`, or ONION_E_CANCELLED. */
static int64_t wait_for_turn(struct copy_job *job, uint64_t wanted) {
    for (;;) {
        uint64_t rate = __atomic_load_n(&job->progress->bytes_per_second, __ATOMIC_RELAXED);
        uint64_t bytes = min_u64(wanted, BUFFER_BYTES);
        struct timespec pause = {0};

        if (is_cancelled(job))
            return ONION_E_CANCELLED;
        if (rate == 0)
            return (int64_t)bytes;
        /* A low rate needs small steps, so that it holds over seconds and not only over minutes. */
        bytes =
            min_u64(bytes, rate / 8 > ALIGNMENT_BYTES ? rate / 8 / ALIGNMENT_BYTES * ALIGNMENT_BYTES : ALIGNMENT_BYTES);
        pthread_mutex_lock(&job->lock);
        pause.tv_nsec = take_tokens(job, (double)rate, bytes);
        pthread_mutex_unlock(&job->lock);
        if (pause.tv_nsec == 0)
            return (int64_t)bytes;
        clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
    }
}

/* ---- the destination ---- */

/* A file system lets only one thread at a time write to a file. Two threads that write to the same file would spin at
 * its lock. So they take turns here: one writes or shares blocks, while the other reads. */
static void begin_writing(struct copy_job *job) { pthread_mutex_lock(&job->writing); }
static void end_writing(struct copy_job *job) { pthread_mutex_unlock(&job->writing); }

/* ---- the ways to move bytes: each moves a part from the front of the piece, or nothing ---- */

static void advance(struct copy_piece *piece, uint64_t bytes) {
    piece->source_offset += bytes;
    piece->destination_offset += bytes;
    piece->length -= bytes;
}

static int copy_through_buffer(struct copy_job *job, unsigned char *buffer, struct copy_piece *piece) {
    while (piece->length > 0) {
        int64_t turn = wait_for_turn(job, piece->length);
        ssize_t got;
        int status;

        if (turn < 0)
            return (int)turn;
        while ((got = pread(piece->pair->source, buffer, (size_t)turn, (off_t)piece->source_offset)) < 0)
            if (errno != EINTR)
                return -errno;
        if (got == 0)
            return -EIO; /* the source ends before the extent does */
        begin_writing(job);
        status = onion_pwrite_all(piece->pair->destination, buffer, (uint64_t)got, piece->destination_offset);
        end_writing(job);
        if (status < 0)
            return status;
        advance(piece, (uint64_t)got);
        count_done(job, &job->progress->bytes_copied, (uint64_t)got);
    }
    return 0;
}

static int copy_in_kernel(struct copy_job *job, struct copy_piece *piece) {
    struct copy_pair *pair = piece->pair;

    while (piece->length > 0 && __atomic_load_n(&pair->has_range, __ATOMIC_RELAXED)) {
        int64_t turn = wait_for_turn(job, piece->length);
        int64_t copied;

        if (turn < 0)
            return (int)turn;
        begin_writing(job);
        copied = onion_copy_range(pair->source, piece->source_offset, pair->destination, piece->destination_offset,
                                  (uint64_t)turn);
        end_writing(job);
        if (copied == -EOPNOTSUPP || copied == 0) {
            /* Files without a size (procfs) return 0 too. The pread that follows finds out whether the source ends. */
            __atomic_store_n(&pair->has_range, 0, __ATOMIC_RELAXED);
            return 0;
        }
        if (copied < 0)
            return (int)copied;
        advance(piece, (uint64_t)copied);
        count_done(job, &job->progress->bytes_ranged, (uint64_t)copied);
    }
    return 0;
}

/* The unaligned last bytes of a file may be shared only if the destination ends there as well. */
static int may_share_tail(const struct copy_piece *piece) {
    struct stat destination;

    return piece->source_offset + piece->length == piece->pair->source_size_bytes &&
           fstat(piece->pair->destination, &destination) == 0 && S_ISREG(destination.st_mode) &&
           piece->destination_offset + piece->length >= (uint64_t)destination.st_size;
}

static int share(struct copy_job *job, struct copy_piece *piece) {
    struct copy_pair *pair = piece->pair;
    uint64_t mask = pair->block_bytes - 1, length = piece->length & ~mask;
    int status;

    if (!__atomic_load_n(&pair->has_reflink, __ATOMIC_RELAXED) ||
        (piece->source_offset | piece->destination_offset) & mask)
        return 0;
    if (length < piece->length && may_share_tail(piece))
        length = piece->length;
    if (length == 0)
        return 0;
    begin_writing(job);
    /* The clone itself drops these pages from the cache too. But it splits each folio that lies partly in the range,
     * which costs as much as the clone: 1,024 clones of 1 MiB took 75 ms on XFS, and 45 ms with this call. */
    onion_drop_cached(pair->destination, piece->destination_offset, length);
    status = onion_reflink(pair->source, piece->source_offset, pair->destination, piece->destination_offset, length);
    end_writing(job);
    if (status < 0)
        return status;
    if (status == 0) {
        /* If blocks cannot be shared, a copy inside the kernel goes page by page through a pipe: it takes 0.42 s for 1
         * GiB, and a buffer takes 0.22 s. It is faster only on a file server. */
        __atomic_store_n(&pair->has_reflink, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&pair->has_range, onion_is_remote(pair->destination), __ATOMIC_RELAXED);
        return 0;
    }
    advance(piece, length);
    count_done(job, &job->progress->bytes_reflinked, length);
    return 0;
}

static int write_zeros(struct copy_job *job, struct copy_piece *piece) {
    while (piece->length > 0) {
        int64_t turn = wait_for_turn(job, piece->length);
        int status;

        if (turn < 0)
            return (int)turn;
        status = onion_pwrite_all(piece->pair->destination, job->zeros, (uint64_t)turn, piece->destination_offset);
        if (status < 0)
            return status;
        advance(piece, (uint64_t)turn);
        count_done(job, &job->progress->bytes_zeroed, (uint64_t)turn);
    }
    return 0;
}

/* Makes the piece a hole and returns 1. Returns 0 if zeros have to be written, as past the end of a file: punching
 * never makes a file longer. */
static int make_hole(const struct copy_piece *piece) {
    uint64_t end = piece->destination_offset + piece->length;
    struct stat destination;
    int status;

    if (fstat(piece->pair->destination, &destination) < 0)
        return -errno;
    if (!S_ISREG(destination.st_mode) || end > (uint64_t)destination.st_size)
        return 0;
    status = onion_has_data(piece->pair->destination, piece->destination_offset, end);
    if (status <= 0)
        return status < 0 ? status : 1; /* it is a hole already, so save a journal transaction of the file system */
    return onion_punch(piece->pair->destination, piece->destination_offset, piece->length);
}

static int make_zero(struct copy_job *job, struct copy_piece *piece) {
    int status = piece->length > 0 && (job->flags & ONION_COPY_ZERO_HOLES) ? make_hole(piece) : 0;

    if (status < 0)
        return status;
    if (status == 0)
        return write_zeros(job, piece);
    count_done(job, &job->progress->bytes_zeroed, piece->length);
    advance(piece, piece->length);
    return 0;
}

/* ---- pieces ---- */

static int move_data(struct copy_job *job, unsigned char *buffer, struct copy_piece *piece) {
    int status = share(job, piece);

    if (status == 0)
        status = copy_in_kernel(job, piece);
    return status < 0 ? status : copy_through_buffer(job, buffer, piece);
}

/* Finds the first data of the source from the beginning of the piece on; *data reaches past the piece where that does.
 * Returns 1, 0 if all of the piece is a hole, or a negative code. */
static int find_data(const struct copy_piece *piece, struct known_data *data) {
    struct onion_data_span span;
    int status;

    if (data->pair == piece->pair && data->offset <= piece->source_offset && piece->source_offset < data->end)
        return 1;
    status = onion_seek_data_to(piece->pair->source, piece->source_offset, piece->source_offset + piece->length,
                                piece->pair->source_size_bytes, &span);
    if (status > 0)
        *data = (struct known_data){.pair = piece->pair, .offset = span.offset, .end = span.offset + span.length};
    return status;
}

static int move_data_and_holes(struct copy_job *job, unsigned char *buffer, struct known_data *data,
                               struct copy_piece *piece) {
    while (piece->length > 0) {
        uint64_t end = piece->source_offset + piece->length, offset = piece->source_offset;
        struct copy_piece part = *piece;
        int status = find_data(piece, data);

        if (status < 0)
            return status;
        part.length = !status ? piece->length : data->offset > offset ? data->offset - offset : 0;
        status = part.length > 0 ? onion_was_cut(piece->pair->source, piece->pair->source_size_bytes) : 0;
        if (status != 0)
            return status < 0 ? status : -EIO;
        advance(piece, part.length);
        status = make_zero(job, &part);
        if (status == 0 && piece->length > 0) {
            part = *piece;
            part.length = min_u64(data->end, end) - part.source_offset;
            advance(piece, part.length);
            status = move_data(job, buffer, &part);
        }
        if (status < 0)
            return status;
    }
    return 0;
}

static int copy_piece(struct copy_job *job, unsigned char *buffer, struct known_data *data, struct copy_piece *piece) {
    const struct copy_pair *pair = piece->pair;

    if (pair->source < 0)
        return make_zero(job, piece);
    /* This is checked first, because past the end of a file everything looks like a hole, and copy_file_range just
     * ends. */
    if (piece->source_offset + piece->length > pair->source_size_bytes)
        return -EIO;
    return (job->flags & (ONION_COPY_ZERO_HOLES | ONION_COPY_SOLID)) == ONION_COPY_ZERO_HOLES
               ? move_data_and_holes(job, buffer, data, piece)
               : move_data(job, buffer, piece);
}

/* Takes the next piece and returns 1. Returns 0 if there are no more, or some thread has failed. */
static int take_piece(struct copy_job *job, struct copy_piece *piece) {
    const struct onion_copy_extent *extent;
    int taken = 0;

    pthread_mutex_lock(&job->lock);
    if (job->status == 0 && is_cancelled(job))
        job->status = ONION_E_CANCELLED;
    if (job->status == 0 && job->extent_index < job->extent_count) {
        extent = &job->extents[job->extent_index];
        while (job->extent_index >= job->pairs[job->pair_index].extent_end)
            job->pair_index++;
        *piece = (struct copy_piece){.pair = &job->pairs[job->pair_index],
                                     .source_offset = extent->source_offset + job->position,
                                     .destination_offset = extent->destination_offset + job->position,
                                     .length = min_u64(extent->length - job->position, PIECE_BYTES)};
        job->position += piece->length;
        if (job->position == extent->length) {
            job->extent_index++;
            job->position = 0;
        }
        taken = 1;
    }
    pthread_mutex_unlock(&job->lock);
    return taken;
}

/* Starts to write out the destination before the piece `done`, so that the disk works while the copy goes on. A sync
 * that found all data still to be written would take as long as the copy did. */
static void write_behind(struct copy_job *job, const struct copy_piece *done) {
    uint64_t from = 0, to = 0;

    pthread_mutex_lock(&job->lock);
    if (job->behind_pair != done->pair) {
        job->behind_pair = done->pair;
        job->behind = done->destination_offset;
    } else if (done->destination_offset >= job->behind + BEHIND_BYTES) {
        from = job->behind;
        to = job->behind = done->destination_offset;
    }
    pthread_mutex_unlock(&job->lock);
    if (to > from)
        onion_write_out(done->pair->destination, from, to - from);
}

static void fail(struct copy_job *job, int status) {
    pthread_mutex_lock(&job->lock);
    if (job->status == 0)
        job->status = status;
    pthread_mutex_unlock(&job->lock);
}

static void *copy_pieces(void *argument) {
    struct copy_job *job = argument;
    struct copy_piece piece;
    struct known_data data = {0};
    void *buffer = NULL;

    if (posix_memalign(&buffer, ALIGNMENT_BYTES, BUFFER_BYTES) != 0) {
        fail(job, -ENOMEM);
        return NULL;
    }
    while (take_piece(job, &piece)) {
        int status = copy_piece(job, buffer, &data, &piece);
        if (status < 0)
            fail(job, status);
        else
            write_behind(job, &piece);
        if (job->alone && !__atomic_load_n(&piece.pair->has_reflink, __ATOMIC_RELAXED))
            break;
    }
    free(buffer);
    return NULL;
}

/* ---- before the threads start ---- */

/* Sorts in the order of the destination. ext4 keeps a file that was written in one go in folios of 2 MiB, and each
 * write into a folio walks the list of its 512 blocks. The list is in the processor's cache only if the write before
 * was to the same folio. 1 GiB in extents of 64 KiB into a fresh image of 4 GiB takes 0.35 s in this order, and 0.9 s
 * in the order of the source. */
static int compare_extents(const void *left, const void *right) {
    const struct onion_copy_extent *a = left, *b = right;
    uint64_t a_offset = a->destination_offset, b_offset = b->destination_offset;

    if (a->source != b->source)
        return a->source < b->source ? -1 : 1;
    if (a->destination != b->destination)
        return a->destination < b->destination ? -1 : 1;
    return a_offset < b_offset ? -1 : a_offset > b_offset;
}

static int check_extents(const struct onion_copy_extent *extents, size_t extent_count) {
    for (size_t i = 0; i < extent_count; i++) {
        const struct onion_copy_extent *extent = &extents[i];
        if (extent->length == 0 || extent->length > INT64_MAX || extent->destination < 0 || extent->source < -1 ||
            extent->destination_offset > (uint64_t)INT64_MAX - extent->length ||
            (extent->source >= 0 && extent->source_offset > (uint64_t)INT64_MAX - extent->length))
            return -EINVAL;
    }
    return 0;
}

static int continues(const struct onion_copy_extent *before, const struct onion_copy_extent *extent) {
    return before->source == extent->source && before->destination == extent->destination &&
           before->destination_offset + before->length == extent->destination_offset &&
           (before->source < 0 || before->source_offset + before->length == extent->source_offset);
}

/* Sorts and joins the extents in place. Returns how many are left. */
static size_t join_extents(struct onion_copy_extent *extents, size_t extent_count) {
    size_t kept = 0;

    if (extent_count == 0)
        return 0;
    qsort(extents, extent_count, sizeof *extents, compare_extents);
    for (size_t i = 1; i < extent_count; i++) {
        if (continues(&extents[kept], &extents[i]))
            extents[kept].length += extents[i].length;
        else
            extents[++kept] = extents[i];
    }
    return kept + 1;
}

static int open_pair(struct copy_pair *pair, const struct onion_copy_extent *extent, int flags) {
    struct statfs filesystem;
    struct stat source;

    *pair = (struct copy_pair){.source = extent->source, .destination = extent->destination};
    if (extent->source < 0)
        return 0;
    if (fstat(pair->source, &source) < 0 || fstatfs(pair->destination, &filesystem) < 0)
        return -errno;
    pair->source_size_bytes = S_ISREG(source.st_mode) ? (uint64_t)source.st_size : UINT64_MAX;
    pair->block_bytes = (uint64_t)filesystem.f_bsize;
    pair->has_range = (flags & ONION_COPY_REFLINK) != 0;
    pair->has_reflink = pair->has_range && pair->block_bytes > 0 && (pair->block_bytes & (pair->block_bytes - 1)) == 0;
    return 0;
}

/* Allocates the table of pairs. The caller frees it, also after a failure. */
static int find_pairs(struct copy_job *job) {
    size_t pair_count = 0;

    for (size_t i = 0; i < job->extent_count; i++)
        pair_count += i == 0 || job->extents[i].source != job->extents[i - 1].source ||
                      job->extents[i].destination != job->extents[i - 1].destination;
    job->pairs = calloc(pair_count, sizeof *job->pairs);
    if (!job->pairs)
        return -ENOMEM;
    for (size_t i = 0, pair = 0; i < job->extent_count; pair++) {
        const struct onion_copy_extent *first = &job->extents[i];
        int status = open_pair(&job->pairs[pair], first, job->flags);

        if (status < 0)
            return status;
        while (i < job->extent_count && job->extents[i].source == first->source &&
               job->extents[i].destination == first->destination)
            i++;
        job->pairs[pair].extent_end = i;
    }
    return 0;
}

int onion_copy(struct onion_copy_extent *extents, size_t extent_count, int threads, int flags,
               struct onion_copy_progress *progress) {
    struct copy_job job = {.extents = extents,
                           .flags = flags,
                           .progress = progress,
                           .lock = PTHREAD_MUTEX_INITIALIZER,
                           .writing = PTHREAD_MUTEX_INITIALIZER};
    void *zeros = NULL;
    int status;

    if (threads < 1 || threads > ONION_WORKERS_MAX || check_extents(extents, extent_count) < 0)
        return -EINVAL;
    if (extent_count == 0)
        return 0;
    if (posix_memalign(&zeros, ALIGNMENT_BYTES, BUFFER_BYTES) != 0)
        return -ENOMEM;
    memset(zeros, 0, BUFFER_BYTES);
    job.zeros = zeros;
    clock_gettime(CLOCK_MONOTONIC, &job.refilled);
    job.extent_count = join_extents(extents, extent_count);
    status = find_pairs(&job);
    if (status == 0) {
        /* One thread works alone for as long as blocks are shared. Sharing is done under the destination's lock, so two
         * threads that take turns are slower than one: 65 ms for 1,024 clones on XFS, and 56 ms with one. */
        job.alone = job.pairs[0].has_reflink;
        if (job.alone)
            copy_pieces(&job);
        job.alone = 0;
        onion_run_workers(copy_pieces, &job, threads);
        status = job.status;
    }
    free(job.pairs);
    free(zeros);
    return status;
}
