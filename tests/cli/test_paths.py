"""Paths may hold any bytes, and URIs are such that clients find the socket."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[bytes]"]
NAMES = ["with a space", "50%,comma=1?&#", "grün", os.fsdecode(b"not \xff utf-8")]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_an_image_of_any_name_is_written_and_read(run: Run, vms: Path, tmp_path: Path, name: str, kind: str) -> None:
    image = tmp_path / name
    assert run("export", f"{vms}/web", image, "--format", kind).exit_code == 0
    told = run("export", f"{vms}/web", f"{image}2", "--format", kind, "--json")
    assert os.fsencode(json.loads(told.stdout)["path"]) == os.fsencode(f"{image}2")
    assert run("import", image, f"{vms}/again").exit_code == 0
    assert run("compare", image, f"{vms}/again").stdout == "the same\n"


def test_a_name_that_the_locale_cannot_write_is_told_with_what_it_can(spawn: Spawn, vms: Path, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"not \xff utf-8")
    process = spawn("export", f"{vms}/web", image, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"LC_ALL": "C"})
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, b"")
    assert b"not ? utf-8" in out
    assert image.exists()


@pytest.mark.parametrize("verb", ["export", "delta"])
def test_a_file_of_any_name_is_written_where_the_locale_is_not_utf_8(
    spawn: Spawn, run: Run, vms: Path, tmp_path: Path, verb: str
) -> None:
    """Of what is decoded from UTF-8, other encodings cannot make the path again."""
    image = tmp_path / "日本.out"
    words = [f"{vms}/web@clean", image] if verb == "export" else [f"{vms}/web@clean", "-o", image]
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = (
        spawn(verb, *words, "--format", "raw", stderr=subprocess.PIPE, env=environment)
        if verb == "export"
        else (spawn(verb, *words, stderr=subprocess.PIPE, env=environment))
    )
    assert process.communicate(timeout=300)[1] == b""
    assert process.returncode == 0 and image.exists()


def test_a_base_whose_path_is_no_text_is_refused_with_the_reason(run: Run, vms: Path, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"not \xff utf-8")
    image.write_bytes(bytes(1 << 20))
    refused = run("create", f"{vms}/over", "--base", image)
    assert refused.exit_code == 2
    assert "cannot be a base: the catalog keeps its path, which is not text that UTF-8 can hold" in refused.stderr
    assert run("info", f"{vms}/over").exit_code == 3


def test_a_command_that_an_error_names_can_be_typed_as_it_stands(run: Run, vms: Path) -> None:
    assert run("rename", f"{vms}/web", "it's new").exit_code == 0
    refused = run("discard", f"{vms}/it's new@none", "--yes")
    assert refused.exit_code == 3
    _, _, command = refused.stderr.strip().partition("list them with: ")
    assert shlex.split(command) == ["onionskin", "snapshots", f"{vms}/it's new"]


def test_an_empty_name_comes_from_a_variable_that_is_not_set(run: Run) -> None:
    refused = run("info", "")
    assert refused.exit_code == 2
    assert "the name is empty" in refused.stderr


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_clients_find_the_socket_by_the_address_that_is_printed(
    spawn: Spawn, vms: Path, tmp_path: Path, name: str
) -> None:
    server = spawn("serve", f"{vms}/web", "--socket", tmp_path / name, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        word, uri = server.stdout.readline().decode("ascii").split()
        assert word == "ready:"
        asked = subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True)
        assert int(asked.stdout) == 1 << 20
    finally:
        server.terminate()
        server.communicate(timeout=300)
