/* turns.h: how long a thread has its processor before one that wakes up may take it.
 *
 * Linux lets a thread run on for its turn (its "slice", 1.4 ms on two processors, and up to a tick of 4 ms) while others
 * that were woken wait, even those that need a few microseconds. One that is woken takes the processor at once only from
 * a thread whose turns are longer than its own; from one with equal ones, often only at the next tick. So whoever answers
 * clients, holds writers, or waits for others at each step has short turns: it is put on soon. Whoever computes for
 * milliseconds beside the writers has long ones, and gives way to each of them. Neither gets less of the processor. */
#ifndef ONIONSKIN_BASE_TURNS_H
#define ONIONSKIN_BASE_TURNS_H

#include <stdint.h>

/* Gives the calling thread, and those that it starts from now on, the shortest or the longest turns that the system has.
 * Returns the length of its turns before in nanoseconds; 0: nothing was changed. A hint: before Linux 6.12 it has no
 * effect, and a thread of a real-time, batch or idle policy is left as it is. */
uint64_t onion_turns_take_short(void);
uint64_t onion_turns_take_long(void);
/* Gives the calling thread back what a call above returned. */
void onion_turns_end(uint64_t before_ns);

#endif
