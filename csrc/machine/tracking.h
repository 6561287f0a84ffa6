/* tracking.h: which pages of another process were written, and what they hold.
 *
 * The other process has armed a userfaultfd with write-protection over the range (preload.c). From then on the kernel
 * notes each first write to a page without telling anybody (WP_ASYNC, Linux 6.7), and PAGEMAP_SCAN gives the pages that
 * were written since they were last protected, from outside and while the process runs.
 *
 * What must hold: a scan that protects again forgets the pages that it returns. The caller keeps them, together with
 * those of earlier scans, until what they hold is durable. */
#ifndef ONIONSKIN_MACHINE_TRACKING_H
#define ONIONSKIN_MACHINE_TRACKING_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/status.h"

struct onion_page_run {
    uint64_t start; /* an address in the other process */
    uint64_t end;   /* behind its last byte */
};

enum onion_pages_wanted {
    ONION_WRITTEN = 0,             /* those that were written since they were last protected */
    ONION_WRITTEN_AND_PROTECT = 1, /* the same, and each is protected again, atomically with the look at it */
    ONION_PRIVATE = 2, /* those of a private mapping that do not read as its file any more, and are in memory */
    ONION_PRIVATE_OR_SWAPPED =
        3 /* those that are swapped out too; where writes are noted, a page that was never touched
                                      looks so as well */
};

/* Finds runs of pages in [*start, end). `pagemap` is /proc/PID/pagemap, open for reading.
 *
 * Returns the number of runs that were stored, or -errno. If there were more than `max`, *start is where to go on;
 * otherwise it is `end`. -ENOTTY or -EINVAL: this kernel cannot; -EPERM: nothing in the range is armed. */
long onion_find_pages(int pagemap, uint64_t *start, uint64_t end, enum onion_pages_wanted wanted,
                      struct onion_page_run *runs, size_t max);

/* Reads the runs of another process's memory into `to`, one behind the other.
 *
 * Returns 0, or -errno: -ESRCH if the process has ended, -EFAULT if it has nothing mapped there, -EPERM. */
int onion_read_pages(pid_t pid, const struct onion_page_run *runs, size_t count, uint8_t *to);

/* Reads the runs, each to its place: what is at `start` + n goes to `to` + n. As onion_read_pages. */
int onion_read_pages_in_place(pid_t pid, const struct onion_page_run *runs, size_t count, uint64_t start, uint8_t *to);

/* Writes to the runs of another process's memory what follows one behind the other at `from`. As onion_read_pages. */
int onion_write_pages(pid_t pid, const struct onion_page_run *runs, size_t count, const uint8_t *from);

/* Writes to the runs of another process's memory what a file has: at `start` + n what it has at n. As onion_read_pages;
 * -EIO: the file ends before that. */
int onion_write_pages_of_file(pid_t pid, const struct onion_page_run *runs, size_t count, uint64_t start, int file);

#endif
