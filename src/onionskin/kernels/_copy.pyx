"""This module copies extents between open files with the C kernel (csrc/bulk/copy.h), without the GIL.

What must hold: the extents and the progress live as long as the job. A job runs once. While it runs, any thread may
read the counters and cancel the job.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import os
from errno import EIO as _EIO

from onionskin.base.named_tuples import NamedTuple

cdef extern from "bulk/copy.h" nogil:
    enum: ONION_COPY_REFLINK
    enum: ONION_COPY_ZERO_HOLES
    enum: ONION_COPY_SOLID
    enum: ONION_E_CANCELLED

    struct onion_copy_extent:
        int source
        int destination
        uint64_t source_offset
        uint64_t destination_offset
        uint64_t length

    struct onion_copy_progress:
        uint64_t bytes_done
        uint64_t bytes_reflinked
        uint64_t bytes_ranged
        uint64_t bytes_copied
        uint64_t bytes_zeroed
        int cancel
        uint64_t bytes_per_second

    int onion_copy(onion_copy_extent *extents, size_t extent_count, int threads, int flags,
                   onion_copy_progress *progress)

cdef extern from "bulk/zero_runs.h" nogil:
    size_t onion_zero_run(const unsigned char *data, size_t length, size_t block_size, int *is_zero)
    size_t onion_same_run(const unsigned char *a, const unsigned char *b, size_t length, size_t block_size, int *is_same)

cdef extern from *:
    """
    #define onion_load(pointer) __atomic_load_n((pointer), __ATOMIC_RELAXED)
    #define onion_store(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELAXED)
    """
    uint64_t onion_load(uint64_t *pointer) nogil
    void onion_store(uint64_t *pointer, uint64_t value) nogil
    void onion_store_int "onion_store"(int *pointer, int value) nogil

# One and two threads were measured on two cores (csrc/bulk/copy.c has the figures): two threads took 20 to 30 % less
# time. More threads were not measured.
DEFAULT_THREADS = 2


class CopyCancelled(Exception):
    """The copy was cancelled. The data that was copied so far stays as it is."""


class CopyResult(NamedTuple):
    """How many bytes were copied, and how many of them in each way."""

    bytes_done: int
    bytes_reflinked: int
    bytes_ranged: int
    bytes_copied: int
    bytes_zeroed: int


cdef class CopyJob:
    """One copy of many extents. Other threads may watch and cancel it.

    Parameters
    ----------
    extents : sequence or bytes
        Tuples ``(source, destination, source_offset, destination_offset, length)``, or the bytes of a table of them, as
        `Extents.copies` returns it. The first two are descriptors, and the others are numbers of bytes. A ``source`` of
        -1 makes zeros. The extents must not overlap on the destination side. The descriptors must stay open until
        ``run`` returns.
    threads : int, optional
        The number of threads, 1 to 64. With 0, the default, it is the number that was measured to be best.
    reflink : bool, optional
        Whether the files may share blocks. It must be false under policy ``zero``.
    zero_holes : bool, optional
        Whether holes of the source (and extents of zeros) may become holes in the destination.
    solid : bool, optional
        Whether the sources are not searched for holes, because they have none or their holes may be copied as zeros.
    bytes_per_second : int, optional
        An upper bound for the rate of the copy. With 0, there is none.
    """

    cdef onion_copy_extent *_extents
    cdef size_t _extent_count
    cdef int _threads
    cdef int _flags
    cdef onion_copy_progress _progress
    cdef bint _started
    cdef readonly object bytes_total

    def __cinit__(self, extents, *, int threads=0, bint reflink=False, bint zero_holes=False, bint solid=False,
                  uint64_t bytes_per_second=0):
        if not 0 <= threads <= 64:
            raise ValueError(f"threads is {threads}: give 1 to 64, or 0 for the default")
        self._threads = threads or DEFAULT_THREADS
        self._flags = ((ONION_COPY_REFLINK if reflink else 0) | (ONION_COPY_ZERO_HOLES if zero_holes else 0)
                       | (ONION_COPY_SOLID if solid else 0))
        self._progress.bytes_per_second = bytes_per_second
        is_table = isinstance(extents, bytes)
        if is_table and len(extents) % sizeof(onion_copy_extent):
            raise ValueError(f"a table of extents has {len(extents)} bytes, which are no whole rows")
        self._extent_count = len(extents) // sizeof(onion_copy_extent) if is_table else len(extents)
        self._extents = <onion_copy_extent *>calloc(self._extent_count or 1, sizeof(onion_copy_extent))
        if self._extents == NULL:
            raise MemoryError(f"no memory for {self._extent_count} extents")
        if is_table:
            self._take_table(extents)
        else:
            self._take_rows(extents)

    cdef int _take_table(self, bytes extents) except -1:
        cdef size_t i
        cdef uint64_t total = 0
        memcpy(self._extents, PyBytes_AS_STRING(extents), self._extent_count * sizeof(onion_copy_extent))
        for i in range(self._extent_count):
            if self._extents[i].length == 0:
                raise ValueError(f"extent {i} has length 0: it must be positive")
            total += self._extents[i].length
        self.bytes_total = total
        return 0

    cdef int _take_rows(self, extents) except -1:
        cdef size_t i
        total = 0
        for i, (source, destination, source_offset, destination_offset, length) in enumerate(extents):
            if length <= 0:
                raise ValueError(f"extent {i} has length {length}: it must be positive")
            self._extents[i].source = source
            self._extents[i].destination = destination
            self._extents[i].source_offset = source_offset
            self._extents[i].destination_offset = destination_offset
            self._extents[i].length = length
            total += length
        self.bytes_total = total
        return 0

    def __dealloc__(self):
        free(self._extents)

    @property
    def descriptors(self):
        """The descriptors that are read, in order, and those that are written."""
        cdef size_t i
        read, written = set(), set()
        for i in range(self._extent_count):
            written.add(self._extents[i].destination)
            if self._extents[i].source >= 0:
                read.add(self._extents[i].source)
        return sorted(read), sorted(written)

    @property
    def bytes_done(self):
        """The number of bytes copied so far."""
        return onion_load(&self._progress.bytes_done)

    @property
    def bytes_per_second(self):
        """The upper bound for the rate, or 0 for none. It may be set while the copy runs."""
        return onion_load(&self._progress.bytes_per_second)

    @bytes_per_second.setter
    def bytes_per_second(self, uint64_t value):
        onion_store(&self._progress.bytes_per_second, value)

    def cancel(self):
        """Make ``run`` stop soon and raise ``CopyCancelled``, even if it has not begun yet. Any thread may call it."""
        onion_store_int(&self._progress.cancel, 1)

    def run(self):
        """Copy all extents. This can be called once. Nothing is durable on return.

        Returns
        -------
        CopyResult
            The numbers of bytes that were copied.

        Raises
        ------
        CopyCancelled
            ``cancel`` was called.
        OSError
            EIO if a source ends early, ENOSPC if the destination is full, or another error of the system. The data that
            was copied stays as it is, and it is always safe to copy again.
        RuntimeError
            The job was run before.
        """
        cdef int status
        if self._started:
            raise RuntimeError("this copy was already run: make a new CopyJob")
        self._started = True
        with nogil:
            status = onion_copy(self._extents, self._extent_count, self._threads, self._flags, &self._progress)
        if status == ONION_E_CANCELLED:
            raise CopyCancelled(f"the copy was cancelled after {self.bytes_done} of {self.bytes_total} bytes")
        if status < 0:
            raise OSError(-status, f"the copy failed: {os.strerror(-status)}")
        if self._progress.bytes_done != self.bytes_total:  # a caller that frees the source next relies on this check
            raise OSError(_EIO, f"the copy ended at {self.bytes_done} of {self.bytes_total} bytes; run it again")
        return CopyResult(self._progress.bytes_done, self._progress.bytes_reflinked, self._progress.bytes_ranged,
                          self._progress.bytes_copied, self._progress.bytes_zeroed)


def split_zeros(const unsigned char[::1] data not None, size_t block_size):
    """Split a buffer into runs of blocks that are all zero and runs of blocks that are not.

    Parameters
    ----------
    data : buffer of bytes, one dimension, contiguous
        Any length; the last block may be shorter than the others.
    block_size : int
        More than 0.

    Returns
    -------
    list of (start, stop, is_zero)
        Bytes of `data`; `stop` is exclusive. Runs follow each other without gaps and alternate. `is_zero` says whether
        every byte of the run is zero.
    """
    cdef size_t start = 0, stop, length = data.shape[0]
    cdef int is_zero = 0
    if block_size == 0:
        raise ValueError("blocks of 0 bytes: give a block size")
    found = []
    while start < length:
        with nogil:
            stop = start + onion_zero_run(&data[start], length - start, block_size, &is_zero)
        found.append((start, stop, is_zero != 0))
        start = stop
    return found


def split_same(const unsigned char[::1] a not None, const unsigned char[::1] b not None, size_t block_size):
    """Split two buffers into runs of blocks that are the same in both and runs of blocks that are not.

    Parameters
    ----------
    a, b : buffer of bytes, one dimension, contiguous
        Of one length; the last block may be shorter than the others.
    block_size : int
        More than 0.

    Returns
    -------
    list of (start, stop, is_same)
        As `split_zeros` returns them.
    """
    cdef size_t start = 0, stop, length = a.shape[0]
    cdef int is_same = 0
    if block_size == 0:
        raise ValueError("blocks of 0 bytes: give a block size")
    if <size_t>b.shape[0] != length:
        raise ValueError(f"{length} bytes are compared with {b.shape[0]}: give as many")
    found = []
    while start < length:
        with nogil:
            stop = start + onion_same_run(&a[start], &b[start], length - start, block_size, &is_same)
        found.append((start, stop, is_same != 0))
        start = stop
    return found
