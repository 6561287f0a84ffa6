"""Images that come as a stream of bytes: from a pipe, from stdin, or from a program that unpacks.

What must hold: bytes that were looked at beforehand are read again, so nothing is lost. The output of a program that
unpacks counts as whole only after the program has ended with status 0. When the `with` block ends, even by an error,
its program and its thread have ended.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from onionskin.base.lazy import Later
from onionskin.base.threads import SureThread
from onionskin.errors import FormatError, OnionskinError
from onionskin.exchange.programs import running, status_of

if TYPE_CHECKING:
    import select
    import shutil
    import subprocess
    import tempfile
else:  # a plain file needs none of them
    select, shutil, tempfile = map(Later, ("select", "shutil", "tempfile"))

# Each of them reads stdin and writes stdout, and is known to end with a status other than 0 if its input ends early.
_PROGRAMS: Final = {
    "gzip": ("gzip", "-dc"),
    "xz": ("xz", "-dc"),
    "zstd": ("zstd", "-dcq"),
    "bzip2": ("bzip2", "-dc"),
    "lz4": ("lz4", "-dcq"),
}
# What the programs inherit. Their own variables (XZ_OPT, GZIP, ZSTD_CLEVEL, BZIP2, ...) could give them other options.
_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH")
# Of several streams in a row bzip2 leaves out all behind one whose first bytes are damaged or missing, and ends with 0.
_LEFT_OUT: Final = "trailing garbage"
COMPRESSED: Final = frozenset(_PROGRAMS)
_CHUNK_BYTES: Final = 1 << 20


class Source:
    """Bytes that are read in order from a descriptor. The first bytes can be looked at before they are read.

    Parameters
    ----------
    descriptor : int
        The caller closes it.
    name : str
        Its name in messages.
    ahead : bytes, optional
        Bytes that were read from the descriptor already.
    """

    def __init__(self, descriptor: int, name: str, ahead: bytes = b"") -> None:
        self.descriptor = descriptor
        self.name = name
        self._ahead = ahead

    def peek(self, length: int) -> bytes:
        """Return the next bytes without consuming them. They are fewer than `length` only at the end."""
        while len(self._ahead) < length:
            with self._naming():
                more = _read(self.descriptor, length - len(self._ahead))
            if not more:
                break
            self._ahead += more
        return self._ahead[:length]

    def readinto(self, buffer: "memoryview[int]") -> int:
        """Fill a buffer and return the number of bytes, which is smaller than the buffer only at the end."""
        done = min(len(self._ahead), len(buffer))
        buffer[:done] = self._ahead[:done]
        self._ahead = self._ahead[done:]
        while done < len(buffer):
            with self._naming():
                read = _readinto(self.descriptor, buffer[done:])
            if read == 0:
                break
            done += read
        return done

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def take_ahead(self) -> bytes:
        """Consume and return the bytes that were looked at. A later reader of the descriptor does not get them."""
        ahead, self._ahead = self._ahead, b""
        return ahead


def _read(descriptor: int, length: int) -> bytes:
    """Read as `os.read`, and wait where the descriptor does not: b"" is the end, and nothing else."""
    buffer = bytearray(length)
    return bytes(buffer[: _readinto(descriptor, memoryview(buffer))])


def _readinto(descriptor: int, buffer: "memoryview[int]") -> int:
    while True:
        try:
            return os.readv(descriptor, [buffer])
        except BlockingIOError:  # whoever made a pipe may have made it non-blocking
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()


def is_seekable(descriptor: int) -> bool:
    """Return whether an image can be read at any offset: it is a file or a block device, at its beginning."""
    mode = os.fstat(descriptor).st_mode
    return (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and os.lseek(descriptor, 0, os.SEEK_CUR) == 0


def hides_size(descriptor: int) -> bool:
    """Return whether a file says that it is empty, and is not, as those of /proc: it has to be read to its end."""
    return (
        os.fstat(descriptor).st_size == 0
        and stat.S_ISREG(os.fstat(descriptor).st_mode)
        and os.pread(descriptor, 1, 0) != b""
    )


@contextlib.contextmanager
def unpacked(source: Source, kind: str) -> Iterator[Source]:
    """Yield the unpacked bytes of a compressed stream, which the system's program unpacks.

    The caller reads all of them within the block. If the block ends without an error, the stream was whole.

    Parameters
    ----------
    source : Source
        It stands at the beginning of the compressed bytes.
    kind : str
        One of `COMPRESSED`.

    Raises
    ------
    OnionskinError
        The program is not installed.
    FormatError
        The program says that the stream is damaged or ends early.
    """
    program, *options = _PROGRAMS[kind]
    found = shutil.which(program)
    if found is None:
        raise OnionskinError(
            f"{source.name} is compressed with {kind}, and {program} is not installed; install it, or unpack the image "
            "elsewhere"
        )
    ahead = source.take_ahead()
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile())
        feeder = None
        if is_rewindable(source.descriptor):  # the program reads the file by itself
            os.lseek(source.descriptor, -len(ahead), os.SEEK_CUR)
        else:
            feeder = stack.enter_context(_Feeder(ahead, source.descriptor))
        input = feeder.output if feeder else source.descriptor
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"LC_ALL": "C"}
        with running([found, *options], stdin=input, stderr=said, env=environment) as process:
            assert process.stdout is not None
            if feeder:
                feeder.start()
            yield Source(process.stdout.fileno(), source.name)
            _refuse_rest(process, source.name)
            status = status_of(process)
        if feeder:
            feeder.finish()
        said.seek(0)
        text = said.read(1 << 16).decode(errors="replace").strip()
        if status or _LEFT_OUT in text:
            reason = _reason(program, text) or f"status {status}"
            raise FormatError(f"{source.name}: {program} could not unpack it: {reason}; {_advice(text)}")


def _reason(program: str, text: str) -> str:
    """Return the line that says what is wrong: the last, but bzip2 says it first, and then much else."""
    lines = text.splitlines()
    named = [line for line in lines if line.startswith(f"{program}: ")]
    return (named[:1] or lines[-1:] or [""])[0].strip(" ;")


def _advice(text: str) -> str:
    if "--long" in text or "--memory" in text:  # of zstd: the window of the stream takes more memory than is usual
        return (
            "the stream is whole, but wants memory: unpack it by hand, with that option, and give 'import -' the bytes"
        )
    if "ictionary" in text:  # of zstd and lz4: what it was packed with is not in the stream
        return "it was packed with a dictionary: unpack it by hand, with that (zstd -D), and give 'import -' the bytes"
    return "fetch it again"


def is_rewindable(descriptor: int) -> bool:
    """Return whether bytes that were read can be read again: it is a file or a block device, at any position."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _refuse_rest(process: "subprocess.Popen[bytes]", name: str) -> None:
    """Raise if the unpacked bytes were not read to the end: the program would wait for a reader forever."""
    assert process.stdout is not None
    if os.read(process.stdout.fileno(), 1):
        raise AssertionError(f"{name} was not read to its end")


class _Feeder:
    """A thread that passes a pipe on to a program, after the bytes that were read from the pipe already."""

    def __init__(self, ahead: bytes, descriptor: int) -> None:
        self._ahead, self._descriptor = ahead, descriptor
        self.output, self._input = os.pipe2(os.O_CLOEXEC)
        self._stopped, self._stop = os.pipe2(os.O_CLOEXEC)
        self._failure: OSError | None = None
        self._thread = SureThread(target=self._run, name="onionskin unpack", daemon=True)
        self._is_started = self._is_given_up = False

    def __enter__(self) -> "_Feeder":
        return self

    def start(self) -> None:
        """Start the thread. The program has inherited its end of the pipe by now."""
        try:
            self._thread.start()
        except BaseException:
            self._is_given_up = True
            raise
        self._is_started = True
        os.close(self.output)

    def finish(self) -> None:
        """Wait for the thread, and raise the error that kept it from reading the source, if there was one."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def __exit__(self, *_: Any) -> None:
        os.write(self._stop, b"x")
        if self._is_started:
            self._thread.join()  # it ends, because the program has ended and the thread was told to stop
        else:
            os.close(self.output)
            os.close(self._input)
        os.close(self._stop)
        os.close(self._stopped)

    def _run(self) -> None:
        if self._is_given_up:  # it begins so late that its descriptors may be others by now
            return
        try:
            self._pass_on()
        except BrokenPipeError:
            pass  # the program has ended, and its own message says why
        except OSError as failure:
            self._failure = failure
        finally:
            os.close(self._input)

    def _pass_on(self) -> None:
        data = self._ahead
        poll = select.poll()
        for descriptor in (self._descriptor, self._stopped):
            poll.register(descriptor, select.POLLIN)
        while True:
            at = 0
            while at < len(data):
                at += os.write(self._input, data[at:])
            if any(descriptor == self._stopped for descriptor, _ in poll.poll()):
                return
            data = _read(self._descriptor, _CHUNK_BYTES)
            if not data:
                return
