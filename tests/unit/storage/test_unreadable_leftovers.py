"""What a killed writer left and did not flush is not taken for nothing where it cannot be read at the moment."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# Preloaded: the next open of a file with this part in its path fails with this number.
FAILING_OPEN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static char failing_path[64];
static int failing_number;

void fail_open(const char *path, int number) {
    snprintf(failing_path, sizeof failing_path, "%s", path);
    failing_number = number;
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    unsigned mode = va_arg(more, unsigned);
    va_end(more);
    if (failing_number && strstr(path, failing_path)) {
        errno = failing_number;
        failing_number = 0;
        return -1;
    }
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
        ctypes.CDLL(None).fail_open(sys.argv[2].encode(), number)
        try:
            store.open("web", mode=mode).close()
        except OSError as error:
            assert error.errno == number and error.filename.endswith(".dirty"), error
        else:
            sys.exit("it was opened without a look at what was left")
    with store.open("web") as web:
        assert (web[:7], web[4096:4103]) == (b"changed", b"written")
"""


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


@pytest.mark.parametrize("file", [".dirty", "boot_id"])
@pytest.mark.parametrize("number", ["EMFILE", "EIO"])
def test_an_opening_that_cannot_look_at_what_was_left_is_refused(
    tmp_path: Path, failing_open: Path, file: str, number: str
) -> None:
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(tmp_path / "store")], check=False)
    assert died.returncode == -signal.SIGKILL
    ran = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "store"), file, number],
        env=os.environ | {"LD_PRELOAD": str(failing_open)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
