"""Every report on the page about the bugs of others has one test of ours, and that test is there."""

import ast
import re
from pathlib import Path

import pytest
from docs.blocks import ROOT

PAGE = (ROOT / "docs/bugs-of-others.md").read_text()
HELD, UNNOTICED = PAGE.split("## What onionskin would not notice either")
LINES = [" ".join(line.split()) for line in re.findall(r"^- .*(?:\n  .*)*", HELD, re.MULTILINE)]
LINKS = re.findall(r"\[([^\]]+)\]\((\S+)\)", PAGE)


def is_there(test: str) -> bool:
    path, _, name = test.partition("::")
    file = Path(ROOT / path)
    if not file.is_file():
        return False
    if file.suffix == ".c":
        return not name and "int main(" in file.read_text()
    tree = ast.parse(file.read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[3:40].partition("]")[0])
def test_each_report_has_an_address_and_one_test_that_is_there(line: str) -> None:
    (test,) = re.findall(r"`(tests/[^`]+)`", line)
    assert line.endswith(f" `{test}`")
    assert "](https://" in line
    assert is_there(test), test


def test_there_are_many_reports_and_none_twice() -> None:
    assert len(LINES) >= 40
    addresses = [address for _, address in LINKS]
    assert len(addresses) == len(set(addresses))
    assert "`tests/" not in UNNOTICED


@pytest.mark.parametrize(("title", "address"), [link for link in LINKS if "#" in link[0]])
def test_the_title_of_a_report_is_its_repository_and_number(title: str, address: str) -> None:
    repository, number = title.split("#")
    assert address in {f"https://github.com/{repository}/{kind}/{number}" for kind in ("issues", "pull")}


@pytest.mark.parametrize(
    "test", ["tests/docs/none.py::test_a", "tests/docs/test_links.py::test_a", "tests/kernels/none.c", "tests/docs"]
)
def test_a_test_that_is_not_there_is_noticed(test: str) -> None:
    assert not is_there(test)
