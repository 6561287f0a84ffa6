"""The connection to the preload library, against a program that answers as that would; and what the library maps."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from onionskin.machine import preload
from onionskin.machine.preload import Preload, library

MAP = """
import ctypes, os, resource, sys

ram, why = sys.argv[1:]
descriptor = os.open(ram, os.O_RDWR)
if why == "no descriptor":
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 1, descriptor + 1))
if why == "no such name":
    os.unlink(ram)
system = ctypes.CDLL(None, use_errno=True)
system.mmap.restype = ctypes.c_void_p
shared, all_of_it = 1, 3
at = system.mmap(None, ctypes.c_size_t(4096), all_of_it, shared, descriptor, ctypes.c_long(0))
if at == ctypes.c_void_p(-1).value:
    print(ctypes.get_errno())
else:
    ctypes.memmove(at, b"guest", 5)
    print(0)
"""


@pytest.mark.parametrize(
    ("why", "number"),
    [
        ("nothing", 0),
        ("no descriptor", errno.EMFILE),
        ("no such name", errno.ENOENT),
        ("being dropped", errno.EWOULDBLOCK),
        ("nobody can be answered", errno.EADDRINUSE),
    ],
)
def test_ram_is_mapped_privately_and_locked_or_not_at_all(tmp_path: Path, why: str, number: int) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(4096))
    if why == "nobody can be answered":
        (tmp_path / "preload").touch()
    with ram.open("r+b") as file:
        if why == "being dropped":
            fcntl.flock(file, fcntl.LOCK_EX)
        ran = subprocess.run(
            [sys.executable, "-c", MAP, ram, why],
            cwd=tmp_path,
            env=os.environ | {"LD_PRELOAD": str(library()), "ONIONSKIN_RAM": str(ram), "ONIONSKIN_PRELOAD": "preload"},
            check=True,
            capture_output=True,
            text=True,
        )
        assert file.read() == bytes(4096)  # forks read it
    assert int(ran.stdout) == number


STAND_IN = """
import mmap, os, sys

with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096) as ram:
    found = ram[:5]
    ram[:5] = b"guest"
    print(found.decode(), [name for name in os.environ if name in sys.argv[2:]])
"""


@pytest.mark.parametrize("is_in", [True, False], ids=["library", "no library"])
def test_a_process_that_the_library_is_not_in_never_sees_the_ram_file(tmp_path: Path, is_in: bool) -> None:
    ram, stand_in = tmp_path / "ram", tmp_path / "stand-in"
    ram.write_bytes(b"saved" + bytes(4091))
    stand_in.write_bytes(bytes(4096))
    given = {"ONIONSKIN_RAM": str(ram), "ONIONSKIN_STAND_IN": str(stand_in), "ONIONSKIN_PRELOAD": "preload"}
    ran = subprocess.run(
        [sys.executable, "-c", STAND_IN, stand_in, "LD_PRELOAD", *given],
        cwd=tmp_path,
        env=os.environ | (given | {"LD_PRELOAD": str(library())} if is_in else {}),
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == ("saved []\n" if is_in else "\0\0\0\0\0 []\n")
    assert ram.read_bytes()[:5] == b"saved"
    assert stand_in.read_bytes()[:5] == (bytes(5) if is_in else b"guest")


SHARES_MEMORY = """
import mmap, os, sys

with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096) as ram:
    for name in sys.argv[1:]:
        os.unlink(name)
    other = os.memfd_create("of the same length")
    os.truncate(other, 4096)
    with mmap.mmap(other, 4096) as shared:
        shared[:5] = b"other"
        print(os.pread(other, 5, 0).decode(), ram[:5].decode())
"""


@pytest.mark.parametrize("stands_in", [True, False], ids=["stand-in", "no stand-in"])
def test_other_memory_is_shared_as_ever_once_the_names_of_what_was_mapped_are_gone(
    tmp_path: Path, stands_in: bool
) -> None:
    """QEMU 10 gives each display such memory, and aborts where it cannot."""
    ram, stand_in = tmp_path / "ram", tmp_path / "stand-in"
    ram.write_bytes(b"saved" + bytes(4091))
    stand_in.write_bytes(bytes(4096))
    given = {"ONIONSKIN_RAM": str(ram), "ONIONSKIN_PRELOAD": "preload", "LD_PRELOAD": str(library())}
    ran = subprocess.run(
        [sys.executable, "-c", SHARES_MEMORY, *([stand_in, ram] if stands_in else [ram])],
        cwd=tmp_path,
        env=os.environ | given | ({"ONIONSKIN_STAND_IN": str(stand_in)} if stands_in else {}),
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "other saved\n"


SAYS_WHO_MAY_TRACE = """
#include <stdio.h>
#include <sys/prctl.h>

int prctl(int option, ...)
{
    __builtin_va_list rest;
    __builtin_va_start(rest, option);
    if (option == PR_SET_PTRACER)
        fprintf(stderr, "%lu", __builtin_va_arg(rest, unsigned long));
    return 0;
}
"""


def test_whoever_supervises_it_may_reach_its_memory_also_where_ancestors_alone_may(tmp_path: Path) -> None:
    """Yama lets them alone, and a supervisor that took a machine over is none. Few kernels of tests have it."""
    ram, says, program = tmp_path / "ram", tmp_path / "says.so", tmp_path / "says.c"
    ram.write_bytes(bytes(4096))
    program.write_text(SAYS_WHO_MAY_TRACE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", says, program], check=True)
    given = {"ONIONSKIN_RAM": str(ram), "ONIONSKIN_PRELOAD": "preload", "LD_PRELOAD": f"{says}:{library()}"}
    with subprocess.Popen(
        [sys.executable, "-c", "print('ready', flush=True); input()"],
        cwd=tmp_path,
        env=os.environ | given,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        with Preload(tmp_path / "preload") as connection:
            connection.where()
        assert child.communicate("\n")[1] == str(os.getpid())


def answer(start: int) -> bytes:
    return preload._REPLY.pack(preload._MAGIC, 0, start, 4096, 1, 1)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_answer_to_what_is_asked_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preload, "SECONDS", 0.1)
    given_up = threading.Event()

    def serve(listener: socket.socket) -> None:
        first, _ = listener.accept()
        with first:
            first.recv(preload._REQUEST.size)
            assert given_up.wait(300)
            with suppress(BrokenPipeError):  # nobody waits for it
                first.sendall(answer(1))
                if first.recv(preload._REQUEST.size):
                    first.sendall(answer(2))
                    return
        second, _ = listener.accept()
        with second:
            second.recv(preload._REQUEST.size)
            second.sendall(answer(2))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "preload"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with Preload(tmp_path / "preload") as connection:
            with pytest.raises(TimeoutError):
                connection.where()
            monkeypatch.setattr(preload, "SECONDS", 300.0)
            given_up.set()
            assert connection.where().start == 2
        thread.join()
