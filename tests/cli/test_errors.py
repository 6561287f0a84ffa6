"""Errors are one line on stderr, and each kind has its exit status."""

import ast
import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from click.testing import Result

import onionskin as onionskin_package
from onionskin.base import lazy
from onionskin.catalog import Catalog
from onionskin.cli import arguments, exit_status
from onionskin.cli.app import onionskin
from onionskin.errors import FormatError, StateError, VerifyError, VolumeNotFoundError
from onionskin.operations import losses
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


def test_a_store_where_a_volume_is_wanted(run: Run, vms: Path) -> None:
    for words in (["lineage", vms], ["snapshot", f"{vms}/"], ["create", vms, "--size", "1M"]):
        one_line(run(*words), 2, f"is a store: write {vms}/VOLUME")


def test_a_volume_where_a_store_is_wanted(run: Run, vms: Path) -> None:
    for verb in ("list", "tree", "expire"):
        one_line(run(verb, f"{vms}/web"), 3, f"{vms}/web is no store, but a name in the store {vms}: give {vms}")


def test_a_name_alone_where_no_store_is(run: Run) -> None:
    one_line(run("info", "web"), 3, "'web' does not exist as a store", "onionskin create web/VOLUME")


def test_a_volume_that_is_not_there(run: Run, vms: Path) -> None:
    one_line(run("info", f"{vms}/nope"), 3, "nope")


def test_an_image_without_a_name_is_not_written(run: Run, vms: Path) -> None:
    for path in (".", "/"):
        one_line(run("export", f"{vms}/web", path), 1, f"{path}: Is a directory")


@pytest.mark.parametrize("verb", ["revert", "discard", "merge", "read", "export", "clone", "info", "delta"])
@pytest.mark.parametrize("name", ["nope", os.fsdecode(b"nope\xff")])
def test_a_snapshot_that_is_not_there(run: Run, vms: Path, tmp_path: Path, verb: str, name: str) -> None:
    more = {
        "read": [0, 1],
        "export": [tmp_path / "out"],
        "clone": [f"{vms}/new"],
        "delta": ["-o", tmp_path / "d"],
    }
    one_line(run(verb, f"{vms}/web@{name}", *more.get(verb, [])), 3, "nope")
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
    ["compare", "{s}/v", "{s}/w"],
    *(["hold", "{s}/v@a", "me"], ["unhold", "{s}/v@a", "me"], ["holds", "{s}/v"], ["note", "{s}/v@a", "text"]),
    *(["prune", "{s}/v", "--keep-last", "1"], ["set", "{s}/v", "wipe=zero"], ["get", "{s}/v"]),
    *(["fork", "{s}/v@a"], ["forks", "{s}/v"], ["lineage", "{s}/v"], ["expire", "{s}"]),
    *(["machine", "list", "{s}"], ["machine", "create", "{s}/m", "--memory", "1M"], ["machine", "start", "{s}/m"]),
    *(["machine", verb, "{s}/m"] for verb in ("stop", "pause", "resume", "status", "snapshot", "snapshots", "tree")),
    *(["machine", verb, "{s}/m@a"] for verb in ("revert", "fork", "discard", "merge")),
    *(["machine", verb, "{s}/m"] for verb in ("usage", "delete", "console")),
    ["machine", "rename", "{s}/m", "n"],
]


@pytest.mark.parametrize("words", READERS, ids=lambda words: words[0])
def test_only_create_and_import_make_a_store(run: Run, tmp_path: Path, words: list[str]) -> None:
    result = run(*(word.format(s=tmp_path / "none") for word in words))
    one_line(result, 3)
    assert list(tmp_path.iterdir()) == []


def test_every_verb_is_among_those_that_make_no_store_or_is_known_to() -> None:
    assert {words[0] for words in READERS} | {
        "create",
        "import",
        "demo",
        "bench",
        "completion",
        "umount",
        "help",
    } == set(onionskin.commands)


def test_every_verb_takes_json() -> None:
    machine = onionskin.commands["machine"]
    assert isinstance(machine, click.Group)
    for name, command in [*onionskin.commands.items(), *machine.commands.items()]:
        takes = [option for parameter in command.params for option in parameter.opts]
        assert "--json" in takes or command is machine, name


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
        (["map", "{s}/web", "--output", "{s}.raw"], "*.svg or *.png"),
        (["map", "{s}/web", "--output", "-", "--json"], "--json"),
        (["map", "{s}/web", "--columns", "0"], "0"),
        (["tree", "{s}", "--output", "{s}.png"], "*.svg"),
        (["tree", "{s}", "--output", "-", "--json"], "--json"),
        (["usage", "{s}/"], "is a store: write"),
        (["info", "{s}/web@"], "no snapshot"),
        (["revert", "{s}/web"], "@SNAPSHOT"),
        (["flatten", "{s}/web@clean"], "a volume is wanted"),
        (["create", "{s}/new"], "--size"),
        (["create", "{s}/new", "--size", "lots"], "not a size"),
        (["create", "{s}/new", "--size", "65T"], "a volume has at most 70368744177664 bytes (64 TiB)"),
        (["resize", "{s}/web", "65T"], "a volume has at most 70368744177664 bytes (64 TiB)"),
        (["create", "{s}/new", "--size", "1M", "--digest"], "--base"),
        (["create", "{s}/new", "--size", "1M", "--block-size", "5000"], "block"),
        (["create", "{s}/new@a", "--size", "1M"], "a volume is wanted"),
        (["merge", "{s}/web"], "--into-base"),
        (["merge", "{s}/web", "--into-base", "--threads", f"{1 << 70}"], "--threads"),
        (["serve", "{s}/web", "--socket", "{s}.sock", "--idle", f"{1 << 32}"], "--idle"),
        (["fork", "{s}/web", "--lifetime", "999999999w"], "a hundred years"),
        (["diff", "{s}/web@clean", "{s}/elsewhere/web"], "not of one store"),
        (["delta", "{s}/elsewhere/web@clean", "{s}/web@clean"], "not of one store"),
        (["rename", "{s}/web@clean", "{s}/other@clean"], "stays with its volume"),
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
    assert exit_status.status_of(error) == status


def test_a_message_stays_on_one_line_and_cannot_steer_a_terminal() -> None:
    assert exit_status.line_of(StateError("two\nlines \x1b[31mred")) == "two lines \ufffd[31mred"
    line = exit_status.line_of(OSError(errno.ENOSPC, "No space left on device", "/store/x.seg"))
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
    for status in (0, 1, 2, 3, 4, 5, 6, 7, 129, 130, 141, 143):
        assert f"\n    {status} " in shown
        assert f"\n| {status} |" in manual


def test_every_verb_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    machine = onionskin.commands["machine"]
    assert isinstance(machine, click.Group)
    for name in [*onionskin.commands, *(f"machine {verb}" for verb in machine.commands)]:
        assert f"onionskin {name} " in manual, name


def test_every_verb_is_in_a_table_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [line.split("|")[1] for line in readme.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"`([a-z]+)`", row)}
    assert set(onionskin.commands) <= named


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


# ---- paths that are something else ----

PATHS = [
    (["import", "{d}", "{s}/new"], 1, "{d}: Is a directory"),
    (["import", "{d}/none", "{s}/new"], 3, "{d}/none: No such file or directory; check the path"),
    (["import", "{f}/x", "{s}/new"], 1, "Not a directory"),
    (["import", "{d}/secret", "{s}/new"], 1, "{d}/secret: Permission denied; check its owner and mode"),
    (["create", "{s}/new", "--base", "{d}/none"], 3, "{d}/none: No such file or directory; check the path"),
    (["create", "{s}/new", "--base", "{d}/secret"], 1, "Permission denied"),
    (["create", "{d}/secret/s/new", "--size", "1M"], 4, "{d}/secret: File exists; choose another path"),
    (["export", "{s}/web", "{d}/none/out"], 3, "No such file or directory; check the path"),
    (["export", "{s}/web", "{d}"], 4, "File exists"),
    (["export", "{s}/web", "{s}/segments/out"], 2, "in the store itself"),
    (["delta", "{s}/web@clean", "-o", "{d}/none/out"], 3, "{d}/none/out: No such file or directory; check the path"),
    (["apply", "{s}/web", "{d}"], 1, "{d}: Is a directory"),
    (["apply", "{s}/web", "{d}/none"], 3, "{d}/none: No such file or directory; check the path"),
    (["apply", "{s}/web", "{d}/secret"], 1, "{d}/secret: Permission denied"),
    (["map", "{s}/web", "-o", "{d}/none/x.svg"], 3, "{d}/none/x.svg: No such file or directory; check the path"),
    (["tree", "{f}"], 3, "{f} is a file, and no store"),
    (["create", "{f}/web", "--size", "1M"], 4, "File exists"),
    (["serve", "{s}/web", "--socket", "{d}"], 4, "it is not a socket"),
    (["serve", "{s}/web", "--socket", "{d}/none/s"], 3, "{d}/none/s: No such file or directory; check the path"),
    (["serve", "{s}/web", "--socket", "{d}/closed/s"], 1, "{d}/closed/s: Permission denied; check its owner and mode"),
    (["serve", "{s}/web", "--tcp", ":0", "--in-flight", "1"], 2, "--in-flight is at least 32M"),
    (
        ["serve", "{s}/web", "--tcp", ":0", "--tls-certificate", "{f}", "--tls-key", "{f}"],
        5,
        "{f} or {f} is no PEM file",
    ),
    (["mount", "{s}/web@clean", "{d}/none"], 3, "{d}/none: No such file or directory"),
    (["umount", "{d}/none"], 3, "{d}/none: No such file or directory"),
    (["stats", "{s}/web"], 5, "nobody serves volume 'web'; start 'onionskin serve'"),
    (["resize", "{s}/web", "64K"], 5, "give --force if that is meant"),
    (["delete", "{s}/web"], 5, "give --recursive to remove them too"),
]
# All modules are loaded first: the environment that they are in may be closed to others.
AS_NOBODY = """
import os, pkgutil, sys
import onionskin
for module in pkgutil.walk_packages(onionskin.__path__, "onionskin."):
    if not module.name.endswith("__main__"):
        try:
            __import__(module.name)
        except ImportError:
            pass  # what an extra would be needed for
from onionskin.cli import main
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(main())
"""


@pytest.mark.parametrize(("words", "status", "said"), PATHS, ids=lambda value: value[0] if type(value) is list else "")
def test_what_is_wrong_with_a_path_is_said_and_nothing_else(
    spawn: Spawn, run: Run, vms: Path, tmp_path: Path, words: list[str], status: int, said: str
) -> None:
    directory, file = tmp_path / "d", tmp_path / "f"
    directory.mkdir()
    file.write_bytes(b"x" * 4096)
    (directory / "secret").write_bytes(b"x" * 4096)
    (directory / "secret").chmod(0)
    (directory / "closed").mkdir(0)
    arguments = [word.format(s=vms, d=directory, f=file) for word in words]
    expected = said.format(s=vms, d=directory, f=file)
    if "Permission denied" not in said:
        one_line(run(*arguments), status, expected)
        return
    for one in (vms, *vms.rglob("*")):
        os.chown(one, 65534, 65534)
    for above in tmp_path.parents:
        if above.name.startswith("pytest"):
            above.chmod(0o755)
    ended = subprocess.run([sys.executable, "-c", AS_NOBODY, *arguments], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert expected in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("directory", ["segments", "layers"])
@pytest.mark.parametrize("replace", [lambda path: None, lambda path: path.mkdir(), lambda path: path.symlink_to(path)])
def test_a_file_of_a_store_that_is_missing_is_damage_and_no_slip_in_a_path(
    run: Run, vms: Path, directory: str, replace: Callable[[Path], None]
) -> None:
    for path in (vms / directory).iterdir():
        path.unlink()
        replace(path)
    result = run("read", f"{vms}/web@clean", 0, 1)
    one_line(result, 6, f"{vms}/{directory}/")
    assert "check the path" not in result.stderr


@pytest.mark.parametrize("name", ["catalog.db", "lock"])
def test_a_directory_in_place_of_a_file_of_a_store_is_damage(run: Run, vms: Path, name: str) -> None:
    (vms / name).unlink()
    (vms / name).mkdir()
    one_line(run("list", vms), 6, f"{vms}/{name} is something else, where a store has a regular file of its own")


def test_a_disk_that_is_full_to_the_last_block_is_said_to_be(
    run: Run, spawn: Spawn, ext4_mount: Callable[[], Path]
) -> None:
    store = ext4_mount() / "vms"
    assert run("create", f"{store}/web", "--size", "1M").exit_code == 0
    (store / "reserve").unlink()
    with (store.parent / "fill").open("wb", buffering=0) as file:
        for piece in (1 << 16, 1 << 10):
            with pytest.raises(OSError, match="No space"):
                while file.write(bytes(piece)):
                    pass
        os.fsync(file.fileno())
    one_line(run("create", f"{store}/new", "--size", "1M"), 7, "the disk was full to the last block")


@pytest.mark.parametrize(
    "has_reserve",
    [
        pytest.param(True, id="reserve", marks=pytest.mark.slow),
        pytest.param(False, id="no reserve", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_all_but_full_does_not_kill_who_looks_at_a_store_on_it(
    run: Run, spawn: Spawn, ext4_mount: Callable[[], Path], has_reserve: bool
) -> None:
    """SQLite maps an index that has not all its blocks: with blocks of 1 KiB, smaller than a page, that was SIGBUS."""
    store = ext4_mount() / "vms"
    for room in range(5 << 10, 13 << 10, 1 << 10):
        assert run("create", f"{store}/web-{room}", "--size", "1M").exit_code == 0
        if not has_reserve:
            (store / "reserve").unlink(missing_ok=True)
        fill_but(store.parent, room)
        process = spawn("list", store, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        _, err = process.communicate()
        assert process.returncode == 0 if has_reserve else process.returncode in (0, 7), (room, err)
        (store.parent / "fill").unlink()
        os.sync()


def fill_but(directory: Path, room: int) -> None:
    """Fill a file system but for so many bytes."""
    with (directory / "room").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room)
    with (directory / "fill").open("wb", buffering=0) as file:
        for piece in (1 << 16, 1 << 10):
            with pytest.raises(OSError, match="No space"):
                while file.write(bytes(piece)):
                    pass
        os.fsync(file.fileno())
    (directory / "room").unlink()
    os.sync()


# ---- standard streams ----


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        # Nobody asked what was done, and it was done.
        ("snapshot {s}/web@cron >&-", 0, ""),
        ("snapshot {s}/web@cron --json >&- <&- 2>&-", 0, ""),
        ("merge {s}/web@clean >&-", 0, ""),
        ("fork {s}/web@clean >&-", 0, ""),
        ("fork {s}/web@clean {s}/other >&-", 0, ""),
        ("prune {s}/web --keep-last 1 >&-", 0, ""),
        ("snapshot {s}/web@cron 1</dev/null", 0, ""),
        ("merge {s}/web@clean --json 1</dev/null", 0, ""),
        ("tree {s} -o {s}.svg >&-", 0, ""),
        ("map {s}/web -o {s}.svg 1</dev/null", 0, ""),
        ("list {s} 1</dev/null", 1, "stdout: Bad file descriptor"),
        ("prune {s}/web --keep-last 1 --dry-run >&-", 1, "stdout: Bad file descriptor"),
        ("list {s} >&-", 1, "stdout: Bad file descriptor"),
        ("list {s} >&- 2>&-", 1, ""),
        ("read {s}/web 0 16 >&-", 1, "stdout: Bad file descriptor"),
        ("delta {s}/web@clean >&-", 1, "stdout: Bad file descriptor"),
        ("export {s}/web - >&-", 1, "stdout: Bad file descriptor"),
        ("write {s}/web 0 <&-", 1, "stdin: Bad file descriptor"),
        ("apply {s}/web <&-", 1, "stdin: Bad file descriptor"),
        ("list {s}/none 2>&-", 3, ""),
        ("list {s} >/dev/full", 7, "stdout: No space left on device; free space there"),
        ("read {s}/web 0 16 >/dev/full", 7, "stdout: No space left on device; free space there"),
        ("delta {s}/web@clean >/dev/full", 7, "stdout: No space left on device; free space there"),
        ("tree {s} -o - >/dev/full", 7, "stdout: No space left on device; free space there"),
        ("--help >/dev/full", 7, "stdout: No space left on device; free space there"),
        ("list {s} >/dev/full 2>/dev/full", 7, ""),
        ("snapshot {s}/web@n >/dev/full", 7, "stdout: No space left on device; what was asked for is done"),
        ("rename {s}/other o --json >/dev/full", 7, "and only this could not be said"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_named(run: Run, vms: Path, command: str, status: int, said: str) -> None:
    assert run("create", f"{vms}/other", "--size", "1M").exit_code == 0
    line = f"{sys.executable} -m onionskin {command.format(s=vms)}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert ended.stderr.count("\n") == (1 if said else 0)
    assert said in ended.stderr


# ---- signals ----

INTERRUPTED_AT_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

from onionskin.__main__ import main
wanted = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupt())
main()
"""


@pytest.mark.parametrize("module", ["onionskin.cli", "onionskin.cli.app", "click", "onionskin.cli.snapshots"])
def test_an_interrupt_before_the_verb_begins_shows_nothing(vms: Path, module: str) -> None:
    line = [sys.executable, "-c", INTERRUPTED_AT_IMPORT, module, "snapshot", f"{vms}/web@two"]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupt_that_is_ignored_stays_so_while_a_verb_starts(vms: Path) -> None:
    line = [sys.executable, "-c", INTERRUPTED_AT_IMPORT, "onionskin.cli.app", "snapshot", f"{vms}/web@two"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what a script starts with &
    try:
        assert subprocess.run(line, capture_output=True).returncode == 0
    finally:
        signal.signal(signal.SIGINT, before)


INTERRUPTED_IN_A_FINALIZER = """
import os, signal, sys, threading
from onionskin.__main__ import main
from onionskin.store import Store

class Gone:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        len("")  # behind a call, Python looks for signals

def wait(self, *rest, **more):
    Gone()
    threading.Event().wait(300)
    return []

Store.volumes = wait
main()
"""


def test_an_interrupt_is_not_lost_where_python_would_ignore_its_exception(vms: Path) -> None:
    line = [sys.executable, "-c", INTERRUPTED_IN_A_FINALIZER, "list", str(vms)]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr.startswith("onionskin: interrupted;") and ended.stderr.count("\n") == 1


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch, hangup: None) -> Callable[[int], None]:
    """Make a command that copies get a signal when it first tells how far it is."""

    def arrange(number: int) -> None:
        @contextmanager
        def progress(title: str, as_json: bool) -> Iterator[Callable[[int, int], None]]:
            yield lambda done, total: os.kill(os.getpid(), number)

        monkeypatch.setattr("onionskin.cli.output.progress", progress)

    return arrange


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(
    "words",
    [
        ["import", "{t}/image", "{s}/new"],
        ["apply", "{s}/copy", "{t}/delta"],
        ["flatten", "{s}/over"],
        ["merge", "{s}/over", "--into-base"],
        ["export", "{s}/over", "{t}/out"],
        ["delta", "{s}/web@clean", "-o", "{t}/out"],
    ],
    ids=lambda words: words[0],
)
def test_a_signal_ends_what_copies_and_leaves_nothing_half_done(
    run: Run, vms: Path, tmp_path: Path, signalled: Callable[[int], None], words: list[str], number: int
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(4 << 20))
    (tmp_path / "base").write_bytes(os.urandom(4 << 20))
    assert run("delta", f"{vms}/web@clean", "-o", tmp_path / "delta").exit_code == 0
    assert run("create", f"{vms}/copy", "--size", "1M").exit_code == 0
    assert run("create", f"{vms}/over", "--base", tmp_path / "base").exit_code == 0
    assert run("write", f"{vms}/over", 0, input=b"x" * 65536).exit_code == 0
    before = run("list", vms).stdout
    signalled(number)
    said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    one_line(run(*(word.format(s=vms, t=tmp_path) for word in words)), 128 + number, said)
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert run("list", vms).stdout == before
    assert not (tmp_path / "out").exists()
    assert run("read", f"{vms}/over", 0, 1).stdout == "x"
    assert run("snapshots", f"{vms}/copy").stdout == ""
    assert run("read", f"{vms}/copy", 0, 5).stdout_bytes == bytes(5)
    assert run("check", vms).exit_code == 0


def test_a_signal_that_is_ignored_stays_so(
    run: Run, vms: Path, tmp_path: Path, signalled: Callable[[int], None]
) -> None:
    signalled(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run("export", f"{vms}/web", tmp_path / "out").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- the words of the command line ----


def messages() -> Iterator[tuple[str, str]]:
    """Yield (where, text) of every message that the library raises; what is put into it reads as {}."""
    package = Path(onionskin_package.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.parent.name in ("cli", "measure") or str(path.relative_to(package)) in NOT_REACHED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield f"{path.name}:{node.lineno}", text_of(node.exc)


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue):
        return "{}"
    if isinstance(node, ast.Call):
        return "".join(map(text_of, node.args))
    return "".join(map(text_of, ast.iter_child_nodes(node)))


NOT_REACHED = {"storage/disk_file.py", "__init__.py", "control/server.py", "control/frames.py", "pytest_plugin.py"}
STRINGS = (ast.Constant, ast.JoinedStr)
OF_PYTHON = re.compile(
    r"\bpass (recursive|force|trust|verify|digest)|with trust\b|\w+=\w+\)|=True|\w\(\)|\bonionskin\.[a-z]|"
    r"\b(Store|Volume|LiveVolume)\.\w"
)


def test_no_message_speaks_of_python_on_the_command_line() -> None:
    found = [(where, exit_status.line_of(StateError(text))) for where, text in messages()]
    assert len(found) > 100
    assert [(where, text) for where, text in found if OF_PYTHON.search(text)] == []


def test_advice_of_the_library_is_said_in_the_words_of_the_command_line() -> None:
    for said, wanted in [
        ("x; pass recursive to remove them too", "x; give --recursive to remove them too"),
        ("x; pass force if that is meant", "x; give --force if that is meant"),
        ("x; ask for a recursive removal to remove them too", "x; give --recursive to remove them too"),
        ("x; say that you trust it if it is the same image", "x; give --trust if it is the same image"),
    ]:
        assert exit_status.line_of(StateError(said)) == wanted


def test_every_advice_that_is_said_in_other_words_is_one_of_the_library() -> None:
    package = Path(onionskin_package.__file__).parent
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py") if path.parent.name != "cli"]
    said = "\n".join(text_of(node) for tree in trees for node in ast.walk(tree) if isinstance(node, STRINGS))
    for pattern, _ in exit_status._IN_WORDS_OF_THE_COMMAND_LINE:
        assert re.search(pattern, said), pattern


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (errno.EIO, "/dev/x", "/dev/x: Input/output error; reading or writing failed below the file system"),
        (errno.ENOSPC, "/x/out", "/x/out: No space left on device; free space there and run it again"),
        (errno.EROFS, "/x/out", "/x/out: Read-only file system; mount it for writing"),
        (errno.ENOENT, "/x/out", "/x/out: No such file or directory; check the path"),
    ],
)
def test_advice_fits_what_happened(number: int, name: str, said: str) -> None:
    assert exit_status.line_of(OSError(number, os.strerror(number), name)).startswith(said)


# ---- options that all verbs have ----


OPENERS = [words for words in READERS if words[0] != "serve"]


@pytest.mark.parametrize("words", OPENERS, ids=lambda words: words[0])
def test_trust_reaches_the_store_of_every_verb(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    asked: list[object] = []

    def refuse(path: Path, *, create: bool, trust: bool, group: str | None) -> None:
        asked.append(trust)
        raise StateError("a store of another user")

    monkeypatch.setattr("onionskin.Store", refuse, raising=False)
    given = [word.format(s=tmp_path / "s") for word in words]
    assert run(*given).exit_code == 5
    assert run(*given, "--trust").exit_code == 5
    assert asked == [False, True]


def test_a_completion_reads_names_and_nothing_else(vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a completion opened a volume, or looked at more than names")

    for method in ("open", "volumes", "snapshots"):
        monkeypatch.setattr(Store, method, opened)
    before = sorted((path, path.stat().st_mtime_ns) for path in vms.rglob("*") if path.suffix in (".map", ".seg"))
    assert [one.value for one in arguments.VOLUME.shell_complete(None, None, f"{vms}/w")] == [f"{vms}/web"]  # type: ignore[arg-type]
    assert [one.value for one in arguments.SNAPSHOT.shell_complete(None, None, f"{vms}/")] == [f"{vms}/web@clean"]  # type: ignore[arg-type]
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in vms.rglob("*") if path.suffix in (".map", ".seg")) == before
    )


@pytest.mark.parametrize(
    "words",
    [
        ["read", "{s}/web", "0", "5"],
        ["export", "{s}/web", "{t}/out"],
        ["diff", "{s}/web@clean", "{s}/web"],
        ["read", "{s}/web@clean", "0", "5"],
        ["delta", "{s}/web@clean", "-o", "{t}/out"],
        ["map", "{s}/web"],
        ["usage", "{s}/web"],
        ["tree", "{s}"],
        ["check", "{s}"],
    ],
    ids=lambda words: words[0],
)
def test_a_verb_that_looks_changes_no_file_of_the_store(run: Run, vms: Path, tmp_path: Path, words: list[str]) -> None:
    assert run("write", f"{vms}/web", 0, input=b"x" * 5000).exit_code == 0

    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in vms.rglob("*") if path.is_file() and not path.name.startswith("catalog.db-")]
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.parent.name != "volumes"
        }

    before = state()
    assert run(*(word.format(s=vms, t=tmp_path) for word in words)).exit_code == 0
    assert state() == before


def test_a_catalog_that_needs_more_descriptors_than_there_are_says_so(tmp_path: Path) -> None:
    Store(tmp_path / "store", create=True).close()
    said = set()
    for spare in range(8):
        script = (
            "import os, resource, sys\nfrom onionskin import Store\nfrom onionskin.cli.exit_status import line_of\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))) + {spare}, 4096))\n"
            "try:\n    Store(sys.argv[1])\nexcept OSError as error:\n    print(line_of(error).partition(': ')[2])"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "store"], check=True, capture_output=True, text=True
        )
        said |= set(ended.stdout.splitlines())
    assert said == {"Too many open files; raise the limit of open files (ulimit -n)"}


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Original error was: libfast.so: failed to map segment from shared object"),
        ImportError("libfast.so: Cannot allocate memory"),
        SystemError("compile() returned NULL without setting an exception"),
    ],
)
def test_a_library_that_has_no_room_in_memory_is_said_to_lack_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(MemoryError) as raised:
        lazy.Later("numpy").array  # noqa: B018
    assert exit_status.line_of(raised.value) == "out of memory; close other programs and run it again"


def test_a_library_that_is_not_there_is_not_said_to_lack_memory() -> None:
    with pytest.raises(ImportError):
        lazy.Later("no_such_library").name  # noqa: B018


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "", "VMS/new"),
        ("export", "VMS/web", ""),
        ("create", "VMS/new", "--base", ""),
        ("list", ""),
        ("bench", ""),
        ("mount", "VMS/web@clean", ""),
    ],
)
def test_an_empty_path_is_not_the_directory_that_is_here(run: Run, vms: Path, arguments: tuple[str, ...]) -> None:
    one_line(run(*(one.replace("VMS", str(vms)) for one in arguments)), 2, "the path is empty")


def test_a_volume_that_is_given_as_an_image_is_no_damage_of_its_store(run: Run, vms: Path) -> None:
    one_line(run("import", f"{vms}/web", f"{vms}/new"), 3, "a name in a store, and an image is wanted")
    one_line(run("create", f"{vms}/new", "--base", f"{vms}/web"), 3, "a name in a store, and an image is wanted")
    one_line(run("apply", f"{vms}/web", f"{vms}/db"), 3, "No such file", "check the path")
    one_line(run("list", vms / "segments" / "none"), 3)


def test_a_file_of_a_store_that_is_missing_is_damage_of_it(run: Run, vms: Path) -> None:
    run("write", f"{vms}/web", 0, input=b"other")
    for file in (vms / "segments").iterdir():
        file.unlink()
    one_line(run("read", f"{vms}/web", 0, 4), 6, "the store is damaged: run onionskin check")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/null"])
def test_a_character_device_without_an_end_is_no_image(run: Run, tmp_path: Path, device: str) -> None:
    one_line(run("import", device, f"{tmp_path}/vms/web"), 6, "is a character device")
    assert not (tmp_path / "vms").exists()


def test_bench_names_a_link_that_leads_back_to_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    one_line(run("bench", tmp_path / "loop"), 1, "a symbolic link leads back to itself")


def test_delete_says_too_that_a_store_is_read_only(run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(catalog: Catalog) -> None:
        raise OSError(errno.EROFS, "the store is read-only: its file system is mounted read-only", str(vms))

    monkeypatch.setattr(Catalog, "refuse_read_only", refuse)
    monkeypatch.setattr(losses, "of_delete", lambda *_, **__: pytest.fail("it was measured first"))
    one_line(run("delete", f"{vms}/web", "--recursive", "--yes"), 1, f"{vms}: the store is read-only")


def test_a_picture_for_which_there_is_no_room_is_named(run: Run, vms: Path, tmp_path: Path) -> None:
    (tmp_path / "map.svg").symlink_to("/dev/full")
    one_line(run("map", f"{vms}/web", "--output", tmp_path / "map.svg"), 7, f"{tmp_path}/map.svg: No space left")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nbd://localhost/disk", "nbdcopy 'URL' - | onionskin import -"),
        ("nbd+unix:///disk?socket=none", "nbdcopy 'URL' - | onionskin import -"),
        ("https://localhost/disk.img", "curl -fL 'URL' | onionskin import -"),
        ("file:///etc/passwd", "what reads it | onionskin import -"),
        ("json:{}", "what reads it | onionskin import -"),
        ("nbd:unix:/none:exportname=disk", "nbdcopy 'URL' - | onionskin import -"),
    ],
)
def test_a_url_is_told_from_a_path_that_was_typed_wrongly(run: Run, vms: Path, url: str, said: str) -> None:
    for words in (
        ("import", url, f"{vms}/new"),
        ("create", f"{vms}/new", "--base", url),
        ("compare", f"{vms}/web", url),
    ):
        one_line(run(*words), 3, "a URL is not followed", said)
    one_line(run("export", f"{vms}/web", url), 3, "a URL is not followed", "pipe 'onionskin export NAME -'")


@pytest.mark.parametrize("verb", ["info", "snapshots", "holds", "list", "tree", "check"])
def test_an_image_in_the_place_of_a_store_is_told_from_one_that_is_not_there(
    run: Run, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb\0\0\0\3")
    monkeypatch.chdir(tmp_path)
    for name in ("disk.qcow2", tmp_path / "disk.qcow2"):
        one_line(run(verb, name), 3, "disk.qcow2 is a file, and no store; 'onionskin import", "qemu-img info")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("set wipe=zero VMS/web", "the volume comes first, as in 'onionskin set STORE/VOLUME wipe=zero'"),
        ("get wipe VMS/web", "the volume comes first, as in 'onionskin get STORE/VOLUME wipe'"),
        ("hold backup VMS/web@clean", "the volume comes first, as in 'onionskin hold STORE/VOLUME@SNAPSHOT HOLDER'"),
        ("snapshot ls VMS/web", "here that is onionskin snapshots"),
        ("snapshot rm VMS/web@clean", "here that is onionskin merge, which keeps all data, or onionskin discard"),
    ],
)
def test_words_in_the_order_of_other_programs_are_told_how_they_are_put(
    run: Run, vms: Path, words: str, said: str
) -> None:
    one_line(run(*words.replace("VMS", str(vms)).split()), 2, said)


def test_a_socket_is_no_image(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("here")
        one_line(run("import", "here", f"{tmp_path}/vms/web"), 1, "it is a socket, or a device that is not there")
