"""The reference of the Python API names every public name, and every public member of the classes."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from docs.blocks import ROOT

import onionskin
from onionskin.cli.app import onionskin as command_line

ABOUT_ITSELF = {"demo", "bench", "completion", "help"}  # verbs that no other program has a word for
REFERENCE = (ROOT / "docs/reference/api.md").read_text()
CLASSES = [name for name in onionskin.__all__ if isinstance(getattr(onionskin, name), type)]
PLAIN = {member for kind in (object, tuple, OSError) for member in dir(kind)}  # what Python gives to a class


@pytest.mark.parametrize("name", onionskin.__all__)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^\.\. auto(class|function|exception):: {name}\b", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_the_members_of_a_class_are_those_that_the_reference_has(name: str) -> None:
    public = getattr(onionskin, name)
    members = {member for member in dir(public) if not member.startswith("_")} - PLAIN
    assert members == members_in_reference(name, members)


def members_in_reference(name: str, members: set[str]) -> set[str]:
    """Return what the page names as members of a class, and what its docstring does; all of them where it says so."""
    found: set[str] = set()
    owner = ""
    for directive, entry, options in re.findall(
        r"^ *\.\. (auto\w+):: ([\w.]+).*\n((?: +:.*\n)*)", REFERENCE, re.MULTILINE
    ):
        if directive in ("autoclass", "autoexception"):
            owner = entry
            found |= members if owner == name and ":members:" in options else set()
        elif directive in ("automethod", "autoproperty"):
            of, _, member = entry.rpartition(".")
            found |= {member} if (of or owner) == name else set()
    return found | (members & attributes_of(name))


def attributes_of(name: str) -> set[str]:
    """Return the attributes that the docstring of a class says it has."""
    _, _, section = (inspect.getdoc(getattr(onionskin, name)) or "").partition("Attributes\n----------\n")
    return set(re.findall(r"^(\w+) : ", section, re.MULTILINE))


def test_an_open_store_and_volume_have_no_other_attributes_than_the_reference_says(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        assert {name for name in vars(store) if not name.startswith("_")} == attributes_of("Store")
        with store.create("web", size="1M") as volume:
            assert {name for name in vars(volume) if not name.startswith("_")} == attributes_of("Volume")


@pytest.mark.parametrize("name", onionskin.__all__)
def test_a_public_name_has_a_docstring(name: str) -> None:
    public = getattr(onionskin, name)
    assert inspect.getdoc(public)
    members = vars(public) if isinstance(public, type) else {}
    without = [key for key, value in members.items() if key[0] != "_" and callable(value) and not inspect.getdoc(value)]
    assert without == []


@pytest.mark.parametrize("verb", sorted(set(command_line.commands) - ABOUT_ITSELF))
def test_the_glossary_says_what_others_call_a_verb(verb: str) -> None:
    table = (
        (ROOT / "docs/glossary.md").read_text().partition("## From onionskin to the others")[2].partition("\n## ")[0]
    )
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert any(re.search(rf"`{verb}\b", first) for first in firsts)


def documented() -> list[tuple[str, Any]]:
    """Return the functions and methods that the reference names, with their names."""
    found: dict[str, Any] = {}
    owner: Any = onionskin
    for directive, entry in re.findall(r"^ *\.\. (auto\w+|currentmodule):: ([\w.]+)", REFERENCE, re.MULTILINE):
        if directive == "currentmodule":
            owner = importlib.import_module(entry)
        public = getattr(owner, entry, None)
        if inspect.isfunction(public):
            found[entry] = public
        elif inspect.isclass(public) and not issubclass(public, Exception):
            for name, member in vars(public).items():
                if not name.startswith("_") and inspect.isfunction(member):
                    found[f"{entry}.{name}"] = member
    return list(found.items())


def section(function: Any, name: str) -> str:
    """Return a section of a docstring, or an empty text."""
    parts = re.split(r"^(\w+)\n-+$", inspect.getdoc(function) or "", flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(name, "")


def parameters_in(text: str) -> set[str]:
    """Return the names in entries such as `offset, length : int` or `**configuration`."""
    entries = [line.partition(" : ")[0] for line in text.splitlines() if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for entry in entries for name in entry.split(",")}


@pytest.mark.parametrize(("name", "function"), documented())
def test_a_public_function_says_what_it_takes_and_gives(name: str, function: Any) -> None:
    signature = inspect.signature(function)
    assert parameters_in(section(function, "Parameters")) == set(signature.parameters) - {"self", "cls"}, name
    gives = signature.return_annotation not in (None, "None", object)
    assert bool(section(function, "Returns") or section(function, "Yields")) == (gives and not is_endless(signature))


def is_endless(signature: inspect.Signature) -> bool:
    return "NoReturn" in str(signature.return_annotation)
