"""What README.md shows is true: the trees are what the verbs make."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

README = (Path(__file__).parents[2] / "README.md").read_text()
Run = Callable[..., Result]


def shape(drawn: str) -> list[tuple[int, str]]:
    """Depth and name of each line of a tree."""
    lines = []
    for line in drawn.rstrip().splitlines():
        name = line.lstrip("│├└─ ")
        lines.append(((len(line) - len(name)) // 4, name.split()[0].rstrip(",")))
    return lines


def pictures() -> dict[str, list[tuple[int, str]]]:
    """Cut the three columns of the picture of verbs apart."""
    (block,) = re.findall(r"```text\n(revert web@clean .*?)\n\n(?:the head)", README, re.DOTALL)
    titles, _, *rows = block.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+ web@\S+", titles)]
    columns = {}
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        drawn = "\n".join(row[start:stop].rstrip() for row in rows if row[start:stop].strip())
        columns[titles[start:stop].strip()] = shape(drawn)
    return columns


@pytest.fixture
def web(tmp_path: Path, run: Run) -> Path:
    """The tree that the picture begins with."""
    store, base = tmp_path / "vms", tmp_path / "debian.raw"
    base.write_bytes(bytes(1 << 20))
    for words, data in (
        (["create", f"{store}/web", "--base", base], None),
        (["snapshot", f"{store}/web@clean"], None),
        (["write", f"{store}/web", 0], b"broken"),
        (["snapshot", f"{store}/web@broken"], None),
        (["revert", f"{store}/web@clean"], None),
        (["write", f"{store}/web", 0], b"work"),
        (["snapshot", f"{store}/web@work"], None),
        (["write", f"{store}/web", "8K"], b"more"),
    ):
        assert run(*words, input=data).exit_code == 0
    return store


def drawn_by(run: Run, store: Path) -> list[tuple[int, str]]:
    named = run("tree", store).stdout.replace("web@", "").replace("web  head", "(head)")
    return shape(named.replace(f"{store.parent}/", ""))


def test_the_tree_is_drawn_as_shown(run: Run, web: Path) -> None:
    (shown,) = re.findall(r"draws it\):\n\n```text\n(.*?)```", README, re.DOTALL)
    assert drawn_by(run, web) == shape(shown)


@pytest.mark.parametrize("verb", ["revert web@clean", "discard web@work", "merge web@work"])
def test_the_verbs_change_the_tree_as_shown(run: Run, web: Path, verb: str) -> None:
    word, name = verb.split()
    assert run(word, f"{web}/{name}", *([] if word == "merge" else ["--yes"])).exit_code == 0
    assert drawn_by(run, web) == pictures()[verb]
