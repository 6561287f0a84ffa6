"""Errors are one line on stderr, and each kind has its exit status."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from onionskin.cli import statuses
from onionskin.cli.verbs import onionskin
from onionskin.errors import FormatError, StateError, VerifyError, VolumeNotFoundError
from onionskin.store import Store

Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[bytes]"]


def one_line(result: Result, status: int, *words: str) -> None:
    assert result.exit_code == status, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("onionskin: ")
    for word in words:
        assert word in result.stderr


def test_a_store_that_is_not_there(run: Run, tmp_path: Path) -> None:
    one_line(run("info", f"{tmp_path}/none/web"), 3, "none")
    assert not (tmp_path / "none").exists()


def test_a_volume_that_is_not_there(run: Run, vms: Path) -> None:
    one_line(run("info", f"{vms}/nope"), 3, "nope")


@pytest.mark.parametrize("verb", ["revert", "discard", "merge", "read", "export", "clone", "info", "delta"])
def test_a_snapshot_that_is_not_there(run: Run, vms: Path, tmp_path: Path, verb: str) -> None:
    more = {
        "read": [0, 1],
        "export": [tmp_path / "out"],
        "clone": [f"{vms}/new"],
        "delta": ["-o", tmp_path / "d"],
    }
    one_line(run(verb, f"{vms}/web@nope", *more.get(verb, [])), 3, "nope")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "d").exists()


READERS = [
    *(["tree", "{s}"], ["list", "{s}"], ["check", "{s}"], ["info", "{s}/v"], ["snapshots", "{s}/v"]),
    *(["usage", "{s}/v"], ["snapshot", "{s}/v@a"], ["revert", "{s}/v@a"], ["discard", "{s}/v@a"]),
    *(["merge", "{s}/v@a"], ["merge", "{s}/v", "--into-base"], ["flatten", "{s}/v"]),
    *(["clone", "{s}/v@a", "{s}/w"], ["diff", "{s}/v@a", "{s}/v"], ["map", "{s}/v"], ["resize", "{s}/v", "1M"]),
    *(["rename", "{s}/v", "w"], ["relocate", "{s}/v", "--base", "/dev/null"], ["delete", "{s}/v"]),
    *(["export", "{s}/v", "{s}.raw"], ["delta", "{s}/v@a"], ["apply", "{s}/v"], ["read", "{s}/v", "0", "1"]),
    *(["write", "{s}/v", "0"], ["trim", "{s}/v", "0", "1"], ["zero", "{s}/v", "0", "1"]),
    *(["serve", "{s}/v", "--tcp", ":0"], ["stats", "{s}/v"], ["mount", "{s}/v@a", "{s}"]),
]


@pytest.mark.parametrize("words", READERS, ids=lambda words: words[0])
def test_only_create_and_import_make_a_store(run: Run, tmp_path: Path, words: list[str]) -> None:
    result = run(*(word.format(s=tmp_path / "none") for word in words))
    one_line(result, 3)
    assert list(tmp_path.iterdir()) == []


def test_every_verb_is_among_those_that_make_no_store_or_is_known_to() -> None:
    assert {words[0] for words in READERS} | {"create", "import", "demo", "bench", "completion", "umount"} == set(
        onionskin.commands
    )


def test_every_verb_takes_json() -> None:
    for name, command in onionskin.commands.items():
        assert "--json" in [option for parameter in command.params for option in parameter.opts], name


def test_an_image_or_base_that_is_not_there_makes_no_store(run: Run, tmp_path: Path) -> None:
    one_line(run("import", tmp_path / "none.raw", f"{tmp_path}/vms/web"), 3, "none.raw")
    one_line(run("create", f"{tmp_path}/vms/web", "--base", tmp_path / "none.raw"), 3, "none.raw")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_taken(run: Run, vms: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    one_line(run("create", f"{vms}/web", "--size", "1M"), 4)
    one_line(run("snapshot", f"{vms}/web@clean"), 4)
    one_line(run("clone", f"{vms}/web@clean", f"{vms}/web"), 4)
    one_line(run("export", f"{vms}/web", tmp_path / "out"), 4)
    one_line(run("delta", f"{vms}/web@clean", "-o", tmp_path / "out"), 4)
    assert (tmp_path / "out").stat().st_size == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "No such command 'nope'"),
        (["info", "web"], "./web"),
        (["map", "{s}/web", "--output", "{s}.raw"], "*.svg or *.png"),
        (["map", "{s}/web", "--output", "-", "--json"], "--json"),
        (["map", "{s}/web", "--columns", "0"], "0"),
        (["tree", "{s}", "--output", "{s}.png"], "*.svg"),
        (["tree", "{s}", "--output", "-", "--json"], "--json"),
        (["info", "{s}/"], "no volume"),
        (["info", "{s}/web@"], "no snapshot"),
        (["revert", "{s}/web"], "@SNAPSHOT"),
        (["flatten", "{s}/web@clean"], "a volume is wanted"),
        (["create", "{s}/new"], "--size"),
        (["create", "{s}/new", "--size", "lots"], "not a size"),
        (["create", "{s}/new", "--size", "1M", "--digest"], "--base"),
        (["create", "{s}/new", "--size", "1M", "--block-size", "5000"], "block"),
        (["create", "{s}/new@a", "--size", "1M"], "a volume is wanted"),
        (["snapshot", "{s}/web"], "@SNAPSHOT"),
        (["merge", "{s}/web"], "--into-base"),
        (["diff", "{s}/web@clean", "{s}/other"], "not of one volume"),
        (["clone", "{s}/web@clean", "{s}-2/web"], "store of its snapshot"),
        (["read", "{s}/web", "0", "2M"], "do not lie in"),
        (["trim", "{s}/web", "1M", "1"], "do not lie in"),
        (["zero", "{s}/web", "2M", "0"], "do not lie in"),
        (["read", "{s}/web", "--", "-1", "1"], "not a size"),
        (["delta", "{s}/web@a", "{s}/web@b", "{s}/web@c"], "one snapshot or two"),
        (["export", "{s}/web", "out", "--format", "vpc"], "vpc"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_wrong_usage(run: Run, vms: Path, words: list[str], said: str) -> None:
    one_line(run(*(word.format(s=vms) for word in words)), 2, said)


def test_a_write_that_would_not_fit_writes_nothing(spawn: Spawn, run: Run, vms: Path, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * (1 << 20))
    with open(tmp_path / "large", "rb") as file:
        process = spawn("write", f"{vms}/web", 1, stdin=file, stderr=subprocess.PIPE)
        assert process.communicate()[1].startswith(b"onionskin: bytes 1 to 1048577")
    assert process.returncode == 2
    assert run("read", f"{vms}/web", 0, 5).stdout_bytes == b"clean"


def test_a_volume_that_is_held_is_busy(run: Run, vms: Path) -> None:
    with Store(vms) as store, store.open("web"):
        one_line(run("snapshot", f"{vms}/web@two"), 5, "web")
        assert run("info", f"{vms}/web", "--json").exit_code == 0


def test_a_discard_that_would_take_others_along_lists_them(run: Run, vms: Path) -> None:
    assert run("snapshot", f"{vms}/web@two").exit_code == 0
    one_line(run("discard", f"{vms}/web@clean"), 5, "two")


def test_a_damaged_stream(run: Run, vms: Path) -> None:
    one_line(run("apply", f"{vms}/web", input=b"nonsense" * 100), 6, "not a delta stream")


def test_a_base_that_changed(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(8192))
    assert run("create", f"{tmp_path}/vms/web", "--base", base).exit_code == 0
    base.write_bytes(bytes(4096))
    one_line(run("read", f"{tmp_path}/vms/web", 0, 1), 6, "relocate")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.seg"), 7),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 7),
        (OSError(errno.EACCES, "Permission denied", "x"), 1),
        (OSError(errno.EBUSY, "Device or resource busy", "x"), 5),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 3),
        (FileExistsError(errno.EEXIST, "File exists", "x"), 4),
        (VolumeNotFoundError("no volume"), 3),
        (StateError("busy"), 5),
        (FormatError("bad"), 6),
        (VerifyError("bad"), 6),
        (KeyboardInterrupt(), 130),
        (ValueError("range"), 2),
        (MemoryError(), 1),
    ],
)
def test_each_kind_of_error_has_its_status(error: BaseException, status: int) -> None:
    assert statuses.status_of(error) == status


def test_a_message_stays_on_one_line_and_cannot_steer_a_terminal() -> None:
    assert statuses.line_of(StateError("two\nlines \x1b[31mred")) == "two lines \ufffd[31mred"
    line = statuses.line_of(OSError(errno.ENOSPC, "No space left on device", "/store/x.seg"))
    assert line.startswith("/store/x.seg: No space left on device; free space")


def test_no_room_is_its_own_status(run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.seg")

    monkeypatch.setattr("onionskin.volume.Volume.flush", full)
    one_line(run("zero", f"{vms}/web", 0, 1), 7, "x.seg: No space left")


def test_a_defect_is_not_hidden(run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr("onionskin.store.Store.volumes", broken)
    assert isinstance(run("list", vms).exception, TypeError)


def test_statuses_are_documented_in_the_help_and_the_manual(run: Run) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    shown = run("--help").stdout
    for status in (0, 1, 2, 3, 4, 5, 6, 7, 130, 141):
        assert f"\n    {status} " in shown
        assert f"\n| {status} |" in manual


def test_every_verb_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for name in onionskin.commands:
        assert f"onionskin {name} " in manual, name


def test_without_a_verb_help_is_shown(run: Run) -> None:
    result = run()
    assert result.exit_code == 2
    assert "Usage: onionskin" in result.stdout


def test_a_reader_that_goes_away_is_no_error(spawn: Spawn, run: Run, tmp_path: Path) -> None:
    assert run("create", f"{tmp_path}/vms/web", "--size", "16M").exit_code == 0
    process = spawn("read", f"{tmp_path}/vms/web", 0, "16M", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == b"\0"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_an_interrupt_is_one_line(spawn: Spawn, run: Run, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    assert run("create", f"{tmp_path}/vms/web", "--size", "4M").exit_code == 0
    for index in range(4):
        assert run("write", f"{tmp_path}/vms/web", index << 20, input=data).exit_code == 0
    assert run("snapshot", f"{tmp_path}/vms/web@a").exit_code == 0
    process = spawn("delta", f"{tmp_path}/vms/web@a", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(8) == b"ONIONDLT"  # it is at work, and the pipe is full: it waits for us
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.startswith(b"onionskin: interrupted;")
    assert said.count(b"\n") == 1


def test_a_traceback_can_be_had(spawn: Spawn, tmp_path: Path) -> None:
    environment = {"ONIONSKIN_TRACEBACK": "1"}
    process = spawn("list", tmp_path / "none", stderr=subprocess.PIPE, env=environment)
    said = process.communicate()[1]
    assert said.startswith(b"Traceback")
    assert process.returncode == 3
