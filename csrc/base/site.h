/* site.h: where an error happened, for the message that a person reads: the file, and the byte in it.
 *
 * A thread notes file and byte when it meets an error that goes up to its caller. The code that makes the message
 * asks for them with the error code that arrived. A note belongs to one thread and is valid for one code only. So
 * the note of an error that was overcome (by a retry, by a clean-up) is not taken for that of another error. */
#ifndef ONIONSKIN_BASE_SITE_H
#define ONIONSKIN_BASE_SITE_H

#include <stdint.h>

struct onion_site {
    int status; /* 0: nothing is noted */
    uint64_t offset;
    char path[4096];
};

/* Notes file and byte of a negative code, unless the code is noted already (the first one is nearer to the fault), and
 * returns the code. Codes that are not negative are returned as they are. */
int onion_site_note(int status, const char *path, uint64_t offset);
/* The same, over anything that is noted. */
int onion_site_set(int status, const char *path, uint64_t offset);
/* What was noted for this code, or NULL. It stays until the next note, or clear. */
const struct onion_site *onion_site_of(int status);
/* Forgets the note. Call it after a message was made, and before work whose errors are to be reported. */
void onion_site_clear(void);

#endif
