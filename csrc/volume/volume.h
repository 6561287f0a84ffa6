/* volume.h: the data path of one open volume or view. It needs no Python, and any thread may call it.
 *
 * A volume is a folded index over a base and a chain of sealed layers, and (for writing) a head with its own
 * segment and map log. Offsets and lengths are bytes. Every verb returns 0 (or what its comment says) or a negative
 * code of base/status.h.
 *
 * What must hold
 *  - Readers take no lock. Objects that they may still see (leaves, mappings, freed slots) outlive them: see
 *    base/epoch.h.
 *  - A change becomes visible in the index and in the list of dirty records together, under dirty_lock. The
 *    bytes that it names were written before. So a flush that takes the list and then syncs the segments has synced
 *    everything that its frame names.
 *  - A slot that was freed is given back only after the frame that frees it is durable and every read that began
 *    before has ended.
 *  - Writers hold `gate` shared; seal, resize and close hold it alone. A striped lock orders writers to one 2 MiB
 *    range. The flush gate orders flushes. Seal and rewrite keep it closed until their outcome is known.
 * Order of locks: flush gate, gate, stripe, dirty_lock / slots_lock / mapping_lock (leaves). */
#ifndef ONIONSKIN_VOLUME_VOLUME_H
#define ONIONSKIN_VOLUME_VOLUME_H

#include <stdint.h>

#include "base/epoch.h"
#include "base/status.h"
#include "index/blockmap.h"
#include "layer/map_log.h"

struct onion_volume;

struct onion_segment_ref {
    unsigned char uuid[ONION_UUID_BYTES];
    uint64_t slots;
};

/* A sealed layer's files, as the catalog has them. map_length 0: an empty layer without a map file. */
struct onion_layer_source {
    const char *map_path;
    unsigned char map_id[ONION_UUID_BYTES];
    uint64_t map_length, map_frames;
    uint32_t map_crc;
    const struct onion_segment_ref *segments;
    uint32_t segment_count;
};

struct onion_head_source {
    const char *map_path;
    unsigned char map_id[ONION_UUID_BYTES];
    const struct onion_segment_ref *inherited;
    uint32_t inherited_count;
    const unsigned char (*own)[ONION_UUID_BYTES]; /* the first is where new blocks go */
    uint32_t own_count;
    unsigned char spare[ONION_UUID_BYTES];
    /* What the catalog knows to be durable in the log: it passes through exactly this point, or it is damaged. 0
     * frames: nothing is known, and the log may be missing or torn anywhere. */
    uint64_t known_length, known_frames;
    uint32_t known_crc;
    const char *dirty_path; /* where dirty records survive the process (journal.h); NULL: they do not */
};

struct onion_sealed {
    uint64_t map_length, map_frames; /* length 0: nothing is in the map, whether it has a file or not */
    uint32_t map_crc;
    uint64_t size_bytes;
};

/* An empty volume: nothing is open yet. segments_directory and layers_directory are synced after files are made. */
int onion_volume_new(uint32_t block_size, uint64_t size_bytes, const char *segments_directory,
                     const char *layers_directory, int wipe_zero, int writable, struct onion_volume **out);
/* Maps the raw image that fd is open on. The caller may close fd. The image must hold size_bytes bytes, unless
 * allow_short: then the bytes that it does not hold read zero. ONION_E_FORMAT: it is shorter. Call it before the
 * first layer. */
int onion_volume_set_base(struct onion_volume *volume, int fd, uint64_t size_bytes, int allow_short);
/* Adds a sealed layer over those added before; checks all that the source says. */
int onion_volume_add_layer(struct onion_volume *volume, const struct onion_layer_source *source);
/* Makes the index of the layers that were added: before the first read of a view. open_head does it too. */
int onion_volume_fold_layers(struct onion_volume *volume);
/* Adds the head, last. It cuts off a torn frame, and syncs all that it finds, because data that can be read after a
 * crash need not be durable. Records that a process that died in this boot left at dirty_path are dirty records again.
 * If a sync of that process failed, all contents of the head's own files are written again. */
int onion_volume_open_head(struct onion_volume *volume, const struct onion_head_source *source);
/* The same for a volume that is not writable: reads the log as far as it is whole, and changes and syncs nothing. No
 * writer may have the head open meanwhile. The spare and dirty_path are not looked at. */
int onion_volume_open_head_to_read(struct onion_volume *volume, const struct onion_head_source *source);
/* Finds the free slots of the head's own segments; with policy `zero` wipes those that still hold bytes. */
int onion_volume_free_own_slots(struct onion_volume *volume);

uint64_t onion_volume_size(const struct onion_volume *volume);
uint32_t onion_volume_block_size(const struct onion_volume *volume);
uint64_t onion_volume_memory(const struct onion_volume *volume);

int onion_volume_read(struct onion_volume *volume, uint64_t offset, uint64_t length, void *out);
int onion_volume_write(struct onion_volume *volume, uint64_t offset, uint64_t length, const void *bytes);
/* Both make the range read zero and free the whole blocks in it. */
int onion_volume_zero(struct onion_volume *volume, uint64_t offset, uint64_t length);
/* count blocks of block_size bytes each, in the order of block_indices. In the last block, the bytes past the
 * volume's end read zero and are not written. */
int onion_volume_read_blocks(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count, void *out);
int onion_volume_write_blocks(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count,
                              const void *bytes);
/* The read plan, for code that sends bytes without copying them. Between plan_begin and plan_end, the pieces that
 * onion_volume_plan hands out stay mapped, and their slots are not used again. The ticket keeps freed slots and
 * replaced mappings of the whole volume waiting. So it is held for one system call that does not block, and never
 * while a client takes its time. */
struct onion_piece {
    const char *address; /* NULL: reads zero */
    uint64_t length;
};
/* 0, or why no verb may run; then there is no ticket. */
int onion_volume_plan_begin(struct onion_volume *volume, struct onion_ticket *ticket);
void onion_volume_plan_end(struct onion_volume *volume, struct onion_ticket ticket);
/* Up to `capacity` pieces that make up the range from its start on, neighbours joined; returns how many, and through
 * *planned how many bytes they hold (all of the range, where capacity sufficed). */
int64_t onion_volume_plan(struct onion_volume *volume, uint64_t offset, uint64_t length, struct onion_piece *pieces,
                          uint32_t capacity, uint64_t *planned);
/* Loads a byte of each page, so that a file that fails under its mapping is known before its bytes are promised to
 * anyone: 0 or -EIO. */
int onion_pieces_touch(const struct onion_piece *pieces, uint64_t count);
/* Everything that was acknowledged before the call is durable after it. -ENOSPC: nothing changed, try again. Any
 * failure of a sync poisons the volume. */
int onion_volume_flush(struct onion_volume *volume);
/* Holds writers off until the same thread thaws the volume or closes it; then they go on, or find it closed. -EBUSY:
 * something was written, or a frame was added, since the log had `frames` frames. */
int onion_volume_freeze(struct onion_volume *volume, uint64_t frames);
void onion_volume_thaw(struct onion_volume *volume);
/* Whether a flush would have something to make durable. */
int onion_volume_unflushed(struct onion_volume *volume);
/* Begins to write out the data of the next flush, for a caller that does something else first. A hint: nothing is
 * durable. */
void onion_volume_start_writing(struct onion_volume *volume);
/* Durable on return. */
int onion_volume_resize(struct onion_volume *volume, uint64_t size_bytes);

/* Up to `capacity` runs that are not HOLE from block_index on; *next is where to go on (the block count at the end). */
int64_t onion_volume_runs(struct onion_volume *volume, uint64_t block_index, uint64_t block_end, struct onion_run *runs,
                          uint64_t capacity, uint64_t *next);
enum onion_extent_kind {
    ONION_EXTENT_NONE,  /* nothing anywhere: reads zero */
    ONION_EXTENT_BASE,  /* the base's own bytes */
    ONION_EXTENT_ZERO,  /* zero, and hides the layers below */
    ONION_EXTENT_HEAD,  /* data that the head holds */
    ONION_EXTENT_BELOW, /* data of a layer below the head */
};
struct onion_extent {
    uint64_t offset, length;
    enum onion_extent_kind kind;
    uint64_t birth; /* HEAD, BELOW: of its segment, see onion_volume_birth; BASE, NONE: of the youngest segment that was
                     * merged into what lies there */
};
/* Up to `capacity` extents that make up the range from its start on; returns how many (at least 1). A hole of the base
 * file is NONE; where its file system knows no holes, all of it is BASE. */
int64_t onion_volume_extents(struct onion_volume *volume, uint64_t offset, uint64_t length,
                             struct onion_extent *extents, uint32_t capacity);
/* The birth of the segment that new blocks go to. Segments are counted as they are added, and no count is given
 * twice in an opening, unlike numbers. Data that is written from now on has this birth or a greater one, or is in a
 * block that the head holds already. 0: a view. */
uint64_t onion_volume_birth(struct onion_volume *volume);
/* Finds the slots of the segment that the index, or a change that is not yet durable, needs: a bitmap of *bits bits
 * that the caller frees. The index is that of the head at that time, so the caller checks afterwards that it is the
 * head it means. Flushes, and waits for writers. */
int onion_volume_live_slots(struct onion_volume *volume, const unsigned char *uuid, unsigned char **bitmap,
                            uint64_t *bits);
/* Returns when every read that began before has ended. */
int onion_volume_wait_for_readers(struct onion_volume *volume);
/* Segments, except those that the head writes, in which slots became free since the last call: the ids of up to
 * `capacity`. Returns how many. */
int onion_volume_reclaim_wanted(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES],
                                uint32_t capacity);
/* Puts a wish back that reclaim_wanted gave out. Ids of segments that are gone are left out. */
void onion_volume_reclaim_again(struct onion_volume *volume, const unsigned char (*uuids)[ONION_UUID_BYTES],
                                uint32_t count);
/* Whether there may be some. Costs nothing. */
int onion_volume_wants_reclaim(struct onion_volume *volume);

/* Bytes of own slots that were wiped since the last call, and whose old contents overwriting cannot have reached. */
uint64_t onion_volume_take_unwipeable(struct onion_volume *volume);

struct onion_segment_info {
    uint32_t number;
    unsigned char uuid[ONION_UUID_BYTES];
    uint64_t slots; /* ever handed out; 0 where the file was never made */
    int role;       /* 0 sealed, 1 inherited by the head, 2 made by the head */
};
/* Returns how many there are; fills as many as fit. */
uint32_t onion_volume_segments(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity);
/* The same for those that a seal under way has sealed, until its outcome is known. */
uint32_t onion_volume_just_sealed(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity);

/* Snapshot. seal makes the head a sealed layer and starts a new one whose map file will be `map_path`, then makes
 * the sealed one durable. On 0 the flush gate stays closed until seal_commit or seal_abort is called by any thread.
 * On an error the old head goes on, as after seal_abort. */
int onion_volume_seal(struct onion_volume *volume, const char *map_path, const unsigned char *map_id,
                      struct onion_sealed *sealed);
int onion_volume_seal_commit(struct onion_volume *volume, const unsigned char *next_spare);
/* The old head goes on, whatever stage the seal was in (see below), and owns what was written since. */
int onion_volume_seal_abort(struct onion_volume *volume);

/* The same in stages, so that several volumes are cut at one instant: begin, hold, cut, release and sync come to
 * onion_volume_seal. From a begin on, the flush gate stays closed until seal_commit, seal_abort, or an error of the
 * sync: after that the old head goes on already. -EINVAL: the seal is not in the stage before.
 *   begin    may take long, with writers at work; on an error nothing has changed
 *   hold     waits for the writers inside, and keeps others waiting
 *   cut      takes what is written, and swaps the heads; no I/O
 *   release  lets writers go on; without a cut, as after the begin. By the thread that held, as is an abort before it
 *   sync     makes the sealed head durable; by any thread */
int onion_volume_seal_begin(struct onion_volume *volume, const char *map_path, const unsigned char *map_id);
int onion_volume_seal_hold(struct onion_volume *volume);
int onion_volume_seal_cut(struct onion_volume *volume);
void onion_volume_seal_release(struct onion_volume *volume);
int onion_volume_seal_sync(struct onion_volume *volume, struct onion_sealed *sealed);
/* Holds all volumes, each of which is there once, cuts all, and releases all: every write that was acknowledged by
 * any of them before one that the cut leaves out began is in the cut. On an error *failed is the index of the volume
 * that it is of; no writer waits, and each volume that was begun is to be aborted. */
int onion_volumes_cut(struct onion_volume *const *volumes, uint32_t count, uint32_t *failed);
/* Makes the files of the next head beforehand, durable: the spare segment, whose id is map_id too, and the map
 * `map_path`, both empty. A seal with this map_id begins with them, so the first flush after it has three syncs less.
 * -EBUSY: another segment is the spare, or none, or a seal has taken it. Where it fails with -ENOSPC nothing is lost: the next head makes its
 * files when it needs them. A seal that comes meanwhile waits. */
int onion_volume_prepare(struct onion_volume *volume, const char *map_path, const unsigned char *map_id);
int onion_volume_set_spare(struct onion_volume *volume, const unsigned char *spare);
int onion_volume_has_spare(struct onion_volume *volume);

/* Writes the head's map, folded over `lower` where given, as a compact log in a new synced file. On 0 the flush
 * gate stays closed until rewrite_commit or rewrite_abort. drop_zero: nothing lies below any more. */
int onion_volume_rewrite(struct onion_volume *volume, const char *new_path, const unsigned char *new_id,
                         const struct onion_layer_source *lower, int drop_zero, struct onion_sealed *written);
int onion_volume_rewrite_commit(struct onion_volume *volume);
int onion_volume_rewrite_abort(struct onion_volume *volume);
/* The records in the head's log, and the runs that a compact log would have. The difference is what a rewrite
 * saves. */
int onion_volume_log_records(struct onion_volume *volume, uint64_t *records, uint64_t *needed);
/* The durable state of the head's log: length, frames, and checksum of the last frame. Zeros if it has no frame. */
int onion_volume_log_state(struct onion_volume *volume, struct onion_sealed *state);
/* Whether more than half of a head's log that is not small is dead: 1 or 0. Costs nothing while little was added to
 * it. */
int onion_volume_wants_compact_map(struct onion_volume *volume);
/* Whether it is worth to ask that. Costs nothing. */
int onion_volume_may_want_compact_map(const struct onion_volume *volume);

/* Replaces the lowest layers in two steps, while reads and writes go on: layers that were merged into the base or
 * copied into one new layer, and segments in which no block is left. Between the steps the caller commits.
 *
 * After commit_below, each block that was in a dropped segment, and each block that the volume did not hold, reads
 * from `layer` if that has it, and else from the base. The caller guarantees that it read the same before. ZERO
 * stays ZERO, and blocks in other segments stay. */
struct onion_below_source {
    int keep_base; /* 1: the base stays as it is; 0: it is what base_fd is open on, or none at -1 */
    int base_fd;
    uint64_t base_bytes;
    const struct onion_layer_source *layer; /* or NULL; with keep_base, it has all that is in the dropped segments */
    const unsigned char (*dropped)[ONION_UUID_BYTES];
    uint32_t dropped_count;
};
/* All that can fail: maps the base, loads and checks the layer, makes room. -EBUSY: another replacement is prepared, or
 * the head still needs a segment that is to be dropped; -ENOENT: there is no such segment. */
int onion_volume_prepare_below(struct onion_volume *volume, const struct onion_below_source *source);
/* 0: done; the numbers, the memory and the mappings of dropped segments, and the old base, are given back: no read
 * needs them any more. A negative code: memory is missing, or the volume cannot be used. All reads as before, from the
 * old files as well as the new: the caller keeps their locks, and may call again. */
int onion_volume_commit_below(struct onion_volume *volume);
/* The old files stay. Nothing is done where nothing is prepared. */
void onion_volume_abort_below(struct onion_volume *volume);
/* Segments that the caller may drop, where the catalog says that they are the head's: no block and no record of the
 * head's log names them. Flushes. Returns how many there are and gives the ids of as many as fit. */
int64_t onion_volume_unused_segments(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES],
                                     uint32_t capacity);

/* A read-only mapping of a page-aligned range of a view, made of the segments' own pages. -E2BIG: more than run_max
 * pieces, or than the process may map. The caller frees it, with the number of pieces that it was told. */
int onion_volume_map_range(struct onion_volume *volume, uint64_t offset, uint64_t length, uint64_t run_max,
                           void **address, uint64_t *mapped_length, uint64_t *pieces);
void onion_mapped_range_free(void *address, uint64_t mapped_length, uint64_t pieces);

int onion_volume_poisoned(const struct onion_volume *volume);
int onion_volume_closed(const struct onion_volume *volume);
void onion_volume_poison(struct onion_volume *volume);
/* In the child of a fork: every later call returns ONION_E_FORKED. */
void onion_volume_after_fork(struct onion_volume *volume);
/* Waits for calls under way, then unmaps and closes. Does not flush. Later calls return ONION_E_CLOSED. */
void onion_volume_close(struct onion_volume *volume);
/* Frees the memory. No thread may be inside or come later. */
void onion_volume_free(struct onion_volume *volume);

#endif
