"""Calls that signals interrupt (EINTR) are made again: FUSE and NFS let nearly all of them be interrupted."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# Preloaded: every other one of these calls of the engine is interrupted, and an allocation of more than 64 KiB always.
INTERRUPTED_CALLS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

unsigned interrupted[8];

static int meets(unsigned call, void *caller) {
    static unsigned count;
    Dl_info from;
    if (!dladdr(caller, &from) || !from.dli_fname || !strstr(from.dli_fname, "onionskin"))
        return 0;
    if (__atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST) % 2)
        return 0;
    __atomic_fetch_add(&interrupted[call], 1, __ATOMIC_SEQ_CST);
    errno = EINTR;
    return 1;
}
#define MEETS(call) meets(call, __builtin_return_address(0))
#define NEXT(kind, name, ...) ((kind(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    unsigned mode = va_arg(more, unsigned);
    va_end(more);
    return MEETS(0) ? -1 : NEXT(int, "open", const char *, int, ...)(path, flags, mode);
}
int ftruncate(int fd, off_t length) { return MEETS(1) ? -1 : NEXT(int, "ftruncate", int, off_t)(fd, length); }
int fsync(int fd) { return MEETS(2) ? -1 : NEXT(int, "fsync", int)(fd); }
int fdatasync(int fd) { return MEETS(3) ? -1 : NEXT(int, "fdatasync", int)(fd); }
int fallocate(int fd, int mode, off_t offset, off_t length) {
    if (mode == 0 && length > 65536) {
        interrupted[4]++;
        errno = EINTR;
        return -1;
    }
    return MEETS(5) ? -1 : NEXT(int, "fallocate", int, int, off_t, off_t)(fd, mode, offset, length);
}
ssize_t pwrite(int fd, const void *from, size_t length, off_t offset) {
    return MEETS(6) ? -1 : NEXT(ssize_t, "pwrite", int, const void *, size_t, off_t)(fd, from, length, offset);
}
ssize_t pread(int fd, void *to, size_t length, off_t offset) {
    return MEETS(7) ? -1 : NEXT(ssize_t, "pread", int, void *, size_t, off_t)(fd, to, length, offset);
}
"""

PROGRAM = """
import ctypes, sys
import onionskin

BLOCK = 4096
with onionskin.Store(sys.argv[1]) as store:
    with store.create("web", size=40000 * BLOCK, wipe="zero") as web:
        web.write(0, b"a" * 8 * BLOCK)
        web.snapshot("one")
        web.write_blocks(range(0, 40000, 3), b"b" * BLOCK * len(range(0, 40000, 3)))  # more records than 64 KiB
        web.flush()
        web.trim(0, 2 * BLOCK)
        web.snapshot("two")
        web.write(BLOCK, b"c" * BLOCK)
        web.merge("one")
        web.revert("two")
        web.export(sys.argv[1] + ".raw")
    store.fork("web@two", count=3, pattern="job-{n}")
    with store.open("job-1") as job:
        job.write(5 * BLOCK, b"d" * BLOCK)
        assert job[: 2 * BLOCK] == bytes(2 * BLOCK) and job[3 * BLOCK : 3 * BLOCK + 1] == b"b"
    assert store.check() == []
    interrupted = list((ctypes.c_uint * 8).in_dll(ctypes.CDLL(None), "interrupted"))
    assert all(interrupted), interrupted
"""


def test_a_store_works_where_every_other_call_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "calls.c").write_text(INTERRUPTED_CALLS)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    library = tmp_path / "calls.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "calls.c"], check=True)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
