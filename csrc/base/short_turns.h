/* short_turns.h: how long a thread has its processor before one that wakes up may take it.
 *
 * Linux lets a thread run on for its turn (its "slice", 1.4 ms on two processors, and up to a tick of 4 ms) while others
 * that were woken wait, even those that need a few microseconds. A thread with shorter turns gets no less of the processor:
 * it is taken off sooner, and put on sooner. So a server's threads, which wait most of the time, are not kept from an answer
 * by one that computes, and whoever computes beside writers does not keep them waiting. */
#ifndef ONIONSKIN_BASE_SHORT_TURNS_H
#define ONIONSKIN_BASE_SHORT_TURNS_H

#include <stdint.h>

/* Gives the calling thread, and those that it starts from now on, the shortest turns that the system has. Returns the
 * length of its turns before in nanoseconds; 0: nothing was changed. A hint: before Linux 6.12 it has no effect, and a
 * thread of a real-time, batch or idle policy is left as it is. */
uint64_t onion_short_turns_take(void);
/* Gives the calling thread back what onion_short_turns_take returned. */
void onion_short_turns_end(uint64_t before_ns);

#endif
