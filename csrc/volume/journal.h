/* journal.h: keeps the dirty records of a head, so that the death of the process loses none of them.
 *
 * The records lie in a mapped file, volumes/ID.dirty. Data that was stored in a mapped page stays when the process
 * is killed, and costs no system call. The file is valid for the same boot and the same mount only, so nothing of
 * it is ever synced. It is made at the first change of an opening. docs/format.md describes its bytes.
 *
 * What must hold
 *  - There are two halves. One half takes new records. A flush takes that half away and switches to the other. A
 *    half is emptied when the frame with its records is durable, and before a slot that the frame freed is given
 *    back. So no record that is left names a slot that was used again. Records that are applied twice change
 *    nothing, because the last record of a block counts.
 *  - A half names the state that it goes on from: a map, and the last frame in it. While a seal or a rewrite waits
 *    for its outcome, a half names two states, since the catalog may name either.
 *  - A mapped page always has a block (fallocate), so a full disk is an error and not a signal. The SIGBUS guard
 *    catches other failures of a page.
 *  - A half that a flush took has room for all records that come meanwhile, so that it can always be put back.
 * The volume's dirty_lock guards all of this. */
#ifndef ONIONSKIN_VOLUME_JOURNAL_H
#define ONIONSKIN_VOLUME_JOURNAL_H

#include <stddef.h>
#include <stdint.h>

#include "layer/map_log.h"

struct onion_volume;
struct onion_dirty_records;

#define ONION_JOURNAL_STAGED_NAMES 4 /* names of files that are being made: the path's, and .0 to .3 */
#define ONION_JOURNAL_MAGIC "ONIONDTY"
#define ONION_JOURNAL_VERSION 1u
#define ONION_JOURNAL_HEADER_BYTES 4096u
#define ONION_JOURNAL_RECORDS_MAX (1u << 19) /* of one half */

/* A state of a map that a half goes on from: with `frames` frames, the last of which has this CRC. No frames: any. */
struct onion_journal_owner {
    unsigned char map_id[ONION_UUID_BYTES];
    uint64_t frames;
    uint32_t crc;
    uint32_t reserved;
};

struct onion_journal_half {
    uint64_t order; /* of two halves that both have records, the one with the lower is older */
    uint64_t record_count;
    struct onion_journal_owner owner, alternative;
};

struct onion_journal_header {
    char magic[8];
    uint32_t version;
    uint32_t block_size;
    unsigned char boot_id[16];
    uint64_t device;
    uint64_t filesystem; /* tells this mount from others; `filesystem_kind` names its kind */
    uint32_t filesystem_kind;
    uint32_t poisoned;  /* a sync failed: the contents of the head's own files have to be written again */
    uint64_t opened_ns; /* CLOCK_MONOTONIC at the opening that made the file */
    struct onion_journal_half halves[2];
};

struct onion_journal {
    char *path; /* NULL: the records are in the heap */
    uint64_t opened_ns;
    uint64_t order;
    int fd;
    int current;                         /* the half that takes new records */
    int heap_taken;                      /* a flush has records that no half of this opening's file holds */
    struct onion_journal_header *header; /* NULL: there is no file yet */
    struct onion_record *records[2];
    size_t capacity[2];
    size_t taken_count;                            /* of the other half, while a flush has it */
    struct onion_journal_owner owner, alternative; /* of the half that takes new records */
    int found_fd; /* the file of an opening before, while it holds what is not durable yet; else -1 */
    int found_poisoned;
};

void onion_journal_init(struct onion_journal *journal);
/* Where the file is, or will be. NULL: there is none. */
int onion_journal_set_path(struct onion_volume *volume, const char *path);
/* While a head is opened: reads the records that a process that died left behind. It makes them the dirty records
 * if they go on from the log of `length` bytes (NULL: no file), which was replayed. segment_first: the head's own
 * segments are those from here on. A file that is not sound, or not of this boot and mount, is ignored as a whole. */
int onion_journal_find(struct onion_volume *volume, const unsigned char *log, uint64_t length, uint32_t segment_first);
/* For a head that is only read, and whose index has the records that were found: the file stays as it is, for the
 * next opening that writes. */
void onion_journal_leave_found(struct onion_volume *volume);
/* Room for the record of one more change, and for one that names its segment. ONION_E_JOURNAL_FULL: a flush makes
 * room. */
int onion_journal_make_room(struct onion_volume *volume);
/* Where the records go on from; when a head was opened. */
void onion_journal_begin_at(struct onion_volume *volume, const struct onion_journal_owner *owner);
/* Takes the dirty records away, and switches to the other half. owner: the state that later records go on from.
 * alternative may be NULL. */
void onion_journal_take(struct onion_volume *volume, struct onion_dirty_records *batch,
                        const struct onion_journal_owner *owner, const struct onion_journal_owner *alternative);
/* The records that were taken are durable in a frame, behind which the log stands as `now` says. */
void onion_journal_drop_taken(struct onion_volume *volume, const struct onion_journal_owner *now);
/* A flush that changed nothing gives its half back, before the records that came since. -EIO. */
int onion_journal_put_back(struct onion_volume *volume, struct onion_dirty_records *batch);
/* Copies records out of a half; a page that cannot be read is -EIO. */
int onion_journal_copy(struct onion_record *to, const struct onion_record *from, size_t count);
/* A rewrite is about to be committed: later records may go on from its map too. */
void onion_journal_add_owner(struct onion_volume *volume, const struct onion_journal_owner *alternative);
/* It is this map that they go on from. */
void onion_journal_resolve_owner(struct onion_volume *volume, const unsigned char *map_id);
/* Says on the disk that a sync failed, before anybody is told. */
void onion_journal_mark_poisoned(struct onion_volume *volume);
/* The work that the mark asked for was done. */
void onion_journal_clear_poisoned(struct onion_volume *volume);
/* Empties the file, unless it holds records that are not durable. */
void onion_journal_close(struct onion_volume *volume);

#endif
