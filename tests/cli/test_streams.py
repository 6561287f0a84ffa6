"""Images that come from stdin or a FIFO and go to stdout, a FIFO or a block device."""

import bz2
import contextlib
import errno
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from support.loop_devices import loop_devices

import onionskin
from onionskin.cli.output import StandardStream
from onionskin.exchange import block_devices
from onionskin.exchange.block_devices import BlockDevice
from onionskin.images import export_to_device, refuse_device

Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[bytes]"]
DISK = b"begin" + bytes(2 << 20) + os.urandom(5000) + b"end"


def shell(script: str, **words: object) -> "subprocess.CompletedProcess[bytes]":
    """Run a line of the shell, in which `os` is the command."""
    command = re.sub(r"\bos\b", "python -m onionskin", script.format(**words))
    path = f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"  # type: ignore[attr-defined]
    return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | {"PATH": path}, timeout=300)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image").write_bytes(DISK)
    return tmp_path / "image"


@pytest.mark.parametrize(
    "line",
    [
        "cat {image} | os import - {vms}/new",
        "cat {image} | os import /dev/stdin {vms}/new",
        "os import - {vms}/new < {image}",
        "os import /dev/stdin {vms}/new < {image}",
        "os import <(cat {image}) {vms}/new",
        "mkfifo {image}.fifo; cat {image} > {image}.fifo & os import {image}.fifo {vms}/new",
        "zstd -qc {image} | os import - {vms}/new",
    ],
)
def test_an_image_is_read_from_where_the_shell_puts_it(run: Run, vms: Path, image: Path, line: str) -> None:
    done = shell(line, image=image, vms=vms)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"unpacked with zstd" in done.stdout) is ("zstd" in line)
    assert run("read", f"{vms}/new", 0, len(DISK)).stdout_bytes == DISK
    assert json.loads(run("info", f"{vms}/new", "--json").stdout)["size_bytes"] == len(DISK)


def test_a_stream_of_zstd_that_wants_more_memory_is_not_called_damaged(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes.fromhex("28b52ffd 00 a8 010000"))  # a window of 2 GiB, and no data
    refused = run("import", tmp_path / "image", f"{tmp_path}/vms/web")
    assert refused.exit_code == 6
    assert "--long=31" in refused.stderr
    assert "unpack it by hand, with that option" in refused.stderr


def test_a_stream_of_bzip2_that_was_cut_short_is_refused_with_what_is_wrong(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bz2.compress(DISK)[:4000])
    refused = run("import", tmp_path / "image", f"{tmp_path}/vms/web")
    assert refused.exit_code == 6
    assert "bzip2 could not unpack it: bzip2: Compressed file ends unexpectedly; fetch it again" in refused.stderr


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_closed_stdin_is_no_image_and_makes_no_store(tmp_path: Path, name: str) -> None:
    done = shell("os import {name} {vms}/new <&-", name=name, vms=tmp_path / "vms")
    assert done.returncode == 1
    assert done.stderr.startswith(b"onionskin: stdin: Bad file descriptor; ")
    assert not (tmp_path / "vms").exists()


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "/dev/null"])
def test_a_stdin_without_an_end_is_no_image_and_makes_no_store(tmp_path: Path, device: str) -> None:
    done = shell("os import - {vms}/new < {device}", vms=tmp_path / "vms", device=device)
    assert done.returncode == 6
    assert done.stderr.startswith(b"onionskin: stdin is a character device, and not a file")
    assert not (tmp_path / "vms").exists()


@pytest.mark.parametrize(
    "line",
    [
        "os export {vms}/web - > {out}",
        "os export {vms}/web /dev/stdout > {out}",
        "os export {vms}/web /dev/stdout | cat > {out}",
        "os export {vms}/web >(cat > {out}) >&2; sleep 0; while ! [ $(stat -c %s {out}) = 1048576 ]; do :; done",
        "mkfifo {out}.fifo; cat {out}.fifo > {out} & os export {vms}/web {out}.fifo >&2; wait",
    ],
)
def test_an_image_is_written_to_where_the_shell_wants_it(vms: Path, tmp_path: Path, line: str) -> None:
    done = shell(line, vms=vms, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == b"clean" + bytes((1 << 20) - 5)


def test_only_a_raw_image_goes_to_a_fifo(run: Run, vms: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused = run("export", f"{vms}/web", tmp_path / "fifo", "--format", "qcow2")
    assert refused.exit_code == 2
    assert "only a raw image can be written to a pipe" in refused.stderr


def test_a_delta_is_written_to_stdout_where_its_output_is_called_so(run: Run, vms: Path) -> None:
    assert run("snapshot", f"{vms}/web@a").exit_code == 0
    stream = run("delta", f"{vms}/web@a").stdout_bytes
    assert len(stream) > 4096
    for line in "os delta {vms}/web@a -o - | cat", "os delta {vms}/web@a -o /dev/stdout | cat":
        assert len(shell(line, vms=vms).stdout) == len(stream)


def test_a_delta_to_what_is_no_file_is_refused_and_nobody_is_told_to_remove_it(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    assert run("snapshot", f"{vms}/web@a").exit_code == 0
    os.mkfifo(tmp_path / "fifo")
    goals = {tmp_path / "fifo": "a pipe", Path("/dev/null"): "a character device", device(1 << 20): "a block device"}
    for path, what in goals.items():
        refused = run("delta", f"{vms}/web@a", "-o", path)
        assert refused.exit_code == 2
        assert f"{path} is {what}, and not a new file: leave out --output, and write '> {path}'" in refused.stderr


def test_a_block_device_that_does_not_fit_is_refused_before_any_of_it_is_written(
    run: Run, vms: Path, device: Callable[..., Path]
) -> None:
    source = device((1 << 20) + 512)
    refused = shell("os write {vms}/web 0 < {source}", vms=vms, source=source)
    assert refused.returncode == 2
    assert run("read", f"{vms}/web", 0, 5).stdout == "clean"
    written = shell(
        "{{ dd bs=512 count=1 status=none of=/dev/null; os write {vms}/web 0; }} < {source}", vms=vms, source=source
    )
    assert (written.returncode, written.stderr) == (0, b"")
    assert run("read", f"{vms}/web", 0, 5).stdout == "\1" * 5


def test_a_pipe_that_does_not_wait_for_its_reader_gets_all_of_a_long_output(vms: Path) -> None:
    verb = "map {vms}/web --columns 200 --rows 50 --json"
    whole = shell(f"os {verb}", vms=vms).stdout
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # so much does the pipe hold
    os.set_blocking(writer, False)
    command = [os.sys.executable, "-m", "onionskin", *verb.format(vms=vms).split()]  # type: ignore[attr-defined]
    with open(reader, "rb") as read, subprocess.Popen(command, stdout=writer) as process:
        os.close(writer)
        assert read.read() == whole
    assert process.returncode == 0
    assert len(whole) > size


def overwrite(base: Path) -> None:
    with open(base, "r+b") as file:
        file.write(b"later")
    os.utime(base, ns=(1, 1))


def test_an_image_to_stdout_is_not_whole_where_the_base_changed_meanwhile(
    run: Run, spawn: Spawn, vms: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.write_bytes(os.urandom(4 << 20))
    assert run("create", f"{vms}/over", "--base", base).exit_code == 0
    process = spawn("export", f"{vms}/over", "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)  # it has begun, and waits
    overwrite(base)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 6
    assert b"has changed" in said


def test_a_file_that_takes_the_place_of_a_pipe_is_not_written_over(
    run: Run, vms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_bytes(b"needed")
    monkeypatch.setattr("onionskin.cli.exchange._goal", lambda image: "stream")
    refused = run("export", f"{vms}/web", tmp_path / "out")
    assert refused.exit_code == 4
    assert (tmp_path / "out").read_bytes() == b"needed"


def test_what_is_full_is_named(run: Run, vms: Path) -> None:
    full = run("export", f"{vms}/web", "/dev/full")
    assert (full.exit_code, full.stderr[:11]) == (7, "onionskin: ")
    assert "/dev/full: No space left" in full.stderr


# ---- standard streams that do not wait, or have no buffer ----


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("verb", [["export", "-"], ["read", "0", "2M"], ["delta"]])
def test_all_goes_through_a_stdout_that_takes_a_part_at_a_time(
    run: Run, spawn: Spawn, vms: Path, verb: list[str], unbuffered: str
) -> None:
    data = os.urandom(2 << 20)
    assert run("create", f"{vms}/full", "--size", "2M").exit_code == 0
    assert run("write", f"{vms}/full", 0, input=data).exit_code == 0
    assert run("snapshot", f"{vms}/full@a").exit_code == 0
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = spawn(verb[0], f"{vms}/full@a", *verb[1:], stdout=writer, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    with open(reader, "rb") as file:
        got = file.read()
    assert process.wait(300) == 0
    if verb[0] == "delta":
        assert run("create", f"{vms}/copy", "--size", "1M").exit_code == 0
        assert run("apply", f"{vms}/copy", input=got).exit_code == 0
        got = run("read", f"{vms}/copy", 0, "2M").stdout_bytes
    assert got == data


@pytest.mark.parametrize("is_buffered", [True, False])
def test_a_stdin_that_has_nothing_yet_has_not_ended(monkeypatch: pytest.MonkeyPatch, *, is_buffered: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    late = [lambda: os.write(writer, b"late"), lambda: os.close(writer)]
    wait = StandardStream._wait

    def write_and_wait(stream: StandardStream) -> None:
        late.pop(0)()
        wait(stream)

    monkeypatch.setattr(StandardStream, "_wait", write_and_wait)
    with open(reader, "rb", -1 if is_buffered else 0) as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        stream = StandardStream("stdin")
        assert [stream.read(4), stream.read(4)] == [b"late", b""]


def test_a_file_that_a_stream_cannot_be_written_to_is_named_and_not_left(run: Run, vms: Path, tmp_path: Path) -> None:
    assert run("write", f"{vms}/web", 0, input=os.urandom(1 << 20)).exit_code == 0
    assert run("snapshot", f"{vms}/web@full").exit_code == 0
    done = shell("ulimit -f 100; trap '' XFSZ; os delta {vms}/web@full -o {out}", vms=vms, out=tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"onionskin: {tmp_path}/out: File too large".encode())
    assert not (tmp_path / "out").exists()


def test_an_image_that_has_no_room_is_named_and_not_left(run: Run, vms: Path, tmp_path: Path) -> None:
    assert run("write", f"{vms}/web", 0, input=os.urandom(1 << 20)).exit_code == 0
    assert run("snapshot", f"{vms}/web@full").exit_code == 0
    (tmp_path / "out").mkdir()
    done = shell("ulimit -f 100; trap '' XFSZ; os export {vms}/web@full {out}", vms=vms, out=tmp_path / "out/disk.raw")
    assert done.returncode == 1
    assert done.stderr.startswith(f"onionskin: {tmp_path}/out/disk.raw: File too large; ".encode())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_noticed_where_stdout_has_no_buffer(vms: Path, tmp_path: Path) -> None:
    line = "ulimit -f 100; trap '' XFSZ; PYTHONUNBUFFERED=1 os export {vms}/web - > {out}"
    done = shell(line, vms=vms, out=tmp_path / "out")
    assert (done.returncode, done.stderr[:32]) == (1, b"onionskin: stdout: File too larg")


# ---- block devices ----


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Make a loop device over a file, which is full of ones."""
    with loop_devices() as make_over:

        def make(size_bytes: int, file: Path = tmp_path / "backing", *options: str) -> Path:
            if not file.exists():
                file.write_bytes(b"\1" * size_bytes)
            return make_over(file, *options)

        yield make


def test_a_block_device_is_written_and_keeps_what_is_behind_the_disk(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    target = device((1 << 20) + 4096)
    done = run("export", f"{vms}/web", target, "--yes")
    assert done.exit_code == 0, done.stderr
    assert target.read_bytes() == b"clean" + bytes((1 << 20) - 5) + b"\1" * 4096
    assert run("import", target, f"{vms}/back").exit_code == 0
    assert run("read", f"{vms}/back", 0, 5).stdout == "clean"


def test_a_block_device_has_no_whole_disk_where_the_base_changed_meanwhile(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * (1 << 20))
    assert run("create", f"{vms}/over", "--base", base).exit_code == 0
    with (
        onionskin.Store(vms) as store,
        store.open("over", mode="r") as over,
        BlockDevice(device(1 << 20)) as target,
        pytest.raises(onionskin.ChainError, match="has changed"),
    ):
        export_to_device(over, target, progress=lambda done, total: overwrite(base))


def test_a_head_that_is_written_to_is_on_a_block_device_as_it_was(
    run: Run, vms: Path, device: Callable[..., Path]
) -> None:
    with onionskin.Store(vms) as store, store.open("web") as web, BlockDevice(device(8 << 20)) as target:
        web.resize("8M")
        web.write(6 << 20, b"as it was")
        export_to_device(web, target, progress=lambda done, total: web.write(6 << 20, b"later    "))
    assert target.path.read_bytes()[6 << 20 : (6 << 20) + 9] == b"as it was"


def test_a_block_device_is_not_written_where_nobody_sees_what_it_stands_on(
    vms: Path, tmp_path: Path, device: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a loop device over the base of a volume."""
    monkeypatch.setattr(block_devices, "directory_of", lambda number: f"{tmp_path}/nothing")
    with (
        onionskin.Store(vms) as store,
        store.open("web") as web,
        BlockDevice(device(8 << 20)) as target,
        pytest.raises(onionskin.StateError, match="mount /sys"),
    ):
        refuse_device(web, target)


def test_a_block_device_that_cannot_be_asked_for_its_size_is_not_kept(
    device: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target = device(1 << 20)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.EIO)) as refused:
        patch.setattr(fcntl, "ioctl", refuse)
        BlockDevice(target)
    BlockDevice(target).close()  # nobody claims it any more, also while the error is kept
    assert refused.value.errno == errno.EIO


def test_a_block_device_is_not_written_without_a_yes(run: Run, vms: Path, device: Callable[..., Path]) -> None:
    target = device(1 << 20)
    refused = run("export", f"{vms}/web", target)
    assert refused.exit_code == 5
    assert "give --yes" in refused.stderr
    assert target.read_bytes() == b"\1" * (1 << 20)


def test_a_block_device_that_is_too_small_is_not_written(run: Run, vms: Path, device: Callable[..., Path]) -> None:
    target = device((1 << 20) - 512)
    refused = run("export", f"{vms}/web", target, "--yes")
    assert refused.exit_code == 7
    assert "choose a larger device" in refused.stderr
    assert set(target.read_bytes()) == {1}


def test_a_block_device_that_is_mounted_is_not_written(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    target = device(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", target], check=True)
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", target, tmp_path / "mounted"], check=True)
    try:
        refused = run("export", f"{vms}/web", target, "--yes")
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)
    assert refused.exit_code == 5
    assert "is in use" in refused.stderr


def test_a_block_device_over_a_base_or_a_file_of_the_store_is_not_written(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    base = tmp_path / "base"
    target = device(1 << 20, base)
    assert run("create", f"{vms}/over", "--base", base).exit_code == 0
    refused = run("export", f"{vms}/web", target, "--yes")
    assert refused.exit_code == 5
    assert "a base that volumes stand on" in refused.stderr
    assert set(base.read_bytes()) == {1}
    refused = run("export", f"{vms}/web", device(0, vms / "reserve"), "--yes")
    assert refused.exit_code == 2
    assert "a file of the store itself" in refused.stderr


@pytest.mark.parametrize(
    "verb", ["export {vms}/web -", "export {vms}/web /dev/stdout", "delta {vms}/web@a", "read {vms}/web 0 4096"]
)
def test_a_stdout_that_is_a_block_device_over_a_base_is_not_written(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path], verb: str
) -> None:
    base = tmp_path / "base"
    target = device(1 << 20, base)
    assert run("create", f"{vms}/over", "--base", base).exit_code == 0
    assert run("snapshot", f"{vms}/web@a").exit_code == 0
    refused = shell(f"os {verb} > {{target}}", vms=vms, target=target)
    assert (refused.returncode, refused.stdout) == (5, b"")
    assert refused.stderr.startswith(f"onionskin: stdout stands on {base}, a base that volumes stand on".encode())
    assert set(base.read_bytes()) == {1}


def test_a_stdout_that_is_a_block_device_in_use_is_not_written(
    vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    target = device(4 << 20)
    descriptor = os.open(target, os.O_RDONLY | os.O_EXCL)  # as a mount claims it
    try:
        refused = shell("os export {vms}/web - > {target}", vms=vms, target=target)
    finally:
        os.close(descriptor)
    assert (refused.returncode, refused.stderr[:33]) == (5, b"onionskin: stdout is in use: it i")
    written = shell("os export {vms}/web - > {target}", vms=vms, target=target)
    assert (written.returncode, written.stderr) == (0, b"")
    assert target.read_bytes()[: 1 << 20] == b"clean" + bytes((1 << 20) - 5)


def test_a_block_device_that_is_read_only_is_refused_before_anybody_is_asked(
    run: Run, vms: Path, tmp_path: Path, device: Callable[..., Path]
) -> None:
    target = device(1 << 20, tmp_path / "backing", "--read-only")
    for words in [], ["--yes"]:
        refused = run("export", f"{vms}/web", target, *words)
        assert refused.exit_code == 5
        assert f"{target} is read-only; choose another device" in refused.stderr


@pytest.mark.parametrize("verb", ["export {vms}/web -", "export {vms}/web /dev/stdout", "delta {vms}/web@clean"])
@pytest.mark.parametrize("needed", ["base", "base of an open volume of another store", "file of the store"])
def test_nothing_is_added_to_a_file_that_is_needed(run: Run, tmp_path: Path, vms: Path, verb: str, needed: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    elsewhere = vms if needed == "base" else tmp_path / "other"
    assert run("create", f"{elsewhere}/over", "--base", base).exit_code == 0
    target = next((vms / "segments").iterdir()) if needed == "file of the store" else base
    before = target.read_bytes()
    with contextlib.ExitStack() as stack:
        if needed.startswith("base of"):
            store = stack.enter_context(onionskin.Store(elsewhere))
            stack.enter_context(store.open("over"))
        refused = shell("os " + verb + " >> {target}", vms=vms, target=target)
    assert refused.returncode in (2, 5) and b"stdout is" in refused.stderr
    assert target.read_bytes() == before


def test_a_stream_that_was_packed_with_a_dictionary_is_not_called_damaged(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes.fromhex("28b52ffd 21 07 01 090000 78"))  # one byte, and dictionary 7
    refused = run("import", tmp_path / "image", f"{tmp_path}/vms/web")
    assert refused.exit_code == 6
    assert "was packed with a dictionary" in refused.stderr and "fetch it again" not in refused.stderr


def test_a_file_that_hides_its_size_is_read_to_its_end(run: Run, tmp_path: Path) -> None:
    expected = Path("/proc/version").read_bytes()
    done = run("import", "/proc/version", f"{tmp_path}/vms/web")
    assert done.exit_code == 0, done.stderr
    assert run("read", f"{tmp_path}/vms/web", 0, len(expected)).stdout_bytes == expected
