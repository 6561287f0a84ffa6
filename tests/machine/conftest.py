"""A store with a disk that boots, its server, and machines that end with the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.gap import Gap
from support.guests import QEMUS, SECONDS_MAX, Console, build_tick_disk, configuration, end_machines
from support.linux_guest import LinuxGuest, build_linux_guest, wait_counts
from support.servers import Serve

import onionskin
from onionskin.machine.hypervisor import Identity
from onionskin.machine.machine import Machine
from onionskin.machine.qemu import QemuHypervisor, QemuProcess


# Of the session, as the machines are that boot Linux.
@pytest.fixture(scope="session", params=QEMUS, ids=lambda qemu: Path(qemu[0]).as_posix().strip("/").replace("/", "-"))
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
def store(vms: Path) -> Iterator[onionskin.Store]:
    """That store, open; machines in it are ended."""
    with onionskin.Store(vms) as store:
        try:
            yield store
        finally:
            end_machines(store)


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


@pytest.fixture
def gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gap:
    return Gap(tmp_path / "gap", monkeypatch)


@pytest.fixture(scope="session")
def linux_guest(tmp_path_factory: pytest.TempPathFactory) -> LinuxGuest:
    return build_linux_guest(tmp_path_factory.mktemp("linux-guest"))


@contextmanager
def booted_machine(directory: Path, guest: LinuxGuest, kernel: Path, qemu: list[str]) -> Iterator[Machine]:
    """A machine with Linux and a screen that was booted, and is off: its snapshot `up` is of the running guest."""
    one = configuration(qemu, 256, qemu_args=("-device", "VGA,vgamem_mb=2", "-vnc", "unix:vnc"))
    with onionskin.Store(directory / "vms") as store:
        store.create("root", size="64M").close()
        store.create("data", size="8M").close()
        machine = store.create_machine(
            "linux",
            disks=["root", "data"],
            memory="256M",
            kernel=kernel,
            initrd=guest.initramfs,
            append="console=ttyS0 quiet panic=-1 counter=64,2000,20",
            program=one.program,
            qemu_args=one.qemu_args,
        )
        machine.start(paused=True)
        try:
            with Console(machine._directory / "console", seconds=SECONDS_MAX) as screen:
                machine.resume()
                wait_counts(screen, 20)
                machine.snapshot("up")
        finally:
            machine.stop(force=True)
        yield machine


@pytest.fixture(scope="session")
def boot(tmp_path_factory: pytest.TempPathFactory, linux_guest: LinuxGuest) -> Iterator[Callable[..., Machine]]:
    """Boot a machine with Linux on a QEMU, once for all tests, each of which begins with a fork of its snapshot `up`."""
    made: dict[tuple[str, ...], Machine] = {}
    with ExitStack() as stack:

        def machine_of(qemu: list[str], kernel: str = "kernel") -> Machine:
            if (which := (kernel, *qemu)) not in made:
                directory = tmp_path_factory.mktemp("linux")
                one = booted_machine(directory, linux_guest, getattr(linux_guest, kernel), qemu)
                made[which] = stack.enter_context(one)
            return made[which]

        yield machine_of


@pytest.fixture(scope="session")
def booted(boot: Callable[..., Machine], qemu: list[str]) -> Machine:
    """A machine that was booted, and is off: its snapshot `up` is of the running guest."""
    return boot(qemu)
