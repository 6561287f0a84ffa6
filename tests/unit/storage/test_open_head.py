"""A head that is open: who is told that its data path is another one, and when."""

from pathlib import Path

import onionskin
from onionskin.kernels._volume import DataPath

BLOCK = 4096


class Follower:
    def __init__(self, volume: onionskin.Volume) -> None:
        self.old: DataPath = volume._path
        self.told: list[tuple[bytes, bool]] = []
        volume._opened.follow(self.follow)

    def follow(self, path: DataPath) -> None:
        """Note what the new disk reads, and whether the old one is closed."""
        self.told.append((path.read(0, 1), self.old.closed))


def changed(store: onionskin.Store) -> onionskin.Volume:
    web = store.create("web", size=16 * BLOCK)
    web.write(0, b"1" * BLOCK)
    web.snapshot("one")
    web.write(0, b"2" * BLOCK)
    return web


def test_who_follows_a_head_is_told_of_the_new_disk_before_the_old_one_is_closed(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, changed(store) as web:
        follower = Follower(web)
        web.revert("one")
        assert follower.told == [(b"1", False)]
        assert follower.old.closed
        assert web._path is web._opened.path


def test_a_follower_that_is_gone_keeps_nobody_from_being_told(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, changed(store) as web:
        gone, stays = Follower(web), Follower(web)
        del gone
        web.revert("one")
        assert stays.told == [(b"1", False)]


def test_a_volume_that_is_dropped_drops_its_head(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        web = changed(store)
        web.flush()
        del web
        assert store._opened.open_handles() == []
        with store.open("web") as again:
            assert again.read(0, 1) == b"2"
