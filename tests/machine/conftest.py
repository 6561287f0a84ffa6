"""A store with a disk that boots, its server, and machines that end with the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.guests import QEMUS, build_tick_disk, configuration
from support.servers import Serve

import onionskin
from onionskin.machine.hypervisor import Identity
from onionskin.machine.qemu import QemuHypervisor, QemuProcess


@pytest.fixture(params=QEMUS, ids=lambda qemu: Path(qemu[0]).as_posix().strip("/").replace("/", "-"))
def qemu(request: pytest.FixtureRequest) -> list[str]:
    """The command and the first arguments of each QEMU that there is."""
    return list(request.param)


@pytest.fixture(scope="session")
def tick_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tick_disk(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def vms(tmp_path: Path, tick_disk: Path) -> Path:
    """A store with a volume web, which boots into tick.S, and an empty volume data."""
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", base=tick_disk).close()
        store.create("data", size="1M").close()
    return tmp_path / "vms"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of a machine, with a longer path than the name of a socket may have."""
    path = tmp_path / ("deep" * 20) / "machine"
    path.mkdir(parents=True, mode=0o700)
    return path


@pytest.fixture
def disks(vms: Path, directory: Path, tmp_path: Path) -> Iterator[list[str]]:
    """The disks web and data, served at `directory`."""
    names = ("web", "data")
    with Serve(*(f"{vms}/{name}" for name in names), "--socket", directory / "nbd", log=tmp_path / "serve.log"):
        yield [f"nbd+unix:///{name}?socket={directory / 'nbd'}" for name in names]


@pytest.fixture
def launch(qemu: list[str], directory: Path, disks: list[str]) -> Iterator[Callable[..., QemuProcess]]:
    """Start a machine that is killed at the end, if it still runs."""
    with ExitStack() as stack:

        def start(*, memory: int = 16, given: dict[str, Any] | None = None, **how: Any) -> QemuProcess:
            arguments = {
                "ram_file": None,
                "disks": disks,
                "state": None,
                "identity": Identity(),
                "directory": directory,
            }
            process = QemuHypervisor().launch(
                configuration(qemu, memory, **(given or {})), name="lab", **(arguments | how)
            )
            stack.callback(process.quit, 0)
            return process

        yield start
