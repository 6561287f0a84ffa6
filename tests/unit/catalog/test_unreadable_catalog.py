"""A disk that cannot read the catalog: that is an I/O error and no damage, whose advice would be to put an old copy back."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import onionskin

FAILING_READS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char ending[64];
static int left;

/* Have so many reads of files whose names end so fail with EIO; -1: all. */
void fail_reads(const char *of, int times)
{
    snprintf(ending, sizeof ending, "%s", of);
    left = times;
}

static int fails(int fd)
{
    char link[64], name[4096];
    if (!left)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, name, sizeof name - 1);
    size_t wanted = strlen(ending);
    if (length < (ssize_t)wanted || memcmp(name + length - wanted, ending, wanted))
        return 0;
    left -= left > 0;
    errno = EIO;
    return 1;
}

#define READ(name)                                                                     \
    ssize_t name(int fd, void *bytes, size_t length, off64_t offset)                   \
    {                                                                                  \
        static ssize_t (*real)(int, void *, size_t, off64_t);                          \
        if (!real)                                                                     \
            *(void **)&real = dlsym(RTLD_NEXT, #name);                                 \
        return fails(fd) ? -1 : real(fd, bytes, length, offset);                       \
    }
READ(pread)
READ(pread64)
"""
PROGRAM = """
import ctypes, sys
import onionskin

path, file, times, is_open = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "open"
fail = lambda times: ctypes.CDLL(None).fail_reads(file.encode(), times)
names = []
try:
    if not is_open:
        fail(times)
    with onionskin.Store(path, create=False) as store:
        store.create("later", size="64K").close() if file.endswith("-wal") else None
        store._opened.catalog._connection.execute("PRAGMA shrink_memory")
        if is_open:
            fail(times)
        print("read", sorted(store.volumes()))
except OSError as error:
    print("OSError", error.errno, error)
except onionskin.OnionskinError as error:
    print(type(error).__name__, error)
fail(0)
with onionskin.Store(path, create=False) as store:
    print("then", "web" in store)
"""


@pytest.fixture(scope="module")
def failing_reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failing_reads")
    (directory / "failing_reads.c").write_text(FAILING_READS)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    library = directory / "failing_reads.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, directory / "failing_reads.c"], check=True)
    return library


def told(failing_reads: Path, store: Path, file: str, times: int, when: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(store), file, str(times), when],
        env=os.environ | {"LD_PRELOAD": str(failing_reads)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="64K").close()
    return tmp_path / "store"


@pytest.mark.parametrize("when", ["before", "open"])
def test_a_catalog_that_the_disk_cannot_read_is_no_damage(failing_reads: Path, store: Path, when: str) -> None:
    said = told(failing_reads, store, "catalog.db", -1, when)
    assert said.startswith("OSError 5"), said
    assert "dmesg" in said and ("cannot read catalog.db" in said or when == "before")
    assert "damaged" not in said and "restore" not in said
    assert said.endswith("then True\n")


@pytest.mark.parametrize("when", ["before", "open"])
def test_a_read_of_the_catalog_that_failed_once_is_no_damage(failing_reads: Path, store: Path, when: str) -> None:
    said = told(failing_reads, store, "catalog.db", 1, when)
    assert said.startswith("OSError 5"), said
    assert "damaged" not in said and ("for a moment" in said or when == "before")
    assert said.endswith("then True\n")


def test_a_log_of_the_catalog_that_the_disk_cannot_read_is_no_damage(failing_reads: Path, store: Path) -> None:
    said = told(failing_reads, store, "catalog.db-wal", -1, "open")
    assert said.startswith("OSError 5"), said
    assert "cannot read catalog.db-wal" in said and "damaged" not in said


def test_a_catalog_whose_contents_are_wrong_is_damage_as_before(store: Path) -> None:
    contents = (store / "catalog.db").read_bytes()
    for wrong in (b"x" * 100 + contents[100:], contents[:4096] + b"\xff" * (len(contents) - 4096)):
        (store / "catalog.db").write_bytes(wrong)
        with pytest.raises(onionskin.FormatError, match="damaged"), onionskin.Store(store, create=False) as opened:
            sorted(opened.volumes())
