/* site.h: the place of an error, for the message that a person reads: the file, and the byte in it.
 *
 * A thread notes the place where it meets an error that goes up to its caller. The code that makes the message asks
 * for the place with the error code that arrived. A note belongs to one thread and is valid for one code only. So
 * the note of an error that was overcome (by a retry, by a clean-up) is not taken for the place of another error. */
#ifndef ONIONSKIN_BASE_SITE_H
#define ONIONSKIN_BASE_SITE_H

#include <stdint.h>

struct onion_site {
    int status; /* 0: nothing is noted */
    uint64_t offset;
    char path[4096];
};

/* Notes the place of a negative code, unless the code is noted already (the first one is nearer to the fault), and returns
 * the code. Codes that are not negative are returned as they are. */
int onion_site_note(int status, const char *path, uint64_t offset);
/* The same, over any place that is noted. */
int onion_site_set(int status, const char *path, uint64_t offset);
/* The place noted for this code, or NULL. It stays until the next note, or clear. */
const struct onion_site *onion_site_of(int status);
/* Forgets the place. Call it after a message was made, and before work whose errors are to be reported. */
void onion_site_clear(void);

#endif
