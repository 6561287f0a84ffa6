/* internal.h: the types and functions that the files of the volume share. They are private to these files.
 *
 * The functions are listed by file, from the bottom up: a file calls only files that are listed before it.
 * tools/check_layers.py finds files that call each other. */
#ifndef ONIONSKIN_VOLUME_INTERNAL_H
#define ONIONSKIN_VOLUME_INTERNAL_H

#include <errno.h>
#include <pthread.h>

#include "base/barrier.h"
#include "base/epoch.h"
#include "base/mappings.h"
#include "base/site.h"
#include "base/whole_io.h"
#include "index/bulk_build.h"
#include "volume/journal.h"
#include "volume/segment.h"
#include "volume/volume.h"

#define ONION_STRIPES 256

/* A slot that a dirty record freed. */
struct onion_freed {
    uint32_t segment;
    uint32_t slot;
    uint32_t count;
};

/* The map changes since the last flush, in order. A record names its segment by the number in the index. A SEGMENT
 * record says which segment has that number, for an opening that finds the records in the journal. */
struct onion_dirty_records {
    struct onion_record *records; /* in a half of the journal, or in the heap */
    size_t record_count, record_capacity;
    uint64_t *published; /* the half's count: records that it counts survive the process. NULL: they are in the heap */
    size_t join_from;    /* records before this one must not be changed any more */
    int is_held;         /* new records are not published, because they belong to a change that is all or nothing */
    uint32_t declared;   /* the segment of the last SEGMENT record */
    struct onion_freed *freed;
    size_t freed_count, freed_capacity;
    uint64_t freed_slots; /* the number of slots in all of `freed` */
    /* The volume flushes by itself when this much more waits. They are raised when such a flush finds the disk full. */
    size_t flush_at_records;
    uint64_t flush_at_slots;
};

/* The limits of what may wait until the volume flushes by itself. Records take memory and make a frame long. Freed
 * slots take space, which a guest could otherwise fill by writing and trimming without end. Above the hard limit,
 * writers wait. */
#define ONION_WAITING_RECORDS_MAX (1u << 18)
#define ONION_WAITING_BYTES_MAX (16ull << 20)
#define ONION_WAITING_BYTES_HARD (32ull << 20)

/* The head's map log, and the point at which the next frame goes. */
struct onion_head_log {
    char *path;
    unsigned char map_id[ONION_UUID_BYTES];
    int fd; /* -1: no file yet */
    struct onion_log_cursor cursor;
    uint32_t numbers_given;
    uint64_t record_count;
    uint64_t room_end; /* the file is written up to this offset: frames, then zeros */
    int is_new;        /* its header and its name are not synced yet */
};

/* How far a seal is: see seal.c. */
enum onion_seal_stage {
    ONION_SEAL_NONE,
    ONION_SEAL_BEGUN,
    ONION_SEAL_HELD,
    ONION_SEAL_CUT,
    ONION_SEAL_RELEASED,
    ONION_SEAL_SYNCED,
};

struct onion_seal {
    enum onion_seal_stage stage;
    int spare_taken;                  /* guarded by prepare_lock: nobody makes files of the spare any more */
    struct onion_dirty_records batch; /* CUT, RELEASED: what was cut off and is not durable yet */
    uint64_t size_bytes;              /* at the cut */
};

struct onion_volume {
    uint32_t block_size, block_shift, blocks_per_range;
    uint64_t size_bytes; /* atomic: readers check their ranges against it */
    int wipe_zero, writable;
    uint64_t bytes_unwipeable;    /* atomic; see onion_volume_take_unwipeable */
    int poisoned, closed, forked; /* atomic */
    int superseded;               /* the catalog has another head for the disk: what is not durable here is nobody's */
    int reclaim_wanted;           /* atomic: reclaim_wanted of some segment is set, or was set */
    int flush_wanted;             /* atomic: more waits for a flush than should */
    uint64_t log_bytes,
        compact_map_at; /* atomic: the log's length, and the length above which a rewrite may be worthwhile */
    char *segments_directory, *layers_directory;
    struct onion_store store; /* which one these were in at the opening */

    struct onion_map index;
    struct onion_build build; /* the changes that were replayed, until the index is made from them */
    struct onion_epoch epoch;
    struct onion_segment **segments; /* by number; ONION_SEGMENT_LAST + 1 entries */
    uint32_t segment_count;          /* numbers 1 to segment_count are in use, or vacant */
    struct onion_segment *vacant;    /* the entry of each number that was given back: no id, no head, no file */
    uint32_t vacant_count;
    uint64_t mappings;         /* the number of mappings set aside: see base/mappings.h */
    uint64_t births;           /* the number of segments ever added */
    uint64_t below_birth;      /* the birth of the youngest segment that is now part of what HOLE reads */
    struct onion_below *below; /* a replacement that is prepared; guarded by the flush gate */

    struct onion_mapping *base; /* NULL: there is none */
    uint64_t base_bytes;
    int nothing_below; /* there is no layer and no base below the head, so HOLE and ZERO read the same */

    pthread_rwlock_t gate;
    pthread_mutex_t stripes[ONION_STRIPES];
    pthread_mutex_t slots_lock;
    pthread_mutex_t dirty_lock; /* guards the next two */
    struct onion_dirty_records dirty_records;
    struct onion_journal journal;

    pthread_mutex_t flush_lock; /* guards the two below; the gate is closed while flush_busy */
    pthread_cond_t flush_free;
    int flush_busy;

    uint64_t generation;              /* the head's; a segment belongs to the head if it has the same generation */
    uint32_t own;                     /* number of the segment that new blocks go to */
    uint32_t spare;                   /* number of the next head's segment; 0: there is none */
    struct onion_segment *next_spare; /* memory for the spare after it, while a seal waits for its outcome */
    struct onion_head_log log;
    struct onion_head_log next_log;     /* while a seal or a rewrite waits for its outcome */
    pthread_mutex_t prepare_lock;       /* guards prepared_log and the making of the spare's file */
    struct onion_head_log prepared_log; /* the next head's log, if its files were made beforehand */
    uint16_t *next_numbers;             /* a rewrite's log numbers, by segment number */
    struct onion_seal seal;
    int sealing, rewriting;
    int frozen; /* prepare_lock and the gate are held until the volume is closed or thawed */
};

/* ---- the sources of a volume's bytes ---- */

enum onion_source_kind { ONION_SOURCE_ZERO, ONION_SOURCE_DATA, ONION_SOURCE_BASE };

/* One run of a range: its first bytes, which all have one source. */
struct onion_source {
    enum onion_source_kind kind;
    uint64_t length;                  /* bytes of the range in this run */
    uint64_t offset;                  /* BASE: in its file. DATA: from the start of the slot */
    const struct onion_mapping *base; /* BASE */
    struct onion_segment *segment;    /* DATA: block_count blocks in consecutive slots from `slot` on */
    uint32_t slot;
    uint64_t block_count;
};

/* Finds the first run of a range. Reading, the read plan and the mapping of a view all use it. The caller has a
 * reader's ticket, or holds the stripe. */
static inline void onion_volume_next_run(const struct onion_volume *volume, uint64_t offset, uint64_t length,
                                         struct onion_source *source) {
    uint64_t start = offset & (volume->block_size - 1);
    uint64_t wanted = (start + length + volume->block_size - 1) >> volume->block_shift;
    struct onion_run run;
    onion_map_run_at(&volume->index, offset >> volume->block_shift, wanted, &run);
    uint64_t bytes = (run.block_count << volume->block_shift) - start;
    source->length = bytes < length ? bytes : length;
    source->kind = ONION_SOURCE_ZERO;
    if (onion_location_is_data(run.location)) {
        source->kind = ONION_SOURCE_DATA;
        source->offset = start;
        source->segment = volume->segments[onion_location_segment(run.location)];
        source->slot = onion_location_slot(run.location);
        source->block_count = run.block_count;
    } else if (run.location == ONION_LOCATION_HOLE) {
        const struct onion_mapping *base = __atomic_load_n(&volume->base, __ATOMIC_ACQUIRE);
        if (base && offset < base->length) { /* zeros past the end of the base are another run */
            source->kind = ONION_SOURCE_BASE;
            source->offset = offset;
            source->base = base;
            if (source->length > base->length - offset)
                source->length = base->length - offset;
        }
    }
}

/* Finds the address of the bytes in memory; NULL: they are zero. The segment is mapped now if it is not yet. */
static inline int onion_source_address(const struct onion_source *source, struct onion_epoch *epoch,
                                       const char **address) {
    *address = source->kind == ONION_SOURCE_BASE ? source->base->address + source->offset : NULL;
    if (source->kind != ONION_SOURCE_DATA)
        return 0;
    int status = onion_segment_address(source->segment, epoch, source->slot, source->block_count, address);
    if (__builtin_expect(status == 0, 1))
        *address += source->offset;
    return status;
}

/* ---- checks and marks ---- */

/* Returns 0, or the code that says why no verb may run now. */
static inline int onion_volume_usable(const struct onion_volume *volume) {
    if (__atomic_load_n(&volume->forked, __ATOMIC_RELAXED))
        return ONION_E_FORKED;
    if (__atomic_load_n(&volume->closed, __ATOMIC_SEQ_CST))
        return ONION_E_CLOSED;
    if (__atomic_load_n(&volume->poisoned, __ATOMIC_SEQ_CST))
        return ONION_E_POISONED;
    return 0;
}

static inline int onion_volume_in_bounds(const struct onion_volume *volume, uint64_t offset, uint64_t length) {
    uint64_t size = __atomic_load_n(&volume->size_bytes, __ATOMIC_ACQUIRE);
    return offset <= size && length <= size - offset;
}

static inline int onion_volume_has_blocks(const struct onion_volume *volume, const uint64_t *block_indices,
                                          uint64_t count) {
    uint64_t size = __atomic_load_n(&volume->size_bytes, __ATOMIC_ACQUIRE);
    uint64_t blocks = (size + volume->block_size - 1) >> volume->block_shift;
    for (uint64_t i = 0; i < count; i++)
        if (block_indices[i] >= blocks)
            return 0;
    return 1;
}

/* Returns whether a write failed for lack of room: a full disk, a quota, or a limit on the size of files. */
static inline int onion_has_no_room(int status) { return status == -ENOSPC || status == -EDQUOT || status == -EFBIG; }

static inline int onion_segment_is_head(const struct onion_volume *volume, const struct onion_segment *segment) {
    return segment->generation == volume->generation;
}

static inline int onion_location_is_own(const struct onion_volume *volume, onion_location location) {
    if (!onion_location_is_data(location))
        return 0;
    const struct onion_segment *segment = volume->segments[onion_location_segment(location)];
    return segment->own && onion_segment_is_head(volume, segment);
}

/* Sets the segment's own mark first, because the thread that takes the volume's mark looks at the segments
 * afterwards. */
static inline void onion_volume_want_reclaim(struct onion_volume *volume, struct onion_segment *segment) {
    __atomic_store_n(&segment->reclaim_wanted, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&volume->reclaim_wanted, 1, __ATOMIC_SEQ_CST);
}

/* For a caller that holds the flush gate closed and opens it soon. onion_volume_poison also wakes the threads that wait
 * at the gate. */
static inline void onion_volume_mark_poisoned(struct onion_volume *volume) {
    __atomic_store_n(&volume->poisoned, 1, __ATOMIC_SEQ_CST);
}

/* ---- base_image.c ---- */

/* Maps the raw image that fd is open on, through a descriptor of its own. */
int onion_base_map(int fd, uint64_t size_bytes, int allow_short, struct onion_mapping **out);
void onion_base_release(void *context, void *mapping);

/* ---- segment_table.c ---- */

int onion_volume_add_segment(struct onion_volume *volume, const unsigned char *uuid, uint32_t *number);
/* Does the same with a description that was made before. It cannot fail if onion_volume_numbers_left is not 0. */
uint32_t onion_volume_number_segment(struct onion_volume *volume, struct onion_segment *segment);
uint32_t onion_volume_numbers_left(const struct onion_volume *volume);
/* Sets mappings aside for as long as the volume is open. 0 or ONION_E_MAPPINGS. */
int onion_volume_take_mappings(struct onion_volume *volume, uint64_t count);
/* Gives a number back, and returns its segment, which the caller frees. No entry of the index names the number, and no
 * reader that found such an entry is still inside. The caller holds the gate alone. */
struct onion_segment *onion_volume_vacate(struct onion_volume *volume, uint32_t number);
uint32_t onion_volume_find_segment(const struct onion_volume *volume, const unsigned char *uuid);
/* Returns the number of segments that a record may name: those that this head made, or the head that is being
 * sealed. */
uint32_t onion_volume_own_segment_count(const struct onion_volume *volume);

/* ---- sealed_map.c ---- */

struct onion_layer;
struct onion_map_bytes;

/* 0, or a code if the header is not that of a map with this id and the volume's block size. */
int onion_volume_check_map_header(const struct onion_volume *volume, const unsigned char *map_id,
                                  const struct onion_map_bytes *map);
/* Reads the map of a sealed layer and checks its header. The caller frees *map, also after an error. */
int onion_volume_read_sealed_map(const struct onion_volume *volume, const struct onion_layer_source *source,
                                 struct onion_map_bytes *map, uint64_t *fault);
/* Checks the end of a replay that returned `status`: a sealed map has no torn frame, and ends with the frame that the
 * source names. */
int onion_volume_check_sealed_end(const struct onion_layer_source *source, const struct onion_log_cursor *end,
                                  int status);
/* Loads the map of a sealed layer into an empty `layer`. */
int onion_volume_load_sealed_map(const struct onion_volume *volume, const struct onion_layer_source *source,
                                 struct onion_layer *layer);

/* ---- dirty_records.c ---- */

/* Notes the journal's file as the place of an error, for the message. Returns `status`. The caller holds dirty_lock. */
int onion_dirty_records_note_fault(struct onion_volume *volume, int status);

/* Appends a record, for which make_room was called. If it continues the last record, it is joined to it. -EIO: the
 * mapping failed, and nothing changed. The caller holds dirty_lock. */
int onion_dirty_records_put(struct onion_volume *volume, const struct onion_record *record);
/* The part of the list's state that putting a record changes. */
struct onion_dirty_records_mark {
    size_t record_count;
    uint32_t last_blocks, declared;
};
struct onion_dirty_records_mark onion_dirty_records_mark(const struct onion_dirty_records *dirty);
/* Takes the last record back, because the index could not be changed. */
void onion_dirty_records_take_back(struct onion_dirty_records *dirty, const struct onion_dirty_records_mark *mark);

/* ---- state.c ---- */

/* Waits at the flush gate and closes it. Returns 0, or the code that says why there can be no flush. */
int onion_volume_close_flush_gate(struct onion_volume *volume);
/* -EBUSY: it is closed, by who may wait for others for long. */
int onion_volume_try_flush_gate(struct onion_volume *volume);
/* Keeps the gate closed until the outcome of a seal or a rewrite is known, and sets *sealing_or_rewriting to `kind`.
 * onion_volume_close need not wait for the outcome. */
void onion_volume_keep_flush_gate(struct onion_volume *volume, int *sealing_or_rewriting, int kind);
void onion_volume_open_flush_gate(struct onion_volume *volume);
/* Poisons the volume if `status` is an error. Called after a sync, or after a step that cannot be undone. Returns
 * `status`. */
int onion_volume_poison_on(struct onion_volume *volume, int status);
int onion_volume_sync_segment_names(struct onion_volume *volume);

/* ---- head_log.c ---- */

/* Describes a log that has no file yet. */
int onion_head_log_describe(struct onion_head_log *log, const char *map_path, const unsigned char *map_id);
/* Makes the log's file: the header, and zeros for the first frames if there is room for them. */
int onion_head_log_create(struct onion_volume *volume, struct onion_head_log *log);
/* Makes the file, and starts to write it out. The sync of the segments waits for a commit of the file system's journal.
 * That commit then holds this file too, so the file's own sync need not wait for another commit. */
int onion_head_log_begin(struct onion_volume *volume, struct onion_head_log *log);
int onion_head_log_sync_new(struct onion_volume *volume, struct onion_head_log *log);
int onion_head_log_draw_salt(struct onion_head_log *log);
int onion_head_log_append(struct onion_head_log *log, const struct onion_record *records, uint32_t count);
void onion_head_log_close(struct onion_head_log *log);
/* Notes the log's length for onion_volume_may_want_compact_map. */
void onion_volume_note_log_bytes(struct onion_volume *volume, const struct onion_head_log *log);
/* Returns the present state of a log, which the journal's records go on from. */
struct onion_journal_owner onion_head_log_owner(const struct onion_head_log *log);
/* Makes the dirty records go on from the head's log, and no longer from an alternative. */
void onion_volume_resolve_owner(struct onion_volume *volume);

/* ---- reclaim.c ---- */

/* Wipes (policy `zero`) and punches slots of one own segment, then lets them be used again. */
int onion_volume_reclaim(struct onion_volume *volume, struct onion_segment *segment, const struct onion_freed *freed,
                         size_t count);
/* Call it after the frame that freed the slots is durable. Inherited segments are shared with other handles, so their
 * slots are not given back here: the operation that holds the layer alone reclaims them. */
int onion_volume_reclaim_freed(struct onion_volume *volume, struct onion_dirty_records *batch);

/* ---- read.c ---- */

/* Reads like onion_volume_read, but also past the volume's end, up to the end of the last block, as the block holds
 * it. */
int onion_volume_read_unbounded(struct onion_volume *volume, uint64_t offset, uint64_t length, void *out);

/* ---- flush.c ---- */

/* Flushes because too much waits for a flush. A full disk is no error here. */
int onion_volume_relieve(struct onion_volume *volume);
/* Takes the dirty records away. The caller makes them durable or puts them back. next: the log of the head that a seal
 * begins, or NULL. */
struct onion_dirty_records onion_volume_take_dirty_records(struct onion_volume *volume,
                                                           const struct onion_head_log *next);
/* Makes a batch durable in `log`. After a failure the batch is back in the list of dirty records. */
int onion_volume_commit_batch(struct onion_volume *volume, struct onion_head_log *log,
                              struct onion_dirty_records *batch, int of_sealed);
/* Puts a batch back before the newer records, because the flush changed nothing. */
void onion_volume_put_back(struct onion_volume *volume, struct onion_dirty_records *batch);
/* Frees what a batch holds of the heap. */
void onion_volume_release_batch(struct onion_dirty_records *batch);
int onion_volume_flush_behind_gate(struct onion_volume *volume);

/* ---- seal.c ---- */

/* Whether the begin of a seal would wait now, for a flush under way or for one of its own. */
int onion_volume_seal_would_wait(struct onion_volume *volume);

/* ---- replace_below.c ---- */

void onion_below_free(struct onion_below *below);

/* ---- write.c ---- */

/* Maps blocks to a location, appends the record, and frees the slots that the head held for these blocks. It does all
 * of this or nothing. The caller holds the stripe. */
int onion_volume_change(struct onion_volume *volume, uint64_t block_index, uint64_t block_count,
                        onion_location location);
/* Writes bytes of one block: in its slot if the head holds the block and !fresh, otherwise in a new slot. The caller
 * holds the stripe. */
int onion_volume_write_part(struct onion_volume *volume, uint64_t block_index, uint32_t start, uint32_t length,
                            const void *bytes, int fresh);
/* Makes room for one more record, and for one that names its segment. ONION_E_JOURNAL_FULL: a flush makes room. The
 * caller holds dirty_lock. */
int onion_dirty_records_make_room(struct onion_volume *volume);

/* ---- lifecycle.c ---- */

/* Makes room in the index for a volume of this size. No thread writes meanwhile. */
int onion_volume_grow_index(struct onion_volume *volume, uint64_t size_bytes);
void onion_volume_retire_leaf(void *context, void *leaf);

#endif
