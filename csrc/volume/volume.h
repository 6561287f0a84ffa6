/* volume.h: the data path of one open volume or view. It needs no Python, and any thread may call it.
 *
 * A volume is a folded index over a base and a chain of sealed layers, and (for writing) a head with its own
 * segment and map log. Offsets and lengths are bytes. Every verb returns 0 (or what its comment says) or a negative
 * code of base/status.h.
 *
 * What must hold
 *  - Readers take no lock. Objects that a reader may still see (leaves, mappings, freed slots) stay until it has left:
 *    see base/epoch.h.
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
#include "base/site.h"
#include "base/status.h"
#include "index/blockmap.h"
#include "layer/map_log.h"

struct onion_volume;

struct onion_segment_ref {
    unsigned char uuid[ONION_UUID_BYTES];
    uint64_t slots;
};

/* The files of a sealed layer, as the catalog records them. map_length 0: an empty layer without a map file. */
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
    const unsigned char (*own)[ONION_UUID_BYTES]; /* new blocks go to the first */
    uint32_t own_count;
    unsigned char spare[ONION_UUID_BYTES];
    /* A point of the log that the catalog knows to be durable. A log that does not pass through exactly this point is
     * damaged. 0 frames: no point is known, and the log may be missing or torn anywhere. */
    uint64_t known_length, known_frames;
    uint32_t known_crc;
    const char *dirty_path; /* the journal's file, in which dirty records survive the process; NULL: there is none */
};

struct onion_sealed {
    uint64_t map_length, map_frames; /* length 0: the map is empty, and may have no file */
    uint32_t map_crc;
    uint64_t size_bytes;
};

/* Makes a volume in which nothing is open yet. segments_directory and layers_directory are synced after files are
 * made. */
int onion_volume_new(uint32_t block_size, uint64_t size_bytes, const char *segments_directory,
                     const char *layers_directory, int wipe_zero, int writable, struct onion_volume **out);
/* Maps the raw image that fd is open on. The caller may close fd. The image must hold size_bytes bytes; with
 * allow_short it may be shorter, and the missing bytes read zero. ONION_E_FORMAT: it is shorter. Call it before the
 * first layer. */
int onion_volume_set_base(struct onion_volume *volume, int fd, uint64_t size_bytes, int allow_short);
/* Adds a sealed layer over those added before. Checks the files against everything that the source says. */
int onion_volume_add_layer(struct onion_volume *volume, const struct onion_layer_source *source);
/* Makes the index from the layers that were added. Call it before the first read of a view. open_head does it too. */
int onion_volume_fold_layers(struct onion_volume *volume);
/* Adds the head; call it last. It cuts off a torn frame, and syncs all that it finds, because data that can be read
 * after a crash need not be durable. If a process died in this boot and left records at dirty_path, they become dirty
 * records again. If a sync of that process failed, all contents of the head's own files are written again. */
int onion_volume_open_head(struct onion_volume *volume, const struct onion_head_source *source);
/* Does the same for a volume that is not writable: it reads the log as far as it is whole, takes over the records at
 * dirty_path, and changes and syncs nothing. No writer may have the head open meanwhile. The spare is not used. */
int onion_volume_open_head_to_read(struct onion_volume *volume, const struct onion_head_source *source);
/* Finds the free slots of the head's own segments. With policy `zero`, it wipes those that still hold bytes. */
int onion_volume_free_own_slots(struct onion_volume *volume);

uint64_t onion_volume_size(const struct onion_volume *volume);
uint32_t onion_volume_block_size(const struct onion_volume *volume);
uint64_t onion_volume_memory(const struct onion_volume *volume);

int onion_volume_read(struct onion_volume *volume, uint64_t offset, uint64_t length, void *out);
int onion_volume_write(struct onion_volume *volume, uint64_t offset, uint64_t length, const void *bytes);
/* Zeroing and trimming: the range reads zero, and the slots of the whole blocks in it are freed. */
int onion_volume_zero(struct onion_volume *volume, uint64_t offset, uint64_t length);
/* Read and write `count` blocks of block_size bytes each, in the order of block_indices. In the volume's last block,
 * the bytes past its end read zero and are not written. */
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
/* Returns 0, or the code that says why no verb may run; then there is no ticket. */
int onion_volume_plan_begin(struct onion_volume *volume, struct onion_ticket *ticket);
void onion_volume_plan_end(struct onion_volume *volume, struct onion_ticket ticket);
/* Finds up to `capacity` pieces that make up the range from its start on, with neighbours joined. Returns how many, and
 * through *planned how many bytes they hold, which is the whole range if `capacity` sufficed. */
int64_t onion_volume_plan(struct onion_volume *volume, uint64_t offset, uint64_t length, struct onion_piece *pieces,
                          uint32_t capacity, uint64_t *planned);
/* Loads a byte of each page, so that a file that cannot be read through its mapping is found before its bytes are
 * promised to anyone: 0 or -EIO. */
int onion_pieces_touch(const struct onion_piece *pieces, uint64_t count);
/* Makes everything durable that was acknowledged before the call. -ENOSPC: nothing changed, and the caller may try
 * again. Any failure of a sync poisons the volume. */
int onion_volume_flush(struct onion_volume *volume);
/* Keeps writers waiting until the same thread thaws the volume or closes it. Then they go on, or find it closed.
 * -EBUSY: data was written, or a frame was added, since the log had `frames` frames. */
int onion_volume_freeze(struct onion_volume *volume, uint64_t frames);
void onion_volume_thaw(struct onion_volume *volume);
/* Returns whether a flush would have something to make durable. */
int onion_volume_unflushed(struct onion_volume *volume);
/* Begins to write out the data of the next flush, for a caller that does something else first. This is a hint: nothing
 * is durable on return. */
void onion_volume_start_writing(struct onion_volume *volume);
/* Changes the size. The new size is durable on return. */
int onion_volume_resize(struct onion_volume *volume, uint64_t size_bytes);

/* Finds up to `capacity` runs that are not HOLE from block_index on. Returns how many. Sets *next to the block at which
 * the next call goes on, which is block_end at the end. */
int64_t onion_volume_runs(struct onion_volume *volume, uint64_t block_index, uint64_t block_end, struct onion_run *runs,
                          uint64_t capacity, uint64_t *next);
enum onion_extent_kind {
    ONION_EXTENT_NONE,  /* no layer and no base has data: it reads zero */
    ONION_EXTENT_BASE,  /* the base's own bytes */
    ONION_EXTENT_ZERO,  /* it reads zero, and hides the layers below */
    ONION_EXTENT_HEAD,  /* data that the head holds */
    ONION_EXTENT_BELOW, /* data of a layer below the head */
};
struct onion_extent {
    uint64_t offset, length;
    enum onion_extent_kind kind;
    uint64_t birth; /* HEAD, BELOW: the birth of its segment, see onion_volume_birth. BASE, NONE: the birth of the
                     * youngest segment that was merged into the base */
};
/* Finds up to `capacity` extents that make up the range from its start on. Returns how many (at least 1). A hole of the
 * base file is NONE. If its file system knows no holes, all of the base is BASE. */
int64_t onion_volume_extents(struct onion_volume *volume, uint64_t offset, uint64_t length,
                             struct onion_extent *extents, uint32_t capacity);
/* Returns the birth of the segment that new blocks go to. Segments are counted as they are added, and no count is given
 * twice in an opening, unlike numbers. Data that is written from now on has this birth or a greater one, or is in a
 * block that the head holds already. 0: the volume is a view. */
uint64_t onion_volume_birth(struct onion_volume *volume);
/* Finds the slots of the segment that the index, or a change that is not yet durable, needs: a bitmap of *bits bits
 * that the caller frees. The index is that of the head at that time, so the caller checks afterwards that it is the
 * head it means. Flushes, and waits for writers. */
int onion_volume_live_slots(struct onion_volume *volume, const unsigned char *uuid, unsigned char **bitmap,
                            uint64_t *bits);
/* Returns when every read that began before has ended. */
int onion_volume_wait_for_readers(struct onion_volume *volume);
/* Finds the segments in which slots became free since the last call, except those that the head writes: the ids of up
 * to `capacity` of them. Returns how many. */
int onion_volume_reclaim_wanted(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES],
                                uint32_t capacity);
/* Makes reclaim_wanted find these segments again. Ids of segments that are gone are ignored. */
void onion_volume_reclaim_again(struct onion_volume *volume, const unsigned char (*uuids)[ONION_UUID_BYTES],
                                uint32_t count);
/* Returns whether reclaim_wanted may find segments. It costs nothing. */
int onion_volume_wants_reclaim(struct onion_volume *volume);

/* Returns the bytes of own slots that were wiped since the last call, but whose old contents overwriting cannot
 * reach. */
uint64_t onion_volume_take_unwipeable(struct onion_volume *volume);

struct onion_segment_info {
    uint32_t number;
    unsigned char uuid[ONION_UUID_BYTES];
    uint64_t slots; /* slots that were ever handed out; 0 if the file was never made */
    int role;       /* 0 sealed, 1 inherited by the head, 2 made by the head */
};
/* Returns the number of segments, and describes as many as fit. */
uint32_t onion_volume_segments(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity);
/* Does the same for the segments that a seal under way has sealed, until its outcome is known. */
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
 *   begin    may take long, with writers at work, where much waits for a flush; on an error nothing has changed
 *   hold     waits for the writers inside, and keeps others waiting
 *   cut      takes what is written, and swaps the heads; no I/O
 *   release  lets writers go on; without a cut, as after the begin. By the thread that held, as is an abort before it
 *   sync     makes the sealed head durable; by any thread */
int onion_volume_seal_begin(struct onion_volume *volume, const char *map_path, const unsigned char *map_id);
int onion_volume_seal_hold(struct onion_volume *volume);
int onion_volume_seal_cut(struct onion_volume *volume);
void onion_volume_seal_release(struct onion_volume *volume);
int onion_volume_seal_sync(struct onion_volume *volume, struct onion_sealed *sealed);

/* A step of one of several seals, which are begun or synced side by side, in threads: each waits for the disk. The call
 * returns when all have ended; where a status is an error, `site` says where it was met. Each volume is there once. */
struct onion_seal_step {
    struct onion_volume *volume;
    const char *map_path;        /* of the begin */
    const unsigned char *map_id; /* of the begin */
    struct onion_sealed sealed;  /* what the sync says */
    int status;
    struct onion_site site;
};
void onion_volumes_seal_begin(struct onion_seal_step *steps, uint32_t count);
void onion_volumes_seal_sync(struct onion_seal_step *steps, uint32_t count);

/* Of a group, some volumes may be with other processes (peers), at the other ends of sockets. All words are texts that
 * both ends agree on, of at most ONION_CUT_WORD_BYTES_MAX bytes: `hold` and `cut` are said to a peer, which answers
 * `held` and `done`. */
enum { ONION_CUT_WORD_BYTES_MAX = 64 };
struct onion_cut_word {
    const void *bytes;
    uint32_t length;
};
struct onion_cut_words {
    struct onion_cut_word hold, held, cut, done;
    int hold_ms; /* a peer whose writers wait for longer lets them go on, and refuses the cut */
};
struct onion_cut {
    struct onion_volume *const *volumes; /* each of them begun, and there once */
    const int *peers;
    uint32_t count, peer_count;
    struct onion_cut_words words;
};
/* Holds all volumes, and only then cuts all; each is released by itself: every write that was acknowledged by any of
 * them before one that the cut leaves out began is in the cut. On an error *failed is the index of the volume that it
 * is of, or `count` and the index of the peer; no writer waits, and each volume that was begun is to be aborted. Of a
 * peer: -ETIME, -ECONNRESET, or -EPROTO where it said something else, which can be read then. */
int onion_volumes_cut(const struct onion_cut *at, uint32_t *failed);
/* The other end, whose one peer is who calls the above: waits for the word to hold, for at most wait_ms, and for the
 * word to cut. Errors are as above. */
int onion_volumes_cut_when_told(const struct onion_cut *at, int wait_ms, uint32_t *failed);
/* Makes the files of the next head beforehand, durable: the spare segment, whose id is map_id too, and the map
 * `map_path`, both empty. A seal with this map_id begins with them, so the first flush after it has three syncs less.
 * -EBUSY: another segment is the spare, or none, or a seal has taken it. Where it fails with -ENOSPC nothing is lost: the next head makes its
 * files when it needs them. A seal that comes meanwhile waits. */
int onion_volume_prepare(struct onion_volume *volume, const char *map_path, const unsigned char *map_id);
/* Makes the file of the head's own map beforehand, durable, and the name of its segment, where a write has made that: the
 * first flush then has four syncs less, and makes no file. -EBUSY: a flush or a seal is under way, which does that itself. */
int onion_volume_make_map(struct onion_volume *volume);
int onion_volume_set_spare(struct onion_volume *volume, const unsigned char *spare);
int onion_volume_has_spare(struct onion_volume *volume);

/* Writes the head's map as a compact log to a new file, and syncs it. If `lower` is given, the map is folded over that
 * layer. On 0 the flush gate stays closed until rewrite_commit or rewrite_abort. drop_zero: nothing lies below any
 * more. */
int onion_volume_rewrite(struct onion_volume *volume, const char *new_path, const unsigned char *new_id,
                         const struct onion_layer_source *lower, int drop_zero, struct onion_sealed *written);
int onion_volume_rewrite_commit(struct onion_volume *volume);
int onion_volume_rewrite_abort(struct onion_volume *volume);
/* Counts the records in the head's log, and the runs that a compact log would have. A rewrite saves the difference. */
int onion_volume_log_records(struct onion_volume *volume, uint64_t *records, uint64_t *needed);
/* Returns the durable state of the head's log: length, frames, and checksum of the last frame. Zeros if it has no
 * frame. */
int onion_volume_log_state(struct onion_volume *volume, struct onion_sealed *state);
/* Returns 1 if the head's log is not small and more than half of its records are not needed, otherwise 0. It costs
 * nothing if little was added since the last call. */
int onion_volume_wants_compact_map(struct onion_volume *volume);
/* Returns whether it is worthwhile to call wants_compact_map. It costs nothing. */
int onion_volume_may_want_compact_map(const struct onion_volume *volume);

/* Replaces the lowest layers in two steps, while reads and writes go on. These are layers that were merged into the
 * base or copied into one new layer, and segments in which no block is left. Between the steps the caller commits.
 *
 * After commit_below, each block that was in a dropped segment, and each block that the volume did not hold, reads from
 * `layer` if `layer` has it, and otherwise from the base. The caller guarantees that it read the same before. ZERO
 * stays ZERO, and blocks in other segments stay. */
struct onion_below_source {
    int keep_base; /* 1: the base stays as it is. 0: base_fd is open on the new base, or is -1 if there is none */
    int base_fd;
    uint64_t base_bytes;
    const struct onion_layer_source *layer; /* or NULL; with keep_base, it has all blocks of the dropped segments */
    const unsigned char (*dropped)[ONION_UUID_BYTES];
    uint32_t dropped_count;
};
/* Does everything that can fail: maps the base, loads and checks the layer, and makes room. -EBUSY: another replacement
 * is prepared, or the head still needs a segment that is to be dropped. -ENOENT: there is no such segment. */
int onion_volume_prepare_below(struct onion_volume *volume, const struct onion_below_source *source);
/* 0: it is done. The numbers, the memory and the mappings of the dropped segments, and the old base, are given back,
 * because no read needs them any more. A negative code: memory is missing, or the volume cannot be used. Everything
 * reads as before, partly from the old files and partly from the new. So the caller keeps the locks of both, and may
 * call again. */
int onion_volume_commit_below(struct onion_volume *volume);
/* Undoes the preparation, so the old files stay. It does nothing if nothing is prepared. */
void onion_volume_abort_below(struct onion_volume *volume);
/* Finds segments that the caller may drop if the catalog says that they belong to the head: no block and no record of
 * the head's log names them. It flushes first. Returns how many there are, with the ids of as many as fit. */
int64_t onion_volume_unused_segments(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES],
                                     uint32_t capacity);

/* Makes a read-only mapping of a page-aligned range of a view, from the segments' own pages. -E2BIG: it would need more
 * than run_max pieces, or more mappings than the process may have. The caller frees it, and passes the number of pieces
 * that it got. */
int onion_volume_map_range(struct onion_volume *volume, uint64_t offset, uint64_t length, uint64_t run_max,
                           void **address, uint64_t *mapped_length, uint64_t *pieces);
void onion_mapped_range_free(void *address, uint64_t mapped_length, uint64_t pieces);

int onion_volume_poisoned(const struct onion_volume *volume);
int onion_volume_closed(const struct onion_volume *volume);
void onion_volume_poison(struct onion_volume *volume);
/* Called in the child of a fork. Every later call there returns ONION_E_FORKED. */
void onion_volume_after_fork(struct onion_volume *volume);
/* Waits for calls under way, then unmaps and closes. It does not flush. Later calls return ONION_E_CLOSED. */
void onion_volume_close(struct onion_volume *volume);
/* Says that the disk went on with another head, before this one is closed: nobody takes up what is not durable in it. */
void onion_volume_supersede(struct onion_volume *volume);
/* Empties what a process that died left of a head that the disk has no more. See onion_journal_drop_stale. */
void onion_volume_drop_stale(struct onion_volume *volume);
/* Frees the memory. No thread may be inside or come later. */
void onion_volume_free(struct onion_volume *volume);

#endif
