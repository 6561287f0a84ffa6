"""A store on the command line, in this process and in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from onionskin.cli.app import onionskin

COMMAND = [sys.executable, "-m", "onionskin"]


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run a command line in this process; its exit status is the one that a shell would see."""

    def invoke(*arguments: object, input: bytes | str | None = None) -> Result:
        return CliRunner().invoke(onionskin, [str(argument) for argument in arguments], input=input)

    return invoke


@pytest.fixture
def spawn() -> Callable[..., "subprocess.Popen[bytes]"]:
    """Start a command line in a process of its own."""

    def start(*arguments: object, **options: Any) -> "subprocess.Popen[bytes]":
        environment = os.environ | options.pop("env", {})
        return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **options)

    return start


@pytest.fixture
def vms(tmp_path: Path, run: Callable[..., Result]) -> Path:
    """A store with a volume web of 1 MiB that has a snapshot clean and a clean head."""
    store = tmp_path / "vms"
    assert run("create", f"{store}/web", "--size", "1M").exit_code == 0
    assert run("write", f"{store}/web", 0, input=b"clean").exit_code == 0
    assert run("snapshot", f"{store}/web@clean", "--note", "as installed").exit_code == 0
    return store
