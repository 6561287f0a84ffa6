"""A store with a volume web over a base, and servers that end with the test."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Any

import pytest
from support.servers import Serve, short_socket

import onionskin

MIB = 1 << 20
BASE_BYTES = 64 * MIB


@pytest.fixture
def vms(tmp_path: Path) -> Path:
    """A store with a volume web of 64 MiB over base.raw, of which each MiB is full of its number."""
    with (tmp_path / "base.raw").open("wb") as base:
        for number in range(BASE_BYTES // MIB):
            base.write(bytes([number]) * MIB)
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", base=tmp_path / "base.raw").close()
    return tmp_path / "vms"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    """Start a server on a Unix socket (or where the arguments say) that is killed at the end, if it still runs."""
    with ExitStack() as stack:

        def start(*arguments: object, **options: Any) -> Serve:
            if not {"--tcp", "--socket"} & set(map(str, arguments)) and not options.pop("activated", False):
                arguments = (*arguments, "--socket", short_socket(tmp_path))
            return stack.enter_context(Serve(*arguments, log=tmp_path / "serve.log", **options))

        yield start


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Have this process open no descriptor below 1024, the first that `select` does not take."""
    soft, hard = getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (hard, hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1024:
            held.append(os.dup(held[-1]))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        setrlimit(RLIMIT_NOFILE, (soft, hard))
