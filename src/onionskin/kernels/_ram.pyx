"""Guest RAM: which pages are zero or differ from a snapshot's, and which pages of another process were written.

See csrc/machine/pages.h and csrc/machine/tracking.h. All work is done without the GIL. Any thread may call these
functions; a `PageTracker` is used by one thread at a time.
"""

from libc.stdint cimport uint8_t, uint64_t

import os

from onionskin.base.lazy import dtypes
from onionskin.base.lazy import numpy as np

cdef extern from "machine/pages.h" nogil:
    enum: ONION_PAGE_BYTES
    enum: ONION_PAGE_SAME
    enum: ONION_PAGE_ZERO
    enum: ONION_PAGE_DATA

    size_t onion_pages_classify(const uint8_t *pages, const uint8_t *parent, size_t count, uint8_t *kinds)

cdef extern from "machine/tracking.h" nogil:
    struct onion_page_run:
        uint64_t start
        uint64_t end

    enum onion_pages_wanted:
        ONION_WRITTEN
        ONION_WRITTEN_AND_PROTECT
        ONION_PRIVATE
        ONION_PRIVATE_OR_SWAPPED

    long onion_find_pages(
        int pagemap, uint64_t *start, uint64_t end, onion_pages_wanted wanted, onion_page_run *runs, size_t max
    )
    int onion_read_pages(int pid, const onion_page_run *runs, size_t count, uint8_t *to)
    int onion_read_pages_in_place(int pid, const onion_page_run *runs, size_t count, uint64_t start, uint8_t *to)
    int onion_write_pages(int pid, const onion_page_run *runs, size_t count, const uint8_t *here)
    int onion_write_pages_of_file(int pid, const onion_page_run *runs, size_t count, uint64_t start, int file)

PAGE_BYTES = ONION_PAGE_BYTES
SAME = ONION_PAGE_SAME
ZERO = ONION_PAGE_ZERO
DATA = ONION_PAGE_DATA

cdef enum:
    RUNS_AT_ONCE = 16384


def classify(const uint8_t[::1] pages not None, const uint8_t[::1] parent=None):
    """Say of each page what it is beside the page of a snapshot at the same place.

    Parameters
    ----------
    pages : buffer of bytes
        Aligned to a page, and a whole number of pages long.
    parent : buffer of bytes, optional
        As long, and aligned as well.

    Returns
    -------
    ndarray of uint8
        One of SAME, ZERO and DATA for each page. Without a parent there is no SAME.
    """
    cdef size_t count = pages.shape[0] // ONION_PAGE_BYTES
    cdef const uint8_t *at = &pages[0] if count else NULL
    cdef const uint8_t *beside = NULL
    if pages.shape[0] % ONION_PAGE_BYTES or <uint64_t>at % ONION_PAGE_BYTES:
        raise ValueError("RAM is compared in whole pages of 4096 bytes, aligned to a page")
    if parent is not None:
        if parent.shape[0] != pages.shape[0]:
            raise ValueError(f"RAM of {pages.shape[0]} bytes is compared with as many, not with {parent.shape[0]}")
        beside = &parent[0] if count else NULL
        if <uint64_t>beside % ONION_PAGE_BYTES:
            raise ValueError("RAM is compared in whole pages of 4096 bytes, aligned to a page")
    kinds = np.empty(count, np.uint8)
    cdef uint8_t[::1] out = kinds
    cdef uint8_t *to = &out[0] if count else NULL
    with nogil:
        onion_pages_classify(at, beside, count, to)
    return kinds


cdef class PageTracker:
    """The pages of a range of another process's memory, in which the writes are noted. A context manager.

    Parameters
    ----------
    pid : int
        The process. It must have armed the range.
    start, length : int
        Address and length in bytes of the range.
    """

    cdef int _pagemap
    cdef int _pid
    cdef uint64_t _start
    cdef uint64_t _end

    def __cinit__(self, int pid, uint64_t start, uint64_t length):
        self._pagemap = -1
        if start % ONION_PAGE_BYTES or length % ONION_PAGE_BYTES or start + length < start:
            raise ValueError(f"a range of memory begins and ends at a page, not {start:#x} and {length:#x} bytes more")
        self._pid, self._start, self._end = pid, start, start + length
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Close it. Further calls do nothing. Several threads may call it at once."""
        cdef int pagemap = self._pagemap
        self._pagemap = -1  # before another thread may run: the number may be another file's once it is closed
        if pagemap >= 0:
            os.close(pagemap)

    def __dealloc__(self):
        if self._pagemap >= 0:
            os.close(self._pagemap)

    def written(self, *, bint protect):
        """Return what was written since it was last protected.

        Parameters
        ----------
        protect : bool
            Protect again what is returned, so that the next call returns what is written after this one. What was
            returned is then known to the caller alone.

        Returns
        -------
        ndarray of dtypes.PAGE_RUN
            Runs of pages as byte offsets in the range, `end` not included, sorted.

        Raises
        ------
        OSError
            The process has ended, nothing is armed in it, or the kernel cannot tell (Linux 6.7 can).
        """
        return self._find(ONION_WRITTEN_AND_PROTECT if protect else ONION_WRITTEN)

    def private(self, *, bint swapped):
        """Return the pages of a private mapping that may not read as its file any more: it has its own copies of them.

        Parameters
        ----------
        swapped : bool
            Also those that are swapped out. Ask for them only while nothing is noted: there, pages that were never
            touched look the same.

        Returns
        -------
        ndarray of dtypes.PAGE_RUN
            As for `written`.

        Raises
        ------
        OSError
            The process has ended, or the kernel cannot tell.
        """
        return self._find(ONION_PRIVATE_OR_SWAPPED if swapped else ONION_PRIVATE)

    cdef _find(self, onion_pages_wanted wanted):
        cdef uint64_t at = self._start
        cdef long count
        cdef onion_page_run[::1] into
        cdef int failed = 0
        parts = []
        while at < self._end and not failed:
            part = np.empty(RUNS_AT_ONCE, dtypes.PAGE_RUN)
            into = part
            with nogil:
                count = onion_find_pages(self._pagemap, &at, self._end, wanted, &into[0], RUNS_AT_ONCE)
            if count < 0:
                failed = -count
            else:
                parts.append(part[:count])
        runs = np.concatenate(parts) if parts else np.empty(0, dtypes.PAGE_RUN)
        for field in ("start", "end"):
            runs[field] -= self._start
        if failed:
            error = OSError(failed, f"the written pages of process {self._pid}: {os.strerror(failed)}")
            error.written = runs  # a scan that protects forgets what it returned: it must not be lost
            raise error
        return runs

    def read(self, runs, uint8_t[::1] to not None):
        """Read runs of pages into `to`, one behind the other.

        Parameters
        ----------
        runs : ndarray of dtypes.PAGE_RUN
            Byte offsets in the range.
        to : writable buffer
            As long as all runs together.

        Raises
        ------
        OSError
            The process has ended, or has nothing mapped there.
        """
        cdef onion_page_run[::1] these = self._runs(runs, to.shape[0])
        cdef size_t count = these.shape[0]
        cdef int error = 0
        if count:
            with nogil:
                error = onion_read_pages(self._pid, &these[0], count, &to[0])
        self._raise(error)

    def read_in_place(self, runs, uint8_t[::1] to not None):
        """Read runs of pages into `to`, each to the offset that it has in the range.

        Parameters
        ----------
        runs : ndarray of dtypes.PAGE_RUN
            Byte offsets in the range.
        to : writable buffer
            As long as the range.

        Raises
        ------
        OSError
            The process has ended, or has nothing mapped there.
        """
        if <uint64_t>to.shape[0] != self._end - self._start:
            raise ValueError(f"a buffer of {to.shape[0]} bytes is not as long as the range")
        cdef onion_page_run[::1] these = self._checked(runs)
        cdef size_t count = these.shape[0]
        cdef int error = 0
        if count:
            with nogil:
                error = onion_read_pages_in_place(self._pid, &these[0], count, self._start, &to[0])
        self._raise(error)

    def write(self, runs, const uint8_t[::1] data not None):
        """Write to runs of pages what stands in `data` one behind the other. The writes are noted as any others.

        Parameters
        ----------
        runs : ndarray of dtypes.PAGE_RUN
            Byte offsets in the range.
        data : buffer
            As long as all runs together.

        Raises
        ------
        OSError
            The process has ended, or has nothing mapped there.
        """
        cdef onion_page_run[::1] these = self._runs(runs, data.shape[0])
        cdef size_t count = these.shape[0]
        cdef int error = 0
        if count:
            with nogil:
                error = onion_write_pages(self._pid, &these[0], count, &data[0])
        self._raise(error)

    def write_from(self, runs, int file):
        """Write to runs of pages what a file has at their offsets. The writes are noted as any others.

        Parameters
        ----------
        runs : ndarray of dtypes.PAGE_RUN
            Byte offsets in the range, and in the file.
        file : int
            An open file that is as long as the range.

        Raises
        ------
        OSError
            The process has ended, or has nothing mapped there; or the file cannot be read, or is shorter (EIO).
        """
        cdef onion_page_run[::1] these = self._checked(runs)
        cdef size_t count = these.shape[0]
        cdef int error = 0
        if count:
            with nogil:
                error = onion_write_pages_of_file(self._pid, &these[0], count, self._start, file)
        self._raise(error)

    def _runs(self, runs, size_t length):
        """Return the runs as addresses, as `_checked` does, after a look at how many bytes they are."""
        runs = self._checked(runs)
        if int((runs["end"] - runs["start"]).sum()) != length:
            raise ValueError(f"the runs have other than the {length} bytes of the buffer")
        return runs

    def _checked(self, runs):
        """Return the runs as addresses, without empty ones, after a look at what would reach out of the range."""
        runs = np.ascontiguousarray(runs, dtypes.PAGE_RUN)
        runs = runs[runs["end"] != runs["start"]]
        if len(runs) and ((runs["end"] < runs["start"]).any() or int(runs["end"].max()) > self._end - self._start):
            raise ValueError("a run ends before it begins, or behind the range")
        for field in ("start", "end"):
            runs[field] += self._start
        return runs

    cdef _raise(self, int error):
        if error:
            raise OSError(-error, f"the memory of process {self._pid}: {os.strerror(-error)}")
