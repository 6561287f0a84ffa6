"""Where a file has data is asked in one way, and an answer that does not come is an error: never a hole."""

import errno
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import pytest

import onionskin
from onionskin.base import files
from onionskin.kernels._copy import CopyJob

BLOCK = 4096
MIB = 1 << 20

SEEKER = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

static long left = -1, seen;

/* From now on the n-th question for data fails with EIO, once; -1: none does. Returns how many there were since. */
long fail_question(long n) { long before = seen; left = n; seen = 0; return before; }

off_t lseek(int fd, off_t offset, int whence)
{
    if (whence == SEEK_DATA || whence == SEEK_HOLE) {
        __atomic_fetch_add(&seen, 1, __ATOMIC_RELAXED);
        if (left > 0 && __atomic_sub_fetch(&left, 1, __ATOMIC_RELAXED) == 0) {
            errno = EIO;
            return -1;
        }
    }
    return syscall(SYS_lseek, fd, offset, whence);
}
off_t lseek64(int fd, off_t offset, int whence) { return lseek(fd, offset, whence); }
"""

# Runs each verb again and again, with the next question failing each time, until one run asks no further.
PROGRAM = """
import ctypes, errno, io, os, sys
from pathlib import Path
import onionskin
from onionskin import delta, images

fail_question = ctypes.CDLL(None).fail_question
fail_question.restype = ctypes.c_long
BLOCK = 4096
root = Path(sys.argv[1])
base = root / "base.raw"
with base.open("wb") as file:
    file.truncate(64 * BLOCK)
    for at in (1, 20, 40, 63):
        os.pwrite(file.fileno(), bytes([at]) * BLOCK, at * BLOCK)
want = base.read_bytes()

def flatten(store):
    with store.open("web") as web:
        try:
            web.flatten()
        finally:
            fail_question(-1)
            assert web.read(0, len(want)) == want

def export(store):
    out = root / "out.raw"
    out.unlink(missing_ok=True)
    with store.open("web") as web:
        try:
            web.export(out)
        except OSError:
            assert not out.exists()
            raise
    assert out.read_bytes() == want

def import_image(store):
    try:
        images.import_image(store, base, "made")
    finally:
        fail_question(-1)
        if any(volume.name == "made" for volume in store.volumes()):
            with store.open("made") as made:
                assert made.read(0, len(want)) == want

def stream(store):
    out = io.BytesIO()
    delta.delta(store, "web", None, "clean", out)
    out.seek(0)
    fail_question(-1)
    with store.create("copy", size=BLOCK) as copy:
        delta.apply(out, copy)
        assert copy.read(0, len(want)) == want

for number, verb in enumerate((flatten, export, import_image, stream)):
    failed = question = 0
    while True:
        question += 1
        with onionskin.Store(root / f"store-{number}-{question}") as store:
            with store.create("web", base=base) as web:
                web.snapshot("clean")
            fail_question(question)
            try:
                verb(store)
            except OSError as error:
                assert error.errno == errno.EIO, error
                failed += 1
                continue
            finally:
                asked = fail_question(-1)
            break
    print(verb.__name__, failed)
"""


@pytest.fixture(scope="module")
def seeker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("seeker")
    (directory / "seeker.c").write_text(SEEKER)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    library = directory / "seeker.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, directory / "seeker.c"], check=True)
    return library


@pytest.mark.slow
def test_no_verb_takes_an_error_of_the_file_system_for_a_hole(seeker: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=os.environ | {"LD_PRELOAD": str(seeker)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    failed = {verb: int(count) for verb, count in (line.split() for line in ran.stdout.splitlines())}
    assert set(failed) == {"flatten", "export", "import_image", "stream"}
    assert min(failed.values()) >= 8, failed  # each of the four ranges was asked for, from data to hole


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_knows_no_holes_has_data_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    real = os.lseek

    def refuse(descriptor: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(refusal, os.strerror(refusal))
        return real(descriptor, offset, whence)

    with open(tmp_path / "file", "wb+") as file:
        file.truncate(10 * BLOCK)
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(files.data_ranges(file.fileno(), BLOCK, 20 * BLOCK)) == [(BLOCK, 10 * BLOCK)]


def test_a_file_that_is_cut_while_its_holes_are_looked_for_is_an_error(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        file.truncate(64 * BLOCK)
        for at in (1, 63):
            os.pwrite(file.fileno(), b"x" * BLOCK, at * BLOCK)
        ranges = files.data_ranges(file.fileno(), 0, 64 * BLOCK)
        assert next(ranges) == (BLOCK, 2 * BLOCK)
        file.truncate(32 * BLOCK)
        with pytest.raises(OSError, match="cut to") as failure:
            list(ranges)
    assert failure.value.errno == errno.EIO
    assert failure.value.filename == str(tmp_path / "file")


def test_a_source_that_is_cut_while_it_is_copied_is_an_error_and_no_hole(tmp_path: Path) -> None:
    with open(tmp_path / "from", "wb+") as source, open(tmp_path / "to", "wb+") as target:
        source.write(b"x" * MIB)
        source.truncate(64 * MIB)
        os.pwrite(source.fileno(), b"y" * MIB, 63 * MIB)
        target.truncate(64 * MIB)
        job = CopyJob(
            [(source.fileno(), target.fileno(), 0, 0, 64 * MIB)], threads=1, zero_holes=True, bytes_per_second=BLOCK
        )
        failure: list[BaseException] = []

        def run() -> None:
            try:
                job.run()
            except OSError as error:
                failure.append(error)

        copying = threading.Thread(target=run)
        copying.start()
        while job.bytes_done == 0 and copying.is_alive():
            copying.join(0.001)
        source.truncate(32 * MIB)
        job.bytes_per_second = 0
        copying.join()
    assert [error.errno for error in failure if isinstance(error, OSError)] == [errno.EIO]


def test_a_base_that_changes_while_it_is_flattened_is_kept_and_the_disk_stays_on_it(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 16 * BLOCK)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=base) as web:

        def touch(done: int, total: int) -> None:
            os.utime(base, ns=(0, 0))

        with pytest.raises(onionskin.ChainError, match="has changed"):
            web.flatten(progress=touch)
        assert store.info("web").base == str(base)
        assert web.read(0, 16 * BLOCK) == b"b" * 16 * BLOCK


def test_a_file_in_memory_is_known_as_one() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as there, Path("/proc/self/mountinfo").open("rb") as elsewhere:
        assert files.is_on_tmpfs(there.fileno())
        assert not files.is_on_tmpfs(elsewhere.fileno())
