"""The data path of one open volume or view, as a thin class over csrc/volume/volume.h.

What must hold: memory and descriptors belong to the C object, which lives as long as the Python object. Every call that
can block runs without the GIL. Every negative code becomes an exception here and nowhere else.
"""

from cpython.buffer cimport (
    PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport E2BIG, EBUSY, EFBIG, EINVAL, EIO, ENOENT
from libc.stdint cimport UINT32_MAX, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import os
from operator import index

from onionskin.errors import FormatError, StateError, moved_error
from onionskin.base.lazy import numpy
from onionskin.kernels._extents cimport (
    ONION_EXTENT_STATE_DATA, ONION_EXTENT_STATE_ZERO, Extents, onion_extent_row, onion_extents,
    onion_extents_add
)

cdef extern from "Python.h":
    ctypedef struct PyObject
    bint PyLong_CheckExact(object)
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    # This is declared without an exception value, because its errors are replaced by others.
    int GetBuffer "PyObject_GetBuffer"(PyObject *, Py_buffer *, int)
    void PyErr_Clear()

cdef extern from "base/turns.h" nogil:
    uint64_t onion_turns_take_short()
    uint64_t onion_turns_take_long()
    void onion_turns_end(uint64_t before_ns)

cdef extern from "base/site.h" nogil:
    struct onion_site:
        int status
        uint64_t offset
        char path[4096]
    const onion_site *onion_site_of(int)
    void onion_site_clear()

cdef extern from "layer/map_log.h" nogil:
    enum:
        ONION_HEADER_BYTES

cdef extern from "layer/layer_map.h" nogil:
    struct onion_stretch:
        uint64_t first
        uint64_t count
    uint64_t onion_stretches_of_bits(const unsigned char *bitmap, uint64_t bits, onion_stretch *out)

cdef extern from "volume/volume.h" nogil:
    enum:
        ONION_UUID_BYTES
        ONION_SEGMENT_FIRST
        ONION_SEGMENT_LAST
    ctypedef uint64_t onion_location
    struct onion_run:
        uint64_t block_index
        uint64_t block_count
        onion_location location
    bint onion_location_is_data(onion_location)
    uint32_t onion_location_segment(onion_location)
    uint32_t onion_location_slot(onion_location)

    struct onion_volume
    struct onion_segment_ref:
        unsigned char uuid[16]
        uint64_t slots
    struct onion_layer_source:
        const char *map_path
        unsigned char map_id[16]
        uint64_t map_length
        uint64_t map_frames
        uint32_t map_crc
        const onion_segment_ref *segments
        uint32_t segment_count
    struct onion_head_source:
        const char *map_path
        unsigned char map_id[16]
        const onion_segment_ref *inherited
        uint32_t inherited_count
        const void *own
        uint32_t own_count
        unsigned char spare[16]
        uint64_t known_length
        uint64_t known_frames
        uint32_t known_crc
        const char *dirty_path
    struct onion_below_source:
        int keep_base
        int base_fd
        uint64_t base_bytes
        const onion_layer_source *layer
        const void *dropped
        uint32_t dropped_count
        const char *dirty_path
    struct onion_sealed:
        uint64_t map_length
        uint64_t map_frames
        uint32_t map_crc
        uint64_t size_bytes
    struct onion_segment_info:
        uint32_t number
        unsigned char uuid[16]
        uint64_t slots
        int role

    int onion_volume_new(uint32_t, uint64_t, const char *, const char *, int, int, onion_volume **)
    int onion_volume_set_base(onion_volume *, int, uint64_t, int)
    int onion_volume_add_layer(onion_volume *, const onion_layer_source *)
    int onion_volume_fold_layers(onion_volume *)
    int onion_volume_open_head(onion_volume *, const onion_head_source *)
    int onion_volume_open_head_to_read(onion_volume *, const onion_head_source *)
    int onion_volume_free_own_slots(onion_volume *)
    uint64_t onion_volume_size(const onion_volume *)
    uint64_t onion_volume_memory(const onion_volume *)
    int onion_volume_read(onion_volume *, uint64_t, uint64_t, void *)
    int onion_volume_write(onion_volume *, uint64_t, uint64_t, const void *)
    int onion_volume_zero(onion_volume *, uint64_t, uint64_t)
    int onion_volume_read_blocks(onion_volume *, const uint64_t *, uint64_t, void *)
    int onion_volume_write_blocks(onion_volume *, const uint64_t *, uint64_t, const void *)
    int onion_volume_flush(onion_volume *)
    int onion_volume_resize(onion_volume *, uint64_t)
    int64_t onion_volume_runs(onion_volume *, uint64_t, uint64_t, onion_run *, uint64_t, uint64_t *)
    int onion_volume_live_slots(onion_volume *, const unsigned char *, unsigned char **, uint64_t *)
    int onion_volume_wait_for_readers(onion_volume *)
    uint64_t onion_volume_take_unwipeable(onion_volume *)
    int onion_volume_reclaim_wanted(onion_volume *, void *, uint32_t)
    void onion_volume_reclaim_again(onion_volume *, const void *, uint32_t)
    int64_t onion_volume_unused_segments(onion_volume *, void *, uint32_t)
    uint32_t onion_volume_segments(onion_volume *, onion_segment_info *, uint32_t)
    uint32_t onion_volume_just_sealed(onion_volume *, onion_segment_info *, uint32_t)
    int onion_volume_seal(onion_volume *, const char *, const unsigned char *, onion_sealed *)
    struct onion_seal_step:
        onion_volume *volume
        const char *map_path
        const unsigned char *map_id
        onion_sealed sealed
        int status
        onion_site site
    void onion_volumes_seal_begin(onion_seal_step *, uint32_t)
    void onion_volumes_seal_sync(onion_seal_step *, uint32_t)
    struct onion_cut_word:
        const void *bytes
        uint32_t length
    struct onion_cut_words:
        onion_cut_word hold
        onion_cut_word held
        onion_cut_word cut
        onion_cut_word done
        int hold_ms
    struct onion_cut:
        onion_volume **volumes
        const int *peers
        uint32_t count
        uint32_t peer_count
        onion_cut_words words
    int onion_volumes_cut(const onion_cut *, uint32_t *)
    int onion_volumes_cut_when_told(const onion_cut *, int, uint32_t *)
    int onion_volume_seal_commit(onion_volume *, const unsigned char *)
    int onion_volume_seal_abort(onion_volume *)
    int onion_volume_prepare(onion_volume *, const char *, const unsigned char *)
    int onion_volume_make_map(onion_volume *)
    void onion_volume_start_writing(onion_volume *)
    int onion_volume_set_spare(onion_volume *, const unsigned char *)
    int onion_volume_has_spare(onion_volume *)
    int onion_volume_rewrite(onion_volume *, const char *, const unsigned char *, const onion_layer_source *, int,
                             onion_sealed *)
    int onion_volume_rewrite_commit(onion_volume *)
    int onion_volume_rewrite_abort(onion_volume *)
    int onion_volume_log_records(onion_volume *, uint64_t *, uint64_t *)
    int onion_volume_log_state(onion_volume *, onion_sealed *)
    int onion_volume_unflushed(onion_volume *)
    int onion_volume_freeze(onion_volume *, uint64_t)
    void onion_volume_thaw(onion_volume *)
    int onion_volume_wants_compact_map(onion_volume *)
    int onion_volume_prepare_below(onion_volume *, const onion_below_source *)
    int onion_volume_commit_below(onion_volume *)
    void onion_volume_abort_below(onion_volume *)
    int onion_volume_map_range(onion_volume *, uint64_t, uint64_t, uint64_t, void **, uint64_t *, uint64_t *)
    void onion_mapped_range_free(void *, uint64_t, uint64_t)
    int onion_volume_poisoned(const onion_volume *)
    int onion_volume_closed(const onion_volume *)
    void onion_volume_poison(onion_volume *)
    void onion_volume_after_fork(onion_volume *)
    void onion_volume_close(onion_volume *)
    void onion_volume_supersede(onion_volume *)
    void onion_volume_drop_stale(onion_volume *)
    void onion_volume_free(onion_volume *)

cdef extern from "base/status.h" nogil:
    enum:
        ONION_E_FORMAT
        ONION_E_VERSION
        ONION_E_CHECKSUM
        ONION_E_TORN
        ONION_E_BOUNDS
        ONION_E_POISONED
        ONION_E_CLOSED
        ONION_E_READ_ONLY
        ONION_E_FORKED
        ONION_E_VERIFY
        ONION_E_FULL_SEGMENT
        ONION_E_CUT_LOG
        ONION_E_NOT_A_FILE
        ONION_E_MOVED
        ONION_E_WHICH_BOOT
        ONION_E_OTHER_MOUNT
        ONION_E_NUMBERS
        ONION_E_MAPPINGS

cdef enum:
    # A view of more pieces than this is copied instead, because each piece needs a mapping and a process has 65,530.
    VIEW_PIECES_MAX = 4096
    RUNS_AT_ONCE = 65536
    SEGMENTS_AT_ONCE = 256
    # In a log with no more records than this, the share of dead records does not matter.
    RECORDS_OF_A_SMALL_LOG = 64
    INDEX_BYTES = sizeof(uint64_t)
_ROLES = ("sealed", "inherited", "own")


cdef object _damage(int status, object path, object offset):
    where = f"{path}: " if path else ""
    if status == ONION_E_VERSION:
        return FormatError(f"{where}version or feature not known to this onionskin; use a newer one")
    if status == ONION_E_CHECKSUM:
        return FormatError(
            f"{where}checksum does not match at byte {offset}; restore the file from a copy of the store"
        )
    if status == ONION_E_CUT_LOG:
        return FormatError(
            f"{where}missing, or ends at byte {offset}, before what was durable in it when the volume was last used; "
            "restore the file from a copy of the store"
        )
    if status == ONION_E_NOT_A_FILE:
        return FormatError(
            f"{where}a symbolic link, or no regular file: nothing of a store is reached through a link; put the file "
            "itself there"
        )
    return FormatError(
        f"{where}damaged, missing bytes, or not the file that the catalog names (byte {offset}); "
        "run 'onionskin check' and restore the file from a copy of the store"
    )


cdef object _refusal(int status, object what):
    """Return the exception for a code that is about the volume and not about a file, or None for other codes."""
    if status == ONION_E_POISONED:
        return StateError(
            f"{what}: an earlier sync failed, so what is durable is not known; close the volume and open it again"
        )
    if status == ONION_E_CLOSED:
        return StateError(f"{what}: the volume is closed; open it again")
    if status == ONION_E_READ_ONLY:
        return StateError(f"{what}: only the head of a volume can be written, and only a snapshot has views")
    if status == ONION_E_FORKED:
        return StateError(f"{what}: this handle was opened before fork(); open the volume again in the child")
    if status == ONION_E_MOVED:
        return moved_error(what)
    if status == ONION_E_NUMBERS:
        return StateError(
            f"{what}: the disk stands on as many segments as a volume can have; merge or discard snapshots, and open the "
            "volume again"
        )
    if status == ONION_E_MAPPINGS:
        return StateError(
            f"{what}: this process has about as many files mapped as the system lets it (vm.max_map_count); close volumes "
            "or snapshots that are not needed, merge snapshots, or raise that limit with sysctl"
        )
    return None


def error_of(status, what, path=None, offset=0):
    """Return the exception of a negative code, about an operation (`what`) and the byte of a file."""
    refusal = _refusal(status, what)
    if refusal is not None:
        return refusal
    if status in (
        ONION_E_FORMAT, ONION_E_VERSION, ONION_E_CHECKSUM, ONION_E_TORN, ONION_E_CUT_LOG, ONION_E_NOT_A_FILE
    ):
        return _damage(status, path, offset)
    if status == ONION_E_BOUNDS:
        return ValueError(f"{what}: the range passes the end of the volume; give one that ends in it")
    if status == ONION_E_WHICH_BOOT:
        return StateError(
            f"{path}: a process that was killed may have left changes there, and this one cannot tell whether they are of "
            "this boot and mount, because it sees no /proc or no /sys: open the volume once where both are mounted"
        )
    if status == ONION_E_OTHER_MOUNT:
        return StateError(
            f"{path}: a process that was killed left changes there, since this machine was started, through another mount "
            "than this one, or this is a copy; on this file system nobody can tell whether all of their data is here: open "
            "the volume once through that mount, or remove that file, which gives up what was not flushed"
        )
    if status == ONION_E_VERIFY:
        return OSError(EIO, f"{what}: bytes that were overwritten with zeros do not read back as zeros; the "
                             "device may be failing, and the kernel's log may say more", path)
    if status == ONION_E_FULL_SEGMENT:
        return OSError(EFBIG, f"{what}: the head's segment has no slot left; take a snapshot to begin a new one", path)
    reason = os.strerror(-status)
    if path is None:
        return OSError(-status, f"{what}: {reason}")
    return OSError(-status, f"{reason} at byte {offset}" if offset else reason, path)


cdef int _add_runs(onion_extents *found, const onion_run *runs, int64_t count, uint64_t block_size) noexcept nogil:
    """Add runs of an index to a table: from where in which segment each comes. Return 0 or -ENOMEM."""
    cdef onion_extent_row row
    cdef int64_t i
    cdef int status
    for i in range(count):
        row.offset, row.length = runs[i].block_index * block_size, runs[i].block_count * block_size
        row.state, row.source, row.place = ONION_EXTENT_STATE_ZERO, 0, 0
        if onion_location_is_data(runs[i].location):
            row.state, row.source = ONION_EXTENT_STATE_DATA, onion_location_segment(runs[i].location)
            row.place = ONION_HEADER_BYTES + onion_location_slot(runs[i].location) * block_size
        status = onion_extents_add(found, &row)
        if status < 0:
            return status
    return 0


cdef int _raise(int status, object what, object path=None) except -1:
    """Raise the exception of a negative code.

    The error names the file and the byte that were noted for the code (base/site.h), and otherwise `path`. An error
    that is about no file, such as one of missing memory, names the operation.
    """
    cdef const onion_site *site = onion_site_of(status)
    offset = 0
    if site != NULL:
        path, offset = os.fsdecode(site.path), site.offset
    onion_site_clear()
    raise error_of(status, what, path, offset)


cdef int _raise_range(int status, object what, object offset, object length, uint64_t size_bytes, object path=None) except -1:
    """Raise the exception of a negative code, as `_raise` does, for an operation on a range of the disk."""
    if status == ONION_E_BOUNDS:
        raise ValueError(
            f"{what}: {length} bytes at offset {offset} pass the end of the volume, which has {size_bytes} bytes; give "
            "a range that ends in it"
        )
    return _raise(status, what, path)


cdef uint64_t _whole(object value, object what) except? 0xFFFFFFFFFFFFFFFF:
    """Return a number of bytes that a caller gave, which is a whole number of Python or NumPy.

    A number that is too large for any volume becomes the largest number, which is outside every volume.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
            raise TypeError(f"{what} is a whole number, not {value!r}")
        value = index(value)
    if value < 0:
        raise ValueError(f"{what} counts from 0, not {value}")
    return value if value < 0xFFFFFFFFFFFFFFFF else 0xFFFFFFFFFFFFFFFE


cdef inline uint64_t _bytes_at(object value, object what) except? 0xFFFFFFFFFFFFFFFF:
    """Return an offset or a length that a caller gave."""
    cdef long long small
    cdef int overflow = 0
    if PyLong_CheckExact(value):
        small = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow == 0 and small >= 0:
            return <uint64_t>small
    return _whole(value, what)


cdef int _refuse_buffer(object buffer, int flags) except -1:
    """Raise the exception that says why an object gives no buffer. Each cause has one exception."""
    try:
        memory = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"a bytes-like object is wanted, such as bytes or a NumPy array, not {type(buffer).__name__}"
        ) from None
    if not memory.c_contiguous:
        raise BufferError("the buffer is not contiguous: copy it, for instance with numpy.ascontiguousarray")
    if flags & PyBUF_WRITABLE and memory.readonly:
        raise BufferError("the buffer is read-only, so nothing can be read into it: give a writable one, such as a bytearray")
    raise BufferError("the object gives no contiguous memory: copy it into bytes")


cdef int _get_buffer(object buffer, Py_buffer *view, int flags) except -1:
    """Get the bytes of a buffer.

    BufferError is raised if they are not contiguous, or are read-only and have to be written. TypeError is raised if
    there is no buffer, or if it has Python objects.
    """
    cdef const char *format
    if GetBuffer(<PyObject *>buffer, view, flags) < 0:
        PyErr_Clear()
        return _refuse_buffer(buffer, flags)
    if view.itemsize == 1:  # no room for a reference to an object
        return 0
    PyBuffer_Release(view)
    if GetBuffer(<PyObject *>buffer, view, flags | PyBUF_ND | PyBUF_FORMAT) < 0:
        PyErr_Clear()
        return _refuse_buffer(buffer, flags)
    format = view.format
    while format != NULL and format[0]:
        if format[0] == b"O":
            PyBuffer_Release(view)
            raise TypeError("an array of Python objects has no bytes that could be kept on a disk: convert it, "
                            "for instance with astype")
        format += 1
    return 0


cdef list _ids(const unsigned char *ids, int64_t count):
    cdef bytes joined = (<const char *>ids)[:ONION_UUID_BYTES * count]
    return [joined[i : i + ONION_UUID_BYTES] for i in range(0, len(joined), ONION_UUID_BYTES)]


cdef object _indices(object block_indices):
    """Return a copy of block indices as uint64. The caller's array might change after the bounds were checked."""
    indices = numpy.asarray(block_indices)
    if indices.size and indices.dtype.kind not in "iu":
        each = numpy.asarray(block_indices, dtype=object).ravel().tolist()
        if all(type(index) is int for index in each):  # NumPy makes objects or fractions of those beyond 64 bits
            raise ValueError(f"no volume has a block {max(each, key=abs)}; give blocks that it has")
        raise TypeError(f"block indices are whole numbers, not {indices.dtype}")
    if indices.dtype.kind == "i" and indices.size and indices.min() < 0:
        raise ValueError(f"block indices count from 0, and one is {indices.min()}")
    return numpy.array(indices, dtype=numpy.uint64).reshape(-1)


cdef int _copy_id(unsigned char *out, object id) except -1:
    if not isinstance(id, bytes) or len(id) != ONION_UUID_BYTES:
        raise ValueError(f"an id has {ONION_UUID_BYTES} bytes, not {id!r}")
    memcpy(out, PyBytes_AS_STRING(id), ONION_UUID_BYTES)
    return 0


cdef onion_segment_ref *_segment_refs(object segments) except? NULL:
    cdef Py_ssize_t i, count = len(segments)
    cdef onion_segment_ref *refs = <onion_segment_ref *>malloc((count + 1) * sizeof(onion_segment_ref))
    if refs == NULL:
        raise MemoryError(f"no memory for {count} segments")
    try:
        for i in range(count):
            _copy_id(refs[i].uuid, segments[i][0])
            refs[i].slots = segments[i][1]
    except BaseException:
        free(refs)
        raise
    return refs


cdef class _LayerSource:
    """An object that owns the memory of an onion_layer_source."""
    cdef onion_layer_source source
    cdef onion_segment_ref *refs
    cdef bytes path

    def __cinit__(self, map_path, map_id, length, frames, crc, segments):
        memset(&self.source, 0, sizeof(self.source))
        self.path = os.fsencode(map_path)
        self.refs = _segment_refs(segments)
        self.source.map_path = self.path
        _copy_id(self.source.map_id, map_id)
        self.source.map_length = length
        self.source.map_frames = frames
        self.source.map_crc = crc
        self.source.segments = self.refs
        self.source.segment_count = len(segments)

    def __dealloc__(self):
        free(self.refs)


cdef class Sealed:
    """A description of what a seal or a rewrite made durable. Its values go into the catalog as they are."""
    cdef readonly object map_length
    cdef readonly object map_frames
    cdef readonly object map_crc
    cdef readonly object size_bytes
    cdef readonly list segments

    def __repr__(self):
        return f"Sealed(map_length={self.map_length}, map_frames={self.map_frames}, size_bytes={self.size_bytes})"


cdef Sealed _sealed(onion_sealed *raw, list segments):
    cdef Sealed sealed = Sealed()
    sealed.map_length = raw.map_length
    sealed.map_frames = raw.map_frames
    sealed.map_crc = raw.map_crc
    sealed.size_bytes = raw.size_bytes
    sealed.segments = segments
    return sealed


cdef class _MappedRange:
    """Read-only memory made of the segments' pages. It is unmapped when the last array over it is gone."""
    cdef void *address
    cdef uint64_t mapped_length
    cdef uint64_t pieces
    cdef Py_ssize_t start
    cdef Py_ssize_t length
    cdef Py_ssize_t shape[1]
    cdef object keep

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("a view of a snapshot is read-only: ask for a read-only buffer, or copy it")
        self.shape[0] = self.length
        buffer.buf = <char *>self.address + self.start
        buffer.format = NULL
        buffer.internal = NULL
        buffer.itemsize = 1
        buffer.len = self.length
        buffer.ndim = 1
        buffer.obj = self
        buffer.readonly = 1
        buffer.shape = self.shape
        buffer.strides = NULL
        buffer.suboffsets = NULL

    def __dealloc__(self):
        if self.address != NULL:
            onion_mapped_range_free(self.address, self.mapped_length, self.pieces)


cdef class DataPath:
    """One open volume (writable), or a view of a snapshot or a head (not writable).

    Offsets and lengths are bytes; block indices count blocks. Any thread may call the methods.

    Parameters
    ----------
    block_size : int
        A power of two from 4096 to 2097152.
    size_bytes : int
        The size of the volume, at most 64 TiB. The head's log may override it.
    segments_directory, layers_directory : str
        The directories of the segment files and of the map files. Each file is named by its id.
    wipe_zero : bool
        Whether freed slots are overwritten with zeros before they are used again.
    writable : bool
        Whether a head will be opened.

    Raises
    ------
    OSError
        An error of the system. It has the path of the file.
    FormatError
        A file is damaged, or is not what the catalog says.
    StateError
        The data path is closed, poisoned, not writable, or used in the child of a fork.
    """
    cdef onion_volume *_volume
    cdef readonly object block_size
    cdef object __weakref__

    def __cinit__(self, *, block_size, size_bytes, segments_directory, layers_directory, wipe_zero, writable):
        segments = os.fsencode(segments_directory)
        layers = os.fsencode(layers_directory)
        cdef int status = onion_volume_new(
            block_size, size_bytes, segments, layers, bool(wipe_zero), bool(writable), &self._volume
        )
        if status < 0:
            self._volume = NULL
            if status == -EINVAL:
                raise ValueError(f"block size {block_size} or volume size {size_bytes} is not supported: a block is a "
                                 "power of two from 4096 to 2097152, a volume at most 64 TiB")
            _raise(status, "open")
        self.block_size = block_size

    def __dealloc__(self):
        if self._volume != NULL:
            onion_volume_free(self._volume)
            self._volume = NULL

    # ---- opening ----

    def set_base(self, int fd, size_bytes, *, allow_short=False):
        """Map a raw image below all layers. The caller may close the descriptor afterwards.

        Parameters
        ----------
        fd : int
            A descriptor of a regular file or a block device. No path is used.
        size_bytes : int
            The number of bytes to map. The file must have as many, unless `allow_short` is true. Then the part that it
            does not have reads zero.

        Raises
        ------
        FormatError
            The file is shorter, or is neither a regular file nor a block device.
        """
        cdef uint64_t size = _whole(size_bytes, "a size")
        cdef int status, c_allow = bool(allow_short)
        with nogil:
            status = onion_volume_set_base(self._volume, fd, size, c_allow)
        if status == ONION_E_FORMAT:
            raise FormatError(f"{_path_of(fd)}: the base is shorter than the {size_bytes} bytes it had; put it back, or "
                              "name another with 'onionskin relocate'")
        if status < 0:
            _raise(status, "open", _path_of(fd))

    def add_layer(self, *, map_path, map_id, length, frames, crc, segments):
        """Add a sealed layer over the layers that were added before. `segments` is a list of (id, slots)."""
        cdef _LayerSource source = _LayerSource(map_path, map_id, length, frames, crc, segments)
        cdef int status
        with nogil:
            status = onion_volume_add_layer(self._volume, &source.source)
        if status < 0:
            _raise(status, "open", map_path)

    def fold_layers(self):
        """Make the index of the layers that were added. This comes before the first read. `open_head` does it too."""
        cdef int status
        with nogil:
            status = onion_volume_fold_layers(self._volume)
        if status < 0:
            _raise(status, "open")

    def open_head(self, *, map_path, map_id, inherited, own, spare, more_own=(), known=(0, 0, 0), dirty_path=None):
        """Add the head, after all layers, and make it ready for writing. Returns the size of the volume in bytes.

        Parameters
        ----------
        known : tuple of int
            The (length, frames, crc) of a point that the head's log passes through. If the log does not, it is damaged.
            With (0, 0, 0), nothing is known. Then a missing log counts as empty, and a bad last frame as torn by a
            crash.
        dirty_path : path, optional
            The file in which the records of unflushed writes survive the process. Records that are found there are
            taken over.
        """
        return self._open_head(map_path, map_id, inherited, (own, *more_own), spare, known, False, dirty_path)

    def open_head_to_read(self, *, map_path, map_id, inherited, own, more_own=(), known=(0, 0, 0), dirty_path=None):
        """Add the head, after all layers, to a path that is not writable. Returns the size of the volume in bytes.

        The durable part of the head is read. If a process died and left unflushed writes in `dirty_path`, these are
        read over it. A torn frame is left as it is. Nothing is written, made, freed or synced, so this works on a file
        system that is mounted read-only. The caller keeps writers from the head.
        """
        no_spare = bytes(ONION_UUID_BYTES)
        return self._open_head(map_path, map_id, inherited, (own, *more_own), no_spare, known, True, dirty_path)

    def _open_head(self, map_path, map_id, inherited, own, spare, known, to_read, dirty_path):
        cdef onion_head_source source
        cdef int status, c_to_read = to_read
        memset(&source, 0, sizeof(source))
        path = os.fsencode(map_path)
        owned = b"".join(own)
        source.map_path = path
        dirty = None if dirty_path is None else os.fsencode(dirty_path)
        if dirty is not None:
            source.dirty_path = dirty
        _copy_id(source.map_id, map_id)
        _copy_id(source.spare, spare)
        source.own = <const void *>PyBytes_AS_STRING(owned)
        source.own_count = len(owned) // ONION_UUID_BYTES
        source.known_length, source.known_frames, source.known_crc = known
        cdef onion_segment_ref *refs = _segment_refs(inherited)
        source.inherited = refs
        source.inherited_count = len(inherited)
        try:
            with nogil:
                if c_to_read:
                    status = onion_volume_open_head_to_read(self._volume, &source)
                else:
                    status = onion_volume_open_head(self._volume, &source)
        finally:
            free(refs)
        if status < 0:
            _raise(status, "open", map_path)
        return onion_volume_size(self._volume)

    def free_own_slots(self):
        """Find the free slots of the head's segments. With policy `zero`, wipe those that still hold bytes."""
        cdef int status
        with nogil:
            status = onion_volume_free_own_slots(self._volume)
        if status < 0:
            _raise(status, "open")

    # ---- reading and writing ----

    @property
    def size_bytes(self):
        """The size of the volume in bytes."""
        return onion_volume_size(self._volume)

    @property
    def memory_bytes(self):
        """The memory that the index takes, in bytes."""
        return onion_volume_memory(self._volume)

    @property
    def poisoned(self):
        """Whether a sync failed, so that the volume can only be closed."""
        return bool(onion_volume_poisoned(self._volume))

    @property
    def unflushed(self):
        """Whether a flush would have something to make durable."""
        cdef int found
        with nogil:  # it waits for the gate, which a thread that needs the interpreter may hold
            found = onion_volume_unflushed(self._volume)
        return bool(found)

    @property
    def closed(self):
        """Whether close was called."""
        return bool(onion_volume_closed(self._volume))

    @property
    def has_spare(self):
        """Whether there is a spare segment for the head that the next seal begins."""
        return bool(onion_volume_has_spare(self._volume))

    def read(self, object offset, object length):
        """Return `length` bytes from `offset` on."""
        cdef uint64_t at = _bytes_at(offset, "an offset"), count = _bytes_at(length, "a length")
        cdef uint64_t size = onion_volume_size(self._volume)
        cdef int status
        if at > size or count > size - at:
            _raise_range(ONION_E_BOUNDS, "read", offset, length, size)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, count)
        cdef char *to = PyBytes_AS_STRING(out)
        with nogil:
            status = onion_volume_read(self._volume, at, count, to)
        if status < 0:
            _raise_range(status, "read", offset, length, onion_volume_size(self._volume))
        return out

    def readinto(self, object offset, buffer):
        """Fill `buffer` with the bytes from `offset` on. Returns its length in bytes.

        Raises
        ------
        BufferError
            The buffer is read-only, or not contiguous.
        TypeError
            The object is no buffer or a buffer of Python objects, or `offset` is no whole number.
        """
        cdef uint64_t at = _bytes_at(offset, "an offset")
        cdef Py_buffer view
        cdef int status
        _get_buffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            with nogil:
                status = onion_volume_read(self._volume, at, view.len, view.buf)
            if status < 0:
                _raise_range(status, "read", offset, view.len, onion_volume_size(self._volume))
            return view.len
        finally:
            PyBuffer_Release(&view)

    def write(self, object offset, data):
        """Write `data` at `offset`. Returns its length in bytes. The data is not durable before `flush`.

        Raises
        ------
        BufferError
            The data is not contiguous.
        TypeError
            The object is no buffer or a buffer of Python objects, or `offset` is no whole number.
        """
        cdef uint64_t at = _bytes_at(offset, "an offset")
        cdef Py_buffer view
        cdef int status
        _get_buffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                status = onion_volume_write(self._volume, at, view.len, view.buf)
            if status < 0:
                _raise_range(status, "write", offset, view.len, onion_volume_size(self._volume))
            return view.len
        finally:
            PyBuffer_Release(&view)

    cdef int _zero(self, object what, object offset, object length) except -1:
        cdef uint64_t at = _bytes_at(offset, "an offset"), count = _bytes_at(length, "a length")
        cdef int status
        with nogil:
            status = onion_volume_zero(self._volume, at, count)
        if status < 0:
            return _raise_range(status, what, offset, length, onion_volume_size(self._volume))
        return 0

    def zero(self, object offset, object length):
        """Make a range read zero. The whole blocks in it are freed."""
        self._zero("zero", offset, length)

    def trim(self, object offset, object length):
        """Do what `zero` does, under the name that errors then have."""
        self._zero("trim", offset, length)

    cdef int _raise_blocks(self, int status, object what, object indices) except -1:
        if status == ONION_E_BOUNDS:
            count = -(-self.size_bytes // self.block_size)
            raise ValueError(f"{what}: block {indices.max()} is past the end of the volume, which has {count} blocks; "
                             "give blocks that it has")
        return _raise(status, what)

    def read_blocks(self, block_indices, out=None):
        """Return blocks by index, as an (n, block_size) array of uint8. If `out` is given, it is filled and returned.

        Errors are as for `readinto`.
        """
        cdef object indices = _indices(block_indices)
        cdef Py_buffer index_view, out_view
        cdef int status
        if out is None:
            out = numpy.empty((len(indices), self.block_size), dtype=numpy.uint8)
        PyObject_GetBuffer(indices, &index_view, PyBUF_CONTIG_RO)
        try:
            _get_buffer(out, &out_view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                if out_view.len != index_view.len // INDEX_BYTES * self.block_size:
                    raise ValueError(f"read_blocks: out has {out_view.len} bytes, and so many blocks have "
                                     f"{index_view.len // INDEX_BYTES * self.block_size}; give as many")
                with nogil:
                    status = onion_volume_read_blocks(
                        self._volume, <const uint64_t *>index_view.buf, index_view.len // INDEX_BYTES, out_view.buf)
                if status < 0:
                    self._raise_blocks(status, "read_blocks", indices)
            finally:
                PyBuffer_Release(&out_view)
        finally:
            PyBuffer_Release(&index_view)
        return out

    def write_blocks(self, block_indices, data):
        """Write whole blocks. `data` has len(block_indices) * block_size bytes. Otherwise this is like `write`."""
        cdef object indices = _indices(block_indices)
        cdef Py_buffer index_view, data_view
        cdef int status
        PyObject_GetBuffer(indices, &index_view, PyBUF_CONTIG_RO)
        try:
            _get_buffer(data, &data_view, PyBUF_SIMPLE)
            try:
                if data_view.len != index_view.len // INDEX_BYTES * self.block_size:
                    raise ValueError(f"write_blocks: data has {data_view.len} bytes, and so many blocks have "
                                     f"{index_view.len // INDEX_BYTES * self.block_size}; give as many")
                with nogil:
                    status = onion_volume_write_blocks(
                        self._volume, <const uint64_t *>index_view.buf, index_view.len // INDEX_BYTES, data_view.buf)
                if status < 0:
                    self._raise_blocks(status, "write_blocks", indices)
            finally:
                PyBuffer_Release(&data_view)
        finally:
            PyBuffer_Release(&index_view)

    def flush(self):
        """Make everything that was written before the call durable."""
        cdef int status
        with nogil:
            status = onion_volume_flush(self._volume)
        if status < 0:
            _raise(status, "flush")

    def resize(self, size_bytes):
        """Change the size. The change is durable on return, and the new part reads zero."""
        cdef uint64_t size = _whole(size_bytes, "a size")
        cdef int status
        with nogil:
            status = onion_volume_resize(self._volume, size)
        if status < 0:
            _raise(status, "resize")

    # ---- the index ----

    def extents(self, offset=0, length=None):
        """Return the blocks of a range that some layer has, as a table.

        Whole blocks, in as few extents as there are runs. The source of DATA is the number of its segment, and its place
        is where it lies in that file. ZERO has the source 0.
        """
        cdef Extents found = Extents()
        cdef uint64_t size = onion_volume_size(self._volume), block_size = self.block_size
        cdef uint64_t next_block = offset // block_size
        cdef uint64_t end = (min(size, size if length is None else offset + length) + block_size - 1) // block_size
        cdef int64_t count = 0
        cdef int status = 0
        cdef onion_run *runs = <onion_run *>malloc(RUNS_AT_ONCE * sizeof(onion_run))
        if runs == NULL:
            raise MemoryError("no memory for the runs of a map")
        with nogil:
            while next_block < end and count >= 0 and status == 0:
                count = onion_volume_runs(self._volume, next_block, end, runs, RUNS_AT_ONCE, &next_block)
                if count > 0:
                    status = _add_runs(&found.table, runs, count, block_size)
            free(runs)
        if count < 0:
            _raise(<int>count, "extents")
        if status < 0:
            raise MemoryError("no memory for a table of extents")
        return found

    def segments(self):
        """Return (number, id, role, slots) of every segment. `slots` is 0 if its file was not made yet."""
        cdef uint32_t count, found
        with nogil:
            count = onion_volume_segments(self._volume, NULL, 0)
        cdef onion_segment_info *infos = <onion_segment_info *>malloc((count + 1) * sizeof(onion_segment_info))
        if infos == NULL:
            raise MemoryError(f"no memory for {count} segments")
        try:
            with nogil:
                found = onion_volume_segments(self._volume, infos, count)
            count = min(count, found)
            return _segment_list(infos, count)
        finally:
            free(infos)

    cdef list _just_sealed(self):
        """Return (id, slots) of the segments that the current seal has sealed: one, and one for each aborted seal."""
        cdef uint32_t count, found
        with nogil:
            count = onion_volume_just_sealed(self._volume, NULL, 0)
        cdef onion_segment_info *infos = <onion_segment_info *>malloc((count + 1) * sizeof(onion_segment_info))
        if infos == NULL:
            raise MemoryError(f"no memory for {count} segments")
        try:
            with nogil:
                found = onion_volume_just_sealed(self._volume, infos, count)
            count = min(count, found)
            return [(id, slots) for _, id, _, slots in _segment_list(infos, count)]
        finally:
            free(infos)

    def live_slots(self, segment):
        """Return the slots of a segment that the index still needs, sorted and joined. Waits for writers.

        They are the bytes of an array of dtypes.SLOTS, which is not made here: `discard` asks this, and to import NumPy
        takes longer than all else that it does.

        The answer comes from the index of the head at that moment. The caller checks afterwards that this is the head
        that it means.
        """
        cdef unsigned char id[ONION_UUID_BYTES]
        cdef unsigned char *bitmap = NULL
        cdef uint64_t bits = 0
        cdef uint64_t count
        cdef onion_stretch *out
        cdef int status
        _copy_id(id, segment)
        with nogil:
            status = onion_volume_live_slots(self._volume, id, &bitmap, &bits)
        if status < 0:
            _raise(status, "reclaim")
        try:
            with nogil:
                count = onion_stretches_of_bits(bitmap, bits, NULL)
            slots = PyBytes_FromStringAndSize(NULL, count * sizeof(onion_stretch))
            out = <onion_stretch *>PyBytes_AS_STRING(slots)
            with nogil:
                onion_stretches_of_bits(bitmap, bits, out)
        finally:
            free(bitmap)
        return slots

    def wait_for_readers(self):
        """Wait until every read that began before has ended. Such a read may still use slots that are to be freed."""
        cdef int status
        with nogil:
            status = onion_volume_wait_for_readers(self._volume)
        if status < 0:
            _raise(status, "reclaim")

    def reclaim_wanted(self):
        """Return the ids of inherited segments in which slots became free since the last call.

        The data path forgets the ids that it returns. A caller that cannot record them puts them back with
        `want_reclaim`.
        """
        cdef unsigned char ids[SEGMENTS_AT_ONCE * ONION_UUID_BYTES]
        cdef int count
        with nogil:
            count = onion_volume_reclaim_wanted(self._volume, ids, SEGMENTS_AT_ONCE)
        return _ids(ids, count)

    def want_reclaim(self, ids):
        """Put ids back that `reclaim_wanted` returned. Ids of segments that are gone are left out."""
        joined = b"".join(ids)
        cdef const void *raw = <const void *>PyBytes_AS_STRING(joined)
        cdef uint32_t count = len(joined) // ONION_UUID_BYTES
        with nogil:
            onion_volume_reclaim_again(self._volume, raw, count)

    def unused_segments(self):
        """Return the ids of segments that no block and no record of the head's log needs. This flushes first.

        Those that belong to the head in the catalog may be dropped, with `prepare_below` before the commit and
        `commit_below` after it.
        """
        cdef unsigned char *ids
        cdef int64_t count
        cdef uint32_t capacity = onion_volume_segments(self._volume, NULL, 0) + 1
        ids = <unsigned char *>malloc(capacity * ONION_UUID_BYTES)
        if ids == NULL:
            raise MemoryError(f"no memory for {capacity} segments")
        try:
            with nogil:
                count = onion_volume_unused_segments(self._volume, ids, capacity)
            if count < 0:
                _raise(<int>count, "reclaim")
            return _ids(ids, min(count, capacity))
        finally:
            free(ids)

    def take_unwipeable(self):
        """Return how many bytes were wiped since the last call whose old contents may still be on the medium."""
        return onion_volume_take_unwipeable(self._volume)

    def map_dead_ratio(self):
        """Return the share of the head's log that a rewrite would save, 0.0 to 1.0."""
        cdef uint64_t records = 0, needed = 0
        cdef int status
        with nogil:
            status = onion_volume_log_records(self._volume, &records, &needed)
        if status < 0:
            _raise(status, "info")
        return max(0.0, 1.0 - needed / records) if records > RECORDS_OF_A_SMALL_LOG else 0.0

    def log_state(self):
        """Return (length, frames, crc) of the durable part of the head's log. They are zeros if it has no frame."""
        cdef onion_sealed raw
        cdef int status
        with nogil:
            status = onion_volume_log_state(self._volume, &raw)
        if status < 0:
            _raise(status, "close")
        return raw.map_length, raw.map_frames, raw.map_crc

    def wants_compaction(self):
        """Whether the head's log is not small and a rewrite would save more than half of it. This call is cheap."""
        cdef int status
        with nogil:
            status = onion_volume_wants_compact_map(self._volume)
        if status < 0:
            _raise(status, "flush")
        return status == 1

    def freeze(self, frames):
        """Stop writers until `thaw` or `close`, which the same thread has to call. Nothing may be flushed meanwhile.

        Returns
        -------
        bool
            False if something was written since the head's log had `frames` frames. Then no writer is stopped.
        """
        cdef uint64_t c_frames = frames
        cdef int status
        with nogil:
            status = onion_volume_freeze(self._volume, c_frames)
        if status < 0 and status != -EBUSY:
            _raise(status, "apply")
        return status == 0

    def thaw(self):
        """Let writers go on. If they are not stopped, this does nothing."""
        onion_volume_thaw(self._volume)

    # ---- seal and rewrite ----

    def start_writing(self):
        """Begin to write out the data that a flush would, without waiting. This is only a hint."""
        with nogil:
            onion_volume_start_writing(self._volume)

    def seal(self, *, map_path, map_id):
        """Make the head a durable sealed layer and begin a new head. Flushes wait for `seal_commit` or `seal_abort`."""
        cdef unsigned char id[ONION_UUID_BYTES]
        cdef onion_sealed raw
        cdef int status
        path = os.fsencode(map_path)
        cdef const char *c_path = path
        _copy_id(id, map_id)
        with nogil:
            status = onion_volume_seal(self._volume, c_path, id, &raw)
        if status < 0:
            if status == -EBUSY:
                raise StateError("snapshot: the volume has no spare segment to go on with; close the volume and open it again")
            _raise(status, "snapshot")
        return _sealed(&raw, self._just_sealed())

    def seal_commit(self, next_spare):
        """Go on with the new head, because the catalog names it."""
        cdef unsigned char id[ONION_UUID_BYTES]
        _copy_id(id, next_spare)
        cdef int status
        with nogil:
            status = onion_volume_seal_commit(self._volume, id)
        if status < 0:
            _raise(status, "snapshot")

    def seal_abort(self):
        """Go on with the old head, because the catalog still names it. It owns what was written since the seal.

        This is allowed at any stage of a seal.
        """
        cdef int status
        with nogil:
            status = onion_volume_seal_abort(self._volume)
        if status < 0:
            _raise(status, "snapshot")

    def prepare(self, *, map_path, map_id):
        """Make the files of the next head durably, before the seal that needs them. The map gets the id `map_id`."""
        cdef unsigned char id[ONION_UUID_BYTES]
        cdef int status
        path = os.fsencode(map_path)
        cdef const char *c_path = path
        _copy_id(id, map_id)
        with nogil:
            status = onion_volume_prepare(self._volume, c_path, id)
        if status < 0:
            _raise(status, "prepare")

    def make_map(self):
        """Make the file of the head's map durably, before the flush that needs it. OSError EBUSY: a flush is under way."""
        cdef int status
        with nogil:
            status = onion_volume_make_map(self._volume)
        if status < 0:
            _raise(status, "prepare")

    def set_spare(self, spare):
        """Register the id of the segment that the next head will begin with."""
        cdef unsigned char id[ONION_UUID_BYTES]
        _copy_id(id, spare)
        cdef int status
        with nogil:
            status = onion_volume_set_spare(self._volume, id)
        if status < 0:
            _raise(status, "snapshot")

    def rewrite_map(self, *, new_path, new_id, lower=None, drop_zero=False):
        """Write the head's map, folded over `lower`, to a new durable file.

        Flushes wait for `rewrite_commit` or `rewrite_abort`. `lower` is (map_path, map_id, length, frames, crc,
        segments) of the parent layer.
        """
        cdef unsigned char id[ONION_UUID_BYTES]
        cdef onion_sealed raw
        cdef _LayerSource source = None
        cdef const onion_layer_source *c_lower = NULL
        cdef int status, c_drop = bool(drop_zero)
        path = os.fsencode(new_path)
        cdef const char *c_path = path
        _copy_id(id, new_id)
        if lower is not None:
            source = _LayerSource(*lower)
            c_lower = &source.source
        with nogil:
            status = onion_volume_rewrite(self._volume, c_path, id, c_lower, c_drop, &raw)
        if status < 0:
            _raise(status, "merge", new_path)
        return _sealed(&raw, [])

    def rewrite_commit(self):
        """Append to the new map file from now on, because the catalog names it."""
        cdef int status
        with nogil:
            status = onion_volume_rewrite_commit(self._volume)
        if status < 0:
            _raise(status, "merge")

    def rewrite_abort(self):
        """Drop the new map file, because the catalog still names the old one."""
        cdef int status
        with nogil:
            status = onion_volume_rewrite_abort(self._volume)
        if status < 0:
            _raise(status, "merge")

    # ---- the lowest files ----

    def prepare_below(self, base_fd=None, base_bytes=0, layer=None, dropped=(), *, keep_base=False):
        """Prepare the replacement of the lowest files, while reads and writes go on. This is called before a commit.

        After `commit_below`, some blocks read from `layer` if it has them, and otherwise from the base. These are the
        blocks that were in a dropped segment, and those that nothing in the volume held. The caller guarantees that
        they read the same as before. ZERO stays ZERO, and the blocks in other segments stay.

        Parameters
        ----------
        base_fd : int, optional
            A descriptor of the new base, which the caller may close. With None, there is no base any more.
        base_bytes : int
            The number of bytes of the base to map. The file must have as many.
        layer : tuple, optional
            The new layer, as (map_path, map_id, length, frames, crc, [(segment id, slots)]). It is the lowest layer.
            With `keep_base`, it is a layer that has everything that is in the dropped segments. Segments that are open
            already stay as they are.
        dropped : sequence of bytes
            The ids of the segments that are not read any more. A segment that the head wrote or inherited may only be
            dropped if `unused_segments` returned it.
        keep_base : bool
            Whether the base stays as it is.

        Raises
        ------
        StateError
            Another replacement is prepared, the head still needs one of the segments, or one does not belong to the
            volume.
        FormatError, OSError
            A file is not what it should be, or could not be opened. Nothing has changed.
        """
        cdef onion_below_source source
        cdef _LayerSource c_layer = None
        cdef int status
        memset(&source, 0, sizeof(source))
        ids = b"".join(dropped)
        source.keep_base = bool(keep_base)
        source.base_fd = -1 if base_fd is None else base_fd
        source.base_bytes = _whole(base_bytes, "a size")
        source.dropped = <const void *>PyBytes_AS_STRING(ids)
        source.dropped_count = len(ids) // ONION_UUID_BYTES
        if layer is not None:
            c_layer = _LayerSource(*layer)
            source.layer = &c_layer.source
        with nogil:
            status = onion_volume_prepare_below(self._volume, &source)
        if status == -EBUSY or status == -ENOENT:
            raise StateError(
                "merge: a change of what lies below is under way, or a segment that is to be dropped is still needed, or "
                "gone; try again when it has ended"
            )
        if status < 0:
            _raise(status, "merge", layer[0] if layer is not None else None if base_fd is None else _path_of(base_fd))

    def commit_below(self):
        """Put the prepared replacement into effect. This is called after the commit.

        Returns
        -------
        bool
            True if no read needs the dropped segments or the old base any more; they are unmapped then. False if memory
            is missing, or the volume is closed or poisoned. All reads then give the same as before, from old and new
            files, so the caller keeps the locks of both. The method may be called again.
        """
        cdef int status
        with nogil:
            status = onion_volume_commit_below(self._volume)
        if status == -EINVAL:
            raise StateError("merge: nothing is prepared; call prepare_below first")
        onion_site_clear()
        return status == 0

    def abort_below(self):
        """Forget the prepared replacement. If there is none, or its commit has begun, this does nothing."""
        with nogil:
            onion_volume_abort_below(self._volume)

    def view(self, object offset, object length, keep=None):
        """Return a range of a snapshot as a read-only array of uint8.

        The array's memory consists of the segments' own pages, and stays valid after `close`. `keep` is referenced as
        long as the array exists. A range in more than 4,096 pieces is copied instead.
        """
        cdef uint64_t at = _bytes_at(offset, "an offset"), count = _bytes_at(length, "a length")
        cdef _MappedRange mapped = _MappedRange()
        cdef int status
        cdef void *address = NULL
        if count == 0:
            return numpy.frombuffer(b"", dtype=numpy.uint8)
        with nogil:
            status = onion_volume_map_range(self._volume, at, count, VIEW_PIECES_MAX, &address, &mapped.mapped_length, &mapped.pieces)
        if status == -E2BIG:
            copied = numpy.frombuffer(self.read(offset, length), dtype=numpy.uint8)
            return copied
        if status < 0:
            _raise_range(status, "view", offset, length, onion_volume_size(self._volume))
        mapped.address = address
        mapped.start = at % <uint64_t>self.block_size
        mapped.length = count
        mapped.keep = keep
        return numpy.frombuffer(mapped, dtype=numpy.uint8)

    @property
    def capsule(self):
        """The C object, for other extension modules. It lives as long as this object."""
        return PyCapsule_New(self._volume, "onion_volume", NULL)

    # ---- the end ----

    def poison(self):
        """Make every later call fail until the volume is opened again."""
        with nogil:
            onion_volume_poison(self._volume)

    def after_fork(self):
        """Mark the data path as unusable in a forked child. Every later call raises, and nothing is released."""
        onion_volume_after_fork(self._volume)

    def drop_stale(self):
        """Empty what a process that died left of a head that the disk has no more, or before another boot.

        Of the only path of a volume, which is open for writing and under its lock.
        """
        onion_volume_drop_stale(self._volume)

    def close(self, *, bint superseded=False):
        """Wait for calls that are under way, then unmap and close. This does not flush. Further calls do nothing.

        `superseded`: the catalog has another head for the disk by now, so nobody takes up what was not flushed here.
        """
        if superseded:
            onion_volume_supersede(self._volume)
        with nogil:
            onion_volume_close(self._volume)


cdef _error_of_step(const onion_seal_step *step):
    """Return the exception of a step that failed, or None."""
    if step.status >= 0:
        return None
    if step.status == -EBUSY:
        return StateError("snapshot: the volume has no spare segment to go on with; close the volume and open it again")
    if step.site.status == step.status:
        return error_of(step.status, "snapshot", os.fsdecode(step.site.path), step.site.offset)
    return error_of(step.status, "snapshot")


cdef onion_seal_step *_steps(paths) except NULL:
    """Describe a step of the seal of each data path. The caller frees it."""
    cdef DataPath path
    if len(set(paths)) != len(paths):
        raise ValueError("snapshot: a volume is named twice; name each once")
    cdef onion_seal_step *steps = <onion_seal_step *>calloc(len(paths) + 1, sizeof(onion_seal_step))
    if steps == NULL:
        raise MemoryError(f"no memory to seal {len(paths)} volumes")
    for index, path in enumerate(paths):
        steps[<uint32_t>index].volume = path._volume
    return steps


cdef class ShortTurns:
    """While this is entered, the calling thread has short turns on its processor: see csrc/base/turns.h.

    For what others wait for, and what waits often itself: it is put on soon when it is woken.
    """

    cdef uint64_t _before_ns

    def __enter__(self):
        self._before_ns = onion_turns_take_short()

    def __exit__(self, kind, error, trace):
        onion_turns_end(self._before_ns)


cdef class LongTurns:
    """While this is entered, the calling thread has long turns on its processor: see csrc/base/turns.h.

    For what computes for long beside writers: they have shorter turns, and need not wait for the end of its own.
    """

    cdef uint64_t _before_ns

    def __enter__(self):
        self._before_ns = onion_turns_take_long()

    def __exit__(self, kind, error, trace):
        onion_turns_end(self._before_ns)


def begin_heads(paths, maps):
    """Begin the seals of volumes, side by side; `cut_heads` and `sync_heads` do the rest of `seal` for each.

    `maps` has the path and the id of the map of each next head. A head for whose changes its log has no room on the disk is
    flushed first. Returns None for each, or the exception of one whose seal has not begun.
    """
    cdef uint32_t index, count = len(paths)
    cdef onion_seal_step *steps = _steps(paths)
    kept = []
    try:
        for index, (map_path, map_id) in enumerate(maps):
            encoded, id = os.fsencode(map_path), bytes(map_id)
            if len(id) != ONION_UUID_BYTES:
                raise ValueError(f"an id has {ONION_UUID_BYTES} bytes, not {len(id)}")
            kept.append((encoded, id))
            steps[index].map_path, steps[index].map_id = <const char *>encoded, <const unsigned char *>id
        if len(kept) != count:
            raise ValueError(f"{count} volumes are to be sealed, with {len(kept)} maps")
        with nogil:
            onion_volumes_seal_begin(steps, count)
        return [_error_of_step(&steps[index]) for index in range(count)]
    finally:
        free(steps)


def sync_heads(paths):
    """Make durable what `cut_heads` cut off, side by side; as after `seal`, flushes wait for seal_commit or seal_abort.

    Returns what was sealed of each, or the exception of one that goes on with its old head.
    """
    cdef uint32_t index, count = len(paths)
    cdef DataPath path
    cdef onion_seal_step *steps = _steps(paths)
    found = []
    try:
        with nogil:
            onion_volumes_seal_sync(steps, count)
        for index, path in enumerate(paths):
            error = _error_of_step(&steps[index])
            found.append(_sealed(&steps[index].sealed, path._just_sealed()) if error is None else error)
        return found
    finally:
        free(steps)


cdef onion_cut_word _word(bytes text):
    return onion_cut_word(<const char *>text, <uint32_t>len(text))


cdef int _set_words(onion_cut_words *raw, words) except -1:
    """Point at what is said at a cut, (hold, held, cut, done, seconds), which the caller keeps."""
    hold, held, cut, done, seconds = words
    raw.hold, raw.held, raw.cut, raw.done = _word(hold), _word(held), _word(cut), _word(done)
    raw.hold_ms = int(seconds * 1000)
    return 0


_NO_WORDS = (b"", b"", b"", b"", 0)


cdef _cut(paths, names, peers, words, wait_seconds):
    """Cut heads, and say it to peers; or, where there is a time to wait, when the one peer says so."""
    cdef uint32_t failed = 0
    cdef int status, wait_ms = 0 if wait_seconds is None else int(wait_seconds * 1000)
    cdef bint is_told = wait_seconds is not None
    cdef DataPath path
    cdef onion_cut at
    if len(set(paths)) != len(paths):
        raise ValueError("snapshot: a volume is named twice; name each once")
    at.count, at.peer_count = len(paths), len(peers)
    _set_words(&at.words, words)
    cdef onion_volume **volumes = <onion_volume **>malloc((at.count + 1) * sizeof(onion_volume *))
    cdef int *descriptors = <int *>malloc((at.peer_count + 1) * sizeof(int))
    try:
        if volumes == NULL or descriptors == NULL:
            raise MemoryError(f"no memory to cut {at.count} volumes")
        for index, path in enumerate(paths):
            volumes[<uint32_t>index] = path._volume
        for index, peer in enumerate(peers):
            descriptors[<uint32_t>index] = peer
        at.volumes, at.peers = volumes, descriptors
        with nogil:
            status = onion_volumes_cut_when_told(&at, wait_ms, &failed) if is_told else onion_volumes_cut(&at, &failed)
    finally:
        free(volumes)
        free(descriptors)
    if status < 0 and at.count <= failed < at.count + at.peer_count:
        return failed - at.count, -status
    if status < 0:
        _raise(status, f"snapshot of {names[failed]!r}" if failed < at.count else "snapshot")
    return None


def cut_heads(paths, names, peers=(), words=_NO_WORDS):
    """Cut the heads of volumes whose seals were begun, at one instant; writers wait meanwhile, and the GIL is not held.

    Each write that was answered before one that the cut leaves out began is in the cut, whichever volumes they went to.
    `names` are what errors call the volumes. `peers` are the sockets of processes that cut more volumes of the group, with
    `cut_when_told`, and `words` what is said: (hold, held, cut, done, seconds). On an error each seal that was begun is to
    be aborted, and so it is where something is returned: (index of a peer that failed, its error number).
    """
    return _cut(paths, names, peers, words, None)


def cut_when_told(paths, names, peer, words, wait_seconds):
    """Cut heads as `cut_heads` does, at the same instant as others and when the process at the other end of a socket says so.

    Returns 0, or the error number of the peer: ETIME, ECONNRESET, EPROTO. Then, and after an error, the seals are to be
    aborted.
    """
    failed = _cut(paths, names, (peer,), words, wait_seconds)
    return failed[1] if failed else 0


def _path_of(fd):
    """Return the path that a descriptor was opened by, for a message."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


cdef list _segment_list(const onion_segment_info *infos, uint32_t count):
    cdef uint32_t i
    return [(infos[i].number, infos[i].uuid[:ONION_UUID_BYTES], _ROLES[infos[i].role], infos[i].slots) for i in range(count)]
