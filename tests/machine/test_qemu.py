"""Machines that QEMU runs, without a supervisor: a guest of one boot sector, over NBD."""

import errno
import os
import re
import shlex
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.guests import MIB, SECONDS_MAX, Console, configuration, has_ended, until
from support.processes import processes_in

from onionskin.base.threads import Thread
from onionskin.errors import StateError
from onionskin.machine import noting, qemu, session
from onionskin.machine.device_state import empty_file
from onionskin.machine.hypervisor import Configuration, Identity, compare
from onionskin.machine.monitor import MonitorError
from onionskin.machine.qemu import QemuHypervisor, QemuProcess, adopt
from onionskin.machine.qemu_command import refuse_arguments
from onionskin.machine.ram import GuestRam
from onionskin.storage.locks import start_ticks

pytestmark = pytest.mark.slow  # each starts QEMU

Launch = Callable[..., QemuProcess]


def test_it_starts_stopped_and_runs_once_it_is_let_go(launch: Launch, directory: Path) -> None:
    process = launch()
    assert process.is_paused
    with Console(directory / "console") as console:
        process.resume()
        assert console.wait_ticks() >= 3
    assert not process.is_paused


def test_its_disk_boots_and_what_it_writes_is_in_the_volume(launch: Launch, directory: Path, vms: Path) -> None:
    process = launch()
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
        process.pause()
        console.wait(lambda: True)
    import onionskin

    with onionskin.connect(vms, "web") as served:
        assert int.from_bytes(served.read(512, 4), "little") >= 3


def test_only_its_user_may_use_what_is_in_its_directory(launch: Launch, directory: Path) -> None:
    launch()
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_its_ram_file_stays_as_it_is(launch: Launch, directory: Path, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.touch(0o600)
    os.truncate(ram, 16 * MIB)
    process = launch(ram_file=ram)
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
    assert process.guest_ram is not None and process.guest_ram.collect() > 0
    assert ram.stat().st_blocks == 0


def test_writes_are_noted_from_before_the_first_instruction(launch: Launch, directory: Path) -> None:
    process = launch()
    ram = process.guest_ram
    assert ram is not None
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
        process.pause()
    ram.collect()
    assert ram._unsaved[9]  # the page at 0x9000, which tick.S fills
    assert ram._unsaved[7]  # the boot sector itself
    assert ram.unsaved_pages < 4096 // 2


def test_what_the_hypervisor_put_into_the_first_page_is_there_when_the_guest_begins(launch: Launch) -> None:
    process = launch(given={"qemu_args": ("-device", "loader,addr=0x400,data=0x12345678,data-len=4")})
    ram = process.guest_ram
    assert ram is not None
    said = process.monitor.execute("human-monitor-command", {"command-line": "xp /1xw 0x400"})
    assert said.split() == ["0000000000000400:", "0x12345678"]
    assert ram._unsaved[0]  # the first snapshot has it, too


def test_a_pause_says_whether_it_ran(launch: Launch) -> None:
    process = launch()
    assert process.pause() is False
    process.resume()
    assert process.pause() is True
    assert process.is_paused


def test_a_press_of_its_power_button_ends_it(launch: Launch, directory: Path) -> None:
    process = launch()
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
        process.power_down()
        assert process.wait(SECONDS_MAX) == 0


def test_a_quit_ends_it_and_a_second_one_does_nothing(launch: Launch) -> None:
    process = launch()
    process.quit(SECONDS_MAX)
    assert process.wait(0) == 0
    process.quit(SECONDS_MAX)


def test_a_quit_kills_what_does_not_answer(launch: Launch) -> None:
    process = launch()
    os.kill(process.pid, signal.SIGSTOP)
    process.quit(0.2)
    assert process.wait(0) == -signal.SIGKILL


def test_the_state_of_its_devices_is_saved_and_loaded_in_place(launch: Launch, directory: Path, tmp_path: Path) -> None:
    process = launch()
    state = tmp_path / "state"
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
        process.prepare_state(state)
        process.pause()
        assert process.save_state() == process.plugged()
        process.finish_state()
        assert 0 < state.stat().st_size < 2 * MIB
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        process.load_state(state)
        process.resume()
        console.wait_ticks()


def test_a_machine_that_starts_as_it_was_saved_has_its_state_opened_before_its_writes_are_noted(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    saved_state(launch, state)
    seen: list[bool] = []
    note_writes = QemuProcess.note_writes

    def look(process: QemuProcess) -> None:
        assert process._opening is not None
        process._opening[1]()
        nodes = [one["node-name"] for one in process.monitor.execute("query-named-block-nodes")]
        seen.append(any(name.startswith("state-") for name in nodes))
        note_writes(process)

    monkeypatch.setattr(QemuProcess, "note_writes", look)
    process = launch(state=state)
    assert seen == [True]
    assert process.started_with == process.plugged()
    nodes = [one["node-name"] for one in process.monitor.execute("query-named-block-nodes")]
    assert not any(name.startswith("state-") for name in nodes)


def saved_state(launch: Launch, state: Path) -> None:
    """Save the state of the devices of a machine that has not run, and end it."""
    process = launch()
    process.prepare_state(state)
    process.save_state()
    process.finish_state()
    process.quit(10)


def test_a_machine_that_starts_as_it_was_saved_has_its_writes_noted_before_it_answers(
    launch: Launch, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_state(launch, tmp_path / "state")
    monkeypatch.setattr(qemu, "note_writes", lambda *_, **__: pytest.fail("it was done behind the answer"))
    process = launch(state=tmp_path / "state")
    assert isinstance(process.guest_ram, GuestRam)
    process.guest_ram.note_written()
    before = {tuple(run) for run in process.guest_ram.unsaved_runs.tolist()}
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
        process.pause()
    process.guest_ram.note_written()
    assert {tuple(run) for run in process.guest_ram.unsaved_runs.tolist()} != before


@pytest.mark.parametrize("why", ["elsewhere", "failed", "no thread"])
def test_writes_that_could_not_be_noted_beside_the_start_are_noted_behind_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """What was armed by then looks like pages that were swapped out: none of those counts as written."""
    saved_state(launch, tmp_path / "state")

    class NoThread(Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    add_private, calls = GuestRam.add_private, []

    def fail_once(ram: GuestRam, *, swapped: bool) -> None:
        calls.append(swapped)
        if calls == [True, False]:  # it is armed by then
            raise OSError("no memory is left")
        add_private(ram, swapped=swapped)

    if why == "elsewhere":
        monkeypatch.setattr(noting.Noted, "is_at", lambda *_: False)
    elif why == "failed":
        monkeypatch.setattr(GuestRam, "add_private", fail_once)
    else:
        monkeypatch.setattr(noting, "Thread", NoThread)
    process = launch(state=tmp_path / "state")
    assert isinstance(process.guest_ram, GuestRam)
    runs = process.guest_ram.unsaved_runs
    assert int((runs["end"] - runs["start"]).sum()) < process.guest_ram.length // 2


def test_a_machine_that_ends_as_it_starts_from_a_state_says_so_and_leaves_no_thread(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_state(launch, tmp_path / "state")

    def kill(process: QemuProcess, *_: object) -> None:
        os.kill(process.pid, signal.SIGKILL)
        raise StateError("it was killed as it started")

    monkeypatch.setattr(QemuProcess, "_connect", kill)
    with pytest.raises(StateError, match="it was killed as it started"):
        launch(state=tmp_path / "state")
    assert not [one for one in threading.enumerate() if one.name == "onionskin noting"]


def test_a_start_from_a_state_that_cannot_be_opened_says_so_and_leaves_no_process(
    launch: Launch, tmp_path: Path, directory: Path
) -> None:
    with pytest.raises(MonitorError, match="may be damaged"):
        launch(state=tmp_path / "none")
    assert not processes_in(directory.parent)


def test_a_state_without_a_snapshot_is_refused_and_leaves_nothing(launch: Launch, tmp_path: Path) -> None:
    process = launch()
    process.prepare_state(tmp_path / "state")
    process.finish_state()
    with pytest.raises(MonitorError, match=r"snapshot-load.*may be damaged"):
        process.load_state(tmp_path / "state")
    assert [one["node-name"] for one in process.monitor.execute("query-named-block-nodes")] != []
    assert not [
        one for one in process.monitor.execute("query-named-block-nodes") if one["node-name"].startswith("state-")
    ]


def test_the_hypervisor_syncs_no_file_of_a_state(launch: Launch, tmp_path: Path) -> None:
    """Each sync is a turn of a thread of it, and the guest stands still."""
    process = launch()
    process.prepare_state(tmp_path / "state")
    nodes = process.monitor.execute("query-named-block-nodes")
    found = [one["cache"]["no-flush"] for one in nodes if one["file"].endswith("/state")]
    process.finish_state()
    assert found == [True, True]  # its format, and the file itself


def test_a_state_before_whose_file_something_is_refused_leaves_no_file_behind(launch: Launch, tmp_path: Path) -> None:
    process = launch()
    process.prepare_state(tmp_path / "state")
    process.save_state()
    process.finish_state()
    with pytest.raises(MonitorError, match="no-such-command"):
        process.load_state(tmp_path / "state", ("no-such-command", None))
    nodes = [one["node-name"] for one in process.monitor.execute("query-named-block-nodes")]
    assert not [name for name in nodes if "state-" in name]


@pytest.mark.parametrize("is_whole", [False, True], ids=["half", "whole"])
def test_what_a_killed_supervisor_left_of_a_file_is_in_nobodys_way(
    launch: Launch, tmp_path: Path, is_whole: bool
) -> None:
    """An older onionskin made it of two nodes."""
    process = launch()
    (tmp_path / "left").write_bytes(empty_file())
    file = {"driver": "file", "node-name": "file-of-state-1", "filename": str(tmp_path / "left")}
    process.monitor.execute("blockdev-add", file)
    if is_whole:
        process.monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": "state-1", "file": "file-of-state-1"})
    process.drop_leftovers()
    nodes = [one["node-name"] for one in process.monitor.execute("query-named-block-nodes")]
    assert not [name for name in nodes if "state-" in name]
    process.prepare_state(tmp_path / "state")
    process.finish_state()


def test_each_machine_has_the_generation_that_it_was_given(launch: Launch) -> None:
    identity = Identity()
    process = launch(identity=identity)
    assert process.monitor.execute("query-vm-generation-id")["guid"] == identity.generation


def test_children_of_the_hypervisor_do_not_inherit_the_library(launch: Launch, tmp_path: Path) -> None:
    process = launch()
    process.monitor.execute("migrate", {"uri": f"exec:env > {tmp_path}/environment; cat > /dev/null"})
    while process.monitor.execute("query-migrate")["status"] not in ("completed", "failed"):
        pass
    text = (tmp_path / "environment").read_text()
    assert "PATH=" in text
    assert "LD_PRELOAD" not in text and "ONIONSKIN_RAM" not in text and "ONIONSKIN_PRELOAD" not in text


def test_a_machine_is_taken_over_with_all_that_it_wrote(launch: Launch, directory: Path) -> None:
    first = launch()
    with Console(directory / "console") as console:
        first.resume()
        console.wait_ticks()
        first.close()  # as a supervisor that was killed
        second = adopt(
            first.pid, start_ticks(first.pid), "lab", directory, first.ram_file, is_tracked=True, on_event=None
        )
        assert not second.is_paused
        assert second.guest_ram is not None and second.guest_ram._unsaved[9]
        console.wait_ticks()
        second.pause()
        second.guest_ram.collect()
        assert second.guest_ram.unsaved_pages < 4096 // 2
        second.quit(SECONDS_MAX)
    assert first.wait(SECONDS_MAX) == 0


@pytest.mark.parametrize("runs", ["exec", ""])
def test_a_script_that_starts_qemu_is_taken_for_it_and_no_process_is_left(
    qemu: list[str], directory: Path, disks: list[str], tmp_path: Path, runs: str
) -> None:
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\n{runs} {shlex.join(qemu)} "$@"\n')
    script.chmod(0o700)
    process = QemuHypervisor().launch(
        configuration([str(script)]),
        **{"name": "lab", "directory": directory, "ram_file": None, "disks": disks, "state": None},
        identity=Identity(),
    )
    try:
        assert Path(f"/proc/{process.pid}/exe").readlink().name.startswith("qemu")
        assert process.ram() is None  # the library was in the script's process
        with Console(directory / "console") as console:
            process.resume()
            console.wait_ticks()
    finally:
        process.quit(0)
    until(lambda: has_ended(process.pid))
    assert process.wait(0) is not None


def test_a_machine_outlives_the_script_that_started_it_and_is_ended_all_the_same(
    qemu: list[str], directory: Path, disks: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\n{shlex.join(qemu)} "$@"\n')
    script.chmod(0o700)
    process = QemuHypervisor().launch(
        configuration([str(script)]),
        **{"name": "lab", "directory": directory, "ram_file": None, "disks": disks, "state": None},
        identity=Identity(),
    )
    try:
        assert process._child is not None
        os.kill(process._child.pid, signal.SIGKILL)
        assert process._child.wait(SECONDS_MAX) == -signal.SIGKILL
        assert process.wait(0) is None
        with Console(directory / "console") as console:
            process.resume()
            console.wait_ticks()
    finally:
        process.quit(0)
    until(lambda: has_ended(process.pid))
    assert process.wait(0) is not None


def test_who_answers_in_the_place_of_its_qemu_is_named_and_not_taken_over(launch: Launch, directory: Path) -> None:
    process = launch()
    process.close()
    with pytest.raises(StateError, match=f"process {process.pid} answers at .* which is not QEMU of machine 'lab'"):
        adopt(os.getpid(), start_ticks(os.getpid()), "lab", directory, process.ram_file, is_tracked=True, on_event=None)


def test_a_connection_that_ended_while_it_lives_is_made_again(launch: Launch, directory: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    process = launch()
    process._on_event = lambda event, _: heard.append(event)
    process.prepare_state(tmp_path / "state")
    assert not process.is_disconnected
    with suppress(MonitorError):  # QEMU takes it for the end
        process.monitor._await(_cut(process), "cut", SECONDS_MAX)
    until(lambda: process.is_disconnected)
    with pytest.raises(MonitorError, match="has it ended"):
        _ = process.status
    process.connect_again()
    assert not process.is_disconnected
    with Console(directory / "console") as console:
        process.resume()
        console.wait_ticks()
    until(lambda: "RESUME" in heard)
    process.prepare_state(tmp_path / "state")  # nothing of the first one is left
    process.finish_state()


def test_a_takeover_from_a_sandbox_that_keeps_ram_from_being_read_says_what_to_do(
    launch: Launch, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = launch()
    process.close()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(GuestRam, "try_out", refuse)
    with pytest.raises(StateError, match="run this outside, or end the machine"):
        adopt(process.pid, process.ticks, "lab", directory, process.ram_file, is_tracked=True, on_event=None)


def test_a_guest_that_does_not_wake_is_told_of_with_what_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onionskin.machine.qemu.WAKE_SECONDS", 0)
    asked: list[str] = []
    sleeper = SimpleNamespace(status="suspended", name="lab", monitor=SimpleNamespace(execute=asked.append))
    with pytest.raises(StateError, match="does not wake; end the machine"):
        QemuProcess.wake(sleeper)  # type: ignore[arg-type]
    assert asked


async def _cut(process: QemuProcess) -> None:
    writer = process.monitor._client._writer
    assert writer is not None
    writer.transport.abort()


def test_without_tracking_its_ram_is_a_shared_file_of_its_own(
    launch: Launch, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise StateError("the preload library is missing")

    monkeypatch.setattr("onionskin.machine.qemu.library", missing)
    process = launch()
    assert process.ram() is None and process.guest_ram is None
    assert process.ram_file.parent == Path("/dev/shm")
    with Console(directory / "console") as console:
        process.resume()
        count = console.wait_ticks()
        with process.ram_file.open("rb") as ram:
            ram.seek(0x9000)
            assert int.from_bytes(ram.read(4), "little") >= count
    process.quit(SECONDS_MAX)
    assert not process.ram_file.exists()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("-m", "64"), "-m"),
        (("--machine", "q35"), "-machine"),
        (("-pflash", "OVMF.fd"), "UEFI"),
        (("-drive", "if=pflash,file=x"), "UEFI"),
        (("-bios", "/usr/share/OVMF/OVMF_CODE.fd"), "UEFI"),
        (("-device", "vfio-pci,host=01:00.0"), "vfio"),
        (("-netdev", "vhost-user,id=n"), "vhost-user"),
        (("-device", "vhost-scsi-pci,wwpn=naa.5001405324af0985"), "vhost-scsi"),
        (("-device", "pvrdma,netdev=n"), "pvrdma"),
        (("-device", "scsi-generic,drive=d"), "a disk of the machine"),
        (("-device", '{"driver":"scsi-block","drive":"d"}'), "a disk of the machine"),
        (("-device", "virtio-balloon-pci"), "balloon"),
        (("-device", '{"driver":"virtio-balloon-pci","free-page-reporting":true}'), "balloon"),
        (("-device", "nvme,serial=a,drive=d"), "cannot save the state of nvme"),
        (("-device", '{"driver":"nvme","serial":"a"}'), "cannot save the state of nvme"),
        (("-device", "usb-mtp,rootdir=/srv"), "cannot save the state of usb-mtp"),
        (("-device", "usb-wacom-tablet"), "cannot save the state of usb-wacom-tablet"),
        (("-device", "virtio-input-host-pci,evdev=/dev/input/event0"), "cannot save the state of virtio-input-host"),
        (("-device", "rocker,name=a"), "cannot save the state of rocker"),
        (("-incoming", "defer"), "-incoming"),
        (("alone",), "belongs to no option"),
        (("-nodefaults", "disk.raw"), "belongs to no option"),  # QEMU takes it for a disk
        (("-win2k-hack", "disk.raw"), "belongs to no option"),
        (("-nodefaults", "-daemonize"), "-daemonize"),
        (("-device", "-snapshot"), "-snapshot"),
        (("--preconfig",), "-preconfig"),
        (("-readconfig", "machine.cfg"), "-readconfig"),
        (("-hda", "disk.raw"), "a disk of the machine"),
        (("-drive", "file=disk.raw,if=virtio"), "a disk of the machine"),
        (("-blockdev", '{"driver":"file","filename":"disk.raw","node-name":"a"}'), "a disk of the machine"),
        (("-drive", "file=seed.iso,media=cdrom,cache=none"), "past the host's cache"),
        (("-drive", "file=seed.raw,readonly=on,aio=native,cache.direct=on"), "past the host's cache"),
        (
            ("-blockdev", '{"driver":"file","filename":"a","node-name":"a","read-only":true,"cache":{"direct":true}}'),
            "past the host's cache",
        ),
        (("-smp", "4"), "give cpus= instead"),
        (("-append", "quiet"), "give append= instead"),
        (("-perfmap", "disk.raw"), "belongs to no option"),
        (("-run-with", "chroot=/srv"), "-run-with"),
    ],
)
def test_an_argument_that_no_snapshot_would_survive_is_refused_by_name(given: tuple[str, ...], named: str) -> None:
    with pytest.raises(StateError, match=named):
        QemuHypervisor().check(Configuration(16 * MIB, qemu_args=given), 1)


@pytest.mark.parametrize(
    "given",
    [
        ("-virtfs", "local,path=/srv,mount_tag=srv,security_model=none"),
        ("-fsdev", "local,id=srv,path=/srv,security_model=none"),
        ("-device", "virtio-9p-pci,fsdev=srv,mount_tag=srv"),
        ("-device", '{"driver":"virtio-9p-pci","fsdev":"srv","mount_tag":"srv"}'),
    ],
)
def test_a_shared_directory_is_refused_for_a_new_machine_and_one_that_has_it_already_can_load_its_snapshots(
    given: tuple[str, ...],
) -> None:
    made = Configuration(16 * MIB, qemu_args=given)
    with pytest.raises(StateError, match="directory of the host"):
        refuse_arguments(made)
    QemuHypervisor().check(made, 1)


def test_no_word_behind_an_option_that_takes_none_is_a_disk_to_this_qemu(qemu: list[str]) -> None:
    said = subprocess.run([qemu[0], "-help"], capture_output=True, text=True, check=True).stdout
    # What an option takes stands one space behind it; what it does, further on or in the next line.
    found = re.findall(r"^(-[\w-]+)(?: or -[\w-]+)?(?=$|\t| \t|  )", said, re.MULTILINE)
    assert "-nodefaults" in found
    for option in {one.replace("--", "-") for one in found} - {"-dtb"}:  # which takes a file, and is shown without one
        with pytest.raises(StateError, match=rf"belongs to no option|argument {option} for QEMU cannot be given"):
            QemuHypervisor().check(configuration(qemu, qemu_args=(option, "disk.raw")), 1)


@pytest.mark.parametrize(
    "given",
    [
        ("-drive", "file=seed.iso,media=cdrom"),
        ("-drive", "file=seed.raw,if=virtio,readonly=on"),
        ("-blockdev", '{"driver":"file","filename":"seed.raw","node-name":"a","read-only":true}'),
        ("-nodefaults", "-cdrom", "seed.iso"),
    ],
)
def test_what_the_guest_can_only_read_may_be_given(given: tuple[str, ...]) -> None:
    QemuHypervisor().check(Configuration(16 * MIB, qemu_args=given), 1)


DRIVES = [
    *(
        "readonly=on",
        "readonly=yes",
        "readonly=true",
        "readonly=y",
        "readonly",
        "read-only=on",
        "read-only",
        "noreadonly",
    ),
    *(
        "readonly=off",
        "readonly=off,readonly=on",
        "media=cdrom",
        "media=cdrom,readonly=off",
        "media=disk",
        "cache=none",
    ),
    *("file.read-only=on", "media=cdrom,media=disk"),
]
NODES = [
    *("read-only=on", "read-only=yes", "read-only=true", "read-only=y", "read-only=off", "discard=ignore"),
    "read-only=on,read-only=off",
]
JSON_NODES = [
    '{{"driver":"file","filename":"{file}","node-name":"a","read-only":true}}',
    "{{'driver':'file','filename':'{file}','node-name':'a', 'read-only' : true}}",
    '{{"driver":"file","filename":"{file}","node-name":"a","read-only":false}}',
    '{{"driver":"raw","node-name":"a","file":{{"driver":"file","filename":"{file}","read-only":true}}}}',
]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("-drive", "if=none,format=raw,id=a,file={file}," + one) for one in DRIVES),
        ("-drive", "if=none,format=raw,id=a,file={file},,readonly=on"),
        *(("-blockdev", "driver=file,node-name=a,filename={file}," + one) for one in NODES),
        *(("-blockdev", one) for one in JSON_NODES),
    ],
)
def test_no_drive_is_taken_that_qemu_itself_would_write(
    qemu: list[str], tmp_path: Path, option: str, value: str
) -> None:
    for name in ("seed.raw", "seed.raw,readonly=on"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    value = value.format(file=tmp_path / "seed.raw")
    started = subprocess.run(
        [*qemu, "-nodefaults", "-display", "none", "-S", "-machine", "none", "-monitor", "stdio", option, value],
        input="info block -n\nquit\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    given = Configuration(16 * MIB, program=qemu[0], qemu_args=(option, value))
    if re.search(r"\((raw|file)\)", started.stdout):
        with pytest.raises(StateError, match="a disk of the machine"):
            refuse_arguments(given)
    elif re.search(r"\((raw|file), read-only\)", started.stdout):
        refuse_arguments(given)
    else:
        assert started.returncode != 0, started.stdout  # QEMU refuses it


def test_a_program_that_is_missing_or_no_qemu_is_refused_in_words() -> None:
    with pytest.raises(StateError, match="not installed"):
        QemuHypervisor().check(Configuration(16 * MIB, program="qemu-system-none"), 1)
    with pytest.raises(StateError, match="does not answer as QEMU"):
        QemuHypervisor().check(Configuration(16 * MIB, program="true"), 1)


def test_what_a_program_says_that_is_no_qemu_is_in_the_error(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho no memory is left >&2\n")
    script.chmod(0o700)
    with pytest.raises(StateError, match="no memory is left"):
        QemuHypervisor().check(Configuration(16 * MIB, program=str(script)), 1)


def noting_its_pid(directory: Path) -> str:
    """Return a command of the shell that notes the process it has started last in `pid`, which appears as a whole."""
    return f"echo $! > {directory}/pid.new && mv {directory}/pid.new {directory}/pid"


@pytest.mark.parametrize("behind", ["", "wait"])
def test_no_process_is_left_of_a_program_that_leaves_one_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    monkeypatch.setattr("onionskin.machine.qemu.PROBE_SECONDS", 1)
    read = session._read

    def read_once_it_is_left(*given: Any) -> Any:
        until((tmp_path / "pid").exists)
        return read(*given)

    monkeypatch.setattr(session, "_read", read_once_it_is_left)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\n{noting_its_pid(tmp_path)}\n{behind}\n")
    script.chmod(0o700)
    with pytest.raises(StateError, match="does not answer as QEMU"):
        QemuHypervisor().check(Configuration(16 * MIB, program=str(script)), 1)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: has_ended(pid))


def test_no_session_is_killed_whose_number_may_be_somebody_elses_by_then(
    qemu: list[str], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []

    def kill(session: int, number: int) -> None:
        os.waitid(os.P_PID, session, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises where it was reaped
        killed.append(session)
        os.kill(-session, number)

    monkeypatch.setattr("os.killpg", kill)
    script = tmp_path / "script"
    line = f'{shlex.join(qemu)} "$@"'
    script.write_text(f"#!/bin/sh\n{line}\nsleep 1000 >/dev/null 2>&1 &\n{noting_its_pid(tmp_path)}\n")
    script.chmod(0o700)
    with pytest.raises(StateError, match=r"did not start: .*nonsense"):
        QemuHypervisor().launch(
            configuration([str(script)], qemu_args=("-device", "nonsense")),
            **{"name": "lab", "directory": directory, "ram_file": None, "disks": [], "state": None},
            identity=Identity(),
        )
    until(lambda: has_ended(int((tmp_path / "pid").read_text())))
    assert len(killed) >= 2  # that of the look at its version, and that of the start


def test_a_machine_type_that_is_missing_is_refused(qemu: list[str]) -> None:
    with pytest.raises(StateError, match="pc-i440fx-0"):
        QemuHypervisor().check(configuration(qemu, machine_type="pc-i440fx-0.1"), 1)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_what_is_no_file_is_refused_as_a_kernel_and_nobody_waits_for_it(
    qemu: list[str], tmp_path: Path, what: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "file").touch()
    given = {"kernel": str(tmp_path / "file"), what: str(tmp_path / "it")}
    make(tmp_path / "it")
    with pytest.raises(StateError, match="it is no file, and the machine boots from it"):
        QemuHypervisor().check(configuration(qemu, **given), 0)


def test_what_is_recorded_has_a_versioned_machine_and_all_devices(qemu: list[str]) -> None:
    network = ("-device", "virtio-rng-pci", "-nic", "user,model=e1000,mac=52:54:00:00:00:01")
    found = QemuHypervisor().check(configuration(qemu, qemu_args=network), 2)
    assert found.machine_type.startswith("pc-i440fx-")
    assert [one.partition(",")[0] for one in found.devices] == [
        *("vmgenid", "virtio-serial-pci", "virtserialport", "virtio-blk-pci", "virtio-blk-pci", "virtio-rng-pci"),
        "-nic model=e1000",
    ]
    assert not any("52:54" in one for one in found.devices)
    compare(found, QemuHypervisor().check(configuration(qemu, qemu_args=network), 2))
    with pytest.raises(StateError, match="virtio-rng"):
        compare(found, QemuHypervisor().check(configuration(qemu), 2))


def test_a_command_line_that_qemu_refuses_is_reported_in_its_words(launch: Launch) -> None:
    with pytest.raises(StateError, match="no-such-device"):
        launch(given={"qemu_args": ("-device", "no-such-device")})


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # bash has an unsetenv of its own
def test_a_qemu_that_the_library_is_not_in_does_not_write_to_the_ram_file_that_forks_read(
    qemu: list[str], directory: Path, disks: list[str], tmp_path: Path, shell: str
) -> None:
    """The library is in the shell that reads the script, and gone when that becomes QEMU, as one with capabilities has it."""
    script = tmp_path / "qemu"
    script.write_text(f'#!{shell}\nexec {qemu[0]} "$@"\n')
    script.chmod(0o755)
    ram = tmp_path / "ram"
    ram.write_bytes(b"Z" * (16 * MIB))
    written_at_reset = ("-device", "loader,addr=0x1000,data=0x7473657567,data-len=8")
    process = QemuHypervisor().launch(
        configuration([str(script), *qemu[1:]], qemu_args=written_at_reset),
        name="lab",
        directory=directory,
        ram_file=ram,
        disks=disks,
        state=None,
        identity=Identity(),
    )
    try:
        assert process.ram() is None
        assert process.ram_file != ram
        assert ram.read_bytes() == b"Z" * (16 * MIB)
        assert not (directory / "ram.stand-in").exists()
    finally:
        process.quit(0)
