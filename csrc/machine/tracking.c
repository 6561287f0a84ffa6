/* tracking.c: see tracking.h. The structures are those of Documentation/admin-guide/mm/pagemap.rst of the kernel: the
 * headers that a wheel is built with are older than they. */
#define _GNU_SOURCE
#include "machine/tracking.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

enum { RUNS_AT_ONCE = 512, VECTORS_AT_ONCE = 1024, BYTES_AT_ONCE = 1 << 30 };

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

typedef ssize_t (*transfer)(pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long,
                            unsigned long);

/* Moves `length` bytes between `here` and the vectors. A call of the kernel may end short at a page that it cannot reach. */
static int move(transfer call, pid_t pid, struct iovec *remote, size_t count, uint8_t *here, size_t length) {
    while (length) {
        struct iovec local = {here, length};
        ssize_t done = call(pid, &local, 1, remote, count, 0);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -EFAULT;
        here += done;
        length -= (size_t)done;
        for (; count && (size_t)done >= remote->iov_len; remote++, count--)
            done -= (ssize_t)remote->iov_len;
        if (done) {
            remote->iov_base = (char *)remote->iov_base + done;
            remote->iov_len -= (size_t)done;
        }
    }
    return 0;
}

static int move_all(transfer call, pid_t pid, const struct onion_page_run *runs, size_t count, uint8_t *here) {
    struct iovec remote[VECTORS_AT_ONCE];
    for (size_t first = 0; first < count;) {
        size_t vectors = 0, length = 0;
        for (; vectors < VECTORS_AT_ONCE && first < count && length < BYTES_AT_ONCE; vectors++, first++) {
            size_t bytes = runs[first].end - runs[first].start;
            remote[vectors] = (struct iovec){(void *)(uintptr_t)runs[first].start, bytes};
            length += bytes;
        }
        int error = move(call, pid, remote, vectors, here, length);
        if (error)
            return error;
        here += length;
    }
    return 0;
}

int onion_read_pages(pid_t pid, const struct onion_page_run *runs, size_t count, uint8_t *to) {
    return move_all(process_vm_readv, pid, runs, count, to);
}

int onion_read_pages_in_place(pid_t pid, const struct onion_page_run *runs, size_t count, uint64_t start, uint8_t *to) {
    struct iovec local[VECTORS_AT_ONCE], remote[VECTORS_AT_ONCE];
    while (count) {
        size_t vectors = 0;
        ssize_t length = 0;
        for (; vectors < VECTORS_AT_ONCE && vectors < count && length < BYTES_AT_ONCE; vectors++) {
            size_t bytes = runs[vectors].end - runs[vectors].start;
            remote[vectors] = (struct iovec){(void *)(uintptr_t)runs[vectors].start, bytes};
            local[vectors] = (struct iovec){to + (runs[vectors].start - start), bytes};
            length += (ssize_t)bytes;
        }
        if (process_vm_readv(pid, local, vectors, remote, vectors, 0) != length) {
            /* It ended short, or at an interrupt: run by run, which says where it cannot go on. */
            for (size_t i = 0; i < vectors; i++) {
                int error = move_all(process_vm_readv, pid, &runs[i], 1, to + (runs[i].start - start));
                if (error)
                    return error;
            }
        }
        runs += vectors;
        count -= vectors;
    }
    return 0;
}

int onion_write_pages(pid_t pid, const struct onion_page_run *runs, size_t count, const uint8_t *from) {
    return move_all(process_vm_writev, pid, runs, count, (uint8_t *)from);
}
