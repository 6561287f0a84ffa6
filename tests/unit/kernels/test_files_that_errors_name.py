"""An error says which file failed: the map, the segment, the journal, a directory, or the lock of the writer."""

import errno
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

# Makes one call on a file fail: the next one of the named call whose file has the given part in its path.
FAILING_CALLS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static char failing_call[32], failing_path[256];
static int failing_errno;

void fail_next(const char *call, const char *path, int error) {
    snprintf(failing_call, sizeof failing_call, "%s", call);
    snprintf(failing_path, sizeof failing_path, "%s", path);
    failing_errno = error;
}

/* Returns 1 once for the call that was asked for, and then errno is set. */
static int fails(const char *call, int fd) {
    char link[64], path[4096];
    if (!failing_errno || strcmp(call, failing_call))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (!strstr(path, failing_path))
        return 0;
    errno = failing_errno;
    failing_errno = 0;
    return 1;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    return fails("pwrite", fd) ? -1 : syscall(SYS_pwrite64, fd, bytes, length, offset);
}
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) { return pwrite(fd, bytes, length, offset); }
int fdatasync(int fd) { return fails("fdatasync", fd) ? -1 : (int)syscall(SYS_fdatasync, fd); }
int fsync(int fd) { return fails("fsync", fd) ? -1 : (int)syscall(SYS_fsync, fd); }
int ftruncate(int fd, off_t length) { return fails("ftruncate", fd) ? -1 : (int)syscall(SYS_ftruncate, fd, length); }
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
int fallocate(int fd, int mode, off_t offset, off_t length) {
    return fails("fallocate", fd) ? -1 : (int)syscall(SYS_fallocate, fd, mode, offset, length);
}
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return fallocate(fd, mode, offset, length); }
"""


class Case(NamedTuple):
    """A verb, the call under it that fails on a file with this part in its path, and the end of the path that is named."""

    verb: str
    call: str
    file: str
    named: str
    number: int = errno.EIO


CASES = {
    "a write in place": Case("overwrite", "pwrite", ".seg", ".seg"),
    "a write on a full disk": Case("overwrite", "pwrite", ".seg", ".seg", errno.ENOSPC),
    "a write whose record finds no room": Case("write first", "fallocate", ".dirty", ".dirty", errno.ENOSPC),
    "a sync of data": Case("flush", "fdatasync", ".seg", ".seg"),
    "a frame": Case("flush", "pwrite", ".map", ".map"),
    "a sync of a frame": Case("flush", "fdatasync", ".map", ".map"),
    "a sync of a snapshot's data": Case("snapshot", "fdatasync", ".seg", ".seg"),
    "a frame of a snapshot": Case("snapshot", "pwrite", ".map", ".map"),
    "a sync of a frame of a snapshot": Case("snapshot", "fdatasync", ".map", ".map"),
    "a sync of a segment's name": Case("flush new files", "fsync", "/segments", "/segments"),
    "a sync of a map's name": Case("flush new files", "fsync", "/layers", "/layers"),
    "a new map of a compaction": Case("compact", "pwrite", ".map", ".map"),
    "a sync of a new map of a compaction": Case("compact", "fdatasync", ".map", ".map"),
    "who holds the volume": Case("open", "pwrite", ".lock", ".lock"),
    "who held the volume before": Case("open", "ftruncate", ".lock", ".lock"),
    "giving the volume up": Case("close", "ftruncate", ".lock", ".lock"),
}

PROGRAM = """
import ctypes, json, os, sys
from pathlib import Path

import onionskin
from onionskin.kernels._volume import DataPath
from onionskin.storage.layout import Layout
from onionskin.storage.locks import VolumeLock

BLOCK = 4096
root, verb, call, file, number = Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
segments, layers, (head, own, spare, following) = root / "segments", root / "layers", [os.urandom(16) for _ in range(4)]


def path_of_map(id):
    return layers / f"{id.hex()}.map"


def open_path():
    path = DataPath(
        block_size=BLOCK, size_bytes=64 * BLOCK, segments_directory=segments, layers_directory=layers,
        wipe_zero=False, writable=True,
    )
    path.open_head(
        map_path=path_of_map(head), map_id=head, inherited=[], own=own, spare=spare, dirty_path=root / "web.dirty"
    )
    return path


def fail():
    ctypes.CDLL(None).fail_next(call.encode(), file.encode(), number)


def change(path):
    if verb == "write first":
        fail()
    path.write(0, b"a" * BLOCK)
    if verb == "flush new files":
        fail()
    path.flush()
    path.write(BLOCK, b"b" * BLOCK)
    fail()
    if verb == "overwrite":
        path.write(0, b"c" * BLOCK)
    elif verb == "flush":
        path.flush()
    elif verb == "snapshot":
        path.seal(map_path=path_of_map(following), map_id=following)
    elif verb == "compact":
        path.flush()
        fail()
        path.rewrite_map(new_path=path_of_map(following), new_id=following)


def lock():
    held = VolumeLock(Layout(root), bytes(16), "web")
    if verb == "open":
        fail()
    held.make_file()
    fail()
    held.close()


for directory in (segments, layers, root / "volumes"):
    directory.mkdir()
try:
    lock() if verb in ("open", "close") else change(open_path())
except OSError as error:
    print(json.dumps([error.errno, error.filename, str(error)]))
else:
    sys.exit("nothing failed")
"""


@pytest.fixture(scope="module")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failing_calls")
    (directory / "failing_calls.c").write_text(FAILING_CALLS)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    library = directory / "failing_calls.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, directory / "failing_calls.c"], check=True)
    return library


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_error_names_the_file_that_failed(case: Case, failing_calls: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), case.verb, case.call, case.file, str(case.number)],
        env=os.environ | {"LD_PRELOAD": str(failing_calls)},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    number, named, message = json.loads(ran.stdout)
    assert number == case.number
    assert named is not None, message
    assert named.startswith(str(tmp_path)) and named.endswith(case.named), message
    assert named in message
