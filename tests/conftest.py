"""File systems in loop-mounted images: what a test needs to look at the bytes on the medium.

The fixtures give functions: ``mount(size_bytes) -> Path`` makes an image, mounts it, and hands out the
directory. The image is ``image_of(directory)``; ``unmount(directory)`` writes all to it. All is unmounted at
the end of the test. They need root, ``mount`` and the mkfs tools, and fail without them: a wipe that nobody
looked at on a medium is not tested.
"""

import faulthandler
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, settings
from support.background import wait_for_background
from support.examples import examples

# A machine that is busy fails no test, and neither do examples of which a few in a row were thrown away by chance.
settings.register_profile(
    "no deadline",
    deadline=None,
    max_examples=examples(100),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
settings.load_profile("no deadline")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has this ignored in what it starts in the background, and programs that a test interrupts inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIB = 1 << 20
# Of a slow test that says nothing else: ten times what it takes, since the machine may be busy.
SLOW_SECONDS = 3000
# So much more than pytest-timeout gives a test, which comes first; but its exception can be swallowed by what it interrupts,
# and then the test goes on, or waits for ever for what the exception left undone.
WATCHDOG_SECONDS = 100
# Modules of tests that count descriptors or threads, send signals, or run programs that take all there is.
OF_THE_PROCESS = {
    "test_hostile_store",
    "test_interrupts",
    "test_interrupted_changes",
    "test_examples",
    "test_imports",
    "test_deep_chains",
}
_STDERR = pytest.StashKey[IO[str]]()
Mount = Callable[..., Path]  # (size_bytes: int = the least) -> directory

# mkfs command and the least size that it takes.
MKFS = {
    "ext4": (["mkfs.ext4", "-q", "-F"], 16 * MIB),
    "xfs": (["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], 320 * MIB),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], 128 * MIB),
}


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")  # a test's own is captured


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_STDERR].close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give slow tests more time, and tell pytest-run-parallel, where it runs, which tests are not for it (`nox -s parallel`).

    Those that several threads cannot run at once are all whose fixtures give something: one store for all threads, a patch,
    the state of the process.
    """
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    if not config.pluginmanager.hasplugin("run-parallel"):
        return
    for item in items:
        assert isinstance(item, pytest.Function)
        given = set(item.callspec.params) if hasattr(item, "callspec") else set()
        shares = set(item.fixturenames) - given - {"tmp_path"}
        if shares or getattr(item.obj, "is_hypothesis_test", False) or item.path.stem in OF_THE_PROCESS:
            item.add_marker("thread_unsafe")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """End the whole run, with the stacks of all threads, when a test hangs: the watchdog needs neither GIL nor signal."""
    own = item.get_closest_marker("timeout")
    seconds = float(own.args[0] if own else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + WATCHDOG_SECONDS, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Leave no thread to the tests behind this one that works for what this one did not close."""
    try:
        return (yield)
    finally:
        wait_for_background()


def image_of(directory: Path) -> Path:
    return directory.with_suffix(".img")


def unmount(directory: Path) -> None:
    subprocess.run(["umount", directory], check=True)


def _mounts(kind: str, tmp_path: Path) -> Iterator[Mount]:
    mkfs, size_bytes_min = MKFS[kind]
    made: list[Path] = []

    def mount(size_bytes: int = size_bytes_min) -> Path:
        directory = tmp_path / f"{kind}-{len(made)}"
        directory.mkdir()
        with image_of(directory).open("wb") as image:
            image.truncate(max(size_bytes, size_bytes_min))
        subprocess.run([*mkfs, image_of(directory)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", image_of(directory), directory], check=True)
        made.append(directory)
        return directory

    yield mount
    for directory in made:
        if directory.is_mount():
            # Lazily: a test that failed may still hold a file open.
            subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def hangup() -> Iterator[None]:
    """Have SIGHUP end a process, here and in what a test starts, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def ext4_mount(tmp_path: Path) -> Iterator[Mount]:
    yield from _mounts("ext4", tmp_path)


@pytest.fixture
def xfs_mount(tmp_path: Path) -> Iterator[Mount]:
    """XFS with reflink."""
    yield from _mounts("xfs", tmp_path)


@pytest.fixture
def btrfs_mount(tmp_path: Path) -> Iterator[Mount]:
    yield from _mounts("btrfs", tmp_path)
