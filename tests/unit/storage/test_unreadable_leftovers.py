"""What a killed writer left and did not flush is not taken for nothing where it cannot be read at the moment."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin

# Preloaded: the next such call for a file with this part in its path fails with this number.
FAILING_OPEN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static char failing_path[64];
static int failing_number, failing_lstat;

void fail(const char *path, int number, int at_lstat) {
    snprintf(failing_path, sizeof failing_path, "%s", path);
    failing_number = number;
    failing_lstat = at_lstat;
}

static int fails(const char *path, int at_lstat) {
    if (!failing_number || failing_lstat != at_lstat || !strstr(path, failing_path))
        return 0;
    errno = failing_number;
    failing_number = 0;
    return 1;
}

int lstat(const char *path, void *found) {
    return fails(path, 1) ? -1 : ((int (*)(const char *, void *))dlsym(RTLD_NEXT, "lstat"))(path, found);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    unsigned mode = va_arg(more, unsigned);
    va_end(more);
    if (fails(path, 0))
        return -1;
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}
"""

WRITE_AND_DIE = """
import os, signal, sys
import onionskin

with onionskin.Store(sys.argv[1]) as store:
    web = store.create("web", size=4 * 4096)
    web.write(0, b"flushed")
    web.flush()
    web.write(0, b"changed")
    web.write(4096, b"written")
    os.kill(os.getpid(), signal.SIGKILL)
"""

OPEN = """
import ctypes, errno, sys
import onionskin

number = getattr(errno, sys.argv[3])
with onionskin.Store(sys.argv[1]) as store:
    for mode in "rw":
        ctypes.CDLL(None).fail(sys.argv[2].encode(), number, sys.argv[2] == ".seg")
        try:
            store.open("web", mode=mode).close()
        except OSError as error:
            assert error.errno == number and error.filename.endswith(".dirty"), error
        else:
            sys.exit("it was opened without a look at what was left")
    with store.open("web") as web:
        assert (web[:7], web[4096:4103]) == (b"changed", b"written")
"""

LOOK = """
import sys
import onionskin

try:
    with onionskin.Store(sys.argv[1]) as store, store.open("web", mode=sys.argv[2]) as web:
        print(web[:7], web[4096:4103])
except onionskin.StateError as error:
    print(error)
"""
KEPT = f"{b'changed'} {b'written'}"


@pytest.fixture(scope="module")
def failing_open(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failing_open")
    (directory / "failing_open.c").write_text(FAILING_OPEN)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    library = directory / "failing_open.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, directory / "failing_open.c"], check=True)
    return library


def write_and_die(store: Path) -> None:
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(store)], check=False)
    assert died.returncode == -signal.SIGKILL


def look(store: Path, mode: str, hidden: str = "") -> str:
    """Open the volume in mounts of its own, where a directory of the system may be hidden."""
    hide = f"mount -t tmpfs none {hidden} && " if hidden else ""
    command = ["unshare", "-m", "sh", "-c", f'{hide}exec "$@"', "sh", sys.executable, "-c", LOOK, str(store), mode]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def errors_of(store: Path) -> list[str]:
    """Say which places `check` calls errors, and not only work that is left."""
    with onionskin.Store(store) as opened:
        return [problem.where for problem in opened.check() if problem.severity == "error"]


@pytest.mark.parametrize("file", [".dirty", "boot_id", ".seg"])
@pytest.mark.parametrize("number", ["EMFILE", "EIO"])
def test_an_opening_that_cannot_look_at_what_was_left_is_refused(
    tmp_path: Path, failing_open: Path, file: str, number: str
) -> None:
    write_and_die(tmp_path / "store")
    ran = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "store"), file, number],
        env=os.environ | {"LD_PRELOAD": str(failing_open)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_what_a_killed_writer_left_is_found_in_other_mounts_and_refused_where_the_system_is_hidden(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """A service or a container that is started again sees its disk through mounts of its own."""
    store = request.getfixturevalue(f"{kind}_mount")() / "store"
    write_and_die(store)
    for mode in "rw":
        for hidden in ("/proc", "/sys"):
            told = look(store, mode, hidden)
            assert ".dirty" in told
            assert "no /proc or no /sys" in told
    assert look(store, "r") == look(store, "w") == KEPT


def test_what_a_writer_left_that_saw_no_sys_is_found(ext4_mount: Callable[[], Path]) -> None:
    store = ext4_mount() / "store"
    both = 'mount -t tmpfs none /sys && "$1" -c "$2" "$3"; umount /sys && exec "$1" -c "$4" "$3" w'
    command = ["unshare", "-m", "sh", "-c", both, "sh", sys.executable, WRITE_AND_DIE, str(store), LOOK]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == KEPT


@pytest.mark.parametrize("way", ["mounted again", "below", "above"])
def test_what_a_writer_left_that_another_mount_may_hold_is_refused_and_not_dropped(
    ext4_mount: Callable[[], Path], way: str
) -> None:
    """An overlayfs does not say which of its mountings it is: nobody can prove that what was written is there still."""
    disk = ext4_mount()
    for name in ("lower", "upper", "work", "merged"):
        (disk / name).mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(disk / "merged")]
    unmount = ["umount", str(disk / "merged")]
    through = {"mounted again": "merged", "below": "merged", "above": "upper"}[way]
    if through == "merged":
        subprocess.run(mount, check=True)
    write_and_die(disk / through / "store")
    if through == "merged":
        subprocess.run(unmount, check=True)
    if way != "below":
        subprocess.run(mount, check=True)
    store = disk / {"mounted again": "merged", "below": "upper", "above": "merged"}[way] / "store"
    try:
        for mode in "rwr":
            told = look(store, mode)
            assert ".dirty" in told
            assert "another mount" in told
        assert errors_of(store) == [next(str(path) for path in (store / "volumes").glob("*.dirty"))]
        next((store / "volumes").glob("*.dirty")).unlink()  # as it says: what was not flushed is given up
        assert look(store, "w") == f"{b'changed'} {bytes(7)}"  # in a block of its own, `changed` needs no record
    finally:
        if way != "below":
            subprocess.run(unmount, check=True)


def test_what_was_left_of_another_head_refuses_no_opening(ext4_mount: Callable[[], Path], tmp_path: Path) -> None:
    """As a backup may put it back: nothing of it goes on from the head that there is, whichever mount it is of."""
    disk = ext4_mount()
    for name in ("lower", "upper", "work", "merged"):
        (disk / name).mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(disk / "merged")]
    store = disk / "merged" / "store"
    subprocess.run(mount, check=True)
    try:
        write_and_die(store)
        left = next((store / "volumes").glob("*.dirty"))
        subprocess.run(["cp", "--sparse=always", left, tmp_path / "kept"], check=True)
        with onionskin.Store(store) as opened, opened.open("web") as web:
            web.snapshot("later")
        subprocess.run(["cp", "--sparse=always", tmp_path / "kept", left], check=True)
        subprocess.run(["umount", disk / "merged"], check=True)
        subprocess.run(mount, check=True)
        assert errors_of(store) == []
        assert look(store, "r") == look(store, "w") == KEPT
    finally:
        subprocess.run(["umount", disk / "merged"], check=True)
