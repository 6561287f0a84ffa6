/* sigbus.h: the SIGBUS guard. A load from a mapping raises SIGBUS if the file was truncated or its device fails.
 * The guard turns this into -EIO of the call that made the load.
 *
 * Work that loads from mappings runs inside onion_fault_run. Around each copy it names, with onion_fault_watch, the
 * bytes that it is about to load. Only a fault of this thread inside that range is caught. Every other SIGBUS goes
 * to the handler that was there before, or kills the process as it would have.
 *
 * The handler is process-wide (it must be), so code that installs another handler later may take the guard away.
 * Therefore onion_fault_install checks at each opening, whenever a mapping is made and at each seal, whether the
 * handler is still ours, and installs it over the other one if not. A handler that was installed since then and
 * gets the signal first does no harm if it passes the signal on. Python's faulthandler does (it writes its
 * traceback, once, and raises the signal again). A handler that does not, such as SIG_DFL, ends the process at a
 * fault that comes before the next check. */
#ifndef ONIONSKIN_BASE_SIGBUS_H
#define ONIONSKIN_BASE_SIGBUS_H

#include <stddef.h>
#include <stdint.h>

struct onion_fault_range {
    uintptr_t low, high; /* [low, high); empty: nothing is watched */
};

extern __thread volatile struct onion_fault_range onion_fault_watched;

/* Installs the handler, unless it is installed. 0 or -errno; any thread may call it at any time: one system call. */
int onion_fault_install(void);
/* Calls work(context) and returns its result, or -EIO if a watched load failed. Between watch and unwatch, `work`
 * must hold no lock and own no memory, because a jump leaves it. Does not nest. */
int onion_fault_run(int (*work)(void *), void *context);

/* The address of the last load that failed and made onion_fault_run of this thread return -EIO; NULL: there was
 * none since the last call. */
const char *onion_fault_address(void);

static inline void onion_fault_watch(const void *address, size_t length) {
    onion_fault_watched.low = (uintptr_t)address;
    onion_fault_watched.high = (uintptr_t)address + length;
    __asm__ volatile("" ::: "memory"); /* the copy must not begin before the range is set */
}
static inline void onion_fault_unwatch(void) {
    __asm__ volatile("" ::: "memory");
    onion_fault_watched.high = 0;
    onion_fault_watched.low = 0;
}

#endif
