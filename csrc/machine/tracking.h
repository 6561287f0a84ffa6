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

/* Finds the runs of written pages in [*start, end). `pagemap` is /proc/PID/pagemap, open for reading. With `protect`,
 * each page that is returned is protected again, atomically with the look at it.
 *
 * Returns the number of runs that were stored, or -errno. If there were more than `max`, *start is where to go on;
 * otherwise it is `end`. -ENOTTY or -EINVAL: this kernel cannot; -EPERM: nothing in the range is armed. */
long onion_written_pages(int pagemap, uint64_t *start, uint64_t end, int protect, struct onion_page_run *runs, size_t max);

/* Reads the runs of another process's memory into `to`, one behind the other.
 *
 * Returns 0, or -errno: -ESRCH if the process has ended, -EFAULT if it has nothing mapped there, -EPERM. */
int onion_read_pages(pid_t pid, const struct onion_page_run *runs, size_t count, uint8_t *to);

#endif
