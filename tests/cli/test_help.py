"""Help is found however it is asked for, and says which verb is meant by a word of another program."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from onionskin.cli.app import onionskin
from onionskin.cli.man_pages import pages
from onionskin.cli.sections import SECTION_OF
from onionskin.cli.verbs import _CALLED, _CALLED_OF_MACHINES, _OF_SNAPSHOTS, _THINGS

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", sorted(onionskin.commands))
def test_help_of_a_verb_is_the_same_by_every_way(run: Run, verb: str) -> None:
    shown = run(verb, "--help")
    assert shown.exit_code == 0
    assert run(verb, "-h").stdout == shown.stdout
    asked = run("help", verb)
    assert (asked.exit_code, asked.stdout) == (0, shown.stdout)


def test_help_of_a_verb_of_machines_is_the_same_by_every_way(run: Run) -> None:
    machine = onionskin.commands["machine"]
    assert isinstance(machine, click.Group)
    for verb in machine.commands:
        shown = run("machine", verb, "--help")
        assert run("machine", verb, "-h").stdout == run("help", "machine", verb).stdout == shown.stdout


def test_help_says_what_is_no_verb_of_a_verb(run: Run) -> None:
    assert "onionskin list has no verbs of its own" in run("help", "list", "all").stderr
    assert "No such command 'begin'" in run("help", "machine", "begin").stderr


def test_help_lists_each_verb_once_under_what_it_is_for(run: Run) -> None:
    shown = run("help").stdout
    assert shown == run("-h").stdout == run("--help").stdout
    for section in set(SECTION_OF.values()):
        assert f"\n{section}:\n" in shown
    for verb in onionskin.commands:
        assert shown.count(f"\n  {verb} ") == 1, verb


@pytest.mark.parametrize("group", [(), ("machine",)])
def test_the_line_of_each_verb_is_whole_on_a_narrow_terminal(run: Run, group: tuple[str, ...]) -> None:
    of_group = run(*group, "--help").stdout.partition("Options:")[2]
    assert "..." not in of_group


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rollback", "here that is onionskin revert"),
        ("commit", "here that is onionskin merge --into-base"),
        ("ls", "here that is onionskin list"),
        ("snapshto", "did you mean snapshot?"),
        ("exprot", "did you mean export?"),
        ("console", "here that is onionskin machine console"),
        ("snapshot-create-as", "here that is onionskin snapshot"),
        ("lvcreate", "here that is onionskin create"),
        ("extract", "here that is onionskin export"),
    ],
)
@pytest.mark.parametrize("ask", [(), ("help",)])
def test_a_near_miss_is_told_which_verb_is_meant(run: Run, word: str, said: str, ask: tuple[str, ...]) -> None:
    refused = run(*ask, word)
    assert refused.exit_code == 2
    assert f"No such command '{word}': {said}" in refused.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("snap", "here that is onionskin machine snapshot"),
        ("rollback", "here that is onionskin machine revert"),
        ("destroy", "here that is onionskin machine stop"),
        ("clone", "here that is onionskin machine fork"),
        ("strat", "did you mean start?"),
        ("snapshto", "did you mean snapshot?"),
    ],
)
@pytest.mark.parametrize("ask", [(), ("help",)])
def test_a_near_miss_of_a_verb_of_machines_is_told_which_is_meant(
    run: Run, word: str, said: str, ask: tuple[str, ...]
) -> None:
    refused = run(*ask, "machine", word)
    assert refused.exit_code == 2
    assert f"No such command '{word}': {said}" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("snapshot -l disk.qcow2", "here that is 'onionskin snapshots STORE/VOLUME'; see"),
        ("snapshot -a clean disk.qcow2", "here that is 'onionskin revert STORE/VOLUME@NAME'; see"),
        ("list -t snapshot vms", "here that is 'onionskin snapshots STORE'; see"),
        ("delete -r vms/web", "did you mean --recursive?; see"),
        ("prune -n vms/web", "did you mean --dry-run?; see"),
        ("export -O qcow2 vms/web out", "did you mean --format?; see"),
        ("info --output=json vms/web", "did you mean --json?; see"),
        ("create -b base.raw vms/web", "did you mean --base or --block-size?; see"),
        ("machine delete -y vms/lab", "did you mean --yes?; see"),
        ("resize vms/web -10G", "no number is below zero here; give the new size, and --force; see"),
    ],
)
def test_an_option_of_another_program_is_told_what_is_meant(run: Run, words: str, said: str) -> None:
    refused = run(*words.split())
    assert refused.exit_code == 2
    assert said in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("snap ls vms/web", "snapshots"),
        ("snap create vms/web@a", "snapshot"),
        ("snap rm vms/web@a", "merge, which keeps all data, or onionskin discard"),
        ("snap rollback vms/web@a", "revert"),
        ("snap protect vms/web@a", "hold"),
        ("image ls", "list"),
        ("volume create vms/web", "create"),
        ("snap vms/web@a", "snapshot"),
    ],
)
def test_what_has_two_words_elsewhere_is_told_by_both(run: Run, words: str, said: str) -> None:
    refused = run(*words.split())
    assert refused.exit_code == 2
    assert f"No such command '{words.split()[0]}': here that is onionskin {said}; see" in refused.stderr


def test_words_of_other_programs_are_no_verbs_and_mean_verbs() -> None:
    of_machines = onionskin.commands["machine"]
    assert isinstance(of_machines, click.Group)
    assert not set(_THINGS) & set(onionskin.commands)
    assert {said.split()[0].rstrip(",") for said in _OF_SNAPSHOTS.values()} <= set(onionskin.commands)
    for called, verbs in ((_CALLED, onionskin.commands), (_CALLED_OF_MACHINES, of_machines.commands)):
        assert not set(called) & set(verbs)
        assert {said.split()[0].rstrip(",") for said in called.values()} <= set(verbs)
    named = {said.partition("machine ")[2] for said in _CALLED.values() if "machine " in said}
    assert named <= set(of_machines.commands)


@pytest.mark.parametrize("name", ["onionskin.1", *(f"onionskin-{verb}.1" for verb in onionskin.commands)])
def test_a_page_of_the_manual_opens_without_a_warning(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(pages("1.0")[name])
    opened = subprocess.run(
        ["man", "--warnings", "-l", tmp_path / name],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )
    assert (opened.returncode, opened.stderr) == (0, "")
    assert "NAME" in opened.stdout
    if name != "onionskin.1":
        assert "--json" in opened.stdout


def test_the_pages_of_the_manual_are_made_of_the_source_alone() -> None:
    program = "import sys, onionskin.cli.man_pages as made; made.pages('1.0'); print('numpy' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == ("False\n", "")


def test_the_manual_is_installed_with_the_package() -> None:
    from importlib.metadata import files

    names = {file.name for file in files("onionskin") or [] if "share/man/man1" in str(file)}
    assert names == set(pages("1.0"))
