"""What the process that forks machines has ready for those that it forks."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from onionskin.base.sockets import connect_unix
from onionskin.machine import fork
from onionskin.nbd.listener import open_listeners


def test_a_server_that_is_forked_has_nothing_left_to_import() -> None:
    text = """
import sys
from onionskin.machine import fork
fork.load_servers()
before = set(sys.modules)
from onionskin.operations import load_all
load_all()
print(sorted(one for one in set(sys.modules) - before if one.startswith("onionskin")))
"""
    said = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout
    assert said == "[]\n"


def test_a_server_that_is_forked_listens_before_it_reads_what_to_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nbd"
    left = fork._listening(["serve", "vms/web", "--socket", str(path), "--tell-listening"])
    assert json.loads(capsys.readouterr().out) == {"listening": True}
    assert left == ["serve", "vms/web", "--socket", str(path)]
    with connect_unix(path):  # it waits in line
        (listener,) = open_listeners((), path=path, mode=0o600, addresses=(), terms=None)
        listener.socket.accept()[0].close()
    listener.close()
    assert not path.exists()


def test_a_socket_that_was_made_beforehand_serves_no_other_path(tmp_path: Path) -> None:
    fork._listening(["serve", "--socket", str(tmp_path / "one"), "--tell-listening"])
    for name in ("other", "one", "another"):
        (listener,) = open_listeners((), path=tmp_path / name, mode=0o600, addresses=(), terms=None)
        assert listener.path == str(tmp_path / name)
        listener.close()


def test_a_start_whose_process_for_the_disks_was_killed_is_told_so() -> None:
    text = """
import os, select, signal
from onionskin.machine import fork
seen, told = os.pipe()
become = fork._become_server
fork._become_server = lambda asked: os.write(told, str(os.getpid()).encode()) and become(asked)
spawn = fork._spawner(os.pipe()[1])
waiting = int(os.read(seen, 20))
ended = os.pidfd_open(waiting)
os.kill(waiting, signal.SIGKILL)
select.select([ended], [], [])
print(spawn(["serve"], 2))
"""
    said = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout
    assert said == "None\n"


# It is told of the end of each process of a spare supervisor, whoever started that.
SPARE = """
import ctypes, os, signal, socket, sys
from contextlib import suppress
from onionskin.machine import fork

ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
asked, _ = socket.socketpair()
seen, told = os.pipe()
be = fork._be_spare
fork._be_spare = lambda *given: os.write(told, str(os.getpid()).encode()) and be(*given)
fork._make_spare(sys.executable, None, asked)
spare = int(os.read(seen, 20))
"""


def test_all_that_waits_for_a_machine_ends_with_the_process_that_would_name_it() -> None:
    text = (
        SPARE
        + """
fork._forget_spare()
with suppress(ChildProcessError):
    while True:
        print(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
"""
    )
    said = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True, timeout=300).stdout
    assert sorted(said.split()) == ["0", "0", "0", "1"]  # of the supervisor, of two for the disks, and of QEMU


def test_a_spare_supervisor_that_was_killed_is_given_no_machine() -> None:
    text = (
        SPARE
        + """
os.kill(spare, signal.SIGKILL)
os.waitpid(spare, 0)
print(fork._give_spare({}, seen), fork._give_spare({}, seen), fork._spare)
"""
    )
    said = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True, timeout=300).stdout
    assert said == "False False None\n"


def test_what_would_wait_is_not_forked_beside_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    with socket.socket() as asked:
        fork._make_spare("qemu", None, asked)
    assert fork._spare is None


@pytest.mark.parametrize(("is_loaded", "count", "is_opened"), [(False, 1, True), (True, 1, False), (True, 2, True)])
def test_a_process_that_has_loaded_all_leaves_the_store_to_the_supervisor_of_a_single_machine(
    monkeypatch: pytest.MonkeyPatch, is_loaded: bool, count: int, is_opened: bool
) -> None:
    opened: list[object] = []

    def refuse() -> int:
        raise OSError(11, "no process is left")

    monkeypatch.setattr(fork, "_is_loaded", is_loaded)
    monkeypatch.setattr(fork, "_prepare", lambda *what: opened.append(what))
    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    pipes = [os.pipe() for _ in range(count)]
    what = {
        "store": "store",
        "machines": [["lab", "log", "00"]] * count,
        "programs": {},
        "trust": False,
        "paused": False,
    }
    with socket.socket() as asked:
        fork._start_machines(what, [writer for _, writer in pipes], asked)
    for reader, _ in pipes:
        with os.fdopen(reader) as answer:
            assert "no process is left" in answer.read()
    assert bool(opened) == is_opened


CHANGES = {
    "nothing": "pass",
    "environment": "os.environ['WORD'] = 'other'",
    "limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))",
    "share": "os.nice(1)",
    "processors": "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])",
    "user": "os.setresuid(65534, 65534, 0)",
    "group": "os.setresgid(65534, 65534, 65534)",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_program_that_is_another_one_now_has_another_process_that_forks(what: str) -> None:
    """What it hands down came with its start: machines of a user who gave up a right would have it still."""
    if what in ("user", "group") and os.geteuid():
        pytest.skip("only root becomes another user")
    if what == "processors" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is one processor")
    text = f"""
import os, resource
from onionskin.machine import fork
one = fork._forking_process()
{CHANGES[what]}
try:
    print(fork._forking_process() is one)
except PermissionError:  # this user may not start Python
    print(False)
"""
    said = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True, timeout=300).stdout
    assert said == f"{what == 'nothing'}\n"
