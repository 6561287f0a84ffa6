"""A real machine on a served volume: each snapshot that is taken while it works is a disk that ext4 can be mounted from."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.guest import Guest, build_guest, content
from support.servers import Serve, onionskin, short_socket

SNAPSHOTS = 10


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,ro", image, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.slow
def test_each_of_ten_snapshots_of_a_working_machine_replays_and_holds_what_was_synced(tmp_path: Path) -> None:
    onionskin("create", f"{tmp_path}/vms/web", "--size", "256M")
    synced = []
    with Serve(f"{tmp_path}/vms/web", "--socket", short_socket(tmp_path), log=tmp_path / "serve.log") as server:
        with Guest(build_guest(tmp_path), server.socket, tmp_path / "console") as guest:
            guest.wait_for("synced 0")
            for number in range(SNAPSHOTS):
                guest.wait_for(f"synced {guest.synced + 1}")
                synced.append(guest.synced)
                onionskin("snapshot", f"{tmp_path}/vms/web@s{number}")
                if number == 5:
                    onionskin("merge", f"{tmp_path}/vms/web@s3")
            guest.wait_for(f"synced {guest.synced + 1}")
            assert "rror" not in guest.console
            guest.power_off()
            synced.append(guest.synced)
        onionskin("snapshot", f"{tmp_path}/vms/web@end")
        assert server.terminate() == 0
    for name, last in zip([*(f"s{number}" for number in range(SNAPSHOTS)), "end"], synced, strict=True):
        if name != "s3":
            check(tmp_path, name, last)


def check(tmp_path: Path, name: str, last: int) -> None:
    image = tmp_path / f"{name}.raw"
    onionskin("export", f"{tmp_path}/vms/web@{name}", image)
    replayed = subprocess.run(["e2fsck", "-p", image], capture_output=True, text=True)
    assert replayed.returncode in (0, 1), f"{name}: {replayed.stdout}{replayed.stderr}"  # 1: the journal was replayed
    clean = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, text=True)
    assert clean.returncode == 0, f"{name}: {clean.stdout}{clean.stderr}"
    with mounted(image, tmp_path / "mnt") as directory:
        for number in range(last + 1):
            assert (directory / f"file-{number}").read_bytes() == content(number), f"{name}: file {number}"
    image.unlink()
