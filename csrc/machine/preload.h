/* preload.h: what is said on the socket of the preload library: a request, and a reply to it, again and again.
 *
 * Numbers have the byte order of the machine: both ends are on it. */
#ifndef ONIONSKIN_MACHINE_PRELOAD_H
#define ONIONSKIN_MACHINE_PRELOAD_H

#include <stdint.h>

#define ONION_PRELOAD_MAGIC 0x316d6172u /* "ram1" */

enum onion_preload_verb {
    ONION_PRELOAD_WHERE = 1, /* say where RAM is */
    ONION_PRELOAD_ARM = 2,   /* note all writes to RAM from now on */
    ONION_PRELOAD_FORGET =
        3, /* drop what was written to `count` runs, which follow the request; they may count as written then */
    ONION_PRELOAD_FILL = 4 /* write to `count` runs, which follow the request, what a file has at their offsets. Its
                              descriptor comes with the request (SCM_RIGHTS); it may be missing where there are none. */
};

struct onion_preload_request {
    uint32_t magic;
    uint32_t verb;
    uint64_t count;
};

struct onion_preload_run {
    uint64_t offset; /* in RAM, a multiple of a page, as the length */
    uint64_t length;
};

struct onion_preload_reply {
    uint32_t magic;
    int32_t status; /* 0 or -errno */
    uint64_t start; /* an address in this process; 0: nothing was mapped yet */
    uint64_t length;
    uint32_t is_private;
    uint32_t is_armed;
};

#endif
