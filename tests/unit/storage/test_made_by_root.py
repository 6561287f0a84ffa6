"""What root makes in the store of another user belongs to that user, who can go on with it."""

import os
from pathlib import Path

import pytest

import onionskin
from onionskin.base import modes
from onionskin.base.paths import FilePath
from onionskin.machine.record import make_directory, open_log, write_json

OWNER = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root alone makes files in the store of another user")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The store of another user, with a volume."""
    root = tmp_path / "vms"
    with onionskin.Store(root) as store:
        store.create("web", size="8M").close()
        store.finish_work()
    for path in (root, *root.rglob("*")):
        os.chown(path, OWNER, OWNER)
    return root


def owners(root: Path) -> dict[str, int]:
    """What in a store is not its owner's."""
    return {
        str(path.relative_to(root)): path.lstat().st_uid for path in root.rglob("*") if path.lstat().st_uid != OWNER
    }


def test_files_of_volumes_and_machines_are_the_owners(root: Path) -> None:
    with onionskin.Store(root, trust=True) as store:
        with store.open("web") as web, store.create("new", size="1M"):
            web.write(0, b"data" * 4096)
            web.flush()
            web.snapshot("a")
            web.write(4096, b"more" * 4096)
            store.clone("web", "a", "copy")
            store.fork("web", snapshot="a", count=3)
            assert owners(root) == {}
            web.merge("a")
        with store.open("copy") as copy:
            copy.flatten()
        machine = store.create_machine("lab", disks=["new"], memory="1M")
        machine.snapshot("off")
        directory = make_directory(root, machine._id)
        os.close(open_log(directory / "qemu.log", os.O_APPEND))
        write_json(directory / "running.json", {})
        store.finish_work()
    assert owners(root) == {}
    assert (root / "machines").is_dir() and (directory / "qemu.log").exists()


def test_a_file_that_has_another_name_elsewhere_is_not_given_away(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    (root / "theirs").hardlink_to(tmp_path / "mine")
    descriptor = os.open(root / "theirs", os.O_RDWR)
    try:
        modes.share_file(descriptor, root / "theirs")
    finally:
        os.close(descriptor)
    assert (tmp_path / "mine").stat().st_uid == 0


def test_a_link_in_the_place_of_a_directory_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (root / "theirs").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        modes.give_directory_to_owner(root / "theirs", FilePath(root))
    assert (tmp_path / "mine").stat().st_uid == 0
