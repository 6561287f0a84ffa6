"""A store's directory as somebody else may have left it: links lead nowhere, foreign things stay, others are kept out."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onionskin
from onionskin.operations import volumes
from onionskin.operations.losses import of_delete
from onionskin.operations.reclaim import segment_wants_zeros

BLOCK = 4096
PRECIOUS = b"precious\n" * 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="1M", wipe="zero") as web:
        web.write(0, b"a" * BLOCK)
        web.snapshot("a")
        web.write(0, b"b" * BLOCK)
    return tmp_path / "store"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside of the store that nothing may change."""
    path = tmp_path / "outside" / "victim"
    path.parent.mkdir()
    path.write_bytes(PRECIOUS)
    before = path.stat()
    yield path
    assert path.read_bytes() == PRECIOUS
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [one.name for one in path.parent.iterdir()] == ["victim"], "a file was made through a link"


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", ["lock", "reserve", "catalog.db-wal", "catalog.db-shm", "catalog.db-journal"])
def test_a_file_of_the_store_that_is_a_link_is_refused(root: Path, victim: Path, name: str, dangling: bool) -> None:
    replace_by_link(root / name, victim.with_name("made") if dangling else victim)
    with pytest.raises(onionskin.StateError, match=f"{name} is a symbolic link"):
        onionskin.Store(root)


def test_a_catalog_that_is_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "catalog.db").rename(tmp_path / "elsewhere.db")
    (root / "catalog.db").symlink_to(tmp_path / "elsewhere.db")
    before = (tmp_path / "elsewhere.db").read_bytes()
    with pytest.raises(onionskin.StateError, match="is a symbolic link"):
        onionskin.Store(root)
    assert (tmp_path / "elsewhere.db").read_bytes() == before


@pytest.mark.parametrize("name", ["layers", "segments", "volumes"])
def test_a_directory_of_the_store_that_is_a_link_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(onionskin.StateError, match=f"{name} is a symbolic link"):
        onionskin.Store(root)


@pytest.mark.parametrize("suffix", ["lock", "dirty", "control"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_beside_the_locks_is_not_followed(root: Path, victim: Path, suffix: str, dangling: bool) -> None:
    with onionskin.Store(root) as store:
        path = store._opened.layout.volumes / f"{store._opened.catalog.volume('web').id.hex()}.{suffix}"
        replace_by_link(path, victim.with_name("made") if dangling else victim)
        try:
            with store.open("web") as web:
                assert web.read(0, 1) == b"b"
                web.write(0, b"c")
        except onionskin.StateError as error:
            assert "symbolic link" in str(error)
        assert any(problem.where == str(path) for problem in store.check()) or not path.is_symlink()


def test_a_hard_link_to_a_lock_is_refused_and_not_cut_off(root: Path, victim: Path) -> None:
    with onionskin.Store(root) as store:
        path = store._opened.layout.volume_lock(store._opened.catalog.volume("web").id)
        path.unlink()
        os.link(victim, path)
        with pytest.raises(onionskin.StateError, match="hard link"):
            store.open("web")
        path.unlink()


def test_whether_a_segment_has_to_be_wiped_is_asked_through_no_link_and_of_no_pipe(root: Path, tmp_path: Path) -> None:
    (segment, *_) = (root / "segments").iterdir()
    assert segment_wants_zeros(segment)
    (tmp_path / "link").symlink_to(segment)
    os.mkfifo(tmp_path / "pipe")
    for made in ("link", "pipe"):
        with pytest.raises(OSError, match=made if made == "link" else "seek"):
            segment_wants_zeros(tmp_path / made)


@pytest.mark.parametrize("kind", ["segments", "layers"])
def test_a_file_of_data_that_is_a_link_is_refused_and_reported(root: Path, victim: Path, kind: str) -> None:
    with onionskin.Store(root) as store:
        for path in list((root / kind).iterdir()):
            replace_by_link(path, victim)
        with pytest.raises((onionskin.OnionskinError, OSError)):
            store.open("web")
        with pytest.raises((onionskin.OnionskinError, OSError)):
            store.open("web", snapshot="a")
        assert any(problem.severity == "error" for problem in store.check())
        assert any("symbolic link" in problem.what for problem in store.check())
        store.delete("web", recursive=True)
        store.finish_work()
        assert all(path.is_symlink() for path in (root / kind).iterdir())


def put_in_place(path: Path, kind: str, target: Path) -> None:
    path.unlink(missing_ok=True)
    {"link": lambda: path.symlink_to(target), "pipe": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
@pytest.mark.parametrize("what", ["spare segment", "lock"])
def test_what_keeps_a_volume_from_being_opened_is_an_error_of_check(
    root: Path, victim: Path, what: str, kind: str
) -> None:
    with onionskin.Store(root) as store:
        catalog, layout = store._opened.catalog, store._opened.layout
        volume = catalog.volume("web")
        (spare,) = (row for row in catalog.segments_of_layer(volume.head) if row.role == "spare")
        place = layout.segment_file(spare.id) if what == "spare segment" else layout.volume_lock(volume.id)
        put_in_place(Path(place), kind, victim)
        with pytest.raises((onionskin.OnionskinError, OSError)):
            store.open("web")
        assert [problem.where for problem in store.check() if problem.severity == "error"] == [str(place)]


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_deletion_that_would_be_refused_is_refused_where_it_is_only_asked_about(
    root: Path, victim: Path, kind: str
) -> None:
    with onionskin.Store(root) as store:
        lock = store._opened.layout.volume_lock(store._opened.catalog.volume("web").id)
        put_in_place(Path(lock), kind, victim)
        for ask in (of_delete, volumes.delete):
            with pytest.raises((onionskin.StateError, onionskin.FormatError), match="remove it"):
                ask(store._opened, ["web"], recursive=True)


def test_a_file_with_two_names_is_neither_wiped_nor_removed_but_reported(root: Path, tmp_path: Path) -> None:
    held = {}
    for path in (root / "segments").iterdir():
        os.link(path, tmp_path / path.name)
        held[path] = path.read_bytes()
    with onionskin.Store(root) as store:
        assert any("2 names" in problem.what for problem in store.check())
        store.delete("web", recursive=True)
        store.finish_work()
        assert {path: path.read_bytes() for path in (root / "segments").iterdir()} == held


def test_foreign_things_stay_and_are_named(root: Path, victim: Path) -> None:
    foreign = [root / name / "lost+found" for name in ("layers", "segments", "volumes")]
    for path in foreign:
        path.mkdir()
    (root / "segments" / "notes.txt").symlink_to(victim)
    (root / "segments" / "notes.seg").write_bytes(PRECIOUS)
    with onionskin.Store(root) as store:
        store.open("web").close()
        where = {problem.where for problem in store.check(repair=True)}
        store.open("web").close()
    foreign += [root / "segments" / "notes.txt", root / "segments" / "notes.seg"]
    assert {str(path) for path in foreign} <= where
    assert all(os.path.lexists(path) for path in foreign)


# ---- modes and owners ----


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_nobody_else_can_read_or_lock_anything_whatever_the_umask(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with umask(0), onionskin.Store(root) as store, store.create("web", size="1M") as web:
        for number in range(4):
            web.write(number * BLOCK, b"x" * BLOCK)
            web.snapshot(f"s{number}")
        web.merge("s1")  # writes a map anew
        web.write(0, b"y" * BLOCK)
        web.flush()
        store.finish_work()
        modes = {path: path.lstat().st_mode for path in [root, *root.rglob("*")]}
    for path, mode in modes.items():
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path


def test_check_says_what_others_may_touch(root: Path) -> None:
    (root / "lock").chmod(0o644)
    (root / "segments").chmod(0o755)
    with onionskin.Store(root) as store:
        found = {problem.where: problem.what for problem in store.check()}
    assert "644" in found[str(root / "lock")]
    assert "755" in found[str(root / "segments")]


def test_the_store_of_another_user_is_refused_without_trust_and_opened_with_it(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        os.chown(path, 65534, 65534)
    with pytest.raises(onionskin.StateError, match="belongs to user 65534"):
        onionskin.Store(root)
    with onionskin.Store(root, trust=True) as store, store.open("web", snapshot="a") as view:
        assert view.read(0, 1) == b"a"


def test_another_user_cannot_keep_the_owner_out() -> None:
    """Not in pytest's directory, which nobody else can enter."""
    root = Path("/var/tmp") / f"onionskin-hostile-{os.getpid()}"
    try:
        with umask(0o022), onionskin.Store(root) as store:
            store.create("web", size="1M").close()
            root.chmod(0o755)
            (root / "volumes").chmod(0o755)
            for path in (root / "lock", *(root / "volumes").iterdir(), root / "catalog.db"):
                ended = subprocess.run(
                    ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", path], capture_output=True
                )
                assert b"Permission denied" in ended.stderr, path
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("name", ["catalog.db-wal", "catalog.db-shm", "catalog.db-journal"])
def test_a_file_of_sqlite_that_has_another_name_too_is_refused_and_not_written(
    root: Path, victim: Path, name: str
) -> None:
    before = victim.read_bytes()
    (root / name).unlink(missing_ok=True)
    os.link(victim, root / name)
    with pytest.raises(onionskin.StateError, match="hard link"):
        onionskin.Store(root)
    assert victim.read_bytes() == before


@pytest.mark.parametrize("kind", ["segments", "layers"])
def test_a_check_waits_for_no_pipe(root: Path, kind: str) -> None:
    for path in list((root / kind).iterdir()):
        path.unlink()
        os.mkfifo(path)
    with onionskin.Store(root) as store:
        assert any("regular file" in problem.what for problem in store.check())


def test_a_base_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    with onionskin.Store(tmp_path / "other") as store:
        store.create("web", base=base).close()
        base.unlink()
        os.mkfifo(base)
        for look in (lambda: store.open("web"), lambda: store.open("web", mode="r"), lambda: store.layering("web")):
            with pytest.raises(onionskin.ChainError, match="relocate"):
                look()
        assert [problem.where for problem in store.check()] == [str(base)]
        with pytest.raises((onionskin.OnionskinError, OSError, ValueError)):
            store.create("new", base=base)
        with pytest.raises((onionskin.OnionskinError, OSError, ValueError)):
            store.relocate("web", base=base)
