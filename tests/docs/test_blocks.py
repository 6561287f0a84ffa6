"""Every code block of README.md and of docs is run, or at least parsed, as its language says.

``python``, ``console`` and ``sh`` are run, all blocks of a page in one directory and one session; what is shown of a
recorded session is compared with another recording instead (test_front_page.py). ``ini``, ``xml`` and
``json`` are parsed. ``text`` is for pictures and for forms of commands: the command lines of onionskin in it are parsed by
the program's own parser. Directives are Sphinx's, whose build has no warnings.
"""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from _pytest.mark.structures import ParameterSet
from docs.blocks import PAGES, ROOT, Block, blocks_of
from docs.session import run_session, steps_of

from onionskin.cli.app import onionskin
from onionskin.errors import VolumeNotFoundError

MIB = 1 << 20
RUN = {"python", "console", "sh"}
PARSED = {"ini", "json", "text", "xml"}
DIRECTIVES = {"{eval-rst}", "{include} ../README.md", "{toctree}"}
RECORDED = ROOT / "docs" / "session.md"
# Pages of many commands, each of which is a process.
SLOW_PAGES = {"backup", "embedding", "qemu-libvirt", "sandboxes", "secure-deletion", "test-farm", "tutorial"}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]

# The two lines of README.md that make an environment: `.ci/run` runs the one, and a test here the program of the other.
ENVIRONMENT = re.compile(r"python3 -m venv (\S+) && \1/bin/pip install '?\.(?:\[(\w+)\])?'? && \1/bin/(.+)\n")
# Commands for the tree of sources, which the test suite is or has in it.
TREE = re.compile(r"(?:pytest -s (?P<path>\S+)|cd tests && python -m (?P<module>\S+)) +#.*")


def is_for_the_tree(block: Block) -> bool:
    return all(TREE.fullmatch(line) for line in block.text.splitlines())


def runs_here(block: Block) -> bool:
    made_otherwise = ENVIRONMENT.fullmatch(block.text) or is_for_the_tree(block) or block.page == RECORDED
    return block.language in RUN and not made_otherwise


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ext4 image, which the pages call debian.raw."""
    directory = tmp_path_factory.mktemp("debian")
    files, image = directory / "files", directory / "debian.raw"
    (files / "etc").mkdir(parents=True)
    (files / "etc" / "hostname").write_text("debian\n")
    (files / "big").write_bytes(bytes(range(256)) * 4096)
    mkfs = shutil.which("mkfs.ext4") or "/usr/sbin/mkfs.ext4"
    subprocess.run([mkfs, "-q", "-d", files, image, "16M"], check=True)
    return image


def page_to_run(page: Path) -> ParameterSet:
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW_PAGES else [])


@pytest.mark.parametrize("page", [page_to_run(page) for page in PAGES if any(map(runs_here, blocks_of(page)))])
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, debian: Path) -> None:
    directory, programs = tmp_path / page.stem, tmp_path / "programs"
    directory.mkdir()
    programs.mkdir()
    shutil.copy(debian, directory)
    steps = [step for block in blocks_of(page) if runs_here(block) for step in steps_of(block, programs)]
    run_session(steps, directory)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_has_a_language_that_is_run_or_parsed(block: Block) -> None:
    language = block.language
    assert language in RUN | PARSED | DIRECTIVES, f"{block}: give the block one of the languages {sorted(RUN | PARSED)}"
    if language == "ini":
        assert configparser.ConfigParser(interpolation=None).read_string(block.text) is None
    elif language == "xml":
        ElementTree.fromstring(block.text)
    elif language == "json":
        json.loads(block.text)
    elif language == "text":
        assert not re.search(r"^\$ ", block.text, re.MULTILINE), f"{block}: a command with a prompt is console"
        for line in block.text.splitlines():
            if not re.match(r" +[\d.]+ ms  ", line):  # what the demo prints
                parse_command(line)


def parse_command(line: str) -> None:
    """Let the program parse the command line of onionskin that stands in a line, if any, and not run it."""
    found = re.search(r"(?:^|[/(| ])onionskin ([a-z]+ [^|>#)]*)", line)
    if found:
        verb, *words = shlex.split(found[1])
        command = onionskin.commands[verb]
        if isinstance(command, click.Group) and words:
            verb, *words = words
            command = command.commands[verb]
        try:
            command.make_context(verb, words)
        except VolumeNotFoundError:
            pass  # a store of the reader's
        except click.BadParameter as wrong:
            if "does not exist" not in wrong.message:  # a directory of the reader's
                raise


def test_a_form_with_an_unknown_option_is_noticed() -> None:
    with pytest.raises(click.NoSuchOption):
        parse_command("onionskin create vms/web --bass debian.raw")


@pytest.mark.parametrize("form", re.findall(r"^\| `(onionskin .*?)`", (ROOT / "docs/cli.md").read_text(), re.MULTILINE))
def test_a_form_of_the_manual_is_one_that_the_program_takes(form: str) -> None:
    parse_command(form)


def test_the_commands_of_the_readme_make_an_environment_and_run_in_it() -> None:
    programs = {}
    for block in blocks_of(ROOT / "README.md"):
        if made := ENVIRONMENT.fullmatch(block.text):
            programs[made[3]] = made[2]
    assert programs == {"onionskin demo": None, "pytest -n 3 --dist loadfile -m 'not slow and not soak'": "test"}
    assert "test" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.slow
def test_the_demo_of_the_readme_runs(tmp_path: Path) -> None:
    block = Block(ROOT / "README.md", 0, "sh", "onionskin demo --size 32M\n")
    (tmp_path / "demo").mkdir()
    run_session(steps_of(block, tmp_path), tmp_path / "demo")


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in RUN and is_for_the_tree(block)], ids=str
)
def test_a_command_for_the_tree_names_what_is_there(block: Block) -> None:
    for line in block.text.splitlines():
        named = TREE.fullmatch(line)
        assert named
        path = ROOT / (named["path"] or f"tests/{named['module'].replace('.', '/')}.py")
        assert path.exists(), path


def test_a_failing_block_is_named(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    blocks = [Block(ROOT / "README.md", 7, "sh", "true\n"), Block(ROOT / "README.md", 9, "sh", "false\n")]
    with pytest.raises(AssertionError, match=r"README\.md:9: exit status 1"):
        run_session([step for block in blocks for step in steps_of(block, tmp_path)], tmp_path / "page")


def test_output_that_is_not_as_shown_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    block = Block(ROOT / "README.md", 7, "console", "$ echo one\none\n$ echo two\nthree\n")
    with pytest.raises(AssertionError, match=r"README\.md:7: echo two\nshown:\nthree\n\nprinted:\ntwo"):
        run_session(steps_of(block, tmp_path), tmp_path / "page")
