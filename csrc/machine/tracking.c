/* tracking.c: see tracking.h. The structures are those of Documentation/admin-guide/mm/pagemap.rst of the kernel: the
 * headers that a wheel is built with are older than they. */
#define _GNU_SOURCE
#include "machine/tracking.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/workers.h"

enum { RUNS_AT_ONCE = 512, VECTORS_AT_ONCE = 256, PART_BYTES = 1 << 20, TWO_THREADS_BYTES = 4 << 20 };

#define CATEGORY_WRITTEN (1ull << 1)
#define CATEGORY_FILE (1ull << 2)
#define CATEGORY_PRESENT (1ull << 3)
#define CATEGORY_SWAPPED (1ull << 4)
#define SCAN_PROTECT (1ull << 0) /* PM_SCAN_WP_MATCHING */
#define SCAN_ONLY_ARMED                                                                                \
    (1ull << 1) /* PM_SCAN_CHECK_WPASYNC: fail where nothing is armed, which would count as written */

struct region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct scan {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t regions;
    uint64_t region_count;
    uint64_t pages_max;
    uint64_t inverted;
    uint64_t wanted;
    uint64_t wanted_any;
    uint64_t returned;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct scan)

static struct scan scan_for(enum onion_pages_wanted wanted) {
    if (wanted == ONION_PRIVATE || wanted == ONION_PRIVATE_OR_SWAPPED)
        return (struct scan){.size = sizeof(struct scan),
                             .inverted = CATEGORY_FILE,
                             .wanted = CATEGORY_FILE,
                             .wanted_any = CATEGORY_PRESENT | (wanted == ONION_PRIVATE ? 0 : CATEGORY_SWAPPED),
                             .returned = CATEGORY_FILE};
    /* Only this category: with more of them, some kernels report zapped pages as clean and do not protect them. */
    return (struct scan){.size = sizeof(struct scan),
                         .flags = SCAN_ONLY_ARMED | (wanted == ONION_WRITTEN_AND_PROTECT ? SCAN_PROTECT : 0),
                         .wanted = CATEGORY_WRITTEN,
                         .returned = CATEGORY_WRITTEN};
}

long onion_find_pages(int pagemap, uint64_t *start, uint64_t end, enum onion_pages_wanted wanted,
                      struct onion_page_run *runs, size_t max) {
    struct scan scan = scan_for(wanted);
    struct region regions[RUNS_AT_ONCE];
    size_t found = 0;
    while (*start < end && found < max) {
        size_t room = max - found < RUNS_AT_ONCE ? max - found : RUNS_AT_ONCE;
        scan.start = *start;
        scan.end = end;
        scan.regions = (uint64_t)(uintptr_t)regions;
        scan.region_count = room;
        int count = ioctl(pagemap, PAGEMAP_SCAN, &scan);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -errno;
        if ((size_t)count > room || scan.walk_end < *start || scan.walk_end > end)
            return -EPROTO;
        for (int i = 0; i < count; i++)
            runs[found++] = (struct onion_page_run){regions[i].start, regions[i].end};
        *start = scan.walk_end;
    }
    return (long)found;
}

/* ---- copying ---- */

typedef ssize_t (*transfer)(pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long,
                            unsigned long);

/* What is to be moved, of which each thread takes parts. */
struct moving {
    transfer call;
    pid_t pid;
    const struct onion_page_run *runs;
    size_t count;
    size_t at;       /* the run in which the next part begins */
    uint64_t done;   /* bytes of it that were taken */
    uint8_t *here;   /* where the next part is in this process */
    int is_in_place; /* each run is at `here` + (its address - `start`) instead */
    uint64_t start;
    int is_of_file; /* each run comes from `file` instead, from its address - `start` on */
    int file;
    int error;
    pthread_mutex_t guard; /* over `at`, `done`, `here` and `error` */
};

struct part {
    struct iovec local[VECTORS_AT_ONCE];
    struct iovec remote[VECTORS_AT_ONCE];
    size_t count;
    uint8_t *room; /* of PART_BYTES, for what comes from a file */
};

/* Takes the next part. Returns 0 where there is none. */
static int take_part(struct moving *moving, struct part *part) {
    uint64_t length = 0;
    part->count = 0;
    pthread_mutex_lock(&moving->guard);
    while (!moving->error && moving->at < moving->count && part->count < VECTORS_AT_ONCE && length < PART_BYTES) {
        const struct onion_page_run *run = &moving->runs[moving->at];
        uint64_t from = run->start + moving->done, bytes = run->end - from;
        if (bytes > PART_BYTES - length)
            bytes = PART_BYTES - length;
        uint8_t *here = moving->is_of_file    ? part->room + length
                        : moving->is_in_place ? moving->here + (from - moving->start)
                                              : moving->here;
        part->remote[part->count] = (struct iovec){(void *)(uintptr_t)from, bytes};
        part->local[part->count++] = (struct iovec){here, bytes};
        if (!moving->is_in_place && !moving->is_of_file)
            moving->here += bytes;
        length += bytes;
        moving->done += bytes;
        if (run->start + moving->done == run->end) {
            moving->at++;
            moving->done = 0;
        }
    }
    pthread_mutex_unlock(&moving->guard);
    return part->count > 0;
}

/* Takes what was moved off the front of the vectors. */
static size_t skip(struct iovec *vectors, size_t count, size_t done) {
    size_t whole = 0;
    for (; whole < count && done >= vectors[whole].iov_len; whole++)
        done -= vectors[whole].iov_len;
    if (done) {
        vectors[whole].iov_base = (char *)vectors[whole].iov_base + done;
        vectors[whole].iov_len -= done;
    }
    return whole;
}

/* Moves a part. A call of the kernel may end short at a page that it cannot reach, or at an interrupt. */
static int move_part(const struct moving *moving, struct part *part) {
    for (size_t first = 0; first < part->count;) {
        size_t left = part->count - first;
        ssize_t done = moving->call(moving->pid, part->local + first, left, part->remote + first, left, 0);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -EFAULT;
        (void)skip(part->local + first, left, (size_t)done);
        first += skip(part->remote + first, left, (size_t)done);
    }
    return 0;
}

static int read_part(const struct moving *moving, const struct part *part) {
    for (size_t i = 0; i < part->count; i++) {
        uint64_t offset = (uint64_t)(uintptr_t)part->remote[i].iov_base - moving->start;
        for (size_t done = 0; done < part->local[i].iov_len;) {
            ssize_t got = pread(moving->file, (char *)part->local[i].iov_base + done, part->local[i].iov_len - done,
                                (off_t)(offset + done));
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                return got < 0 ? -errno : -EIO;
            done += (size_t)got;
        }
    }
    return 0;
}

static void end_with(struct moving *moving, int error) {
    pthread_mutex_lock(&moving->guard);
    moving->error = error;
    pthread_mutex_unlock(&moving->guard);
}

static void *move_parts(void *argument) {
    struct moving *moving = argument;
    struct part part = {.room = moving->is_of_file ? malloc(PART_BYTES) : NULL};
    if (moving->is_of_file && !part.room)
        end_with(moving, -ENOMEM);
    while (take_part(moving, &part)) {
        int error = moving->is_of_file ? read_part(moving, &part) : 0;
        if (!error)
            error = move_part(moving, &part);
        if (error)
            end_with(moving, error);
    }
    free(part.room);
    return NULL;
}

/* The kernel takes a lock and a reference for each page: so one thread reaches two thirds of the speed of memory, and a
 * second one the rest. */
static int move_all(struct moving *moving) {
    uint64_t length = 0;
    for (size_t i = 0; i < moving->count && length < TWO_THREADS_BYTES; i++)
        length += moving->runs[i].end - moving->runs[i].start;
    pthread_mutex_init(&moving->guard, NULL);
    onion_run_workers(move_parts, moving, length < TWO_THREADS_BYTES ? 1 : 2);
    pthread_mutex_destroy(&moving->guard);
    return moving->error;
}

int onion_read_pages(pid_t pid, const struct onion_page_run *runs, size_t count, uint8_t *to) {
    return move_all(&(struct moving){.call = process_vm_readv, .pid = pid, .runs = runs, .count = count, .here = to});
}

int onion_read_pages_in_place(pid_t pid, const struct onion_page_run *runs, size_t count, uint64_t start, uint8_t *to) {
    return move_all(&(struct moving){.call = process_vm_readv,
                                     .pid = pid,
                                     .runs = runs,
                                     .count = count,
                                     .here = to,
                                     .is_in_place = 1,
                                     .start = start});
}

int onion_write_pages(pid_t pid, const struct onion_page_run *runs, size_t count, const uint8_t *from) {
    return move_all(
        &(struct moving){.call = process_vm_writev, .pid = pid, .runs = runs, .count = count, .here = (uint8_t *)from});
}

int onion_write_pages_of_file(pid_t pid, const struct onion_page_run *runs, size_t count, uint64_t start, int file) {
    return move_all(&(struct moving){.call = process_vm_writev,
                                     .pid = pid,
                                     .runs = runs,
                                     .count = count,
                                     .is_of_file = 1,
                                     .start = start,
                                     .file = file});
}
