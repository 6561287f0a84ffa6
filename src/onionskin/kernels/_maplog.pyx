"""The block map of one layer, the map of which layer each block comes from, and the bytes of headers and map logs.

The module is a thin wrapper of csrc/layer/layer_map.h, csrc/layer/provenance.h and csrc/layer/map_log.h.

Only one thread at a time may use a LayerMap, because its longer methods release the GIL and lock nothing.
"""

import contextlib
import os

from onionskin.errors import FormatError, StateError
from onionskin.base.lazy import dtypes
from onionskin.base.lazy import numpy as np
from onionskin.base.modes import make_file
from onionskin.base.named_tuples import NamedTuple
from onionskin.kernels._extents cimport (
    ONION_EXTENT_STATE_DATA, ONION_EXTENT_STATE_ZERO, Extents, onion_extent_row, onion_extents_add, onion_extents_join
)

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy


cdef extern from "index/blockmap.h" nogil:
    ctypedef uint64_t onion_location
    enum:
        ONION_SEGMENT_LAST
    const uint64_t ONION_SLOT_LAST
    const onion_location ONION_LOCATION_HOLE
    const onion_location ONION_LOCATION_ZERO
    uint32_t onion_location_segment(onion_location location)
    uint32_t onion_location_slot(onion_location location)
    int onion_location_is_data(onion_location location)
    struct onion_map:
        uint64_t block_count
    uint64_t onion_map_memory(const onion_map *map)
    struct onion_run:
        uint64_t block_index
        uint64_t block_count
        onion_location location
    int onion_map_next(const onion_map *map, uint64_t block_index, uint64_t block_end, onion_run *run)
    onion_location onion_map_lookup(const onion_map *map, uint64_t block_index)
    int onion_map_set(onion_map *map, uint64_t block_index, uint64_t block_count, onion_location location)
    int onion_map_fold(onion_map *lower, const onion_map *upper, const uint16_t *renumber)
    uint64_t onion_map_count_shadowed(const onion_map *lower, const onion_map *upper)


cdef extern from "layer/map_log.h" nogil:
    const uint64_t ONION_VOLUME_BYTES_MAX
    enum:
        ONION_E_FORMAT
        ONION_E_VERSION
        ONION_E_CHECKSUM
        ONION_E_TORN
        ONION_HEADER_BYTES
        ONION_FORMAT_VERSION
        ONION_FEATURE_WIPE_ZERO
        ONION_RECORD_BYTES
        ONION_UUID_BYTES
        ONION_RECORD_SIZE
    const char *ONION_MAGIC_MAP
    const char *ONION_MAGIC_SEGMENT
    struct onion_header:
        uint32_t version
        uint32_t block_size
        uint64_t incompatible
        uint64_t compatible
        unsigned char uuid[16]
    struct onion_record:
        uint64_t block_index
        uint32_t block_count
        uint32_t slot
        uint16_t kind
        uint16_t segment
    struct onion_log_cursor:
        uint64_t offset
        uint64_t sequence
        uint64_t salt
        uint32_t crc
    void onion_header_encode(const onion_header *header, const char *magic, unsigned char *out)
    int onion_header_decode(const unsigned char *data, size_t length, const char *magic, onion_header *out)
    int onion_header_is_torn(const unsigned char *data, size_t length, const char *magic, const onion_header *expected)
    size_t onion_frame_bytes(size_t record_count)
    uint32_t onion_frame_encode(const onion_record *records, uint32_t record_count, uint64_t sequence,
                                uint64_t salt, uint32_t previous_crc, unsigned char *out)
    int onion_log_next(const unsigned char *data, uint64_t length, onion_log_cursor *cursor,
                       const unsigned char **records, uint32_t *record_count)
    int onion_log_has_holes(const unsigned char *data, uint64_t length, uint64_t offset)


cdef extern from "fcntl.h" nogil:
    int O_RDONLY

cdef extern from "base/store_file.h" nogil:
    struct onion_map_bytes:
        unsigned char *bytes
        uint64_t length
    int onion_open_file(const char *path, int flags)
    int onion_map_bytes_read_sealed(int fd, uint64_t length, onion_map_bytes *out, uint64_t *fault)
    int onion_map_bytes_read(int fd, onion_map_bytes *out, uint64_t *fault)
    void onion_map_bytes_free(onion_map_bytes *read)

cdef extern from "base/status.h" nogil:
    enum:
        ONION_E_NOT_A_FILE

cdef extern from "layer/layer_map.h" nogil:
    struct onion_layer:
        onion_map map
        uint32_t segment_count
        unsigned char (*segment_ids)[16]
        int has_size
        uint64_t size_bytes
    struct onion_layer_writer:
        uint64_t block_index
    struct onion_layer_run:
        pass
    struct onion_stretch:
        uint64_t first
        uint64_t count
    int onion_layer_init(onion_layer *layer, uint64_t block_count, uint32_t block_shift)
    void onion_layer_destroy(onion_layer *layer)
    int onion_layer_grow(onion_layer *layer, uint64_t block_count)
    int onion_layer_add_segment(onion_layer *layer, const unsigned char *uuid)
    int onion_layer_load(onion_layer *layer, const unsigned char *data, uint64_t length, onion_log_cursor *cursor,
                         uint64_t *fault_offset)
    uint32_t onion_layer_records(const onion_layer *layer, onion_layer_writer *writer, onion_record *records,
                                 uint32_t capacity)
    uint64_t onion_layer_runs(const onion_layer *layer, onion_layer_run *out)
    uint64_t onion_layer_slots(const onion_layer *layer, uint32_t segment, onion_stretch *out)
    uint64_t onion_stretches_join(onion_stretch *stretches, uint64_t count)
    void onion_layer_slots_by_segment(const onion_layer *layer, uint64_t *starts, onion_stretch *out)
    void onion_layer_count(const onion_layer *layer, uint64_t *data_blocks, uint64_t *zero_blocks)
    void onion_layer_segment_use(const onion_layer *layer, uint64_t *blocks, uint64_t *ends)
    int onion_layer_drop_zero(onion_layer *layer)
    int64_t onion_layer_replace(onion_layer *layer, uint32_t segment, const onion_stretch *slots,
                                const uint64_t *new_first, uint64_t count, uint32_t new_segment)


cdef extern from "layer/provenance.h" nogil:
    enum:
        ONION_PROVENANCE_LAYER_LAST
    struct onion_provenance:
        onion_map map
    struct onion_provenance_run:
        uint64_t block_index
        uint64_t block_count
        uint32_t layer
        unsigned char state
    int onion_provenance_init(onion_provenance *provenance, uint64_t block_count, uint32_t block_shift)
    void onion_provenance_destroy(onion_provenance *provenance)
    int onion_provenance_lay(onion_provenance *provenance, const onion_map *upper, uint32_t layer)
    int onion_provenance_lay_log(onion_provenance *provenance, const unsigned char *data, uint64_t length, onion_log_cursor *cursor,
                             uint32_t layer, uint64_t *size_bytes, uint64_t *fault_offset)
    int onion_provenance_resolve(onion_provenance *provenance)
    uint64_t onion_provenance_runs(const onion_provenance *provenance, onion_provenance_run *out)


cdef extern from "base/crc32c.h" nogil:
    uint32_t onion_crc32c(uint32_t crc, const void *data, size_t length)
    uint32_t onion_crc32c_reference(uint32_t crc, const void *data, size_t length)


MAGIC_SEGMENT = b"ONIONSEG"
MAGIC_MAP = b"ONIONMAP"
HEADER_BYTES = ONION_HEADER_BYTES
LOCATION_HOLE = ONION_LOCATION_HOLE
LOCATION_ZERO = ONION_LOCATION_ZERO
STATE_DATA = 1
STATE_ZERO = 2
# A map of this size has 2.8 thousand million records. No map that is compacted in time has as many.
_MAP_BYTES_MAX = 64 << 30
# The most records in one frame of a compact log. It bounds the memory that writing a frame takes.
_FRAME_RECORDS = 65536
_ADVICE = (
    "Restore the file from a copy of the store, or discard what needs it; `onionskin check` lists what does."
)


class Header(NamedTuple):
    """The fields of the header of a file of the store."""

    version: int
    block_size: int
    incompatible: int
    compatible: int
    uuid: bytes


class Frame(NamedTuple):
    """One whole frame of a map log. ``records`` is a structured array as in docs/format.md."""

    offset: int
    sequence: int
    salt: int
    crc: int
    records: object


cdef object _array_data(object array):
    return array.ctypes.data


def crc32c(data, crc=0, *, reference=False):
    """Return the CRC-32C of bytes. ``crc`` is the result for the bytes before them."""
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    cdef const unsigned char *start = &view[0] if view.shape[0] else NULL
    cdef size_t length = view.shape[0]
    cdef uint32_t value = crc
    cdef bint plain = reference
    with nogil:
        value = onion_crc32c_reference(value, start, length) if plain else onion_crc32c(value, start, length)
    return value


cdef int _fill_header(onion_header *header, object block_size, bytes uuid, uint64_t compatible) except -1:
    if len(uuid) != ONION_UUID_BYTES:
        raise ValueError(f"an id has {ONION_UUID_BYTES} bytes, not {len(uuid)}")
    _block_shift(block_size)
    header.version = ONION_FORMAT_VERSION
    header.block_size = block_size
    header.incompatible = 0
    header.compatible = compatible
    memcpy(header.uuid, <const unsigned char *>uuid, ONION_UUID_BYTES)
    return 0


def _block_shift(block_size):
    shift = int(block_size).bit_length() - 1
    if not 12 <= shift <= 21 or block_size != 1 << shift:
        raise ValueError(f"block size {block_size} is not a power of two from 4096 to 2097152")
    return shift


cdef int _check_made(int status, block_count) except -1:
    """Raise the error of a call that made an index."""
    if status == -ENOMEM:
        raise MemoryError(f"no memory for the index of {block_count} blocks")
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    return 0


cdef const char *_magic(object magic) except NULL:
    if magic == MAGIC_MAP:
        return ONION_MAGIC_MAP
    if magic == MAGIC_SEGMENT:
        return ONION_MAGIC_SEGMENT
    raise ValueError(f"{magic!r} is no magic of a file of a store")


def encode_header(magic, *, block_size, uuid, wipe_zero=False):
    """Return the 4,096 bytes with which a segment or map file begins."""
    cdef onion_header header
    cdef bytearray out = bytearray(ONION_HEADER_BYTES)
    cdef const char *kind = _magic(magic)
    _fill_header(&header, block_size, uuid, ONION_FEATURE_WIPE_ZERO if wipe_zero else 0)
    onion_header_encode(&header, kind, <unsigned char *>out)
    return bytes(out)


def decode_header(data, magic, *, path="header"):
    """Check and read the header at the beginning of ``data``.

    If the header is damaged, or has a version or feature that is not known, FormatError is raised, which names
    ``path``.
    """
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    cdef onion_header header
    cdef int status = onion_header_decode(
        &view[0] if view.shape[0] else NULL, view.shape[0], _magic(magic), &header
    )
    if status < 0:
        raise FormatError(_header_fault(path, magic, view.shape[0], status))
    return Header(
        header.version,
        header.block_size,
        header.incompatible,
        header.compatible,
        (<const unsigned char *>header.uuid)[:ONION_UUID_BYTES],
    )


def _header_fault(path, magic, length, status):
    if status == ONION_E_VERSION:
        return (
            f"{path}: written by a newer onionskin, with a version or a feature that this one does not know. "
            "Use the onionskin that wrote it."
        )
    if status == ONION_E_CHECKSUM:
        return f"{path}: header is damaged (bytes 0 to 4095: checksum does not match). {_ADVICE}"
    if length < ONION_HEADER_BYTES:
        return f"{path}: only {length} bytes long, shorter than a header. {_ADVICE}"
    return f"{path}: not a {magic.decode()} file (byte 0), or its header is impossible. {_ADVICE}"


def decode_log(data, *, path="map log"):
    """Read the frames of a whole map file, header included.

    Returns
    -------
    frames : list of Frame
        The whole frames. Their records are read-only arrays over ``data``, which are not yet checked one by one.
    length : int
        The offset at which the last whole frame ends.
    torn : bool
        Whether a torn frame, as a crash leaves it, follows the last whole frame.

    Raises
    ------
    FormatError
        The header is bad, or a frame that is not the last one is bad.
    """
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    cdef onion_log_cursor cursor = onion_log_cursor(ONION_HEADER_BYTES, 0, 0, 0)
    cdef const unsigned char *records
    cdef uint32_t count
    cdef uint64_t length = view.shape[0]
    cdef uint64_t start
    cdef int status
    decode_header(data, MAGIC_MAP, path=path)
    frames = []
    while True:
        start = cursor.offset
        with nogil:
            status = onion_log_next(&view[0], length, &cursor, &records, &count)
        if status != 1:
            break
        array = np.frombuffer(data, dtypes.RECORD, count, start + onion_frame_bytes(0))
        array.flags.writeable = False
        frames.append(Frame(start, cursor.sequence, cursor.salt, cursor.crc, array))
    if status < 0 and status != ONION_E_TORN:
        raise FormatError(_log_fault(path, start, status))
    return frames, cursor.offset, status == ONION_E_TORN


def _log_fault(path, offset, status):
    what = {
        ONION_E_CHECKSUM: "the checksum of the frame does not match",
        ONION_E_TORN: "the log ends in the middle of a frame",
    }.get(status, "there is no sound frame or record")
    return f"{path}: block map is damaged at byte {offset}: {what}. {_ADVICE}"


def _read_map_file(path, length):
    """Read a map file into a bytearray: its first ``length`` bytes, or the allocated part if ``length`` is None."""
    cdef onion_map_bytes read
    cdef uint64_t fault = 0, sealed_length = 0 if length is None else length
    cdef int fd, status, is_sealed = length is not None
    encoded = os.fsencode(path)
    cdef const char *c_path = encoded
    with nogil:
        fd = onion_open_file(c_path, O_RDONLY)
    if fd == ONION_E_NOT_A_FILE:
        raise FormatError(f"{path}: a symbolic link, or no regular file. {_ADVICE}")
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd), path)
    try:
        size = os.fstat(fd).st_size
        if is_sealed and size < length:
            raise FormatError(
                f"{path}: {size} bytes long, but the catalog says that its block map has {length}. {_ADVICE}"
            )
        with nogil:
            if is_sealed:
                status = onion_map_bytes_read_sealed(fd, sealed_length, &read, &fault)
            else:
                status = onion_map_bytes_read(fd, &read, &fault)
    finally:
        os.close(fd)
    try:
        if status == ONION_E_FORMAT:
            raise FormatError(f"{path}: a hole, or an end, where its frames should be (byte {fault}). {_ADVICE}")
        if status == -ENOMEM:
            raise MemoryError(f"{path}: no memory for its bytes")
        if status < 0:
            raise OSError(-status, os.strerror(-status), path)
        if read.length > _MAP_BYTES_MAX:
            raise FormatError(f"{path}: {read.length} bytes are too many for a block map. {_ADVICE}")
        return PyByteArray_FromStringAndSize(<char *>read.bytes, read.length)
    finally:
        onion_map_bytes_free(&read)


cdef bint _header_is_torn(bytearray data, map_id, block_size) except -1:
    """Whether a crash left this file in a state in which its header was never synced."""
    cdef onion_header expected
    cdef onion_log_cursor cursor = onion_log_cursor(ONION_HEADER_BYTES, 0, 0, 0)
    cdef const unsigned char *start = <const unsigned char *>PyByteArray_AS_STRING(data)
    cdef const unsigned char *records
    cdef uint32_t count
    cdef uint64_t length = len(data)
    _fill_header(&expected, block_size, map_id, 0)
    if not onion_header_is_torn(start, length, ONION_MAGIC_MAP, &expected):
        return False
    return length <= ONION_HEADER_BYTES or onion_log_next(
        start, length, &cursor, &records, &count
    ) == ONION_E_TORN


def _read_sound_map(path, map_id, block_size, length):
    """Read a map file and check its header. ``length`` is that of a sealed layer, or None for a head.

    If the header of a head's map was never synced, None is returned.
    """
    data = _read_map_file(path, length)
    if length is None and _header_is_torn(data, map_id, block_size):
        return None
    header = decode_header(data, MAGIC_MAP, path=path)
    if header.uuid != map_id or header.block_size != block_size:
        raise FormatError(
            f"{path}: is the block map {header.uuid.hex()} with blocks of {header.block_size} bytes, not "
            f"{map_id.hex()} with blocks of {block_size}. Put the right file in its place."
        )
    return data


def _check_sealed(path, wanted, found):
    """Compare (length, frames, crc) of the catalog with those of the file. A value that is None is not compared."""
    length, frames, crc = found
    _, wanted_frames, wanted_crc = wanted
    if wanted_frames not in (None, frames) or wanted_crc not in (None, crc):
        raise FormatError(
            f"{path}: the {length} bytes of block map have {frames} frames with CRC "
            f"{crc:08x}, but the catalog says otherwise (frames: {wanted_frames}, CRC: "
            f"{'any' if wanted_crc is None else f'{wanted_crc:08x}'}). {_ADVICE}"
        )


def _write_all(descriptor, data):
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


cdef class LayerMap:
    """The block map of one layer, loaded from a map file, changed in memory, and written to a new one.

    All blocks are HOLE at first. Segment numbers (in ``set``, ``lookup`` and ``runs``) count from 1: number n stands
    for ``segments[n - 1]``. Only one thread at a time may use a map. If a method that changes the map raises
    MemoryError, the map is half changed and has to be closed.

    Parameters
    ----------
    block_size : int
        The block size in bytes.
    block_count : int
        The number of blocks of the layer. The map grows by itself with ``fold`` and with the sizes that a log names.
    """

    cdef onion_layer _layer
    cdef bint _open
    cdef readonly object block_size
    cdef readonly object map_length
    cdef readonly object map_frames
    cdef readonly object map_crc
    cdef readonly bint torn
    cdef list _segments
    cdef dict _numbers

    def __cinit__(self, *, block_size, block_count):
        if block_count < 0:
            raise ValueError(f"block_count {block_count} is negative")
        shift = _block_shift(block_size)
        _check_made(onion_layer_init(&self._layer, block_count, shift), block_count)
        self._open = True
        self.block_size = block_size
        self.map_length = self.map_frames = self.map_crc = 0
        self.torn = False
        self._segments = []
        self._numbers = {}

    def __dealloc__(self):
        onion_layer_destroy(&self._layer)

    def close(self):
        """Free the memory. Every later call other than this one raises StateError."""
        self._open = False
        onion_layer_destroy(&self._layer)

    cdef int _check_open(self) except -1:
        if not self._open:
            raise StateError("this block map is closed: load it again")
        return 0

    # ---- from and to files ----

    @classmethod
    def load(cls, path, *, map_id, block_size, block_count, length=None, frames=None, crc=None):
        """Read a map file.

        Parameters
        ----------
        path : str
            The path of the file.
        map_id : bytes
            The id that its header must have.
        block_size, block_count : int
            Those of the volume. If the volume has grown, its log makes the map larger.
        length, frames, crc : int, optional
            For a sealed layer, the values of the catalog: the first ``length`` bytes must be exactly that many frames
            with that chained CRC. Bytes after them are ignored. For a head, the values are None. Then a torn last frame
            is ignored, and so is a header that was never synced. ``map_length`` says how much of the file is sound.

        Raises
        ------
        FormatError
            The file is damaged, is another one, or was cut short. The message says where, and what to do.
        OSError
            The file cannot be read. If there is no file, the error is FileNotFoundError.
        """
        path = os.fspath(path)
        cdef LayerMap self = cls(block_size=block_size, block_count=block_count)
        data = _read_sound_map(path, map_id, block_size, length)
        if data is None:
            self.torn = True
            return self
        self._apply(path, data, length is not None)
        _check_sealed(path, (length, frames, crc), (self.map_length, self.map_frames, self.map_crc))
        return self

    def _apply(self, path, bytearray data, sealed):
        cdef onion_log_cursor cursor = onion_log_cursor(ONION_HEADER_BYTES, 0, 0, 0)
        cdef const unsigned char *start = <const unsigned char *>PyByteArray_AS_STRING(data)
        cdef uint64_t length = len(data)
        cdef uint64_t fault = 0
        cdef int status
        cdef uint32_t i
        with nogil:
            status = onion_layer_load(&self._layer, start, length, &cursor, &fault)
        if status == -ENOMEM:
            raise MemoryError(f"{path}: no memory for the block map")
        if status < 0 and (status != ONION_E_TORN or sealed):
            raise FormatError(_log_fault(path, fault, status))
        for i in range(self._layer.segment_count):
            self._segments.append((<const unsigned char *>self._layer.segment_ids[i])[:ONION_UUID_BYTES])
        self._numbers = {segment: number for number, segment in enumerate(self._segments, 1)}
        if len(self._numbers) != len(self._segments):
            raise FormatError(f"{path}: block map gives two numbers to one segment. {_ADVICE}")
        self.torn = status == ONION_E_TORN
        self.map_length = cursor.offset
        self.map_frames = cursor.sequence
        self.map_crc = cursor.crc

    def write(self, path, *, map_id, wipe_zero, size_bytes):
        """Write a compact log to a new file and sync the file (not its directory).

        The log names only segments that are still used. It begins with a SIZE record, unless ``size_bytes`` is None. If
        this fails, the file is removed again. With ``wipe_zero``, it is overwritten before that.

        Returns
        -------
        length, frames, crc : int
            The values that describe the file in the catalog.

        Raises
        ------
        FileExistsError
            There is a file of that name.
        OSError
            The file could not be written, for example because there is no room.
        """
        self._check_open()
        if size_bytes is not None and not 0 <= size_bytes <= ONION_VOLUME_BYTES_MAX:
            raise ValueError(f"{size_bytes} is no size of a volume, which has 1 byte to 64 TiB")
        path = os.fspath(path)
        header = encode_header(MAGIC_MAP, block_size=self.block_size, uuid=map_id, wipe_zero=wipe_zero)
        descriptor = make_file(path)
        try:
            _write_all(descriptor, header)
            written = self._write_frames(descriptor, size_bytes)
            os.fsync(descriptor)  # BARRIER: written map
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path
            if wipe_zero:
                _overwrite(descriptor)
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)
        return written

    def _write_frames(self, descriptor, size_bytes):
        cdef onion_layer_writer *writer = <onion_layer_writer *>calloc(1, sizeof(onion_layer_writer))
        # There may be a SIZE record, and for each run a DATA record with a SEGMENT record before it. A run of more
        # blocks than a record can have takes several records. onion_layer_records needs room for two records at least.
        cdef uint32_t capacity = min(_FRAME_RECORDS, 4 + 2 * onion_layer_runs(&self._layer, NULL))
        cdef onion_record *records = <onion_record *>calloc(capacity, sizeof(onion_record))
        cdef uint32_t used = 0
        cdef uint32_t crc = 0
        cdef uint64_t sequence = 0
        cdef uint64_t salt = int.from_bytes(os.urandom(8), "little")
        cdef unsigned char *out
        try:
            if writer == NULL or records == NULL:
                raise MemoryError("no memory to write a block map")
            frame = bytearray(onion_frame_bytes(capacity))
            out = <unsigned char *>frame
            length = ONION_HEADER_BYTES
            if size_bytes is not None:
                records[0].kind = ONION_RECORD_SIZE
                records[0].block_index = size_bytes
                used = 1
            while True:
                with nogil:
                    used += onion_layer_records(&self._layer, writer, records + used, capacity - used)
                    if used:
                        sequence += 1
                        crc = onion_frame_encode(records, used, sequence, salt, crc, out)
                if not used:
                    return length, sequence, crc
                _write_all(descriptor, memoryview(frame)[: onion_frame_bytes(used)])
                length += onion_frame_bytes(used)
                used = 0
        finally:
            free(writer)
            free(records)

    # ---- its contents ----

    @property
    def segments(self):
        """The ids of its segments. The id of number n is at index n - 1."""
        return list(self._segments)

    @property
    def size_bytes(self):
        """The size in bytes that the last SIZE record gave the layer, or None if there is no such record."""
        self._check_open()
        return self._layer.size_bytes if self._layer.has_size else None

    @property
    def block_count(self):
        """The number of blocks that the map has room for."""
        self._check_open()
        return self._layer.map.block_count

    def memory_bytes(self):
        """Return the number of bytes of memory that the index takes."""
        self._check_open()
        return onion_map_memory(&self._layer.map)

    def lookup(self, block_index):
        """Return the location of a block: 0 for HOLE, LOCATION_ZERO, or segment number << 32 | slot."""
        self._check_open()
        if not 0 <= block_index < self._layer.map.block_count:
            raise ValueError(f"block {block_index} is outside the map of {self._layer.map.block_count} blocks")
        return onion_map_lookup(&self._layer.map, block_index)

    def runs(self):
        """Return all runs that are not HOLE, in order, as an array of dtypes.LAYER_RUN."""
        cdef uint64_t count
        cdef onion_layer_run *out
        self._check_open()
        with nogil:
            count = onion_layer_runs(&self._layer, NULL)
        array = np.zeros(count, dtypes.LAYER_RUN)
        out = <onion_layer_run *><size_t>_array_data(array)
        if count:
            with nogil:
                onion_layer_runs(&self._layer, out)
        return array

    def extents(self):
        """Return which bytes of the disk are DATA and which are ZERO here, as a table that does not say where they lie.

        Neighbours that are both DATA, or both ZERO, are one extent.
        """
        cdef Extents found = Extents()
        cdef onion_extent_row row
        cdef onion_run run
        cdef uint64_t block_size = self.block_size
        cdef int status = 0
        self._check_open()
        run.block_index = run.block_count = row.source = 0
        with nogil:
            while status == 0 and onion_map_next(&self._layer.map, run.block_index + run.block_count,
                                                 self._layer.map.block_count, &run):
                row.offset, row.length = run.block_index * block_size, run.block_count * block_size
                row.state, row.place = ONION_EXTENT_STATE_ZERO, 0
                if onion_location_is_data(run.location):
                    row.state, row.place = ONION_EXTENT_STATE_DATA, row.offset
                status = onion_extents_add(&found.table, &row)
            onion_extents_join(&found.table)
        if status < 0:
            raise MemoryError("no memory for a table of extents")
        return found

    def count(self):
        """Return (DATA blocks, ZERO blocks)."""
        cdef uint64_t data
        cdef uint64_t zero
        self._check_open()
        with nogil:
            onion_layer_count(&self._layer, &data, &zero)
        return data, zero

    def segment_use(self):
        """Return {id: (blocks, end)} of the segments that have blocks. ``end`` is one more than the highest slot."""
        cdef uint64_t *blocks
        cdef uint64_t *ends
        cdef size_t count
        self._check_open()
        # No array of NumPy: a merge asks this, and to import NumPy takes longer than all else that a merge does.
        count = self._layer.segment_count + 1
        blocks = <uint64_t *>calloc(2 * count, sizeof(uint64_t))
        if blocks == NULL:
            raise MemoryError("no memory for the use of segments")
        ends = blocks + count
        try:
            with nogil:
                onion_layer_segment_use(&self._layer, blocks, ends)
            return {
                segment: (blocks[number], ends[number])
                for number, segment in enumerate(self._segments, 1)
                if blocks[number]
            }
        finally:
            free(blocks)

    def count_shadowed(self, LayerMap upper not None):
        """Return how many blocks are DATA here and not HOLE in ``upper``. A merge of the two frees their slots."""
        cdef uint64_t count
        self._check_open()
        upper._check_open()
        with nogil:
            count = onion_map_count_shadowed(&self._layer.map, &upper._layer.map)
        return count

    def live_slots(self, segment):
        """Return the slots of a segment that the map names, sorted and joined: the bytes of an array of dtypes.SLOTS.

        They are empty if the map does not know the segment.
        """
        cdef uint64_t count
        cdef onion_stretch *out
        cdef uint32_t number = self._numbers.get(segment, 0)
        self._check_open()
        if number == 0:
            return b""
        with nogil:
            count = onion_layer_slots(&self._layer, number, NULL)
            out = <onion_stretch *>malloc((count + 1) * sizeof(onion_stretch))
        if out == NULL:
            raise MemoryError(f"no memory for {count} runs of slots")
        try:
            with nogil:
                onion_layer_slots(&self._layer, number, out)
                count = onion_stretches_join(out, count)
            return PyBytes_FromStringAndSize(<char *>out, count * sizeof(onion_stretch))
        finally:
            free(out)

    def slots_by_segment(self):
        """Return {id: slots} of the segments that have blocks: what the map names of them, sorted and joined.

        The slots are the bytes of an array of dtypes.SLOTS. There is no such array here: `discard` asks this, and to import
        NumPy takes longer than all else that it does.
        """
        cdef uint64_t *starts = NULL
        cdef onion_stretch *out = NULL
        cdef uint64_t count
        cdef uint32_t number
        self._check_open()
        starts = <uint64_t *>calloc(self._layer.segment_count + 2, sizeof(uint64_t))
        if starts == NULL:
            raise MemoryError("no memory for the slots of segments")
        try:
            with nogil:
                onion_layer_slots_by_segment(&self._layer, starts, NULL)
                count = starts[self._layer.segment_count + 1]
                out = <onion_stretch *>malloc((count + 1) * sizeof(onion_stretch))
            if out == NULL:
                raise MemoryError(f"no memory for {count} runs of slots")
            with nogil:
                onion_layer_slots_by_segment(&self._layer, starts, out)
            found = {}
            for number in range(1, self._layer.segment_count + 1):
                with nogil:
                    count = onion_stretches_join(out + starts[number], starts[number + 1] - starts[number])
                if count:
                    found[self._segments[number - 1]] = PyBytes_FromStringAndSize(
                        <char *>(out + starts[number]), count * sizeof(onion_stretch))
            return found
        finally:
            free(out)
            free(starts)

    # ---- changes ----

    def add_segment(self, segment):
        """Return the number of a segment. If the map does not know it yet, it gets the next number."""
        self._check_open()
        known = self._numbers.get(segment)
        if known is not None:
            return known
        if len(segment) != ONION_UUID_BYTES:
            raise ValueError(f"an id has {ONION_UUID_BYTES} bytes, not {len(segment)}")
        number = onion_layer_add_segment(&self._layer, segment)
        if number == ONION_E_FORMAT:
            raise StateError(f"a layer has no more than {ONION_SEGMENT_LAST} segments: compact small ones first")
        if number < 0:
            raise MemoryError("no memory for one more segment")
        self._segments.append(bytes(segment))
        self._numbers[bytes(segment)] = number
        return number

    def set(self, block_index, block_count, location):
        """Map ``block_count`` blocks from ``block_index`` on to ``location`` and the slots that follow it.

        ``location`` is LOCATION_HOLE, LOCATION_ZERO, or segment number << 32 | slot.
        """
        self._check_open()
        limit = self._layer.map.block_count
        if block_index < 0 or block_count < 0 or block_index + block_count > limit:
            raise ValueError(f"{block_count} blocks from {block_index} on are outside the map of {limit} blocks")
        if location not in (ONION_LOCATION_HOLE, ONION_LOCATION_ZERO):
            number, slot = location >> 32, location & 0xFFFFFFFF
            if not 1 <= number <= len(self._segments) or slot + block_count - 1 > ONION_SLOT_LAST:
                raise ValueError(f"location {location:#x} is in no segment of this map: add_segment first")
        if block_count == 0:
            return
        if onion_map_set(&self._layer.map, block_index, block_count, location) < 0:
            raise MemoryError("no memory for the index")

    def fold(self, LayerMap upper not None):
        """Lay ``upper`` over this map: its blocks that are not HOLE replace those of this map.

        The segments of ``upper`` are added to ``segments``.
        """
        cdef uint16_t *renumber
        cdef int status
        self._check_open()
        upper._check_open()
        if upper is self:
            raise ValueError("a block map cannot be folded into itself")
        if upper.block_size != self.block_size:
            raise ValueError(f"blocks of {upper.block_size} bytes do not fold into blocks of {self.block_size}")
        renumber = <uint16_t *>calloc(ONION_SEGMENT_LAST + 1, sizeof(uint16_t))
        if renumber == NULL:
            raise MemoryError("no memory for the numbers of segments")
        try:
            for number, segment in enumerate(upper._segments, 1):
                renumber[number] = self.add_segment(segment)
            with nogil:
                status = onion_layer_grow(&self._layer, upper._layer.map.block_count)
                if status == 0:
                    status = onion_map_fold(&self._layer.map, &upper._layer.map, renumber)
        finally:
            free(renumber)
        if status < 0:
            raise MemoryError("no memory for the index")
        if upper._layer.has_size:
            self._layer.has_size = 1
            self._layer.size_bytes = upper._layer.size_bytes

    def drop_zero(self):
        """Turn ZERO into HOLE. This is right for a layer that has neither a layer nor a base below it any more."""
        cdef int status
        self._check_open()
        with nogil:
            status = onion_layer_drop_zero(&self._layer)
        if status < 0:
            raise MemoryError("no memory for the index")

    def replace(self, segment, slots, new_segment, new_slots):
        """Map blocks of one segment to their copies in another segment.

        ``slots`` are stretches of slots: a block in slot k of stretch i of ``segment`` moves to slot ``new_slots[i] + k`` of
        ``new_segment``. Blocks in other slots stay.

        Parameters
        ----------
        segment, new_segment : bytes
            The ids of the segments. The map must know the first. The second is added to ``segments``.
        slots : bytes
            The slots to move, sorted and without overlaps, as ``live_slots`` returns them.
        new_slots : sequence of int
            For each stretch, its first slot in ``new_segment``.

        Returns
        -------
        int
            The number of blocks that moved.
        """
        cdef const unsigned char[::1] stretches = slots
        cdef uint64_t count = len(stretches) // sizeof(onion_stretch)
        cdef onion_stretch *from_slots = NULL
        cdef uint64_t *to_slots = NULL
        cdef uint32_t number, new_number
        cdef uint64_t i
        cdef int64_t moved
        self._check_open()
        number = self._numbers.get(segment, 0)
        if number == 0:
            raise ValueError(f"segment {segment.hex()} is not in this map")
        if segment == new_segment:
            raise ValueError(f"segment {segment.hex()} cannot be moved into itself")
        if len(stretches) % sizeof(onion_stretch) or len(new_slots) != count:
            raise ValueError(f"{len(new_slots)} new slots for {len(stretches)} bytes of old ones")
        from_slots = <onion_stretch *>calloc(count + 1, sizeof(onion_stretch))
        to_slots = <uint64_t *>calloc(count + 1, sizeof(uint64_t))
        try:
            if from_slots == NULL or to_slots == NULL:
                raise MemoryError(f"no memory for {count} runs of slots")
            if count:
                memcpy(from_slots, &stretches[0], count * sizeof(onion_stretch))
            for i in range(count):
                to_slots[i] = new_slots[i]
            _check_slots(from_slots, to_slots, count)
            new_number = self.add_segment(new_segment)
            with nogil:
                moved = onion_layer_replace(&self._layer, number, from_slots, to_slots, count, new_number)
        finally:
            free(from_slots)
            free(to_slots)
        if moved < 0:
            raise MemoryError("no memory for the index")
        return moved


cdef class ProvenanceMap:
    """A map of which layer each block comes from. Layers are laid over each other, from the bottom up.

    Layers get numbers in the order in which they are laid, 1 for the first. Only one thread at a time may use the map.
    If a method that changes it raises an error, the map is half changed and has to be closed.

    Parameters
    ----------
    block_size : int
        The block size in bytes.
    block_count : int
        The number of blocks that the map has room for, which no layer may exceed.
    """

    cdef onion_provenance _provenance
    cdef bint _open
    cdef readonly object block_size
    cdef readonly object laid

    def __cinit__(self, *, block_size, block_count):
        if block_count < 0:
            raise ValueError(f"block_count {block_count} is negative")
        _check_made(onion_provenance_init(&self._provenance, block_count, _block_shift(block_size)), block_count)
        self._open = True
        self.block_size = block_size
        self.laid = 0

    def __dealloc__(self):
        onion_provenance_destroy(&self._provenance)

    def lay(self, LayerMap upper not None):
        """Lay a layer over the layers before it.

        Raises
        ------
        StateError
            No number is left for one more layer.
        """
        cdef uint32_t layer = self._next()
        cdef int status
        upper._check_open()
        if upper.block_size != self.block_size:
            raise ValueError(f"blocks of {upper.block_size} bytes do not lie over blocks of {self.block_size}")
        with nogil:
            status = onion_provenance_lay(&self._provenance, &upper._layer.map, layer)
        if status < 0:
            raise MemoryError("no memory for the index")
        self.laid = layer

    def lay_file(self, path, *, map_id, length=None, frames=None, crc=None):
        """Lay the layer of a map file over the layers before it. Parameters and errors are those of `LayerMap.load`.

        Returns
        -------
        int or None
            The size in bytes that the last SIZE record gives the layer.
        """
        cdef onion_log_cursor cursor = onion_log_cursor(ONION_HEADER_BYTES, 0, 0, 0)
        cdef const unsigned char *start
        cdef uint32_t layer = self._next()
        cdef uint64_t count
        cdef uint64_t fault = 0
        cdef uint64_t size_bytes = <uint64_t>-1
        cdef int status
        path = os.fspath(path)
        data = _read_sound_map(path, map_id, self.block_size, length)
        if data is None:
            self.laid = layer
            return None
        start = <const unsigned char *>PyByteArray_AS_STRING(data)
        count = len(data)
        if self.laid and onion_log_has_holes(start, count, ONION_HEADER_BYTES):
            return self._lay_map(path, map_id, length, frames, crc)
        with nogil:
            status = onion_provenance_lay_log(&self._provenance, start, count, &cursor, layer, &size_bytes, &fault)
        if status == -ENOMEM:
            raise MemoryError(f"{path}: no memory for the block map")
        if status < 0 and (status != ONION_E_TORN or length is not None):
            raise FormatError(_log_fault(path, fault, status))
        _check_sealed(path, (length, frames, crc), (cursor.offset, cursor.sequence, cursor.crc))
        self.laid = layer
        return None if size_bytes == <uint64_t>-1 else size_bytes

    def _lay_map(self, path, map_id, length, frames, crc):
        """Lay a layer whose log has HOLE records. Such a record makes the blocks below it visible again."""
        layer = LayerMap.load(
            path, map_id=map_id, block_size=self.block_size, block_count=self._provenance.map.block_count,
            length=length, frames=frames, crc=crc,
        )
        try:
            self.lay(layer)
            return layer.size_bytes
        finally:
            layer.close()

    def extents(self, sources):
        """Return which bytes of the disk are DATA and which are ZERO, and of which layer, as a table.

        Parameters
        ----------
        sources : sequence of int
            For each layer, by its number, the source that the table has for it.
        """
        cdef uint64_t count, block_size = self.block_size
        cdef onion_provenance_run *runs
        cdef onion_extent_row row
        cdef Extents found = Extents()
        cdef int status
        cdef uint64_t i
        self._check_open()
        with nogil:
            status = onion_provenance_resolve(&self._provenance)
            count = onion_provenance_runs(&self._provenance, NULL) if status == 0 else 0
            runs = <onion_provenance_run *>malloc((count + 1) * sizeof(onion_provenance_run))
        if status < 0 or runs == NULL:
            free(runs)
            raise MemoryError("no memory for the index")
        try:
            with nogil:
                onion_provenance_runs(&self._provenance, runs)
            for i in range(count):
                row.offset, row.length = runs[i].block_index * block_size, runs[i].block_count * block_size
                row.source, row.state = sources[runs[i].layer], runs[i].state
                row.place = row.offset if row.state == ONION_EXTENT_STATE_DATA else 0
                if onion_extents_add(&found.table, &row) < 0:
                    raise MemoryError("no memory for a table of extents")
            return found
        finally:
            free(runs)

    def close(self):
        """Free the memory. Every later call other than this one raises StateError."""
        self._open = False
        onion_provenance_destroy(&self._provenance)

    cdef int _check_open(self) except -1:
        if not self._open:
            raise StateError("this map of layers is closed: make it again")
        return 0

    cdef int64_t _next(self) except -1:
        self._check_open()
        if self.laid == ONION_PROVENANCE_LAYER_LAST:
            raise StateError(f"more than {ONION_PROVENANCE_LAYER_LAST} layers hold data: merge some of their snapshots first")
        return self.laid + 1


cdef int _check_slots(const onion_stretch *slots, const uint64_t *new_slots, uint64_t count) except -1:
    cdef uint64_t past_last = <uint64_t>ONION_SLOT_LAST + 1
    cdef uint64_t i
    for i in range(count):
        for first in (slots[i].first, new_slots[i]):
            if first >= past_last or slots[i].count > past_last - first:
                raise ValueError("a slot number is too large")
        if i and slots[i].first < slots[i - 1].first + slots[i - 1].count:
            raise ValueError("slots are not sorted, or overlap")
    return 0


def _overwrite(descriptor):
    """Overwrite a file that could not be written with zeros, as far as possible. Errors are ignored.

    The caller raises the error of the write instead.
    """
    with contextlib.suppress(OSError):
        size = os.fstat(descriptor).st_size
        for offset in range(0, size, 1 << 20):
            os.pwrite(descriptor, bytes(min(1 << 20, size - offset)), offset)
        os.fsync(descriptor)  # BARRIER: overwritten staged map
