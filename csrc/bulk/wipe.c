/* wipe.c: overwrites with zeros, calls fdatasync, reads back, and punches. wipe.h says what it promises.
 *
 * What must hold:
 * - the phases run one after the other over all ranges: no range is punched before one fdatasync has returned 0 after
 * the
 *   last zero was written, and (with VERIFY) before all zeros have been read back;
 * - any error ends the whole wipe before the next phase;
 * - all extents that FIEMAP calls allocated are overwritten, unwritten extents too. SEEK_DATA takes unwritten extents
 * for
 *   holes. But after a crash old bytes can lie under such an extent: the bytes had reached the medium, and the file
 *   system's record that the extent is written had not.
 *
 * Within a phase the threads take pieces from one cursor under a mutex. The cursor walks the ranges and the file's
 * blocks, so no memory is needed in proportion to them. */
#define _GNU_SOURCE
#include "bulk/wipe.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/linux_io.h"
#include "base/workers.h"

enum {
    PIECE_BYTES = 8 << 20,  /* the largest piece that a thread takes at a time */
    BUFFER_BYTES = 1 << 20, /* the largest write or read */
    ALIGNMENT_BYTES = 4096  /* the alignment of memory, offset and length under O_DIRECT */
};

struct wipe_job {
    int fd;
    const struct onion_byte_range *ranges;
    size_t range_count;
    uint64_t size_bytes;
    int copy_on_write;
    const unsigned char *zeros; /* BUFFER_BYTES, ALIGNMENT_BYTES aligned */
    uint64_t *progress;         /* NULL during phases that do not count progress */
    const int *cancel;

    int read_fd;     /* a second descriptor of the file, for reading back */
    int read_direct; /* 1: read_fd reads past the page cache */

    pthread_mutex_t lock; /* guards all below */
    struct onion_data_walk walk;
    size_t range_index;
    uint64_t position; /* an offset in the file; below the range's offset: the range is not begun */
    int status;        /* the first failure of any thread */
    uint64_t bytes_taken, bytes_skipped, bytes_shared;
};

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int is_cancelled(const struct wipe_job *job) {
    return job->cancel && __atomic_load_n(job->cancel, __ATOMIC_RELAXED);
}

static void count_progress(const struct wipe_job *job, uint64_t bytes) {
    if (job->progress)
        __atomic_fetch_add(job->progress, bytes, __ATOMIC_RELAXED);
}

static void count_skipped(struct wipe_job *job, uint64_t bytes) {
    job->bytes_skipped += bytes;
    count_progress(job, bytes);
}

/* Moves the cursor to the next allocated span and takes a piece of it. Returns 1, 0 at the end, or a negative code. */
static int take_piece(struct wipe_job *job, struct onion_data_span *piece) {
    while (job->range_index < job->range_count) {
        const struct onion_byte_range *range = &job->ranges[job->range_index];
        uint64_t end = min_u64(range->offset + range->length, job->size_bytes);
        int status = 0;

        if (is_cancelled(job))
            return ONION_E_CANCELLED;
        if (job->position < range->offset)
            job->position = range->offset;
        if (job->position < end)
            status = onion_data_walk_next(&job->walk, job->position, end, piece);
        if (status < 0)
            return status;
        if (status == 0) {
            if (job->position < end)
                count_skipped(job, end - job->position);
            job->range_index++;
            continue;
        }
        count_skipped(job, piece->offset - job->position);
        piece->length = min_u64(piece->length, PIECE_BYTES);
        job->position = piece->offset + piece->length;
        job->bytes_taken += piece->length;
        if (piece->shared)
            job->bytes_shared += piece->length;
        return 1;
    }
    return 0;
}

/* Calls take_piece under the lock. Returns 0 as soon as any thread has failed. */
static int take_piece_locked(struct wipe_job *job, struct onion_data_span *piece) {
    int status = 0;

    pthread_mutex_lock(&job->lock);
    if (job->status == 0) {
        status = take_piece(job, piece);
        if (status < 0)
            job->status = status;
    }
    pthread_mutex_unlock(&job->lock);
    return status > 0;
}

static void fail(struct wipe_job *job, int status) {
    pthread_mutex_lock(&job->lock);
    if (job->status == 0)
        job->status = status;
    pthread_mutex_unlock(&job->lock);
}

static int write_zeros(const struct wipe_job *job, uint64_t offset, uint64_t length) {
    while (length > 0) {
        ssize_t written;

        if (is_cancelled(job))
            return ONION_E_CANCELLED;
        written = pwrite(job->fd, job->zeros, min_u64(length, BUFFER_BYTES), (off_t)offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written < 0 ? -errno : -EIO;
        offset += (uint64_t)written;
        length -= (uint64_t)written;
        count_progress(job, (uint64_t)written);
    }
    return 0;
}

static void *zero_pieces(void *argument) {
    struct wipe_job *job = argument;
    struct onion_data_span piece;

    while (take_piece_locked(job, &piece)) {
        int status = write_zeros(job, piece.offset, piece.length);
        if (status < 0)
            fail(job, status);
    }
    return NULL;
}

/* Reads [offset, offset + length) back, at most BUFFER_BYTES, and compares it with zeros. Under O_DIRECT more is read,
 * up to the alignment on both sides; these bytes are not part of the range and are not compared. */
static int verify_run(const struct wipe_job *job, unsigned char *buffer, uint64_t offset, uint64_t length, int direct) {
    uint64_t start = direct ? offset / ALIGNMENT_BYTES * ALIGNMENT_BYTES : offset;
    uint64_t wanted = offset + length - start, filled = 0;

    while (filled < wanted) {
        uint64_t room =
            direct ? (wanted - filled + ALIGNMENT_BYTES - 1) / ALIGNMENT_BYTES * ALIGNMENT_BYTES : wanted - filled;
        ssize_t got = pread(job->read_fd, buffer + filled, room, (off_t)(start + filled));

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO; /* the file is shorter than it was */
        filled += (uint64_t)got;
        if (direct && filled < wanted && filled % ALIGNMENT_BYTES)
            return -EINVAL; /* O_DIRECT cannot go on at this offset: the caller reads again through the cache */
    }
    return memcmp(buffer + (offset - start), job->zeros, length) == 0 ? 0 : ONION_E_VERIFY;
}

static int verify_piece(struct wipe_job *job, unsigned char *buffer, const struct onion_data_span *piece) {
    for (uint64_t done = 0; done < piece->length;) {
        uint64_t offset = piece->offset + done;
        uint64_t length = min_u64(piece->length - done, BUFFER_BYTES);
        int status = job->read_direct ? verify_run(job, buffer, offset, length, 1) : -EINVAL;

        if (is_cancelled(job))
            return ONION_E_CANCELLED;
        if (status == -EINVAL) {
            /* After the fdatasync all pages are clean, so the kernel can drop them and has to read them again. */
            posix_fadvise(job->fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
            status = verify_run(job, buffer, offset, length, 0);
        }
        if (status < 0)
            return status;
        done += length;
        count_progress(job, length);
    }
    return 0;
}

static void *verify_pieces(void *argument) {
    struct wipe_job *job = argument;
    struct onion_data_span piece;
    void *buffer = NULL;

    if (posix_memalign(&buffer, ALIGNMENT_BYTES, BUFFER_BYTES + 2 * ALIGNMENT_BYTES) != 0) {
        fail(job, -ENOMEM);
        return NULL;
    }
    while (take_piece_locked(job, &piece)) {
        int status = verify_piece(job, buffer, &piece);
        if (status < 0)
            fail(job, status);
    }
    free(buffer);
    return NULL;
}

static int run_phase(struct wipe_job *job, void *(*work)(void *), int threads) {
    job->range_index = 0;
    job->position = 0;
    job->bytes_taken = job->bytes_skipped = job->bytes_shared = 0;
    onion_run_workers(work, job, threads);
    return job->status;
}

/* The caller's descriptor may be write-only, so the file is opened again. The path in /proc works for an unlinked file
 * too. */
static void open_for_reading_back(struct wipe_job *job) {
    char path[40];

    snprintf(path, sizeof path, "/proc/self/fd/%d", job->fd);
    job->read_fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    job->read_direct = job->read_fd >= 0;
    if (job->read_fd < 0)
        job->read_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (job->read_fd < 0)
        job->read_fd = job->fd;
}

static int zero_phase(struct wipe_job *job, int threads, struct onion_wipe_result *result) {
    int status = run_phase(job, zero_pieces, threads);

    if (status < 0)
        return status;
    if (is_cancelled(job))
        return ONION_E_CANCELLED;
    /* It is called only once: after a failure the kernel takes the pages for clean, and a second call would succeed. */
    if (job->bytes_taken > 0 && fdatasync(job->fd) < 0) { /* BARRIER: wiped bytes */
        result->sync_failed = 1;
        return -errno;
    }
    result->bytes_wiped = job->bytes_taken;
    result->bytes_skipped = job->bytes_skipped;
    result->bytes_unwipeable = job->copy_on_write ? job->bytes_taken : job->bytes_shared;
    return 0;
}

static int verify_phase(struct wipe_job *job, int threads, struct onion_wipe_result *result) {
    int status;

    open_for_reading_back(job);
    status = run_phase(job, verify_pieces, threads);
    if (job->read_fd != job->fd)
        close(job->read_fd);
    if (status == 0)
        result->bytes_verified = job->bytes_taken;
    return status;
}

static int punch_phase(struct wipe_job *job, uint64_t block_bytes, struct onion_wipe_result *result) {
    for (size_t i = 0; i < job->range_count;) {
        uint64_t offset = job->ranges[i].offset, end = offset, counted;
        int status;

        /* Adjacent ranges are punched together, so that a block which two of them share becomes free. */
        for (; i < job->range_count && job->ranges[i].offset == end; i++)
            end += job->ranges[i].length;
        if (offset >= job->size_bytes)
            break;
        counted = min_u64(end, job->size_bytes) - offset;
        /* The file system frees the file's last block only if the range covers all of it, so the end is rounded up. */
        if (end >= job->size_bytes)
            end = (job->size_bytes + block_bytes - 1) / block_bytes * block_bytes;
        if (is_cancelled(job))
            return ONION_E_CANCELLED;
        status = end > offset ? onion_punch(job->fd, offset, end - offset) : 1;
        if (status <= 0)
            return status;
        result->bytes_punched += counted;
        count_progress(job, counted);
    }
    return 0;
}

static int check_ranges(const struct onion_byte_range *ranges, size_t range_count) {
    uint64_t behind = 0;

    for (size_t i = 0; i < range_count; i++) {
        if (ranges[i].offset < behind || ranges[i].offset > INT64_MAX ||
            ranges[i].length > (uint64_t)INT64_MAX - ranges[i].offset)
            return -EINVAL;
        behind = ranges[i].offset + ranges[i].length;
    }
    return 0;
}

/* Runs the phases that the flags ask for. Each byte counts as progress once, in the first of them. */
static int run_phases(struct wipe_job *job, int flags, int threads, uint64_t block_bytes,
                      struct onion_wipe_result *result) {
    int status = 0;

    if (flags & (ONION_WIPE_ZERO | ONION_WIPE_VERIFY))
        status = onion_data_walk_begin(&job->walk, job->fd);
    if (status == 0 && (flags & ONION_WIPE_ZERO)) {
        status = zero_phase(job, threads, result);
        job->progress = NULL;
        job->walk.known_from = job->walk.known_to = 0; /* overwriting may have moved blocks, so ask FIEMAP again */
    }
    if (status == 0 && (flags & ONION_WIPE_VERIFY)) {
        status = verify_phase(job, threads, result);
        job->progress = NULL;
    }
    if (status == 0 && (flags & ONION_WIPE_PUNCH))
        status = punch_phase(job, block_bytes, result);
    return status;
}

int onion_wipe(int fd, const struct onion_byte_range *ranges, size_t range_count, int flags, int threads,
               struct onion_wipe_result *result, uint64_t *progress, const int *cancel) {
    struct wipe_job job = {.fd = fd,
                           .ranges = ranges,
                           .range_count = range_count,
                           .progress = progress,
                           .cancel = cancel,
                           .lock = PTHREAD_MUTEX_INITIALIZER};
    struct stat file;
    void *zeros = NULL;
    int status;

    memset(result, 0, sizeof *result);
    if (threads < 1 || threads > ONION_WORKERS_MAX || check_ranges(ranges, range_count) < 0)
        return -EINVAL;
    if (fstat(fd, &file) < 0)
        return -errno;
    if (!S_ISREG(file.st_mode))
        return -EINVAL; /* a device has st_size 0, so nothing would be wiped and success would be reported */
    job.size_bytes = (uint64_t)file.st_size;
    job.copy_on_write = onion_is_copy_on_write(fd, &result->filesystem_magic);
    if (job.copy_on_write < 0)
        return job.copy_on_write;
    result->copy_on_write = job.copy_on_write;
    if (posix_memalign(&zeros, ALIGNMENT_BYTES, BUFFER_BYTES) != 0)
        return -ENOMEM;
    memset(zeros, 0, BUFFER_BYTES);
    job.zeros = zeros;
    status = run_phases(&job, flags, threads, file.st_blksize > 0 ? (uint64_t)file.st_blksize : 4096, result);
    free(zeros);
    return status;
}

size_t onion_unused_ranges(const struct onion_used_slots *used, size_t count, uint64_t header_bytes,
                           uint64_t slot_bytes, uint64_t file_bytes, struct onion_byte_range *out) {
    size_t found = 0;
    uint64_t at = header_bytes;
    for (size_t i = 0; i <= count; i++) {
        uint64_t end = i < count ? header_bytes + used[i].first * slot_bytes : file_bytes;
        if (end > at)
            out[found++] = (struct onion_byte_range){at, end - at};
        if (i < count)
            at = end + used[i].count * slot_bytes;
    }
    return found;
}
