/* store_file.h: opens the files of a store, and reads a map file into memory.
 *
 * A store may come from anywhere. So no file of it is opened through a symbolic link, and only regular files are
 * opened. The size of a file is not trusted either: a sparse file costs memory only for its allocated parts. */
#ifndef ONIONSKIN_BASE_STORE_FILE_H
#define ONIONSKIN_BASE_STORE_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* A descriptor (close on exec) of the regular file at path, or -errno, or ONION_E_NOT_A_FILE: a symbolic link, a
 * directory, a pipe... flags and mode as for open(). */
int onion_open_file(const char *path, int flags);
/* Makes the file (O_RDWR); -EEXIST where anything has that name. Its mode is 0600, or 0660 in a directory that is
 * shared with its group: one with the set-group-ID bit whose group may write. */
int onion_make_file(const char *path);

/* Which store is at a path, told by the inode of its catalog. A store may be moved while it is open, and a copy of it,
 * which has files of the same names, may be put in its place: what is made or read by name is in the copy then. */
struct onion_store {
    char *catalog; /* NULL: there was none, and nothing is compared */
    uint64_t device, inode;
};

/* Notes which store the directory of segments is in. 0, or -ENOMEM. */
int onion_store_note(struct onion_store *store, const char *segments_directory);
void onion_store_forget(struct onion_store *store);
/* Whether that store is still there: 0, ONION_E_MOVED, or -errno. */
int onion_store_check(const struct onion_store *store);
/* As onion_open_file and onion_make_file, for a file of that store. ONION_E_MOVED: nothing was opened or made. */
int onion_store_open_file(const struct onion_store *store, const char *path, int flags);
int onion_store_make_file(const struct onion_store *store, const char *path);

struct onion_map_bytes {
    unsigned char *bytes; /* anonymous memory; parts that were never written cost none */
    uint64_t length;
};

/* Reads the first `length` bytes of a sealed map. All of them must exist, and none may lie in a hole.
 * ONION_E_FORMAT: one does not; *fault is its offset. */
int onion_map_bytes_read_sealed(int fd, uint64_t length, struct onion_map_bytes *out, uint64_t *fault);
/* Reads a head's map up to the last byte that was written. The bytes behind it are zeros, which are no frame.
 * ONION_E_FORMAT: the file is mostly holes, and longer than a crash can leave it with one frame. */
int onion_map_bytes_read(int fd, struct onion_map_bytes *out, uint64_t *fault);
/* Also good on a zeroed or an already freed one. */
void onion_map_bytes_free(struct onion_map_bytes *read);

#endif
