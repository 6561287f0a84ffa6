"""Tables of the extents of a disk (csrc/base/extents.h), and the tables that copies are made by. No table needs NumPy.

What must hold: a table does not change once it is made, so any thread may use it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from onionskin.base.lazy import dtypes, numpy

cdef extern from "bulk/copy.h" nogil:
    struct onion_copy_extent:
        int source
        int destination
        uint64_t source_offset
        uint64_t destination_offset
        uint64_t length


cdef extern from "base/cells.h" nogil:
    const size_t ONION_CELLS_MAX
    struct onion_cell:
        uint64_t offset
        uint64_t length
        uint64_t shown
        uint32_t source
        uint32_t state
    int onion_cells_cut(const onion_extents *extents, onion_cell *cells, size_t count)


cdef enum:
    SOURCES = 1 << 16  # the numbers of segments, and that of the base
    NOT_COPIED = -2  # in the place of a descriptor


cdef int check(int status) except -1:
    if status < 0:
        raise MemoryError("no memory for a table of extents")
    return 0


cdef class Extents:
    """Extents of a disk, in order and without overlap; there may be gaps between them.

    An extent is a tuple (offset, length, state, source, place). Offset, length and place are bytes. The states are those of
    `base.states`. The source is a number that says what the bytes come from, and place is where the first byte of DATA
    lies in it; both are 0 where nobody asks for them.

    Parameters
    ----------
    ranges : iterable of (first, end), optional
        The extents, by their first byte and the byte behind the last one. The first bytes rise. Ranges that overlap or
        touch become one, and empty ones are left out.
    state, source : int, optional
        Those of all extents. DATA lies in its source where it lies on the disk.
    """

    def __cinit__(self, ranges=(), *, uint32_t state=ONION_EXTENT_STATE_HOLE, uint32_t source=0):
        cdef onion_extent_row row
        cdef uint64_t first, end
        row.offset = row.length = 0
        row.source, row.state = source, state
        for first, end in ranges:
            if first < row.offset or end > ONION_EXTENTS_END:
                raise ValueError(f"the range of bytes {first} to {end} is not in order, or too far away")
            if end <= first:
                continue
            if row.length and first <= row.offset + row.length:
                row.length = max(row.length, end - row.offset)
                self.table.rows[self.table.count - 1].length = row.length
                continue
            row.offset, row.length = first, end - first
            row.place = first if state == ONION_EXTENT_STATE_DATA else 0
            check(onion_extents_add(&self.table, &row))

    def __dealloc__(self):
        onion_extents_destroy(&self.table)

    @classmethod
    def of(cls, extents):
        """Return a table of extents that are given one by one.

        Parameters
        ----------
        extents : iterable of tuple
            As the table itself gives them, in order and without overlap.
        """
        cdef Extents made = cls()
        cdef onion_extent_row row
        cdef uint64_t end = 0
        for row.offset, row.length, row.state, row.source, row.place in extents:
            is_far = row.length > ONION_EXTENTS_END or row.offset > ONION_EXTENTS_END - row.length
            if row.offset < end or not row.length or is_far:
                raise ValueError(f"the extent of {row.length} bytes at {row.offset} is empty, out of order, or too far away")
            end = row.offset + row.length
            check(onion_extents_add(&made.table, &row))
        return made

    def __len__(self):
        return self.table.count

    def __iter__(self):
        cdef size_t i
        for i in range(self.table.count):
            row = self.table.rows[i]
            yield row.offset, row.length, row.state, row.source, row.place

    def array(self, dtype=None):
        """Return a structured array, which is the caller's own.

        Parameters
        ----------
        dtype : numpy.dtype, optional
            Some of the fields offset, length, state, source and place, in any order. It is `dtypes.EXTENT` if not given.
        """
        rows = numpy.frombuffer(
            PyBytes_FromStringAndSize(<char *>self.table.rows, self.table.count * sizeof(onion_extent_row)),
            dtypes.EXTENT_ROW,
        )
        made = numpy.empty(self.table.count, dtypes.EXTENT if dtype is None else dtype)
        for name in made.dtype.names:
            made[name] = rows[name]
        return made

    # ---- tables of tables ----

    def over(self, Extents lower not None):
        """Return what shows where these extents lie over others: all of these, and in their gaps what `lower` has."""
        cdef Extents made = Extents()
        cdef int status
        with nogil:
            status = onion_extents_over(&self.table, &lower.table, &made.table)
        check(status)
        return made

    def within(self, Extents ranges not None):
        """Return the parts of these extents that lie in other ones."""
        cdef Extents made = Extents()
        cdef int status
        with nogil:
            status = onion_extents_within(&self.table, &ranges.table, &made.table)
        check(status)
        return made

    def only(self, uint32_t state):
        """Return the extents that have one state."""
        cdef Extents made = Extents()
        cdef int status = 0
        cdef size_t i
        with nogil:
            for i in range(self.table.count):
                if self.table.rows[i].state == state and status == 0:
                    status = onion_extents_add(&made.table, &self.table.rows[i])
        check(status)
        return made

    def from_source(self, uint32_t source):
        """Return the extents that come from one source."""
        cdef Extents made = Extents()
        cdef int status = 0
        cdef size_t i
        with nogil:
            for i in range(self.table.count):
                if self.table.rows[i].source == source and status == 0:
                    status = onion_extents_add(&made.table, &self.table.rows[i])
        check(status)
        return made

    def joined(self):
        """Return the extents with those made one that are one: neighbours of one state that go on in the same source."""
        cdef Extents made = copy_of(self)
        with nogil:
            onion_extents_join(&made.table)
        return made

    def ranges(self):
        """Return which bytes the extents cover, as extents that are HOLE and do not touch."""
        cdef Extents made = copy_of(self)
        cdef size_t i
        with nogil:
            for i in range(made.table.count):
                made.table.rows[i].state = ONION_EXTENT_STATE_HOLE
                made.table.rows[i].source = 0
                made.table.rows[i].place = 0
            onion_extents_join(&made.table)
        return made

    def packed(self, uint64_t offset, uint64_t unit):
        """Return the extents packed behind each other from `offset` on: each begins at a multiple of `unit` from there."""
        cdef Extents made = copy_of(self)
        if unit == 0:
            raise ValueError("units of 0 bytes: give the size of a block")
        with nogil:
            onion_extents_pack(&made.table, offset, unit)
        return made

    # ---- sums and places ----

    @property
    def end(self):
        """The byte behind the last extent, or 0 if there is none."""
        if not self.table.count:
            return 0
        return self.table.rows[self.table.count - 1].offset + self.table.rows[self.table.count - 1].length

    @property
    def total_bytes(self):
        """The sum of all lengths."""
        return self.bytes_before(ONION_EXTENTS_END)

    def bytes_before(self, uint64_t offset):
        """Return how many bytes of the extents lie before an offset."""
        cdef uint64_t found
        with nogil:
            found = onion_extents_bytes_before(&self.table, offset)
        return found

    def offset_after(self, uint64_t count):
        """Return the lowest offset before which `count` bytes of the extents lie: at least 1, and no more than there are."""
        cdef uint64_t found
        if not 0 < count <= self.total_bytes:
            raise ValueError(f"{count} bytes of {self.total_bytes}: give 1 at least, and no more than there are")
        with nogil:
            found = onion_extents_offset_after(&self.table, count)
        return found

    def sources(self):
        """Return the set of the sources of all extents."""
        cdef size_t i
        found = set()
        for i in range(self.table.count):
            if i == 0 or self.table.rows[i].source != self.table.rows[i - 1].source:
                found.add(self.table.rows[i].source)
        return found

    def bytes_of_sources(self, size_t count):
        """Return a list of how many bytes of the extents come from each of the sources below `count`."""
        cdef uint64_t *sums = <uint64_t *>calloc(count or 1, sizeof(uint64_t))
        cdef size_t i
        if sums == NULL:
            raise MemoryError(f"no memory for the sums of {count} sources")
        try:
            with nogil:
                for i in range(self.table.count):
                    if self.table.rows[i].source < count:
                        sums[self.table.rows[i].source] += self.table.rows[i].length
            return [sums[i] for i in range(count)]
        finally:
            free(sums)

    def cells(self, size_t count):
        """Cut the bytes before the end of the last extent into cells of equal size, and return what each shows.

        DATA goes before ZERO, and ZERO before HOLE. Of the sources of that state a cell shows the one that has most bytes in
        it, and the lowest of equal ones.

        Parameters
        ----------
        count : int
            How many cells there are: 1 at least, and no more than bytes.

        Returns
        -------
        edges : list of int
            `count` + 1 offsets, which are the ends of the cells.
        states : bytes
        sources : list of int
        shown : list of int
            For each cell, the bytes that have its state and source.
        """
        cdef onion_cell *cells
        cdef size_t i
        cdef int status
        if not 1 <= count <= min(self.end, ONION_CELLS_MAX):
            raise ValueError(f"{count} cells for {self.end} bytes: give 1 at least, and no more than there are bytes")
        cells = <onion_cell *>malloc(count * sizeof(onion_cell))
        if cells == NULL:
            raise MemoryError(f"no memory for {count} cells")
        try:
            with nogil:
                status = onion_cells_cut(&self.table, cells, count)
            check(status)
            return (
                [cells[i].offset for i in range(count)] + [self.end],
                bytes([cells[i].state for i in range(count)]),
                [cells[i].source for i in range(count)],
                [cells[i].shown for i in range(count)],
            )
        finally:
            free(cells)

    # ---- copies ----

    def copies(self, int destination, descriptors):
        """Return what `CopyJob` takes to copy extents to the same offsets of a file, as the bytes of its table.

        Parameters
        ----------
        destination : int
            The descriptor of the file.
        descriptors : mapping of int to int
            For each source whose extents are to be copied, its descriptor, or -1 for zeros. Other extents are left out.
        """
        cdef int *of_source = <int *>malloc(SOURCES * sizeof(int))
        cdef onion_copy_extent *out
        cdef onion_extent_row row
        cdef size_t i, count = 0
        if of_source == NULL:
            raise MemoryError("no memory for the descriptors of a copy")
        try:
            for i in range(SOURCES):
                of_source[i] = NOT_COPIED
            for source, descriptor in descriptors.items():
                if not 0 <= source < SOURCES:
                    raise ValueError(f"{source} is no number of a segment")
                of_source[<size_t>source] = descriptor
            for i in range(self.table.count):
                count += is_copied(of_source, self.table.rows[i].source)
            made = PyBytes_FromStringAndSize(NULL, count * sizeof(onion_copy_extent))
            out = <onion_copy_extent *>PyBytes_AS_STRING(made)
            for i in range(self.table.count):
                row = self.table.rows[i]
                if is_copied(of_source, row.source):
                    out[0] = onion_copy_extent(of_source[row.source], destination, row.place, row.offset, row.length)
                    out += 1
            return made
        finally:
            free(of_source)


cdef bint is_copied(const int *of_source, uint32_t source) noexcept nogil:
    return source < SOURCES and of_source[source] != NOT_COPIED


cdef Extents copy_of(Extents extents):
    cdef Extents made = Extents()
    cdef int status = 0
    cdef size_t i
    with nogil:
        for i in range(extents.table.count):
            status = onion_extents_add(&made.table, &extents.table.rows[i])
            if status < 0:
                break
    check(status)
    return made
