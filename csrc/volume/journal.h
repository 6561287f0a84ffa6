/* journal.h: keeps the dirty records of a head in a file, so that none is lost when the process dies.
 *
 * The records lie in a mapped file, volumes/ID.dirty. Data that was stored in a mapped page stays when the process is
 * killed, and storing it costs no system call. The file is valid only for the same boot and the same mount, so it is
 * never synced. It is made at the first change of an opening. docs/format.md describes its bytes.
 *
 * What must hold
 *  - There are two halves. One half takes new records. A flush takes the records of that half, and new records go to
 the
 *    other half. A half is emptied when the frame with its records is durable, and before a slot that the frame freed
 is
 *    given back. So no record that is left names a slot that was used again. Applying records twice changes nothing,
 *    because the last record of a block counts.
 *  - A half names the state that it goes on from: a map, and the last frame in it. While a seal or a rewrite waits
 *    for its outcome, a half names two states, since the catalog may name either.
 *  - A mapped page always has a block on the disk (fallocate), so a full disk is an error and not a signal. The SIGBUS
 *    guard catches other failures of a page.
 *  - A half that a flush has taken has room for all records that are added meanwhile, so that it can always be put
 back.
 * The volume's dirty_lock guards all of this. */
#ifndef ONIONSKIN_VOLUME_JOURNAL_H
#define ONIONSKIN_VOLUME_JOURNAL_H

#include <stddef.h>
#include <stdint.h>

#include "layer/map_log.h"

struct onion_volume;
struct onion_dirty_records;

#define ONION_JOURNAL_STAGED_NAMES 4 /* a file is made under the path with .0 to .3 appended, and renamed to the path */
#define ONION_JOURNAL_MAGIC "ONIONDTY"
#define ONION_JOURNAL_VERSION 1u
#define ONION_JOURNAL_HEADER_BYTES 4096u
#define ONION_JOURNAL_RECORDS_MAX (1u << 19) /* in one half */

/* A state of a map that a half goes on from: the map has `frames` frames, and the last has this CRC. frames 0 while it is
 * advancing: any state of the map. */
struct onion_journal_owner {
    unsigned char map_id[ONION_UUID_BYTES];
    uint64_t frames;
    uint32_t crc;
    uint32_t is_advancing;
};

enum onion_journal_poison {
    ONION_JOURNAL_POISONED = 1,
    ONION_JOURNAL_WAS_POISONED = 2, /* the contents were written again; the records may still be one frame behind */
};

struct onion_journal_half {
    uint64_t order; /* if both halves have records, the half with the lower order is older */
    uint64_t record_count;
    struct onion_journal_owner owner, alternative;
};

struct onion_journal_header {
    char magic[8];
    uint32_t version;
    uint32_t block_size;
    unsigned char boot_id[16];
    uint64_t device;
    uint64_t filesystem; /* a number that identifies this mount; `filesystem_kind` says what kind of number it is */
    uint32_t filesystem_kind;
    uint32_t poisoned;  /* 1: a sync failed, so the contents of the head's own files have to be written again */
    uint64_t opened_ns; /* CLOCK_MONOTONIC at the opening that made the file */
    struct onion_journal_half halves[2];
};

struct onion_journal {
    char *path; /* NULL: the records stay in the heap */
    uint64_t opened_ns;
    uint64_t order;
    int fd;
    int current;                         /* the half that takes new records */
    int heap_taken;                      /* a flush has taken records that are in the heap and in no half */
    struct onion_journal_header *header; /* NULL: there is no file yet */
    struct onion_record *records[2];
    size_t capacity[2];
    size_t taken_count;                            /* the number of records in the other half, while a flush has it */
    struct onion_journal_owner owner, alternative; /* the states that the half with new records goes on from */
    int found_fd; /* the file of an earlier opening, while it holds records that are not durable; else -1 */
    int found_poisoned;
};

void onion_journal_init(struct onion_journal *journal);
/* Sets the path at which the file is or will be made. NULL: there will be no file. */
int onion_journal_set_path(struct onion_volume *volume, const char *path);
/* Called while a head is opened. Reads the records that a process that died left behind. If they go on from the log of
 * `length` bytes (NULL: no file), which was replayed, they become the dirty records. The head's own segments have the
 * numbers from segment_first on. A file that is not sound, not of this boot and mount, or older than the log, is ignored;
 * ONION_E_OTHER_MOUNT: records of it would be used, it is of this boot, and nobody can tell of which mount. */
int onion_journal_find(struct onion_volume *volume, const unsigned char *log, uint64_t length, uint32_t segment_first);
/* Called for a head that is opened only for reading, after its index took the records that were found. The file stays
 * as it is, for the next opening that writes. */
void onion_journal_leave_found(struct onion_volume *volume);
/* Makes room for the record of one more change, and for one more that names its segment. ONION_E_JOURNAL_FULL: the
 * caller has to flush, which makes room. */
int onion_journal_make_room(struct onion_volume *volume);
/* Called when a head was opened. Sets the state that records go on from. */
void onion_journal_begin_at(struct onion_volume *volume, const struct onion_journal_owner *owner);
/* Takes the dirty records for a flush, and switches to the other half. owner: the state that later records go on from.
 * alternative: a second such state, or NULL. */
void onion_journal_take(struct onion_volume *volume, struct onion_dirty_records *batch,
                        const struct onion_journal_owner *owner, const struct onion_journal_owner *alternative);
/* Empties the half that was taken, whose records are durable in a frame now. `now` is the state of the log after this
 * frame. */
void onion_journal_drop_taken(struct onion_volume *volume, const struct onion_journal_owner *now);
/* Puts the records that a flush took back before the newer records, because the flush changed nothing. -EIO,
 * -ENOMEM. */
int onion_journal_put_back(struct onion_volume *volume, struct onion_dirty_records *batch);
/* Copies records out of a half. -EIO: a page cannot be read. */
int onion_journal_copy(struct onion_record *to, const struct onion_record *from, size_t count);
/* Called before a rewrite is committed: later records may go on from its map too. */
void onion_journal_add_owner(struct onion_volume *volume, const struct onion_journal_owner *alternative);
/* Called when the outcome is known: later records go on from this map. */
void onion_journal_resolve_owner(struct onion_volume *volume, const unsigned char *map_id);
/* Records in the file that a sync failed, before anybody is told. */
void onion_journal_mark_poisoned(struct onion_volume *volume);
/* Removes that mark, because the data was written again and synced. */
void onion_journal_clear_poisoned(struct onion_volume *volume);
/* Empties a file whose records nobody can take any more: of another head, which the catalog has not, or of another boot.
 * Called behind the opening, under the lock of the volume, while no other data path of the volume is open here. */
void onion_journal_drop_stale(struct onion_volume *volume);
/* Empties the file, unless it holds records that are not durable, of a head that the disk still has. */
void onion_journal_close(struct onion_volume *volume);

#endif
