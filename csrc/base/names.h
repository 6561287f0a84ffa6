/* names.h: many names of files by one call: to ask Python for a hundred takes longer than the system needs for them.
 *
 * What must hold: a name that is reported as given leads to the open file, and not to another one. */
#ifndef ONIONSKIN_BASE_NAMES_H
#define ONIONSKIN_BASE_NAMES_H

#include <stddef.h>
#include <stdint.h>

/* Gives an open file (it may be open with O_PATH) one more name for each path, in place of what is there if `replaces`.
 * errors[i]: 0 or a positive errno. EMLINK, and no name, is also that of a file system which makes another file of it. */
void onion_link_names(int fd, const char *const *paths, size_t count, int replaces, int *errors);
/* Whether a path, which is not followed, leads to an open file. Some file systems in user space have an inode for each name,
 * also where they say the same number for all (bindfs): a lock or a socket is not seen at the others then. */
int onion_leads_to(int fd, const char *path);
/* Sets the size of each file: 0 where there is none, and -errno where that cannot be told. */
void onion_sizes(const char *const *paths, size_t count, int64_t *sizes);

#endif
