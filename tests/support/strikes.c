/* Raises a signal at the N-th event of a thread's Python: each call and each return, of functions of Python and of C.
 *
 * Python then handles it where it next looks for signals, as it does with one that comes from outside. A profile function
 * in Python would not do: its own exception leaves the frame that it watches, without its `finally`.
 */
#include <signal.h>

static long left, seen;
static int number;

/* Have the signal raised at an event, or never (0). */
void strikes_arm(long at, int signal_number)
{
    left = at;
    number = signal_number;
    seen = 0;
}

/* How many events there were since. */
long strikes_seen(void) { return seen; }

/* A Py_tracefunc. */
int strikes_event(void *own, void *frame, int what, void *value)
{
    (void)own, (void)frame, (void)what, (void)value;
    ++seen;
    if (left > 0 && --left == 0)
        raise(number);
    return 0;
}
