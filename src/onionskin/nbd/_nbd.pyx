"""The NBD server: a thin class over csrc/nbd/server.h.

What must hold: every data path that the server may read or write is kept alive here until the server has let go of
it; calls that wait run without the GIL; callbacks from the server's threads take it.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.errno cimport EINVAL, EIO, ENOENT, ESHUTDOWN
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

import os
import threading

from onionskin.kernels._volume import DataPath, error_of
from onionskin.errors import StateError
from onionskin.base.lazy import numpy

cdef extern from "base/site.h" nogil:
    struct onion_site:
        int status
        uint64_t offset
        char path[4096]
    const onion_site *onion_site_of(int)
    void onion_site_clear()

cdef extern from "nbd/server.h" nogil:
    struct onion_volume
    struct onion_nbd_server
    struct onion_nbd_listing
    struct onion_nbd_context_listing
    struct onion_nbd_hooks:
        int (*still_export)(void *, const char *, uint32_t) noexcept
        int (*still_context)(void *, const char *, uint32_t, const char *, uint32_t) noexcept
        int (*find_export)(void *, const char *, uint32_t) noexcept
        int (*find_context)(void *, const char *, uint32_t, const char *, uint32_t) noexcept
        int (*make_room)(void *, const char *) noexcept
        void (*freed)(void *, const char *) noexcept
        int (*begin_writing)(void *, const char *) noexcept
        void (*written)(void *, const char *) noexcept
        int (*list_exports)(void *, const char *, uint32_t, onion_nbd_listing *) noexcept
        int (*list_contexts)(void *, const char *, const char *, uint32_t, onion_nbd_context_listing *) noexcept
        void *context
    struct onion_nbd_options:
        uint32_t connections_max
        uint32_t idle_seconds
        uint32_t request_bytes_max
        uint64_t bytes_in_flight_max
        uint32_t turn_ms
        uint32_t kept_ms
        onion_nbd_hooks hooks
    struct onion_nbd_counters:
        uint64_t requests[8]
        uint64_t bytes[8]
        uint64_t latency_ns[8]
        uint64_t errors
        uint64_t sends
    struct onion_nbd_connection_info:
        uint64_t id
        char peer[128]
        char export_name[256]
        int tls
        int negotiating
        onion_nbd_counters counters

    int onion_nbd_new(const onion_nbd_options *, onion_nbd_server **)
    void onion_nbd_free(onion_nbd_server *)
    enum onion_nbd_access:
        ONION_NBD_TO_WRITE
        ONION_NBD_TO_READ
        ONION_NBD_UNWRITTEN
    int onion_nbd_add_export(onion_nbd_server *, const char *, onion_volume *, onion_nbd_access, const char *)
    void onion_nbd_found(onion_nbd_server *, const char **, size_t, uint64_t)
    int64_t onion_nbd_asked(onion_nbd_server *, char **, uint64_t *)
    int onion_nbd_set_default(onion_nbd_server *, const char *)
    int onion_nbd_rename_export(onion_nbd_server *, const char *, const char *, const char *)
    int onion_nbd_remove_export(onion_nbd_server *, const char *, int)
    int onion_nbd_replace_volume(onion_nbd_server *, const char *, onion_volume *)
    int onion_nbd_hold(onion_nbd_server *, const char *)
    int onion_nbd_release(onion_nbd_server *, const char *)
    int64_t onion_nbd_change_mark(onion_nbd_server *, const char *)
    int onion_nbd_list_context(onion_nbd_context_listing *, const char *)
    int onion_nbd_set_context(onion_nbd_server *, const char *, const char *, const void *, size_t, uint64_t)
    int onion_nbd_list(onion_nbd_listing *, const char *, const char *)
    int64_t onion_nbd_serve(onion_nbd_server *, int, const char *, int, uint32_t)
    int onion_nbd_accept(onion_nbd_server *, int)
    void onion_nbd_begin_threads(onion_nbd_server *, uint32_t)
    uint32_t onion_nbd_connections(onion_nbd_server *, onion_nbd_connection_info *, uint32_t)
    void onion_nbd_count(onion_nbd_server *, onion_nbd_counters *)
    int onion_nbd_count_export(onion_nbd_server *, const char *, onion_nbd_counters *)
    int onion_nbd_event_fd(const onion_nbd_server *)
    uint32_t onion_nbd_next_event(onion_nbd_server *, char *, uint64_t *)
    int onion_nbd_stop(onion_nbd_server *, uint64_t)

# Numbered as the protocol's commands; "disc" has no counter.
_VERBS = ("read", "write", "disc", "flush", "trim", "cache", "write_zeroes", "block_status")
_TLS, _REQUIRE_TLS, _RESUME_OPTIONS = 1, 2, 4


cdef class _Hooks:
    """What the server's threads call. Lives longer than the server."""
    cdef object still_export
    cdef object still_context
    cdef object find_export
    cdef object find_context
    cdef object list_exports
    cdef object list_contexts
    cdef object make_room
    cdef object freed
    cdef object begin_writing
    cdef object written


cdef object _name(const char *bytes_, uint32_t length):
    """A client's string, or None where it is none that anything here could be called."""
    try:
        text = bytes_[:length].decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


cdef int _still_export(void *context, const char *name, uint32_t length) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        text = _name(name, length)
        return hooks.still_export is None or text is None or bool(hooks.still_export(text))
    except BaseException as error:
        _report(error, hooks.still_export)
        return 0


cdef int _still_context(void *context, const char *name, uint32_t length, const char *meta,
                        uint32_t meta_length) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        text, meta_text = _name(name, length), _name(meta, meta_length)
        if hooks.still_context is None or text is None or meta_text is None:
            return 1
        return bool(hooks.still_context(text, meta_text))
    except BaseException as error:
        _report(error, hooks.still_context)
        return 0


cdef int _find_export(void *context, const char *name, uint32_t length) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        text = _name(name, length)
        return hooks.find_export is not None and text is not None and bool(hooks.find_export(text))
    except BaseException as error:
        return _failure(error, hooks.find_export)


cdef int _find_context(void *context, const char *name, uint32_t length, const char *meta,
                       uint32_t meta_length) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        text, meta_text = _name(name, length), _name(meta, meta_length)
        if hooks.find_context is None or text is None or meta_text is None:
            return 0
        return bool(hooks.find_context(text, meta_text))
    except BaseException as error:
        return _failure(error, hooks.find_context)


cdef int _make_room(void *context, const char *name) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        return hooks.make_room is not None and bool(hooks.make_room(name.decode()))
    except BaseException as error:
        _report(error, hooks.make_room)
        return 0


cdef void _freed(void *context, const char *name) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        if hooks.freed is not None:
            hooks.freed(name.decode())
    except BaseException as error:
        _report(error, hooks.freed)


cdef int _begin_writing(void *context, const char *name) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        if hooks.begin_writing is None:
            return -EIO
        hooks.begin_writing(name.decode())
        return 0
    except BaseException as error:
        return _failure(error, hooks.begin_writing)


cdef void _written(void *context, const char *name) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    try:
        if hooks.written is not None:
            hooks.written(name.decode())
    except BaseException as error:
        _report(error, hooks.written)


cdef int _list_exports(void *context, const char *after, uint32_t length, onion_nbd_listing *listing) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    cdef int status = 0
    try:
        for name, description in hooks.list_exports(after[:length].decode()):
            status = onion_nbd_list(listing, _encoded(name), _encoded(description))
            if status != 0:
                break
        return status
    except BaseException as error:
        _report(error, hooks.list_exports)
        return -EIO


cdef int _list_contexts(void *context, const char *name, const char *after, uint32_t length,
                        onion_nbd_context_listing *listing) noexcept with gil:
    cdef _Hooks hooks = <_Hooks>context
    cdef int status = 0
    cdef bytes encoded
    cdef const char *c_meta
    try:
        for meta in hooks.list_contexts(name.decode(), after[:length].decode()):
            encoded = _encoded(meta)
            c_meta = encoded
            with nogil:  # it looks at each of the client's queries, of which there may be thousands
                status = onion_nbd_list_context(listing, c_meta)
            if status != 0:
                break
        return status
    except BaseException as error:
        _report(error, hooks.list_contexts)
        return -EIO


cdef int _failure(object error, object callback) noexcept:
    """Return the code of what a callback raised. What it may not raise is reported."""
    if isinstance(error, OSError):
        return -error.errno if error.errno and error.errno > 0 else -EIO
    if not isinstance(error, StateError):
        _report(error, callback)
    return -EIO


cdef void _report(object error, object callback) noexcept:
    """Hand an exception that nobody can catch to sys.unraisablehook."""
    try:
        raise RuntimeError(f"{callback!r} failed for a client") from error
    except RuntimeError:
        import sys
        import types
        kind, value, trace = sys.exc_info()
        sys.unraisablehook(types.SimpleNamespace(exc_type=kind, exc_value=value, exc_traceback=trace, err_msg=None,
                                                 object=callback))


cdef dict _counters(const onion_nbd_counters *raw):
    return {
        "requests": {verb: raw.requests[i] for i, verb in enumerate(_VERBS) if verb != "disc"},
        "bytes": {verb: raw.bytes[i] for i, verb in enumerate(_VERBS) if verb not in ("disc", "flush")},
        "latency_seconds": {verb: raw.latency_ns[i] / 1e9 for i, verb in enumerate(_VERBS) if verb != "disc"},
        "errors": raw.errors,
        "sends": raw.sends,
    }


cdef class NbdServer:
    """Serves open data paths to NBD clients, each connection in a C thread that needs no GIL.

    The caller listens and accepts; see `serve`. All methods may be called from any thread.

    Parameters
    ----------
    connections_max : int
        More are refused by closing; but the oldest that still negotiates gives way to a new one.
    bytes_in_flight_max : int
        Payload bytes of one connection that wait to be written durably (FUA); behind them nothing more is received.
    idle_seconds : int
        A connection without requests, or that takes no replies, for so long is closed; 0: never.
    request_bytes_max : int
        Of one read or write, 65,536 to 32 MiB.
    turn_seconds : float
        For so long a client waits while `on_unknown_export` is called for another one.
    kept_seconds : float
        For so long a thread whose client has gone waits for a later one. At most 128 threads wait.
    list_exports : callable(after) -> iterable of (name, description), optional
        Names what clients can ask for, also what is not there yet: the names behind `after` (empty: all), in an order
        that is always the same. No more of them are taken than are sent together. Called as `on_unknown_export` is.
    list_contexts : callable(name, after) -> iterable of str, optional
        Names, likewise, the metadata contexts that `on_unknown_context` could add to the export `name`.

    Attributes
    ----------
    on_unknown_export : callable(name) -> bool, or None
        A client names an export that is not there. Called from the connection's thread, which waits; no lock is held,
        so it may call any method here but `stop`. It adds the export and returns True, or returns False where there is
        none, or raises OSError or StateError where that cannot be told now: the client is to ask again. Several
        threads may ask for the same name at once, so `add_export` may raise FileExistsError, which is as good. The
        name is whatever the client sent. Clients take turns: it may also add what the others ask for (`asked`), and tell
        them (`found`).
    on_unknown_context : callable(name, context) -> bool, or None
        As above, for a context ``onionskin:changed-since:...`` or ``qemu:dirty-bitmap:...`` of the export `name`: calls
        `set_changed_since`.
    on_known_export, on_known_context : callable, or None
        Asked as the two above are, where there is an export or context of that name: whether it still is what the name
        means. False: `on_unknown_export`, or `on_unknown_context`, is asked as if it were not there.
    on_full_disk : callable(name) -> bool, or None
        A client's flush of the export `name` found the disk full. True: this has flushed, with room that it made for it.
    on_first_write : callable(name), or None
        A request needs the head of the export `name`, which was added as `unwritten`: this opens the head and calls
        `replace_path`, or raises OSError or StateError. Called like `on_full_disk`.
    on_written : callable(name), or None
        A client is about to change the export `name`, for the first time since it was added. Called like `on_full_disk`.
    on_freed : callable(name), or None
        A client's flush left segments for `DataPath.reclaim_wanted`. Like `on_full_disk` it is called from the
        connection's thread, before the client is answered, with no lock held.
    """
    cdef onion_nbd_server *_server
    cdef _Hooks _hooks
    cdef dict _paths
    cdef object _lock
    cdef int _pid
    cdef object __weakref__

    def __cinit__(self, *, connections_max=64, bytes_in_flight_max=64 << 20, idle_seconds=0,
                  request_bytes_max=32 << 20, turn_seconds=0.2, kept_seconds=10.0, list_exports=None, list_contexts=None):
        cdef onion_nbd_options options
        self._hooks = _Hooks()
        self._hooks.list_exports = list_exports
        self._hooks.list_contexts = list_contexts
        self._paths = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        options.connections_max = connections_max
        options.idle_seconds = idle_seconds
        options.request_bytes_max = request_bytes_max
        options.bytes_in_flight_max = bytes_in_flight_max
        options.turn_ms = round(turn_seconds * 1000)
        options.kept_ms = round(kept_seconds * 1000)
        options.hooks.still_export = _still_export
        options.hooks.still_context = _still_context
        options.hooks.find_export = _find_export
        options.hooks.find_context = _find_context
        options.hooks.make_room = _make_room
        options.hooks.freed = _freed
        options.hooks.begin_writing = _begin_writing
        options.hooks.written = _written
        options.hooks.list_exports = NULL
        if list_exports is not None:
            options.hooks.list_exports = _list_exports
        options.hooks.list_contexts = NULL
        if list_contexts is not None:
            options.hooks.list_contexts = _list_contexts
        options.hooks.context = <void *>self._hooks
        cdef int status = onion_nbd_new(&options, &self._server)
        if status < 0:
            self._server = NULL
            if status == -EINVAL:
                raise ValueError("a server needs connections_max of at least 1, request_bytes_max from 65536 to "
                                 "33554432, and bytes_in_flight_max of at least request_bytes_max")
            raise OSError(-status, f"the NBD server cannot be made: {os.strerror(-status)}")

    def __dealloc__(self):
        # After a fork the threads are the parent's, and so are their locks.
        if self._server != NULL and self._pid == os.getpid():
            with nogil:
                onion_nbd_free(self._server)

    cdef int _raise(self, int64_t status, object name) except -1:
        # A flush that failed here says in which file.
        cdef const onion_site *site = onion_site_of(<int>status)
        where, offset = (name, 0) if site == NULL else (os.fsdecode(site.path), site.offset)
        onion_site_clear()
        if status == -ENOENT:
            raise KeyError(name)
        if status == -ESHUTDOWN:
            raise StateError("the NBD server is stopped; start another one")
        if status == -EINVAL:
            raise ValueError(f"{name}: the name has more than 4096 bytes, or the runs are not sorted and apart")
        raise error_of(status, name, where, offset)

    property on_unknown_export:
        def __get__(self):
            return self._hooks.find_export

        def __set__(self, callback):
            self._hooks.find_export = callback

    property on_unknown_context:
        def __get__(self):
            return self._hooks.find_context

        def __set__(self, callback):
            self._hooks.find_context = callback

    property on_known_export:
        def __get__(self):
            return self._hooks.still_export

        def __set__(self, callback):
            self._hooks.still_export = callback

    property on_known_context:
        def __get__(self):
            return self._hooks.still_context

        def __set__(self, callback):
            self._hooks.still_context = callback

    property on_full_disk:
        def __get__(self):
            return self._hooks.make_room

        def __set__(self, callback):
            self._hooks.make_room = callback

    property on_freed:
        def __get__(self):
            return self._hooks.freed

        def __set__(self, callback):
            self._hooks.freed = callback

    property on_first_write:
        def __get__(self):
            return self._hooks.begin_writing

        def __set__(self, callback):
            self._hooks.begin_writing = callback

    property on_written:
        def __get__(self):
            return self._hooks.written

        def __set__(self, callback):
            self._hooks.written = callback

    # ---- exports ----

    def add_export(self, name, path, *, read_only, unwritten=False, description=""):
        """Offer a data path under a name, e.g. 'web' or 'web@clean'. FileExistsError where the name is taken.

        `unwritten`: the path reads as the head of the export, and `on_first_write` puts that of the head in its place.
        """
        cdef onion_volume *volume = _volume_of(path)
        encoded, text = _encoded(name), _encoded(description)
        cdef onion_nbd_access access = ONION_NBD_TO_WRITE
        if read_only:
            access = ONION_NBD_TO_READ
        elif unwritten:
            access = ONION_NBD_UNWRITTEN
        cdef int status
        with self._lock:
            status = onion_nbd_add_export(self._server, encoded, volume, access, text)
            if status == 0:
                self._paths[name] = path
        if status < 0:
            self._raise(status, name)

    def asked(self):
        """Return the names for which clients wait until it is their turn to call `on_unknown_export`, each once.

        Returns them with this moment, for `found`.
        """
        cdef char *raw = NULL
        cdef uint64_t until = 0
        cdef int64_t length = onion_nbd_asked(self._server, &raw, &until)
        if length < 0:
            raise MemoryError("no memory for the names that clients ask for")
        try:
            parts = raw[:length].split(b"\0") if length else []
        finally:
            free(raw)
        names = []
        for part in dict.fromkeys(parts):
            try:
                names.append(part.decode())
            except UnicodeDecodeError:
                pass  # nothing here could be called so
        return [name for name in names if name], until

    def found(self, names, until):
        """Tell the clients that wait for their turn, and want one of these exports, that it was added: they go on at once.

        Only those that had asked when `asked` returned `until`. A name may have got another meaning before others asked.
        """
        cdef list encoded = [_encoded(name) for name in names]
        cdef size_t count = len(encoded), i
        cdef uint64_t c_until = until
        cdef const char **at = <const char **>malloc((count + 1) * sizeof(char *))
        if at == NULL:
            raise MemoryError(f"no memory for {count} names")
        for i in range(count):
            at[i] = <bytes>encoded[i]
        with nogil:
            onion_nbd_found(self._server, at, count, c_until)
        free(at)

    def set_default(self, name):
        """Make an export answer to the empty name, too."""
        cdef int status = onion_nbd_set_default(self._server, _encoded(name))
        if status < 0:
            self._raise(status, name)

    def rename_export(self, name, new_name, *, description=""):
        """Call an export something else: open connections go on, later ones ask for the new name.

        FileExistsError where that is taken.
        """
        encoded, new, text = _encoded(name), _encoded(new_name), _encoded(description)
        cdef int status
        with self._lock:
            status = onion_nbd_rename_export(self._server, encoded, new, text)
            if status == 0:
                self._paths[new_name] = self._paths.pop(name)
        if status < 0:
            self._raise(status, name)

    def remove_export(self, name, *, if_unused=False):
        """Take an export away: waits for requests in flight; later ones on open connections get ESHUTDOWN.

        With `if_unused` only where no client has it, or is coming to it; returns whether it was taken away.
        """
        encoded = _encoded(name)
        cdef const char *c_name = encoded
        cdef int c_if_unused = bool(if_unused)
        cdef int status
        with self._lock:  # requests in flight call nothing of Python, so they cannot wait for it
            with nogil:
                status = onion_nbd_remove_export(self._server, c_name, c_if_unused)
            if status == 0:
                del self._paths[name]
        if c_if_unused and status == -16:
            return False
        if status < 0:
            self._raise(status, name)
        return True

    def replace_path(self, name, path):
        """Go on with another data path, as after a revert: waits for requests in flight, later ones use the new one.

        A read that was answered in part ends in an error. Contexts of `set_changed_since` say from then on that
        everything changed, until they are set again.
        """
        cdef onion_volume *volume = _volume_of(path)
        encoded = _encoded(name)
        cdef const char *c_name = encoded
        cdef int status
        with self._lock:
            with nogil:
                status = onion_nbd_replace_volume(self._server, c_name, volume)
            if status == 0:
                self._paths[name] = path
        if status < 0:
            self._raise(status, name)

    def pause(self, name):
        """Hold the requests of an export: waits for those in flight; later ones wait for as many calls of `resume`.

        New clients wait in their negotiation. `replace_path` may be called meanwhile; `stop` ends it.
        """
        encoded = _encoded(name)
        cdef const char *c_name = encoded
        cdef int status
        with nogil:
            status = onion_nbd_hold(self._server, c_name)
        if status < 0:
            self._raise(status, name)

    def resume(self, name):
        """Let the requests of an export go on."""
        cdef int status = onion_nbd_release(self._server, _encoded(name))
        if status < 0:
            self._raise(status, name)

    def change_mark(self, name):
        """Return the mark to take before the runs of `set_changed_since` are computed. Not while it is paused."""
        encoded = _encoded(name)
        cdef const char *c_name = encoded
        cdef int64_t mark
        with nogil:
            mark = onion_nbd_change_mark(self._server, c_name)
        if mark < 0:
            self._raise(mark, name)
        return mark

    def set_changed_since(self, name, context, runs, *, mark=None):
        """Offer, or renew, a metadata context that answers flag 1 for what changed.

        Parameters
        ----------
        name, context : str
            The export; ``onionskin:changed-since:SNAPSHOT``.
        runs : array of uint64, shape (n, 2)
            Offset and length in bytes of what had changed when it was computed: sorted, apart, none empty.
        mark : int, optional
            From `change_mark`, taken before the runs were computed. Without it, of now: then the caller sees to it that
            nothing was written, and no snapshot taken, since it began to compute them.

        On a writable export, what was written since the mark counts as changed as well, and so does every range of
        zeros that hides something: more than changed, never less.
        """
        cdef object table = numpy.ascontiguousarray(runs, dtype=numpy.uint64).reshape(-1, 2)
        cdef const unsigned char[:] raw = table.view(numpy.uint8).reshape(-1) if len(table) else b"\0"
        cdef const void *c_runs = &raw[0]
        cdef size_t count = len(table)
        encoded, meta = _encoded(name), _encoded(context)
        cdef const char *c_name = encoded
        cdef const char *c_meta = meta
        cdef uint64_t since = self.change_mark(name) if mark is None else mark
        cdef int status
        with nogil:
            status = onion_nbd_set_context(self._server, c_name, c_meta, c_runs, count, since)
        if status < 0:
            self._raise(status, name)

    # ---- connections ----

    def serve(self, fd, peer, *, tls=False, require_tls=False, resume_options=False, client_flags=3):
        """Take over a connected stream socket and serve it in a thread of its own.

        Parameters
        ----------
        fd : int
            Belongs to the server from now on, also where this raises: pass ``sock.detach()``.
        peer : str
            For events and `connections`.
        tls : bool
            The socket carries what came out of TLS; STARTTLS is refused.
        require_tls : bool
            All options but STARTTLS and ABORT are answered with ERR_TLS_REQD.
        resume_options : bool
            Greeting and `client_flags` were exchanged by the caller: begin with the next option.

        Returns
        -------
        int
            The connection's id.

        Raises
        ------
        OSError
            EMFILE: connections_max are open.
        StateError
            The server is stopped.
        """
        encoded = os.fsencode(peer)
        cdef const char *c_peer = encoded
        cdef int c_fd = fd
        cdef uint32_t c_client_flags = client_flags
        cdef int flags = (_TLS if tls else 0) | (_REQUIRE_TLS if require_tls else 0) | (
            _RESUME_OPTIONS if resume_options else 0)
        cdef int64_t id
        with nogil:
            id = onion_nbd_serve(self._server, c_fd, c_peer, flags, c_client_flags)
        if id < 0:
            self._raise(id, peer)
        return id

    def accept(self, listener):
        """Take clients that wait at a listening Unix socket, and serve each as `serve` does; of very many, some.

        One that cannot be served is sent away, with an event. What goes wrong with the socket itself raises OSError.

        Parameters
        ----------
        listener : int
            The descriptor of the socket, which does not block.
        """
        cdef int c_listener = listener
        cdef int status
        with nogil:
            status = onion_nbd_accept(self._server, c_listener)
        if status < 0:
            raise OSError(-status, os.strerror(-status))

    def begin_threads(self, count):
        """Start threads for clients that come, until so many are there, and keep as many. At most 128.

        To start one takes as long as a handshake. Where the system gives no more of them, there are fewer.
        """
        cdef uint32_t c_count = count
        with nogil:
            onion_nbd_begin_threads(self._server, c_count)

    def connections(self):
        """Return a dict for each open connection: id, peer, export (None: negotiating), tls, and its `counters`."""
        cdef uint32_t capacity = onion_nbd_connections(self._server, NULL, 0) + 16, count, i
        cdef onion_nbd_connection_info *infos = <onion_nbd_connection_info *>malloc(
            capacity * sizeof(onion_nbd_connection_info))
        if infos == NULL:
            raise MemoryError(f"no memory for {capacity} connections")
        try:
            count = min(capacity, onion_nbd_connections(self._server, infos, capacity))
            return [
                {
                    "id": infos[i].id,
                    "peer": os.fsdecode(infos[i].peer),
                    "export": None if infos[i].negotiating else infos[i].export_name.decode(errors="replace"),
                    "tls": bool(infos[i].tls),
                    **_counters(&infos[i].counters),
                }
                for i in range(count)
            ]
        finally:
            free(infos)

    def counters(self, name=None):
        """Return requests, bytes and seconds of latency by verb, errors, and system calls that sent replies.

        Of all connections that there ever were: to the server, or to the export `name`, since it was added. A request's
        latency ends when its reply was handed to the socket.
        """
        cdef onion_nbd_counters raw
        cdef int status = 0
        if name is None:
            onion_nbd_count(self._server, &raw)
        else:
            status = onion_nbd_count_export(self._server, _encoded(name), &raw)
        if status < 0:
            self._raise(status, name)
        return _counters(&raw)

    # ---- events ----

    @property
    def event_fd(self):
        """An eventfd that is readable while `events` has something; it belongs to the server."""
        return onion_nbd_event_fd(self._server)

    def events(self):
        """Return what happened since the last call, oldest first: who connected, what failed. Never waits.

        At most 1,024 lines are kept; where older ones were dropped, a line says how many.
        """
        cdef char line[512]
        cdef uint64_t dropped = 0
        lines = []
        while True:
            length = onion_nbd_next_event(self._server, line, &dropped)
            if dropped:
                lines.append(f"{dropped} events were dropped")
            if not length:
                return lines
            lines.append(os.fsdecode(line[:length]))

    # ---- the end ----

    def stop(self, *, grace_seconds=5.0):
        """Take no more requests, answer those that arrived, flush each writable export, and let go of all paths.

        After `grace_seconds`, connections whose clients take no replies are closed. Idempotent.

        Raises
        ------
        OSError, StateError
            The first flush that failed; the server is stopped all the same.
        """
        cdef uint64_t grace_ms = max(0, round(grace_seconds * 1000))
        cdef int status
        with nogil:
            status = onion_nbd_stop(self._server, grace_ms)
        with self._lock:
            self._paths.clear()
        if status < 0:
            self._raise(status, "flush")


cdef onion_volume *_volume_of(object path) except NULL:
    if not isinstance(path, DataPath):
        raise TypeError(f"an export serves a DataPath, not {type(path).__name__}")
    return <onion_volume *>PyCapsule_GetPointer(path.capsule, "onion_volume")


cdef bytes _encoded(object text):
    encoded = text.encode()
    if b"\0" in encoded:
        raise ValueError(f"{text!r} has a zero byte in it, which no name over NBD can have")
    return encoded
