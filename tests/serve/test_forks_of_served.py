"""Forks of what is served, as it is now; and of several disks together, whoever holds them."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.servers import Serve, onionskin_json
from support.servers import onionskin as command

import onionskin
from onionskin import aio
from onionskin.control import frames, groups
from onionskin.control.client import LiveVolume
from onionskin.nbd.server import Limits, Server
from onionskin.operations import forks

MIB = 1 << 20
SECONDS = 300.0  # for which a test waits for what must come


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A store with the volumes web and db, each with its name at its begin and a snapshot clean."""
    with onionskin.Store(tmp_path / "vms") as store:
        for name in ("web", "db"):
            with store.create(name, size=MIB) as volume:
                volume.write(0, name.encode())
                volume.snapshot("clean")
    return tmp_path / "vms"


@pytest.fixture
def store(at: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(at) as store:
        yield store


Here = Callable[..., Callable[[str], onionskin.Volume]]


@pytest.fixture
def here(at: Path) -> Iterator[Here]:
    """Serve volumes in this process, with a store of their own; gives what finds them by name."""
    with ExitStack() as stack:

        def start(*names: str) -> Callable[[str], onionskin.Volume]:
            server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
            stack.callback(server.close)
            for name in names:
                server.exports.add_volume(at, name)
            return lambda name: server.exports.table.served[name].volume

        yield start


def begin_of(store: onionskin.Store, name: str) -> bytes:
    with store.open(name, mode="r") as volume:
        return volume.read(0, 8).rstrip(b"\0")


def test_a_served_disk_is_forked_as_it_is_now(store: onionskin.Store, here: Here) -> None:
    served = here("web")
    served("web").write(0, b"now")
    assert store.fork("web", count=2, pattern="job-{n:02}") == ["job-01", "job-02"]
    served("web").write(0, b"later")
    assert [begin_of(store, name) for name in ("job-01", "job-02")] == [b"now", b"now"]
    assert [one.name for one in store.lineage("job-01")] == ["web"]
    assert store.snapshots("web")[-1].name == "clean"


def test_a_disk_that_a_server_opens_while_it_is_about_to_be_forked_is_forked_there(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = onionskin.Store._lock_volume

    def late(self: onionskin.Store, *arguments: Any) -> Any:
        monkeypatch.undo()
        here("web")("web").write(0, b"now")
        return lock(self, *arguments)

    monkeypatch.setattr(onionskin.Store, "_lock_volume", late)
    (name,) = store.fork("web")
    assert begin_of(store, name) == b"now"


def test_a_served_disk_that_was_not_written_to_is_forked_on_what_it_stands_on(
    store: onionskin.Store, here: Here
) -> None:
    here("web")
    before = len(store.chain("web"))
    for _ in range(20):
        store.delete(*store.fork("web"))
    assert len(store.chain("web")) == before


def test_the_chain_of_a_served_disk_stays_short_under_forks_and_drops(store: onionskin.Store, here: Here) -> None:
    served = here("web", "db")
    for number in range(20):
        for name in ("web", "db"):
            served(name).write(4096, number.to_bytes(8, "little"))
        made = store.fork_group({"web": None, "db": None})
        store.delete(*made["web"], *made["db"])
    for name in ("web", "db"):
        store.fork(name)
        assert len(store.chain(name)) <= 5


def test_a_served_disk_is_forked_with_all_that_a_fork_can_be_told(store: onionskin.Store, here: Here) -> None:
    here("web")
    made = store.fork("web", names=["a{b}", "c"], labels={"task": "42"}, lifetime="2h", wipe="zero")
    assert made == ["a{b}", "c"]
    info = store.info("c")
    assert (info.labels, info.wipe) == ({"task": "42"}, "zero")
    assert info.expires is not None


def test_the_same_key_makes_the_forks_of_a_served_disk_once(store: onionskin.Store, here: Here) -> None:
    served = here("web")
    first = store.fork("web", count=2, pattern="{{{n:03}}}-{source}", idempotency_key="k", lifetime=3600.5)
    served("web").write(0, b"later")
    assert store.fork("web", count=2, pattern="{{{n:03}}}-{source}", idempotency_key="k", lifetime=3600.5) == first
    with pytest.raises(onionskin.StateError, match="used for another fork"):
        store.fork("web", count=3, idempotency_key="k")
    assert first == ["{001}-web", "{002}-web"]


@pytest.mark.parametrize("text", ["{source}-{n}", "job-{n:03}", "{{{n}}}", "a{{b-{n:018}", "{n}"])
def test_a_pattern_is_read_again_as_it_was(text: str) -> None:
    pattern = forks.parse_pattern(text, "web{x}")
    assert forks.parse_pattern(pattern.text, "another") == pattern


def test_a_temporary_fork_of_a_served_disk_goes_with_its_block(store: onionskin.Store, here: Here) -> None:
    served = here("web")
    served("web").write(0, b"now")
    with store.temporary("web") as disk:
        assert disk.read(0, 3) == b"now"
    assert list(store) == ["db", "web"]


def test_a_fork_that_a_server_refuses_is_refused_here(store: onionskin.Store, here: Here) -> None:
    here("web")
    with pytest.raises(onionskin.VolumeExistsError):
        store.fork("web", names=["db"])
    assert list(store) == ["db", "web"]


def test_disks_are_forked_together_with_one_number(store: onionskin.Store, here: Here) -> None:
    served = here("web")
    served("web").write(0, b"now")
    store.fork("db", "clean", names=["db-4"])
    made = store.fork_group({"web": None, "db": "clean"}, count=2, labels={"vm": "1"})
    assert made == {"web": ["web-5", "web-6"], "db": ["db-5", "db-6"]}
    assert begin_of(store, "web-5") == b"now"
    assert begin_of(store, "db-6") == b"db"
    assert {one.name for one in store.volumes(labels={"vm": "1"})} == {"web-5", "web-6", "db-5", "db-6"}
    assert store.fork_group({"web@clean": None, "db@clean": None}) == {"web@clean": ["web-7"], "db@clean": ["db-7"]}
    assert [(one.name, one.snapshot) for one in store.lineage("db-7")] == [("db", "clean")]


def test_open_and_closed_disks_are_forked_together(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"now")
        made = store.fork_group({"web": None, "db": None}, pattern="vm{n}-{source}")
        web.write(0, b"later")
    assert made == {"web": ["vm1-web"], "db": ["vm1-db"]}
    assert (begin_of(store, "vm1-web"), begin_of(store, "vm1-db")) == (b"now", b"db")


@pytest.mark.parametrize("now", [True, False])
def test_the_same_key_forks_disks_together_once(store: onionskin.Store, here: Here, now: bool) -> None:
    here("web")
    sources = dict.fromkeys(("web", "db"), None if now else "clean")
    first = store.fork_group(sources, count=2, idempotency_key="k")
    assert store.fork_group(sources, count=2, idempotency_key="k") == first
    with pytest.raises(onionskin.StateError, match="used for another fork"):
        store.fork_group(sources, count=1, idempotency_key="k")
    assert sorted(store) == ["db", "db-1", "db-2", "web", "web-1", "web-2"]


def test_a_name_that_is_taken_forks_nothing(store: onionskin.Store, here: Here) -> None:
    served = here("web")
    with pytest.raises(ValueError, match="same names"):
        store.fork_group({"web": None, "db": None}, pattern="vm{n}")
    store.rename("db", "a1")
    store.fork("web", "clean", names=["a"])
    with pytest.raises(ValueError, match="same names"):  # the tenth of one is the first of the other
        store.fork_group({"a1": "clean", "a": None}, count=20, pattern="{source}{n}")
    assert sorted(store) == ["a", "a1", "web"]
    served("web").flush()


@pytest.mark.parametrize(
    ("sources", "how", "error"),
    [
        ("web", {}, TypeError),
        ({"web": "clean", "web@clean": None}, {}, ValueError),
        ({"web@clean": "clean"}, {}, ValueError),
        ({"web": None, "db": None}, {"count": 9999}, ValueError),
        ({"web": None, "gone": None}, {}, onionskin.VolumeNotFoundError),
        ({"web": None, "db": "gone"}, {}, onionskin.SnapshotNotFoundError),
    ],
)
def test_what_cannot_be_forked_together_is_refused(
    store: onionskin.Store, sources: Any, how: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        store.fork_group(sources, **how)
    assert sorted(store) == ["db", "web"]
    assert store.fork_group({}) == {}


async def _fork_awaited(at: Path) -> dict[str, list[str]]:
    async with aio.Store(at) as store:
        return await store.fork_group({"web": None, "db": "clean"})


def test_disks_are_forked_together_by_awaiting(at: Path) -> None:
    import asyncio

    assert asyncio.run(_fork_awaited(at)) == {"web": ["web-1"], "db": ["db-1"]}


async def _used_awaited(at: Path) -> None:
    import asyncio

    async with aio.Store(at) as store:
        async with aio.connect(store, "web") as live:
            assert (live.name, await live.size_bytes(), await live.block_size()) == ("web", MIB, 4096)
            taken, *others = await asyncio.gather(live.snapshot("now"), live.read(0, 3), live.head_changed())
            assert (taken.name, others[0]) == ("now", b"web")
            assert [one.name for one in await live.snapshots()] == ["clean", "now"]
            await live.zero(0, 8)
            assert len(await live.diff("now")) == 1
            with pytest.raises(onionskin.SnapshotNotFoundError):
                await live.merge("gone")
            await live.merge("now")
        with pytest.raises(onionskin.StateError, match="closed"):
            await live.info()
        with pytest.raises(onionskin.StateError, match="nobody serves"):
            await aio.connect(store, "db")


def test_a_served_disk_is_used_by_awaiting(at: Path, here: Here) -> None:
    import asyncio

    here("web")
    asyncio.run(_used_awaited(at))


def test_the_command_line_forks_served_disks(at: Path, tmp_path: Path) -> None:
    with Serve(at / "web", "--socket", tmp_path / "s", log=tmp_path / "log") as server, server.client() as client:
        client.write(0, b"now")
        assert command("fork", at / "web").stdout == f"{at}/web-1\n"
        ended = command("fork", at / "web", f"{at}/db@clean", "-n", 2)
        assert ended.stdout == f"{at}/web-2 {at}/db-2\n{at}/web-3 {at}/db-3\n"
        assert onionskin_json("fork", at / "web", f"{at}/db@clean") == [
            {"source": f"{at}/web", "forks": ["web-4"]},
            {"source": f"{at}/db@clean", "forks": ["db-4"]},
        ]
        command("fork", at / "web", at / "db", "--name", "x", status=2)
        command("fork", at / "web", at / "web", status=2)
        command("snapshot", f"{at}/web@s", f"{at}/db@s")
    with onionskin.Store(at) as store:
        assert begin_of(store, "web-3") == b"now"


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": []},
        {"names": [1]},
        {"labels": {"a": 1}},
        {"labels": [["a", "b"]]},
        {"count": -1},
        {"ids": ["zz"]},
        {"ids": ["00"]},
        {"ids": ["00" * 16, "11" * 16]},
        {"pattern": "{0.__class__}"},
        {"source": "db"},
    ],
)
def test_a_server_refuses_a_fork_that_cannot_be(store: onionskin.Store, here: Here, arguments: dict[str, Any]) -> None:
    here("web")
    whole = {"source": "web", "names": None, "count": 1, "pattern": "x{n}", "key": None, "lifetime_ns": None}
    whole |= {"labels": {}, "wipe": None, "ids": None} | arguments
    request = {
        "version": frames.VERSION,
        "verb": "fork",
        "arguments": whole | {"labels": {}, "wipe": None, "ids": None} | arguments,
    }
    with onionskin.connect(store, "web") as live:
        frames.send(live._connection, request, bytes_max=frames.REQUEST_BYTES_MAX)
        reply = frames.receive(live._connection, bytes_max=frames.REPLY_BYTES_MAX)
        assert reply is not None
        assert "error" in reply
        live.flush()
    assert sorted(store) == ["db", "web"]
    with ExitStack() as stack:
        assert groups.find_served_heads(store, {"db": os.getpid()}, stack) == {}


def test_what_was_written_to_a_fork_that_is_served_counts(store: onionskin.Store, here: Here) -> None:
    store.fork("web@clean", names=["a"])
    served = here("a")
    served("a").write(0, b"x" * 12288)
    assert store.usage_of_forks("web@clean")[0].private_bytes == 12288


# ---- a caller that does not hear the outcome ----


class Meeting:
    """A server that reaches a point of its fork, goes on when its caller has given up, and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: Path, where: Any, step: str, error: BaseException) -> None:
        self.is_reached, self.may_go_on = threading.Event(), threading.Event()
        self._real: Callable[..., Any] = getattr(where, step)
        self.server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
        self.server.exports.add_volume(at, "web")
        call, receive, hang_up = LiveVolume._call, LiveVolume._receive, LiveVolume._hang_up

        def lose_patience(live: LiveVolume, *deadline: float | None) -> dict[str, Any]:
            assert self.is_reached.wait(SECONDS)
            raise error

        def ask(live: LiveVolume, verb: str, **arguments: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(LiveVolume, "_receive", lose_patience if verb == "fork" else receive)
                return call(live, verb, **arguments)

        def hang_up_and_tell(live: LiveVolume) -> None:
            hang_up(live)
            self.may_go_on.set()

        monkeypatch.setattr(LiveVolume, "_call", ask)
        monkeypatch.setattr(LiveVolume, "_hang_up", hang_up_and_tell)
        monkeypatch.setattr(where, step, self._meet)

    def _meet(self, *arguments: Any) -> Any:
        self.is_reached.set()
        assert self.may_go_on.wait(SECONDS)
        return self._real(*arguments)

    def end(self) -> None:
        self.may_go_on.set()
        served = self.server.exports.table.served["web"]
        served.control.join(SECONDS)
        served.volume.write(0, b"goes on")
        served.volume.flush()
        self.server.close()


@pytest.mark.parametrize("error", [onionskin.StateError("it has not answered"), KeyboardInterrupt()])
@pytest.mark.parametrize("what", ["fork", "temporary"])
def test_a_server_that_goes_on_after_its_caller_gave_up_forks_nothing(
    at: Path, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException
) -> None:
    meeting = Meeting(monkeypatch, at, forks, "flush", error)
    with pytest.raises(type(error)):
        if what == "fork":
            store.fork("web")
        with store.temporary("web"):
            pass
    meeting.end()
    assert set(store) == {"web", "db"}


@pytest.mark.parametrize("what", ["fork", "temporary"])
def test_a_caller_that_gives_up_inside_the_transaction_of_its_server_finds_its_forks(
    at: Path, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    meeting = Meeting(monkeypatch, at, forks, "insert_named", onionskin.StateError("it has not answered"))
    if what == "fork":
        assert store.fork("web", count=2) == ["web-1", "web-2"]
    else:
        with store.temporary("web") as disk:
            assert disk.read(0, 3) == b"web"
    meeting.end()
    assert set(store) == ({"web", "db", "web-1", "web-2"} if what == "fork" else {"web", "db"})


def test_a_temporary_fork_that_is_made_as_its_caller_is_interrupted_goes(
    at: Path, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = Meeting(monkeypatch, at, forks, "insert_named", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), store.temporary("web"):
        pass
    meeting.end()
    assert set(store) == {"web", "db"}
