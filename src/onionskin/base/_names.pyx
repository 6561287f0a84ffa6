"""This module gives files names, and looks at files, many by one call without the GIL (csrc/base/names.h)."""

from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

import os

cdef extern from "base/names.h" nogil:
    void onion_link_names(int fd, const char **paths, size_t count, int replaces, int *errors)
    int onion_leads_to(int fd, const char *path)
    void onion_sizes(const char **paths, size_t count, int64_t *sizes)


cdef class _Paths:
    """Paths as C has them, which live as long as this."""
    cdef list kept
    cdef const char **at
    cdef size_t count

    def __cinit__(self, paths):
        self.kept = [os.fsencode(path) for path in paths]
        self.count = len(self.kept)
        if any(b"\0" in path for path in self.kept):
            raise ValueError("a path has a zero byte in it")
        self.at = <const char **>malloc((self.count + 1) * sizeof(char *))
        if self.at == NULL:
            raise MemoryError(f"no memory for {self.count} paths")
        for i in range(self.count):
            self.at[i] = <bytes>self.kept[i]

    def __dealloc__(self):
        free(self.at)


def link_all(int descriptor, paths, *, bint replaces=False):
    """Give an open file one more name for each path, in place of what is there with `replaces`.

    Returns the number of the error for each: 0 where the name leads to the file now. EMLINK is also that of a file system
    that would make another file of it.
    """
    cdef _Paths names = _Paths(paths)
    cdef int c_replaces = replaces
    cdef int *errors = <int *>malloc((names.count + 1) * sizeof(int))
    if errors == NULL:
        raise MemoryError(f"no memory for {names.count} names")
    try:
        with nogil:
            onion_link_names(descriptor, names.at, names.count, c_replaces, errors)
        return [errors[i] for i in range(names.count)]
    finally:
        free(errors)


def leads_to(int descriptor, path):
    """Whether a path, which is not followed, leads to an open file: a lock or a socket is seen there too.

    Some file systems in user space have an inode for each name, also where they say the same number for all.
    """
    cdef _Paths names = _Paths([path])
    cdef int leads
    with nogil:
        leads = onion_leads_to(descriptor, names.at[0])
    return leads != 0


def sizes_of(paths):
    """Return the sizes of files, and 0 for each that is not there. OSError where that cannot be told of one."""
    cdef _Paths names = _Paths(paths)
    cdef int64_t *sizes = <int64_t *>malloc((names.count + 1) * sizeof(int64_t))
    if sizes == NULL:
        raise MemoryError(f"no memory for {names.count} sizes")
    try:
        with nogil:
            onion_sizes(names.at, names.count, sizes)
        for i in range(names.count):
            if sizes[i] < 0:
                raise OSError(-sizes[i], os.strerror(-sizes[i]), os.fsdecode(names.kept[i]))
        return [sizes[i] for i in range(names.count)]
    finally:
        free(sizes)
