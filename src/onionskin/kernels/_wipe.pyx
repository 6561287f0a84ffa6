"""This module overwrites ranges of an open file with zeros and then frees them (csrc/bulk/wipe.h), without the GIL.

What must hold: the ranges live as long as the job. A job runs once. Any thread may watch and cancel it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import os

from onionskin.base.named_tuples import NamedTuple
from onionskin.errors import VerifyError

cdef extern from "bulk/wipe.h" nogil:
    enum: ONION_WIPE_ZERO
    enum: ONION_WIPE_VERIFY
    enum: ONION_WIPE_PUNCH
    enum: ONION_E_CANCELLED
    enum: ONION_E_VERIFY

    struct onion_byte_range:
        uint64_t offset
        uint64_t length

    struct onion_wipe_result:
        uint64_t bytes_wiped
        uint64_t bytes_skipped
        uint64_t bytes_verified
        uint64_t bytes_punched
        uint64_t bytes_unwipeable
        uint32_t filesystem_magic
        int copy_on_write

    struct onion_used_slots:
        uint64_t first
        uint64_t count

    size_t onion_unused_ranges(const onion_used_slots *used, size_t count, uint64_t header_bytes, uint64_t slot_bytes,
                               uint64_t file_bytes, onion_byte_range *out)
    int onion_wipe(int fd, const onion_byte_range *ranges, size_t range_count, int flags, int threads,
                   onion_wipe_result *result, uint64_t *progress, const int *cancel)

cdef extern from *:
    """
    #define onion_load(pointer) __atomic_load_n((pointer), __ATOMIC_RELAXED)
    #define onion_store(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELAXED)
    """
    uint64_t onion_load(uint64_t *pointer) nogil
    void onion_store(int *pointer, int value) nogil

# These times were measured on ext4 (Linux 6.18, 2 cores), for 1 GiB with its fdatasync: 0.31 to 0.32 s with one thread,
# 0.31 to 0.38 s with two, and 0.31 to 0.47 s for dd conv=fdatasync. The disk is the limit, so a second thread would
# only take a core.
DEFAULT_THREADS = 1


class WipeCancelled(Exception):
    """The wipe was cancelled. Nothing was punched that was not made durable as zeros before."""


class WipeResult(NamedTuple):
    """The result of a wipe, in bytes, and its file system: the fields of ``onion_wipe_result`` in csrc/bulk/wipe.h."""

    bytes_wiped: int
    bytes_skipped: int
    bytes_verified: int
    bytes_punched: int
    bytes_unwipeable: int
    filesystem_magic: int
    copy_on_write: bool


cdef class WipeJob:
    """One wipe, which other threads may watch and cancel. The parameters are those of ``wipe``."""

    cdef onion_byte_range *_ranges
    cdef size_t _range_count
    cdef int _fd
    cdef int _threads
    cdef int _flags
    cdef int _cancel
    cdef uint64_t _bytes_done
    cdef bint _started

    def __cinit__(self, int fd, ranges, *, bint zero, bint punch, bint verify=False, int threads=0):
        cdef size_t i
        if not 0 <= threads <= 64:
            raise ValueError(f"threads is {threads}: give 1 to 64, or 0 for the default")
        is_packed = isinstance(ranges, bytes)
        if is_packed:
            rows = ()
            self._range_count = len(ranges) // sizeof(onion_byte_range)
        else:
            rows = ranges.tolist() if hasattr(ranges, "tolist") else list(ranges)
            self._range_count = len(rows)
        self._ranges = <onion_byte_range *>calloc(self._range_count or 1, sizeof(onion_byte_range))
        if self._ranges == NULL:
            raise MemoryError(f"no memory for {self._range_count} ranges")
        if is_packed:
            memcpy(self._ranges, PyBytes_AS_STRING(ranges), self._range_count * sizeof(onion_byte_range))
        end = 0
        for i, (offset, length) in enumerate(rows):
            if offset < end:
                raise ValueError(f"range {i} begins at {offset}, before {end}: ranges must be sorted and apart")
            end = offset + length
            if length < 0 or end > 0x7FFFFFFFFFFFFFFF:
                raise ValueError(f"range {i} at {offset} has length {length}: no file has such bytes")
            self._ranges[i].offset = offset
            self._ranges[i].length = length
        self._fd = fd
        self._threads = threads or DEFAULT_THREADS
        self._flags = ((ONION_WIPE_ZERO if zero else 0) | (ONION_WIPE_PUNCH if punch else 0)
                       | (ONION_WIPE_VERIFY if verify else 0))

    def __dealloc__(self):
        free(self._ranges)

    @property
    def bytes_done(self):
        """The number of bytes that the first phase of the wipe has processed so far."""
        return onion_load(&self._bytes_done)

    def cancel(self):
        """Make ``run`` stop soon and raise ``WipeCancelled``. Any thread may call it."""
        onion_store(&self._cancel, 1)

    def run(self):
        """Do the wipe. This can be called once.

        It returns and raises the same as ``wipe``. After ``cancel``, it raises ``WipeCancelled``.
        """
        cdef onion_wipe_result result
        cdef int status
        if self._started:
            raise RuntimeError("this wipe was already run: make a new WipeJob")
        self._started = True
        with nogil:
            status = onion_wipe(self._fd, self._ranges, self._range_count, self._flags, self._threads, &result,
                                &self._bytes_done, &self._cancel)
        if status == ONION_E_CANCELLED:
            raise WipeCancelled(f"the wipe was cancelled after {self.bytes_done} bytes; do it again")
        if status == ONION_E_VERIFY:
            raise VerifyError(f"bytes of {_path_of(self._fd) or 'the file'} that were overwritten with zeros do not read back "
                              "as zeros; nothing was given back: the device may be failing")
        if status < 0:
            raise OSError(-status, os.strerror(-status), _path_of(self._fd))
        return WipeResult(result.bytes_wiped, result.bytes_skipped, result.bytes_verified, result.bytes_punched,
                          result.bytes_unwipeable, result.filesystem_magic, bool(result.copy_on_write))


def _path_of(fd):
    """Return the path that a descriptor was opened by, for a message, or None if the system does not tell it."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None


def unused_ranges(bytes slots not None, *, uint64_t header_bytes, uint64_t slot_bytes, uint64_t file_bytes):
    """Return the ranges of a file behind its header that no used slot has, for `wipe`.

    Parameters
    ----------
    slots : bytes
        The used slots, sorted and joined: the bytes of an array of dtypes.SLOTS.
    header_bytes, slot_bytes, file_bytes : int
        The size of what is before the first slot, of a slot, and of the file.

    Returns
    -------
    bytes
        Ranges of 16 bytes each; none if there is nothing to free.
    """
    cdef size_t count = len(slots) // sizeof(onion_used_slots)
    cdef const onion_used_slots *used = <const onion_used_slots *>PyBytes_AS_STRING(slots)
    cdef onion_byte_range *out
    found = PyBytes_FromStringAndSize(NULL, (count + 1) * sizeof(onion_byte_range))
    out = <onion_byte_range *>PyBytes_AS_STRING(found)
    with nogil:
        count = onion_unused_ranges(used, count, header_bytes, slot_bytes, file_bytes, out)
    return found[: count * sizeof(onion_byte_range)]


def wipe(int fd, ranges, *, bint zero, bint punch, bint verify=False, int threads=0):
    """Overwrite ranges with zeros, make the zeros durable, and only then free the space.

    Parameters
    ----------
    fd : int
        A descriptor of a regular file that is open for writing.
    ranges : sequence, ndarray or bytes
        Pairs ``(offset, length)`` in bytes, sorted and not overlapping, or what `unused_ranges` returned. Parts behind the
        end of the file are ignored.
    zero : bool
        Overwrite the allocated parts once, and sync them.
    punch : bool
        Make the ranges holes at the end. It is no error if the file system cannot do this.
    verify : bool, optional
        Read the zeros back from the medium before punching.
    threads : int, optional
        The number of threads, 1 to 64. With 0, the default, it is the number that was measured to be best.

    Returns
    -------
    WipeResult
        ``bytes_unwipeable`` counts the bytes whose old contents overwriting cannot reach.

    Raises
    ------
    OSError
        An error of the system, or EINVAL if the file is no regular file. Nothing was punched that is not durable as
        zeros.
    VerifyError
        A byte that was read back is not zero.
    """
    return WipeJob(fd, ranges, zero=zero, punch=punch, verify=verify, threads=threads).run()
