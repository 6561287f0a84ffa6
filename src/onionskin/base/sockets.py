"""Sockets that only their owner may use, in whatever directory they are.

What must hold: a Unix socket has its mode from the moment at which it has a name, whatever the umask. A path of any
length can be bound and connected to (the kernel's limit is 107 bytes). A socket on which no process listens is
replaced. A socket on which a process listens is never replaced. At the end, only a socket that still belongs to this
process is removed.
"""

import errno
import ipaddress
import os
import select
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from onionskin.base.held import held
from onionskin.base.paths import FilePath
from onionskin.errors import StateError

PORT = 10809
BACKLOG = 4096  # as many clients as a server lets in at most; the system may let fewer wait (net.core.somaxconn)
_CREDENTIALS = struct.Struct("3i")
_NOBODY_LISTENS = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR, errno.ENOTSOCK)


@held
def short_path(path: "str | os.PathLike[str]") -> Iterator[str]:
    """Name a file by a descriptor of its directory. Such a name fits in an address, however long the path is."""
    descriptor = os.open(FilePath(path).absolute().parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{FilePath(path).name}"
    finally:
        os.close(descriptor)


class UnixListener:
    """A listening Unix socket with a name in the file system.

    Parameters
    ----------
    path : str or os.PathLike
        A socket on which no process listens is replaced.
    mode : int

    Raises
    ------
    StateError
        Another process listens there.
    FileExistsError
        Something other than a socket is there.
    """

    def __init__(self, path: "str | os.PathLike[str]", *, mode: int = 0o600) -> None:
        self.path = FilePath(path).absolute()
        self._process = os.getpid()
        self._inode = -1  # of the file, once it gets a second name: the first one may be another file's by then
        _refuse_taken(self.path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # It gets its name by a rename, so that no client ever finds a socket that does not listen yet.
        staged = self.path.with_name(f".{self.path.name[:40]}.{os.getpid()}")
        try:
            os.fchmod(self.socket.fileno(), mode)  # before bind: the file is made with this mode, less the umask
            with short_path(staged) as short:
                with suppress(FileNotFoundError):
                    FilePath(short).unlink()
                self.socket.bind(short)
                self.socket.listen(BACKLOG)
                found = os.lstat(short)
                if stat.S_IMODE(found.st_mode) != mode:
                    os.chmod(short, mode)  # noqa: PTH101 - only ever widens: restores bits that the umask took away
            self._identity = (found.st_dev, found.st_ino)
            os.rename(staged, self.path)  # noqa: PTH104
        except BaseException as error:
            self.socket.close()
            with suppress(OSError):
                staged.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno:  # the error names no file, or a name that only stands for it
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise

    def add_name(self, path: FilePath) -> None:
        """Give the socket one more name, in place of a socket on which no process listens.

        Raises
        ------
        OSError
            The file system knows no second names, the socket has too many, or has none any more.
        """
        from onionskin.base._names import leads_to

        if self._inode < 0:
            self._inode = self._open_inode()
        link_descriptor(self._inode, path)
        if not leads_to(self._inode, path):
            os.unlink(path)  # noqa: PTH108 - a few microseconds
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), str(path))

    def add_names(self, paths: Sequence[FilePath]) -> set[FilePath]:
        """Give the socket more names by one call. Returns those that it has: `add_name` says what is wrong with others."""
        from onionskin.base._names import link_all

        if self._inode < 0:
            self._inode = self._open_inode()
        errors = link_all(self._inode, paths, replaces=True)
        return {path for path, error in zip(paths, errors, strict=True) if not error}

    def _open_inode(self) -> int:
        """Open the file of the socket, which is not at its first name any more where somebody replaced that."""
        with short_path(self.path) as short:
            descriptor = os.open(short, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) == self._identity:
            return descriptor
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def remove_name(self, path: FilePath) -> None:
        """Remove one of the names, if it is still this socket's. In the child of a fork it stays."""
        if os.getpid() != self._process:
            return
        with suppress(OSError):
            found = path.lstat()
            if (found.st_dev, found.st_ino) == self._identity:
                path.unlink()

    def close(self) -> None:
        """Stop listening, and remove the name if it is still this socket's. Idempotent.

        In the child of a fork the name stays: the parent listens there still.
        """
        self.socket.close()
        inode, self._inode = self._inode, -1
        self.remove_name(self.path)
        self._identity = (-1, -1)
        if inode >= 0:  # until now it kept another file from getting the same number
            os.close(inode)


def link_descriptor(descriptor: int, path: FilePath) -> None:
    """Give an open file one more name, in place of whatever is there. Raises OSError where that cannot be done."""
    source = f"/proc/self/fd/{descriptor}"
    for _ in range(2):
        try:
            # Without a directory, Python makes the call that does not follow the link.
            os.link(source, path, src_dir_fd=descriptor, follow_symlinks=True)
        except FileExistsError:
            os.unlink(path)  # noqa: PTH108 - a few microseconds
        else:
            return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _refuse_taken(path: FilePath) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "it is not a socket; choose another path, or remove it first", str(path))
    try:
        connect_unix(path, seconds=1).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return
    except BlockingIOError:
        pass  # a process listens, and is behind with accepting
    raise StateError(f"another server listens on {path}; stop it, or choose another path")


def connect_unix(path: "str | os.PathLike[str]", *, seconds: float = 0) -> socket.socket:
    """Connect to a Unix socket.

    The queue may be full, as it is for a process that was stopped. Then the call waits for so many seconds (0: for
    ever) and raises BlockingIOError.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Python's own time limit would make the socket non-blocking, and such a socket does not wait for the queue.
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with short_path(path) as short:
            connection.connect(short)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    except BaseException:
        connection.close()
        raise
    return connection


def connect_if_listening(path: "str | os.PathLike[str]", *, seconds: float = 0) -> socket.socket | None:
    """Connect to a Unix socket as `connect_unix` does, or return None where no process listens there.

    Then it is not there, or it was left by a process that is gone. Any other error says nothing of that, and is raised.
    """
    try:
        return connect_unix(path, seconds=seconds)
    except OSError as error:
        if error.errno not in _NOBODY_LISTENS:
            raise
        return None


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the other end of a Unix socket has closed it. That this end reads no more does not count."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def may_be_read(connection: socket.socket) -> bool:
    """Whether a read would not wait: something has come, or the other end is gone."""
    return _is_ready(connection, select.POLLIN)


def may_be_written(connection: socket.socket) -> bool:
    """Whether a write of a few bytes would not wait."""
    return _is_ready(connection, select.POLLOUT)


def _is_ready(connection: socket.socket, events: int) -> bool:
    """Ask by `poll`: `select` refuses descriptors from 1024 on, which a server of many volumes has."""
    poll = select.poll()
    poll.register(connection, events)
    return bool(poll.poll(0))


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT.

    `:10809` and `10809` are on loopback, `[::1]:10809` is IPv6, and a host alone has the port of NBD.
    """
    host, colon, port = text.rpartition(":")
    if not colon and text.isdigit():
        host, port = "", text
    elif not colon or text.endswith("]"):
        host, port = text, str(PORT)
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, such as 127.0.0.1:10809")
    host = host.removeprefix("[").removesuffix("]")
    if ":" in host and not text.startswith("["):
        raise ValueError(f"{text!r} is not an address: write an IPv6 address in brackets, such as [::1]:10809")
    return host or "127.0.0.1", int(port)


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listen on all addresses that a host name stands for."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"no host {host!r} is known here: {error.strerror}; check the address") from None
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise OSError(
            error.errno, f"{os.strerror(error.errno or 0)}; choose another address", f"{host}:{port}"
        ) from None
    return listeners


def is_local(listener: socket.socket) -> bool:
    """Whether only processes of this machine can connect."""
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def peer_of(connection: socket.socket) -> str:
    """Describe the peer of a connection, for a log."""
    if connection.family == socket.AF_UNIX:
        pid, uid, _ = credentials_of(connection)
        return f"process {pid} of user {uid}"
    host, port = connection.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def credentials_of(connection: socket.socket) -> tuple[int, int, int]:
    """Return (process id, user id, group id) of the process that connected to a Unix socket."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(found)
    return pid, uid, gid


def may_connect(uid: int, owner: int) -> bool:
    """Return whether a process of user `uid` may use a socket that controls what user `owner` runs."""
    return uid in (owner, 0)


def uri_of(listener: socket.socket, path: "os.PathLike[str] | str | None", *, tls: bool) -> str:
    """Return the URI that clients connect to, without the name of an export."""
    if path is not None:
        return f"nbd+unix:///?socket={_quoted(os.fsencode(path))}"
    if listener.family == socket.AF_UNIX:
        return f"nbd+unix:///?socket={_quoted(os.fsencode(listener.getsockname()))}"
    host, port = listener.getsockname()[:2]
    return f"{'nbds' if tls else 'nbd'}://{f'[{host}]' if ':' in host else host}:{port}/"


def _quoted(path: bytes) -> str:
    """Encode a path for a URI, whatever its bytes are. See RFC 3986, section 2.1."""
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/"
    return "".join(chr(byte) if byte in plain else f"%{byte:02X}" for byte in path)
