"""Takes a snapshot of three volumes while a writer of the second is held inside its write: `exact_cut.py STORE`.

Nothing can be cut meanwhile, so whoever writes to the first volume and then to the third waits: neither write is in the
snapshot. Prints what the snapshots of the first and the third say of these writes. Without the barrier, which is that all
volumes are held before any is cut, the first is cut at once, and both writes are answered before the third is cut: then
the third has its write, and the first has not.

The writer is held by a page of its buffer that is not there (userfaultfd), which is also the event that tells that it is
inside. That a thread waits in the data path is read in /proc: it waits for a futex without a time limit, and whoever waits
for the interpreter has a limit.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onionskin
from onionskin.kernels import _volume
from onionskin.operations import seal

BLOCK = 4096
STAMP = (1).to_bytes(8, "little")
USERFAULTFD = {"x86_64": 323, "aarch64": 282}
FUTEX = {"x86_64": 202, "aarch64": 98}
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
UFFD_API, MISSING = 0xAA, 1


class MissingPage:
    """A page of memory that is not there until it is given: who touches it waits."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.syscall(USERFAULTFD[platform.machine()], os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd; it needs root")
        fcntl.ioctl(self._fd, UFFDIO_API, bytearray(struct.pack("<QQQ", UFFD_API, 0, 0)))
        self.page = mmap.mmap(-1, mmap.PAGESIZE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        fcntl.ioctl(
            self._fd, UFFDIO_REGISTER, bytearray(struct.pack("<QQQQ", self._address, mmap.PAGESIZE, MISSING, 0))
        )

    def wait_for_toucher(self) -> None:
        """Wait until somebody waits for the page."""
        os.read(self._fd, 32)

    def give(self) -> None:
        """Let it be there, with zeros."""
        fcntl.ioctl(self._fd, UFFDIO_ZEROPAGE, bytearray(struct.pack("<QQQq", self._address, mmap.PAGESIZE, 0, 0)))


class Worker(threading.Thread):
    """A thread whose calls of the data path can be looked at."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self._work = work
        self.inside = False  # set before the call that may wait
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failed = error

    def wait_until_it_waits(self) -> None:
        """Return when it waits inside the data path, or has ended."""
        while self.is_alive() and not (self.inside and self._waits_without_limit()):
            os.sched_yield()

    def _waits_without_limit(self) -> bool:
        try:
            words = Path(f"/proc/self/task/{self.native_id}/syscall").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return words[0] == str(FUTEX[platform.machine()]) and int(words[4], 16) == 0


@contextmanager
def entering(worker: Callable[[], Worker], before: Callable[[], None]) -> Iterator[None]:
    """Do something before the heads of a group are cut, and note that the worker goes inside."""
    cut_heads = _volume.cut_heads

    def cut(paths: list[_volume.DataPath], names: list[str]) -> None:
        before()
        worker().inside = True
        cut_heads(paths, names)

    seal.cut_heads = cut  # type: ignore[assignment]
    try:
        yield
    finally:
        seal.cut_heads = cut_heads


def main(path: Path) -> None:
    """Print the stamps of the first and the third volume."""
    missing = MissingPage()
    names = ("first", "second", "third")
    with onionskin.Store(path) as store:
        volumes = [store.create(name, size=4 * BLOCK) for name in names]
        first, second, third = volumes
        slow = Worker(lambda: second.write(0, missing.page))

        def hold_the_second() -> None:
            slow.start()
            missing.wait_for_toucher()

        def write_both() -> None:
            stamping.inside = True
            first.write(0, STAMP)
            third.write(0, STAMP)

        group = Worker(lambda: (store.snapshot_group(dict.fromkeys(names, "s")), None)[1])
        stamping = Worker(write_both)
        with entering(lambda: group, hold_the_second):
            group.start()
            group.wait_until_it_waits()
            stamping.start()
            stamping.wait_until_it_waits()
            missing.give()
            for worker in (slow, group, stamping):
                worker.join()
        failed = [worker.failed for worker in (slow, group, stamping) if worker.failed]
        if failed:
            raise failed[0]
        stamps = []
        for name in ("first", "third"):
            with store.open(name, snapshot="s") as view:
                stamps.append(int.from_bytes(view.read(0, 8), "little"))
        assert [volume.read(0, 8) for volume in (first, third)] == [STAMP, STAMP]
        for volume in volumes:
            volume.close()
    print(*stamps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
