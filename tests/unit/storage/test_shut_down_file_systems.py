"""A file system that is shut down, or set read-only after an error, while a store on it is open."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096
Mount = Callable[..., Path]


@pytest.fixture(params=["ext4", "xfs"])
def mount(request: pytest.FixtureRequest) -> Mount:
    found: Mount = request.getfixturevalue(f"{request.param}_mount")
    return found


def shut_down(root: Path) -> None:
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", root], check=True)


def verbs(store: onionskin.Store, web: onionskin.Volume) -> list[Callable[[], object]]:
    return [
        lambda: web.snapshot("t"),
        lambda: store.fork("web", "s"),
        lambda: store.volumes(),
        lambda: store.rename("other", "another"),
        lambda: store.hold("web", "s", "me"),
        lambda: store.delete("other"),
        lambda: store.check(),
        lambda: onionskin.Store(store.path).volumes(),
    ]


def test_a_shut_down_file_system_is_not_taken_for_a_damaged_catalog_or_a_moved_store(mount: Mount) -> None:
    """Who believes it restores an old copy, and loses what came since."""
    root = mount(96 << 20)
    store = onionskin.Store(root / "store")
    store.create("other", size="1M").close()
    web = store.create("web", size="1M")
    web.write(0, b"1" * BLOCK)
    web.snapshot("s")
    web.write(0, b"2" * BLOCK)
    web.flush()
    shut_down(root)
    told = []
    for verb in verbs(store, web):
        try:
            verb()
        except OSError:
            continue
        except onionskin.OnionskinError as error:
            told.append(str(error))
    for what in (web, store):
        try:
            what.close()
        except (OSError, onionskin.StateError):
            continue
    assert not [text for text in told if "damaged" in text or "moved" in text], told
    subprocess.run(["umount", root], check=True)
    subprocess.run(["mount", "-o", "loop", root.with_suffix(".img"), root], check=True)
    with onionskin.Store(root / "store") as again, again.open("web") as web:
        assert again.check() == []
        assert web.read(0, 1) == b"2"


def test_a_verb_that_needs_a_lock_of_a_store_that_became_read_only_says_that_it_is(ext4_mount: Mount) -> None:
    root = ext4_mount(96 << 20)
    with onionskin.Store(root / "store") as store:
        store.create("web", size="1M").close()
        subprocess.run(["mount", "-o", "remount,abort", root], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            store.delete("web")
