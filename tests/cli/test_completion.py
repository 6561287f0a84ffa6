"""Shells complete verbs, stores, volumes and snapshots; bash although it splits words at '@'."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onionskin.cli.app import onionskin
from onionskin.nbd import fuse_mount

Run = Callable[..., Result]


def completed(line: str) -> list[str]:
    """Ask as the bash script does."""
    environment = {"_ONIONSKIN_COMPLETE": "bash_complete", "_ONIONSKIN_LINE": line}
    answer = CliRunner().invoke(onionskin, [], env=environment)
    answers = (one.partition(",") for one in answer.stdout.splitlines())
    return [text for kind, _, text in answers if kind == "plain"]


def completed_by(shell: str, words: str, word: str) -> list[str]:
    """Ask as the script of zsh or fish does, behind words."""
    at = len(words.split()) if shell == "zsh" else word
    environment = {"_ONIONSKIN_COMPLETE": f"{shell}_complete", "COMP_WORDS": f"{words} {word}", "COMP_CWORD": str(at)}
    return CliRunner().invoke(onionskin, [], env=environment).stdout.splitlines()


def test_verbs_complete() -> None:
    assert completed("onionskin sna") == ["snapshot", "snapshots"]


def test_help_completes_verbs_and_those_of_machines() -> None:
    assert completed("onionskin help sna") == ["snapshot", "snapshots"]
    assert completed("onionskin help machine sta") == ["start", "status"]
    assert completed("onionskin help list ") == []


def test_what_can_be_set_completes(vms: Path) -> None:
    assert completed(f"onionskin set {vms}/web w") == ["wipe=release", "wipe=zero"]
    assert completed(f"onionskin set {vms} b") == ["block-size="]


def test_time_zones_complete(vms: Path) -> None:
    assert completed(f"onionskin prune {vms}/web --time-zone Europe/Berl") == ["Europe/Berlin"]
    assert completed(f"onionskin prune {vms}/web --time-zone=UT") == ["--time-zone=UTC"]


def test_volumes_complete(run: Run, vms: Path) -> None:
    run("create", f"{vms}/db", "--size", "1M")
    assert sorted(completed(f"onionskin info {vms}/")) == [f"{vms}/db", f"{vms}/web"]
    assert completed(f"onionskin flatten {vms}/w") == [f"{vms}/web"]


def test_snapshots_complete_where_one_is_wanted(run: Run, vms: Path) -> None:
    run("snapshot", f"{vms}/web@two")
    assert completed(f"onionskin revert {vms}/") == [f"{vms}/web@clean", f"{vms}/web@two"]
    assert completed(f"onionskin revert --yes {vms}/web@t") == [f"{vms}/web@two"]
    assert completed(f"onionskin info {vms}/web@c") == [f"{vms}/web@clean"]
    assert completed(f"onionskin map --rows 4 {vms}/web@c") == [f"{vms}/web@clean"]


def test_what_can_be_served_completes(run: Run, vms: Path) -> None:
    assert completed(f"onionskin serve {vms}/w") == [f"{vms}/web"]
    assert completed(f"onionskin serve {vms}/web {vms}/web@c") == [f"{vms}/web@clean"]


def test_what_is_mounted_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        b"60 22 0:50 / /mnt/a\\040b ro shared:2 - fuse.nbdfuse nbdfuse ro\n"
        b"61 22 0:51 / /mnt/c ro - fuse nbdfuse ro\n"
        b"62 22 0:52 / /mnt/d ro - fuse.sshfs host: ro\n"
    )
    assert fuse_mount.mounted(table) == [Path("/mnt/a b"), Path("/mnt/c")]
    found = fuse_mount.mounted(table)
    monkeypatch.setattr(fuse_mount, "mounted", lambda: found)
    assert completed("onionskin umount /mnt/c") == ["/mnt/c"]
    assert completed("onionskin umount /mnt/") == ["/mnt/a\\ b", "/mnt/c"]


def test_names_that_are_to_be_made_do_not_complete(vms: Path) -> None:
    assert completed(f"onionskin create {vms}/w") == []
    assert completed(f"onionskin snapshot {vms}/w") == [f"{vms}/web"]
    assert completed(f"onionskin snapshot {vms}/web@c") == []


def test_a_directory_that_is_no_store_offers_nothing_and_stays(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert completed(f"onionskin info {tmp_path}/plain/") == []
    (tmp_path / "plain" / "catalog.db").write_text("not a catalog")
    assert completed(f"onionskin info {tmp_path}/plain/") == []
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["catalog.db"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_printed(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_ONIONSKIN_COMPLETE" in script
    assert f"{shell}_complete" in script


@pytest.fixture
def typed() -> Iterator[Callable[[Path, str], list[str]]]:
    """Type a line in a real bash, as far as it is given and then a tab; the words that the command then gets."""
    with ExitStack() as stack:

        def type(directory: Path, line: str) -> list[str]:
            master, slave = pty.openpty()
            stack.callback(os.close, master)
            environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
            command = ["bash", "--norc", "--noprofile", "-i"]
            shell = subprocess.Popen(
                command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=directory, start_new_session=True
            )
            stack.callback(shell.wait)
            stack.callback(shell.kill)
            os.close(slave)
            os.write(master, SETUP.encode())
            until(master, b"ready>")
            os.write(master, f"{line}\t\n".encode())
            return until(master, b"|over|\r\n").decode().rpartition("|words|")[2].split("|")[:-2]

        yield type


SETUP = f"""\
PS1=; shopt -s failglob; bind "set bell-style none"; bind "set enable-bracketed-paste off"
shown() {{ printf '|words'; printf '|%s' "$@" over; echo '|'; }}
onionskin() {{ if [ "$_ONIONSKIN_COMPLETE" ]; then {sys.executable} -m onionskin; else shown "$@"; fi; }}
eval "$({sys.executable} -m onionskin completion bash)"
printf 'read%s' 'y>'
"""


def until(descriptor: int, end: bytes) -> bytes:
    """Read what a terminal shows until it shows something."""
    shown = b""
    while end not in shown:
        shown += os.read(descriptor, 1 << 16)
    return shown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("onionskin revert vms/web@cl", ["revert", "vms/web@clean"]),
        ("onionskin info vms/my", ["info", "vms/my vol"]),
        ("onionskin info vms/my\\ vol@a", ["info", "vms/my vol@a b"]),
        ("onionskin info vms/m'y vol@a", ["info", "vms/my vol@a b"]),
        ('onionskin info "vms/my', ["info", "vms/my vol"]),
        ("onionskin info vms/i", ["info", "vms/it's $x"]),
        ("onionskin info 'vms/i", ["info", "vms/it's $x"]),
        ('onionskin info "vms/i', ["info", "vms/it's $x"]),
        ('onionskin info "vms/st', ["info", "vms/st*r?"]),
        ("onionskin info vms/st", ["info", "vms/st*r?"]),
        ("onionskin info vms/co\\$", ["info", "vms/co$(exit)`exit`"]),
        ('onionskin info "vms/co\\$', ["info", "vms/co$(exit)`exit`"]),
        ("onionskin info vms/col:", ["info", "vms/col:on"]),
        ("onionskin info ~/vms/we", ["info", "HOME/vms/web"]),
        ("onionskin set vms/web wipe=z", ["set", "vms/web", "wipe=zero"]),
        ("onionskin create vms/new --wipe=z", ["create", "vms/new", "--wipe=zero"]),
        ("onionskin create vms/new --base=my", ["create", "vms/new", "--base=my disk.raw"]),
    ],
)
def test_bash_gives_the_command_what_was_completed_in_one_word(
    run: Run, vms: Path, typed: Callable[[Path, str], list[str]], line: str, words: list[str]
) -> None:
    (vms.parent / "my disk.raw").touch()
    for name in ("my vol", "it's $x", "col:on", "st*r?", "co$(exit)`exit`"):
        run("create", f"{vms}/{name}", "--size", "1M")
    run("snapshot", f"{vms}/my vol@a b")
    assert typed(vms.parent, line) == [word.replace("HOME", str(vms.parent)) for word in words]


@pytest.mark.parametrize("line", ["onionskin infos vms/", "onionskin machine strat vms/"])
def test_completing_a_line_that_is_wrong_shows_nothing(line: str) -> None:
    environment = {"_ONIONSKIN_COMPLETE": "bash_complete", "_ONIONSKIN_LINE": line}
    answer = CliRunner().invoke(onionskin, [], env=environment)
    assert isinstance(answer.exception, SystemExit | None)
    assert answer.output.strip() == ""


def test_an_option_and_its_value_stay_one_word_in_each_shell() -> None:
    assert completed("onionskin create vms/new --wipe=z") == ["--wipe=zero"]
    assert completed_by("zsh", "onionskin create vms/new", "--wipe=z") == ["plain", "--wipe=zero", "_"]
    assert completed_by("fish", "onionskin create vms/new", "--wipe=z") == ["plain,--wipe=zero"]
    assert completed_by("fish", "onionskin create vms/new", "--base=d") == ["file,--base=d"]


def test_a_home_is_looked_into(vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(vms.parent))
    assert completed("onionskin info ~/vms/w") == ["~/vms/web"]
    assert completed_by("zsh", "onionskin info", "~/vms/w") == ["plain", f"{vms}/web", "_"]
    assert completed_by("fish", "onionskin info", "~/vms/w") == ["plain,~/vms/web"]


def test_the_scripts_of_zsh_and_fish_know_paths_behind_an_option_and_fish_names_with_a_comma(run: Run) -> None:
    assert run("completion", "zsh").stdout.count("compset -P 1 '--*='; _path_files -") == 2
    assert 'string split -m 1 ","' in run("completion", "fish").stdout


def test_holders_complete_where_one_is_let_go(run: Run, vms: Path) -> None:
    run("snapshot", f"{vms}/web@two")
    run("hold", f"{vms}/web@clean", "backup")
    run("hold", f"{vms}/web@two", "bob")
    assert completed(f"onionskin unhold {vms}/web@clean ") == ["backup"]
    assert completed(f"onionskin unhold {vms}/web@clean {vms}/web@two b") == ["backup", "bob"]
    assert completed(f"onionskin unhold {vms}/web@clean {vms}/web@t") == [f"{vms}/web@two"]
    assert completed(f"onionskin unhold {vms}/gone@clean b") == []


def test_holders_of_a_machines_snapshots_complete_where_one_is_let_go(run: Run, vms: Path) -> None:
    run("machine", "create", f"{vms}/lab", "--disk", "web", "--memory", "1M")
    for name in ("one", "two"):
        run("machine", "snapshot", f"{vms}/lab@{name}")
    run("machine", "hold", f"{vms}/lab@one", "backup")
    assert completed(f"onionskin machine unhold {vms}/lab@one ") == ["backup"]
    assert completed(f"onionskin machine unhold {vms}/lab@one {vms}/lab@t") == [f"{vms}/lab@two"]
    assert completed(f"onionskin machine unhold {vms}/gone@one b") == []


def test_disks_of_a_machine_complete(vms: Path) -> None:
    assert completed(f"onionskin machine create {vms}/lab --disk w") == ["web"]
    assert completed("onionskin machine create /nowhere/lab --disk w") == []


def test_the_end_of_a_range_completes_with_snapshots_of_its_volume(run: Run, vms: Path) -> None:
    for name in ("web@two", "web@three"):
        run("snapshot", f"{vms}/{name}")
    run("clone", f"{vms}/web@clean", f"{vms}/copy")
    run("snapshot", f"{vms}/copy@two")
    both = [f"{vms}/web@clean..@three", f"{vms}/web@clean..@two"]
    assert completed(f"onionskin merge {vms}/web@clean..@t") == both
    assert completed(f"onionskin hold {vms}/web@clean..@three") == both[:1]
    assert completed(f"onionskin revert {vms}/web@clean..@t") == []  # which takes one
