"""A process that is killed loses nothing that was acknowledged, flushed or not, whatever it was at."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner
from support.listing import found_in

import onionskin
from onionskin.base.states import DATA
from onionskin.catalog import Catalog
from onionskin.cli.app import onionskin as command_line
from onionskin.images import export_image, import_image
from onionskin.operations.unflushed import has_unflushed
from onionskin.storage.layout import Layout
from onionskin.storage.open_head import OpenHead

BLOCK = 4096
BLOCKS = 32


def killed(work: Callable[[], None]) -> bool:
    """Run in a child, which ends by a kill; whether it came to the end of its work before."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_call(number: int) -> Callable[..., None]:
    """Make a profile function that kills the process at the nth call or return of a function."""
    left = [number]

    def profile(frame: object, event: str, argument: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            kill_me()

    return profile


def filled(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (BLOCK * count)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a volume that has a snapshot, and some of whose head is flushed."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=BLOCKS * BLOCK) as web:
        web.write(0, filled("a", 8))
        web.snapshot("one")
        web.write(0, filled("b", 4))
    return tmp_path / "store"


def dirty_file(root: Path) -> Path:
    with onionskin.Store(root) as store:
        return Layout(root).dirty_file(store._opened.catalog.volume("web").id)


def change(web: onionskin.Volume) -> bytes:
    """Write, trim and overwrite, of which a part is flushed; returns what the disk reads then."""
    web.write(6 * BLOCK, filled("c", 2))
    web.flush()
    web.write(2 * BLOCK, filled("d", 3))
    web.trim(3 * BLOCK, BLOCK)
    web.write(9 * BLOCK, filled("e"))
    web.write(9 * BLOCK + 5, b"in place")
    web.write_blocks([20, 12], filled("f", 2))
    return bytes(web.read(0, web.size_bytes))


EXPECTED = bytearray(filled("\0", BLOCKS))
for first, data in (
    *((0, filled("a", 8)), (0, filled("b", 4)), (6, filled("c", 2)), (2, filled("d", 3)), (3, filled("\0"))),
    *((9, filled("e")), (20, filled("f")), (12, filled("f"))),
):
    EXPECTED[first * BLOCK : first * BLOCK + len(data)] = data
EXPECTED[9 * BLOCK + 5 : 9 * BLOCK + 13] = b"in place"


def write_and_die(root: Path) -> None:
    def work() -> None:
        with onionskin.Store(root) as store:
            assert change(store.open("web")) == EXPECTED
            kill_me()

    assert not killed(work)


def test_what_was_not_flushed_is_there_after_a_kill(root: Path) -> None:
    write_and_die(root)
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == EXPECTED
        web.snapshot("two")
    with onionskin.Store(root) as store:
        assert store.check() == []
        with store.open("web", snapshot="two") as two:
            assert two.read(0, two.size_bytes) == EXPECTED


def test_an_opening_that_only_reads_shows_it_too_and_leaves_it_for_the_next_writer(root: Path) -> None:
    write_and_die(root)
    left = dirty_file(root).read_bytes()
    assert left
    for _ in range(2):
        with onionskin.Store(root) as store, store.open("web", mode="r") as web:
            assert web.read(0, web.size_bytes) == EXPECTED
            assert not web._path.unflushed
    assert dirty_file(root).read_bytes() == left
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == EXPECTED


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_export_of_a_head_that_is_only_read_has_it_too(
    root: Path, tmp_path: Path, kind: Literal["raw", "qcow2"]
) -> None:
    write_and_die(root)
    with onionskin.Store(root) as store, store.open("web", mode="r") as web:
        export_image(web, tmp_path / "out", format=kind)
        import_image(store, tmp_path / "out", "back")
        with store.open("back") as back:
            assert back.read(0, back.size_bytes) == EXPECTED


def test_an_export_keeps_writers_from_a_head_that_is_only_read(root: Path, tmp_path: Path) -> None:
    with onionskin.Store(root) as store, store.open("web", mode="r") as web:

        def close_it(done: int, total: int) -> None:
            web.close()
            with pytest.raises(onionskin.StateError, match="open for reading"):
                store.open("web")
            progress.append(done)

        progress: list[int] = []
        web.export(tmp_path / "out", progress=close_it)
        assert progress
        with pytest.raises(onionskin.StateError, match="closed"):
            web.export(tmp_path / "out")
        store.open("web").close()


def test_what_changed_is_not_told_before_what_was_left_is_in_the_map(root: Path) -> None:
    write_and_die(root)
    with onionskin.Store(root) as store:
        with store.open("web", mode="r") as web, pytest.raises(onionskin.StateError, match="unflushed"):
            web.diff("one")
        with store.open("web", mode="r") as web:
            assert web.diff("one", "one").tolist() == []
        store.open("web").close()
        with store.open("web", mode="r") as web:
            assert (20 * BLOCK, BLOCK, DATA) in web.diff("one").tolist()


def files_of(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for directory in ("layers", "segments") for file in (root / directory).iterdir()}


@pytest.mark.parametrize("verb", ["map", "usage"])
def test_what_reads_maps_alone_refuses_what_was_left_unflushed_until_it_is_durable(root: Path, verb: str) -> None:
    write_and_die(root)
    before = files_of(root)
    told = CliRunner().invoke(command_line, [verb, f"{root}/web", "--json"])
    assert (told.exit_code, told.stdout) == (5, "") and "take a snapshot of it" in told.stderr
    assert files_of(root) == before
    with onionskin.Store(root) as store, store.open("web", mode="r") as web:
        for ask in (web.usage, web.layering):
            with pytest.raises(onionskin.StateError, match="unflushed"):
                ask()
    assert CliRunner().invoke(command_line, ["map", f"{root}/web@one"]).exit_code == 0
    assert CliRunner().invoke(command_line, ["snapshot", f"{root}/web@now"]).exit_code == 0
    assert CliRunner().invoke(command_line, [verb, f"{root}/web"]).exit_code == 0


@pytest.mark.parametrize("verb", ["map", "usage"])
def test_what_a_living_writer_has_not_flushed_is_no_reason_to_show_nothing(root: Path, verb: str) -> None:
    with onionskin.Store(root) as store, store.open("web") as web:
        web.write(20 * BLOCK, b"x" * BLOCK)
        asked = subprocess.run([sys.executable, "-m", "onionskin", verb, f"{root}/web"], capture_output=True)
        assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize("of", ["web", "clone"])
def test_diff_of_the_command_line_refuses_what_was_left_unflushed_and_changes_nothing(root: Path, of: str) -> None:
    with onionskin.Store(root) as store:
        store.clone("web", "one", "clone")
        with store.open("clone") as clone:
            clone.snapshot("one")
    write_and_die(root)
    before = files_of(root)
    told = CliRunner().invoke(command_line, ["diff", f"{root}/{of}@one", f"{root}/web", "--json"])
    assert (told.exit_code, told.stdout) == (5, "") and "take a snapshot of it" in told.stderr
    assert files_of(root) == before
    assert CliRunner().invoke(command_line, ["snapshot", f"{root}/web@now"]).exit_code == 0
    told = CliRunner().invoke(command_line, ["diff", f"{root}/{of}@one", f"{root}/web", "--json"])
    assert {"offset": 20 * BLOCK, "length": BLOCK, "state": "data"} in json.loads(told.stdout)["extents"]


def test_a_head_of_which_nothing_was_flushed_is_read_after_a_kill(tmp_path: Path) -> None:
    def work() -> None:
        with onionskin.Store(tmp_path / "store") as store:
            store.create("new", size=BLOCKS * BLOCK).write(BLOCK, filled("n"))
            kill_me()

    assert not killed(work)
    with onionskin.Store(tmp_path / "store") as store, store.open("new", mode="r") as new:
        assert new.read(0, 3 * BLOCK) == filled("\0") + filled("n") + filled("\0")


def test_a_writer_that_is_killed_right_after_it_took_over_loses_nothing_either(root: Path) -> None:
    write_and_die(root)

    def work() -> None:
        with onionskin.Store(root) as store:
            store.open("web").write(30 * BLOCK, filled("z"))
            kill_me()

    for _ in range(3):
        assert not killed(work)
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, 30 * BLOCK) == EXPECTED[: 30 * BLOCK]
        assert web.read(30 * BLOCK, BLOCK) == filled("z")


def test_a_closed_volume_leaves_nothing_to_be_taken_up(root: Path) -> None:
    with onionskin.Store(root) as store, store.open("web") as web:
        change(web)
        assert dirty_file(root).stat().st_size > 0
        assert dirty_file(root).stat().st_mode & 0o777 == 0o600
    assert dirty_file(root).stat().st_size == 0
    with onionskin.Store(root) as store:
        store.delete("web", recursive=True)
        assert list(store._opened.layout.volumes.glob("*.dirty")) == []


def test_a_volume_that_is_only_read_makes_no_file(root: Path) -> None:
    dirty_file(root).unlink(missing_ok=True)
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, 1) == b"b"
        web.flush()
        assert not dirty_file(root).exists()


BOOT_ID, DEVICE, COUNTS = 16, 32, (72, 152)
FIRST_HALF = 4096


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (0, b"ONIONSEG"),  # another kind of file
        (8, b"\x02"),  # another version
        (BOOT_ID, b"another boot"),
        (DEVICE, b"another disk"),
        (COUNTS[0], b"\xff" * 8),  # more records than the file has
        (FIRST_HALF, b"\xff" * 8),  # a segment that is not the head's
        (FIRST_HALF + 24, b"\xff" * 8),  # blocks behind the end of any disk
        (FIRST_HALF + 24 + 12, b"\xff\xff\xff\x00"),  # slots behind the end of the segment
        (FIRST_HALF + 24 + 16, b"\x05"),  # a record that does not belong there
    ],
)
def test_a_file_that_is_not_sound_is_ignored_as_a_whole(root: Path, at: int, data: bytes) -> None:
    write_and_die(root)
    flushed = bytearray(filled("\0", BLOCKS))
    flushed[: 8 * BLOCK] = filled("b", 2) + filled("d", 2) + filled("a", 2) + filled("c", 2)  # in place
    descriptor = os.open(dirty_file(root), os.O_RDWR)
    # The halves take turns: what is not flushed is in the second one.
    found = [int.from_bytes(os.pread(descriptor, 8, place), "little") for place in COUNTS]
    assert found[0] == 0
    assert found[1] > 3
    if at == COUNTS[0]:
        at = COUNTS[1]
    if at >= FIRST_HALF:
        at += (1 << 19) * 24
    os.pwrite(descriptor, data, at)
    os.close(descriptor)
    with onionskin.Store(root) as store:
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == flushed
            web.write(0, filled("x"))
        assert store.check() == []


def test_what_an_opening_through_another_mount_could_not_take_comes_back_in_no_later_one(root: Path) -> None:
    """It freed the blocks, so the records would name zeros."""
    write_and_die(root)
    descriptor = os.open(dirty_file(root), os.O_RDWR)
    device = os.pread(descriptor, 8, DEVICE)
    os.pwrite(descriptor, b"another!", DEVICE)
    with onionskin.Store(root) as store, store.open("web") as web:
        found = web.read(0, web.size_bytes)
    os.pwrite(descriptor, device, DEVICE)
    os.close(descriptor)
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == found


def test_an_opening_drops_what_was_left_before_another_boot(root: Path) -> None:
    write_and_die(root)
    with open(dirty_file(root), "r+b") as file:
        file.seek(BOOT_ID)
        file.write(b"another boot")
    opened_and_closed(root)
    assert dirty_file(root).stat().st_size == 0


def test_a_map_that_is_older_than_what_was_pending_takes_none_of_it(root: Path) -> None:
    with onionskin.Store(root) as store:
        head = store._opened.catalog.layer(store._opened.catalog.volume("web").head)
        log = store._opened.layout.map_file(head.map_id)
    older = log.read_bytes()
    write_and_die(root)
    log.write_bytes(older)
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, 8 * BLOCK) == filled("b", 2) + filled("d", 2) + filled("a", 4)  # in place


@pytest.mark.parametrize("verb", ["revert", "discard", "flatten"])
def test_what_a_head_had_pending_does_not_come_back_in_another(root: Path, verb: str) -> None:
    def work() -> None:
        with onionskin.Store(root) as store:
            web = store.open("web")
            change(web)
            if verb == "flatten":
                web.flatten()
            else:
                getattr(web, verb)("one")
            kill_me()

    assert not killed(work)
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == (
            EXPECTED if verb == "flatten" else filled("a", 8) + filled("\0", BLOCKS - 8)
        )


def reverted(root: Path) -> None:
    with onionskin.Store(root) as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == EXPECTED
        web.revert("one")


def reverted_and_killed_behind_the_commit(root: Path) -> None:
    """As by a process that is killed before it can empty the file of the head that it left."""

    def work() -> None:
        OpenHead.switch = lambda *_: kill_me()  # type: ignore[method-assign]
        with onionskin.Store(root) as store:
            web = store.open("web")
            change(web)
            web.revert("one")

    assert not killed(work)
    assert dirty_file(root).stat().st_size > 0


def opened_and_closed(root: Path) -> None:
    with onionskin.Store(root) as store:
        store.open("web").close()


def assert_has_nothing_unflushed(root: Path) -> None:
    """The disk reads as its snapshot, and all that asks a closed head for its map answers."""
    assert dirty_file(root).stat().st_size == 0
    for verb in (["map"], ["usage"], ["diff", f"{root}/web@one"]):
        asked = CliRunner().invoke(command_line, [*verb, f"{root}/web"])
        assert asked.exit_code == 0, asked.stderr
    with onionskin.Store(root) as store, store.open("web", mode="r") as web:
        assert not has_unflushed(store._opened, web._opened.row.id)
        assert web.read(0, web.size_bytes) == filled("a", 8) + filled("\0", BLOCKS - 8)
        assert web.diff("one").tolist() == []


def test_what_a_killed_writer_left_is_gone_with_the_head_that_a_revert_drops(root: Path) -> None:
    write_and_die(root)
    reverted(root)
    assert_has_nothing_unflushed(root)


def test_what_was_written_before_a_revert_is_gone_with_its_head_where_the_reverter_is_killed_later(root: Path) -> None:
    def work() -> None:
        with onionskin.Store(root) as store:
            web = store.open("web")
            change(web)
            web.revert("one")
            kill_me()

    assert not killed(work)
    assert_has_nothing_unflushed(root)


def test_an_opening_drops_what_was_left_of_a_head_where_the_reverter_was_killed_behind_its_commit(root: Path) -> None:
    reverted_and_killed_behind_the_commit(root)
    opened_and_closed(root)
    assert_has_nothing_unflushed(root)


def hard_linked(file: Path, beside: Path) -> None:
    beside.hardlink_to(file)


def symbolic(file: Path, beside: Path) -> None:
    file.rename(beside)
    file.symlink_to(beside)


def of_others(file: Path, beside: Path) -> None:
    beside.write_bytes(b"mine" + file.read_bytes())
    beside.rename(file)


@pytest.mark.parametrize("disguise", [hard_linked, symbolic, of_others])
def test_an_opening_empties_no_file_that_is_not_the_volume_s_alone(
    root: Path, tmp_path: Path, disguise: Callable[[Path, Path], None]
) -> None:
    reverted_and_killed_behind_the_commit(root)
    disguise(dirty_file(root), tmp_path / "beside")
    left = dirty_file(root).read_bytes()
    opened_and_closed(root)
    assert left and dirty_file(root).read_bytes() == left


def snapshot(web: onionskin.Volume) -> None:
    web.snapshot("two")


def fold(web: onionskin.Volume) -> None:
    web.merge("one")


def compact(web: onionskin.Volume) -> None:
    from onionskin.operations import new_map

    new_map.compact_map(web._opened.to_write())


def flush(web: onionskin.Volume) -> None:
    web.flush()


def close(web: onionskin.Volume) -> None:
    web.close()


@pytest.mark.soak
@pytest.mark.parametrize("verb", [snapshot, fold, compact, flush, close])
def test_a_kill_in_many_gaps_of_a_verb_loses_nothing(root: Path, verb: Callable[[onionskin.Volume], None]) -> None:
    _kill_in_each_gap(root, verb, 11)


@pytest.mark.parametrize("verb", [snapshot, fold])
@pytest.mark.slow
def test_a_kill_in_some_gaps_of_a_verb_loses_nothing(root: Path, verb: Callable[[onionskin.Volume], None]) -> None:
    _kill_in_each_gap(root, verb, 97)


def _kill_in_each_gap(root: Path, verb: Callable[[onionskin.Volume], None], stride: int) -> None:
    template = root.with_name("template")
    shutil.copytree(root, template)
    number, ended = 0, False
    while not ended:
        shutil.rmtree(root)
        shutil.copytree(template, root)

        def work(number: int = number) -> None:
            with onionskin.Store(root) as store:
                web = store.open("web")
                assert change(web) == EXPECTED
                sys.setprofile(killed_at_call(number))
                verb(web)
                sys.setprofile(None)
                if not web.closed:
                    web.write(31 * BLOCK, filled("y"))
                kill_me() if not web.closed else os._exit(0)

        ended = killed(work)
        with onionskin.Store(root) as store:
            with store.open("web") as web:
                disk = web.read(0, web.size_bytes)
                assert disk[: 31 * BLOCK] == EXPECTED[: 31 * BLOCK], f"killed at call {number}"
                ended |= disk[31 * BLOCK :] == filled("y")
                names = [one.name for one in web.snapshots]
            if "two" in names:
                with store.open("web", snapshot="two") as two:
                    assert two.read(0, two.size_bytes) == EXPECTED
            assert store.check() == []
        number += stride
    assert number > 2 * stride


def test_what_is_written_and_trimmed_without_a_flush_takes_no_more_than_its_bounds(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="1M", block_size=65536) as web:
        for _ in range(2000):
            web.write(0, b"g" * 65536)
            web.trim(0, 65536)
        held = sum(status.st_blocks * 512 for _, status in found_in(store._opened.layout.segments))
        assert held <= 64 << 20


def test_a_log_that_is_mostly_dead_is_written_anew_while_the_volume_is_open(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="32M") as web:
        longest, before = 0, web.read(0, 4096)
        for _ in range(12):
            web.write_blocks(range(0, 8000, 2), b"x" * (4000 * 4096))
            web.flush()
            web.trim(0, web.size_bytes)
            web.flush()
            longest = max(longest, *(status.st_size for _, status in found_in(store._opened.layout.layers)))
        assert longest < 1 << 20
        assert web.read(0, 4096) == before


def pages_of_records(store: Path) -> list[dict[str, str]]:
    """What the kernel says of each mapping of a file of records: the header of the file, and its two halves."""
    found: list[dict[str, str]] = []
    is_one = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            is_one = str(store / "volumes") in rest and rest.endswith(".dirty")
            if is_one:
                found.append({})
        elif is_one:
            found[-1][word] = rest.strip()
    return found


def test_the_pages_of_records_are_there_before_a_writer_needs_them(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=BLOCK) as web:
        web.write(0, b"one")
        found = pages_of_records(store.path)
        assert len(found) == 3
        assert [one["Rss:"] for one in found] == [one["Size:"] for one in found]


def test_no_page_of_records_is_read_ahead_of_also_when_there_are_more(tmp_path: Path) -> None:
    blocks = 4096
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=blocks * BLOCK) as web:
        for block in range(0, blocks, 2):
            web.write(block * BLOCK, b"one")
        found = pages_of_records(store.path)
        assert max(int(one["Size:"].split()[0]) for one in found) > 16  # KiB: a half has grown
        assert all("rr" in one["VmFlags:"].split() for one in found)


@pytest.mark.parametrize("mode", ["r", "w"])
def test_what_was_written_beside_a_snapshot_that_was_killed_is_read(root: Path, mode: Literal["r", "w"]) -> None:
    """It is in the segment that was spare, for an opening that only reads too."""

    def work() -> None:
        with onionskin.Store(root) as store, store.open("web") as web:
            web.write(0, filled("c"))

            def commit(self: Catalog) -> None:
                web.write(BLOCK, filled("d"))
                web.write(0, filled("e"))
                kill_me()

            Catalog.transaction = commit  # type: ignore[assignment,method-assign]
            web.snapshot("two")

    assert not killed(work)
    with onionskin.Store(root) as store, store.open("web", mode=mode) as web:
        assert web.read(0, 3 * BLOCK) == filled("e") + filled("d") + filled("b")
