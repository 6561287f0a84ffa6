/* turns.c: see turns.h. */
#define _GNU_SOURCE
#include "base/turns.h"

#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SHORTEST_NS 100000u   /* Linux takes no less */
#define LONGEST_NS 100000000u /* ... and no more */

/* Of headers that older systems do not have. */
#ifndef SYS_sched_setattr
#ifdef __x86_64__
#define SYS_sched_setattr 314
#define SYS_sched_getattr 315
#else
#define SYS_sched_setattr 274
#define SYS_sched_getattr 275
#endif
#endif

/* The first version of the kernel's struct sched_attr, which every kernel knows. */
struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period; /* the first is the length of a turn */
};

static int get(struct attributes *now) {
    return syscall(SYS_sched_getattr, 0, now, sizeof *now, 0) == 0 && now->policy == SCHED_OTHER &&
           now->runtime >= SHORTEST_NS && now->runtime <= LONGEST_NS; /* older kernels say 0 */
}

static int set(struct attributes *now, uint64_t turn_ns) {
    now->size = sizeof *now;
    now->runtime = turn_ns;
    return syscall(SYS_sched_setattr, 0, now, 0) == 0;
}

static uint64_t take(uint64_t turn_ns) {
    struct attributes now = {0};
    int error = errno;
    uint64_t before_ns = get(&now) ? now.runtime : 0;
    if (before_ns && !set(&now, turn_ns))
        before_ns = 0;
    errno = error;
    return before_ns;
}

uint64_t onion_turns_take_short(void) { return take(SHORTEST_NS); }

uint64_t onion_turns_take_long(void) { return take(LONGEST_NS); }

void onion_turns_end(uint64_t before_ns) {
    struct attributes now = {0};
    int error = errno;
    if (before_ns && get(&now))
        (void)set(&now, before_ns);
    errno = error;
}
