"""onionskin.aio: twins of all that may block, and what holds when a task that waits for one is cancelled."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import onionskin
from onionskin import aio
from onionskin.images import import_image

QUICK = {"path", "read_only", "unreachable_bytes", "open_file"}  # asked by way of `sync`
WHOLE_PROCESS = {"run", "be_pool"}  # of a machine: they take this process
KINDS = ["Store", "Volume", "LiveVolume", "Machine", "MachinePool"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_public_has_a_twin_or_is_quick(kind: str) -> None:
    ours, twins = getattr(onionskin, kind), getattr(aio, kind)
    quick = WHOLE_PROCESS if kind == "Machine" else QUICK
    assert {name for name in dir(ours) if name[0] != "_"} - set(dir(twins)) <= quick


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_takes_what_its_twin_takes_and_says_the_same(kind: str) -> None:
    ours, twins = getattr(onionskin, kind), getattr(aio, kind)
    for name, method in vars(ours).items():
        if inspect.isfunction(method) and name[0] != "_" and name not in QUICK | WHOLE_PROCESS:
            twin = getattr(twins, name)
            one, other = inspect.signature(method).parameters, inspect.signature(twin).parameters
            assert [(p.name, p.kind, p.default) for p in one.values()] == [
                (p.name, p.kind, p.default) for p in other.values()
            ], name
            assert (inspect.getdoc(method) or "") in (inspect.getdoc(twin) or ""), name


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [
        one.name for one in threading.enumerate() if one.name.startswith(("onionskin aio", "onionskin bytes"))
    ] == []


class Held:
    """A function that is held in its thread until the test lets it go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(300)
        return self.function(*args, **kwargs)


async def begun(held: Held) -> None:
    assert await asyncio.to_thread(held.begun.wait, 300)


def test_a_volume_is_made_written_snapshotted_and_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store:
            async with store.create("web", size="1M") as disk:
                await disk.write(0, b"hello")
                assert (await disk.snapshot("a")).name == "a"
                assert [one.name for one in await disk.snapshots()] == ["a"]
            disk = await store.open("web")
            assert await disk.read(0, 5) == b"hello"
        assert disk.closed
        with pytest.raises(onionskin.StateError, match="closed"):
            await disk.read(0, 5)

    asyncio.run(main())


def test_a_cancelled_snapshot_is_taken_before_its_await_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store, store.create("web", size="1M") as disk:
            held = Held(disk.sync.snapshot)
            monkeypatch.setattr(disk.sync, "snapshot", held)
            task = asyncio.create_task(disk.snapshot("a"))
            await begun(held)
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
            held.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [one.name for one in await disk.snapshots()] == ["a"]
            await disk.write(0, b"goes on")

    asyncio.run(main())


def test_a_cancelled_call_that_waits_for_a_thread_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms", threads=1) as store, store.create("web", size="1M") as disk:
            held = Held(lambda: None)
            first = asyncio.create_task(store.run(held))
            await begun(held)
            second = asyncio.create_task(disk.snapshot("a"))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            held.go_on.set()
            await first
            assert await disk.snapshots() == []

    asyncio.run(main())


def test_two_tasks_that_await_a_store_open_it_once(tmp_path: Path) -> None:
    made: list[onionskin.Store] = []
    both_wait = threading.Event()

    async def main() -> None:
        store = aio.Store(tmp_path / "vms")
        make = store._make

        def make_and_tell() -> onionskin.Store:
            both_wait.wait(300)
            made.append(make())
            return made[-1]

        store._make = make_and_tell  # type: ignore[assignment]
        tasks = [asyncio.ensure_future(store._opened()) for _ in range(2)]
        await asyncio.sleep(0)
        both_wait.set()
        await asyncio.gather(*tasks)
        await store.close()

    asyncio.run(main())
    assert [bool(one) for one in made] == [False]


def test_a_volume_whose_opening_was_cancelled_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store:
            await (await store.create("web", size="1M")).close()
            held = Held(store.sync.open)
            with monkeypatch.context() as patch:
                patch.setattr(store.sync, "open", held)
                opening = store.open("web")
            task = asyncio.ensure_future(opening)
            await begun(held)
            task.cancel()
            held.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with store.open("web") as disk:
                assert disk.writable

    asyncio.run(main())


def test_close_waits_for_calls_and_no_cancellation_cuts_it_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store:
            disk = await store.create("web", size="1M")
            held = Held(disk.sync.snapshot)
            monkeypatch.setattr(disk.sync, "snapshot", held)
            snapshot = asyncio.create_task(disk.snapshot("a"))
            await begun(held)
            closing = asyncio.create_task(disk.close())
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.sleep(0)
            assert not closing.done() and not disk.closed
            held.go_on.set()
            assert (await snapshot).name == "a"
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert disk.closed

    asyncio.run(main())


def test_a_cancelled_call_with_progress_ends_where_it_reports(tmp_path: Path) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store, store.create("web", size="64M") as disk:
            await disk.write(0, b"x" * (32 << 20))
            task: asyncio.Task[None] | None = None

            def cancel(done: int, total: int) -> None:
                assert task is not None
                task.cancel()

            def export(report: Any) -> None:
                report(0, 1)
                while True:  # an operation without an end, but for what its progress raises
                    report(0, 1)

            task = asyncio.create_task(disk._calls.run_with_progress(cancel, export))
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(ZeroDivisionError):
                await disk._calls.run_with_progress(lambda done, total: 1 // 0, export)
            await disk.export(tmp_path / "out.raw")
            assert (tmp_path / "out.raw").stat().st_size == 64 << 20

    asyncio.run(main())


def test_a_loop_that_ends_waits_for_what_its_tasks_began(tmp_path: Path) -> None:
    async def main() -> None:
        store = await aio.Store(tmp_path / "vms")
        disk = await store.create("web", size="1M")

        async def work() -> None:
            async with store:
                await disk.snapshot("a")
                await asyncio.sleep(3600)

        task = asyncio.create_task(work())
        while not disk.sync.snapshots:
            await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(main())
    with onionskin.Store(tmp_path / "vms") as store, store.open("web") as disk:
        assert [one.name for one in disk.snapshots] == ["a"]


def test_a_temporary_fork_is_dropped_though_its_task_is_cancelled_again_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms", threads=1) as store, store.create("web", size="1M") as web:
            await web.snapshot("clean")
            held, inside = Held(lambda: None), asyncio.Event()

            async def use() -> None:
                async with store.temporary("web@clean") as disk:
                    await disk.write(0, b"x")
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(use())
            await inside.wait()
            blocker = asyncio.create_task(store.run(held))  # the only thread is busy while the fork is to be dropped
            await begun(held)
            for _ in range(3):
                task.cancel()
                for _ in range(5):
                    await asyncio.sleep(0)
            held.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await blocker
            assert [info.name for info in await store.volumes()] == ["web"]

    asyncio.run(main())


def test_a_temporary_fork_that_cannot_be_flushed_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store, store.create("web", size="1M") as web:
            await web.snapshot("clean")
            async with store.temporary("web@clean") as disk:
                await disk.write(0, b"x")
                disk.sync._opened.path.poison()
            assert [info.name for info in await store.volumes()] == ["web"]

    asyncio.run(main())


# ---- each twin, cancelled ----


class StandIn:
    """A store or volume whose every method, and every property that blocks, is held; it takes any arguments."""

    name = "stand-in"
    closed = False

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.held = Held(self._ended)
        self.ended: list[bool] = []
        self.report: Callable[[int, int], None] | None = None

    def _ended(self, *args: object, **kwargs: Any) -> object:
        self.ended.append(True)
        if (report := kwargs.get("progress")) is not None:
            report(0, 1)  # raises in a call that was told to stop
            self.ended.append(False)
        return MagicMock()

    def __getattr__(self, name: str) -> object:
        is_property = isinstance(vars(self.kind).get(name), property)
        return self.held() if is_property else self.held


def twins() -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        for name, twin in vars(getattr(aio, kind)).items():
            opens = "Opening" in str(inspect.signature(twin).return_annotation) if inspect.isfunction(twin) else False
            if name[0] != "_" and (inspect.iscoroutinefunction(twin) or opens):
                yield kind, name


TWINS = [
    (kind, name) for kind, name in twins() if name not in ("run", "run_with_progress", "close")
]  # which have tests of their own


def test_the_list_of_twins_has_all_that_is_public() -> None:
    found = {(kind, name) for kind, name in TWINS}
    for kind in KINDS:
        ours = vars(getattr(onionskin, kind))
        awaited = {name for name, value in ours.items() if name[0] != "_" and inspect.isfunction(value)}
        assert awaited - QUICK - WHOLE_PROCESS - {"close", "temporary"} <= {name for of, name in found if of == kind}


def call_of(twin: Callable[..., Any]) -> Any:
    """Call a twin with something for each argument that it needs."""
    needed = [
        p for p in inspect.signature(twin).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    return twin(
        *["x" for p in needed if p.kind is not p.KEYWORD_ONLY],
        **{p.name: "x" for p in needed if p.kind is p.KEYWORD_ONLY},
    )


def owner_of(kind: str, store: aio.Store, disk: aio.Volume) -> Any:
    """Something whose twins can be called, of a store that is open."""
    return {"Store": store, "Volume": disk}.get(kind) or getattr(aio, kind)(store, StandIn(getattr(onionskin, kind)))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("kind", "name"), TWINS, ids=".".join)
def test_a_twin_that_is_cancelled_ends_with_its_call_and_not_before(tmp_path: Path, kind: str, name: str) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store, store.create("web", size="1M") as disk:
            owner: Any = owner_of(kind, store, disk)
            real, owner._sync = owner._sync, StandIn(getattr(onionskin, kind))
            try:
                task = asyncio.ensure_future(call_of(getattr(owner, name)))
                await begun(owner.sync.held)
                for _ in range(2):
                    task.cancel()
                    await turns()
                    assert not task.done() and not owner.sync.ended
                owner.sync.held.go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert owner.sync.ended == [True]  # and what tells its progress was ended by that
            finally:
                owner.sync.held.go_on.set()
                owner._sync = real
                if kind == "LiveVolume":
                    owner._calls.threads.end()
            await disk.write(0, b"goes on")

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "name"), TWINS, ids=".".join)
def test_a_twin_that_is_cancelled_before_a_thread_is_free_does_not_begin(tmp_path: Path, kind: str, name: str) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms", threads=1) as store, store.create("web", size="1M") as disk:
            owner: Any = owner_of(kind, store, disk)
            busy = [Held(lambda: None), Held(lambda: None)]
            blockers = [
                asyncio.create_task(getattr(owner, "_calls", store._calls).run(busy[0])),
                asyncio.create_task(disk._bytes(busy[1])),
            ]
            for held in busy:
                await begun(held)
            real, owner._sync = owner._sync, StandIn(getattr(onionskin, kind))
            owner.sync.held.go_on.set()
            try:
                task = asyncio.ensure_future(call_of(getattr(owner, name)))
                await turns()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                for held in busy:
                    held.go_on.set()
                await asyncio.gather(*blockers)
                assert not owner.sync.held.begun.is_set()
            finally:
                owner._sync = real
                for held in busy:
                    held.go_on.set()
                if kind == "LiveVolume":
                    owner._calls.threads.end()

    asyncio.run(main())


# ---- what is connected or begun ----


async def ended_again(store: aio.Store, of: Any, call: str, opening: Any, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Cancel an opening while its call is under way; return what that call opened."""
    found = MagicMock()
    held = Held(lambda *args, **kwargs: found)
    with monkeypatch.context() as patch:
        patch.setattr(of, call, held)
        task = asyncio.ensure_future(opening())
        await begun(held)
        task.cancel()
        await turns()
        assert not task.done()
        held.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    return found


def test_what_a_cancelled_call_connected_or_began_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store:
            real = MagicMock()
            machine = aio.Machine(store, real)
            console = await ended_again(store, real, "console", machine.console, monkeypatch)
            console.close.assert_called_once_with()
            stopped = MagicMock()
            monkeypatch.setattr(onionskin.MachinePool, "stop", stopped)
            pool = await ended_again(store, real, "pool", lambda: machine.pool("clean"), monkeypatch)
            stopped.assert_called_once_with(pool)
            closed = MagicMock()
            monkeypatch.setattr(onionskin.LiveVolume, "close", closed)
            live = await ended_again(
                store, onionskin.control.client, "connect", lambda: aio.connect(store, "web"), monkeypatch
            )
            closed.assert_called_once_with(live)

    asyncio.run(main())


def test_a_pool_is_ended_with_its_block_though_the_task_is_cancelled_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store:
            real = MagicMock()
            held = real.pool.return_value.stop = Held(lambda: None)
            inside = asyncio.Event()

            async def use() -> None:
                async with aio.Machine(store, real).pool("clean", warm=2) as pool:
                    assert pool.sync is real.pool.return_value
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(use())
            await inside.wait()
            for _ in range(3):
                task.cancel()
                await turns()
            assert not task.done()
            await begun(held)
            held.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            real.pool.assert_called_once_with("clean", warm=2)

    asyncio.run(main())


def test_a_connection_is_closed_also_behind_its_store_and_calls_of_it_take_no_thread_of_the_store(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        real = MagicMock()
        held = real.stats = Held(dict)
        async with aio.Store(tmp_path / "vms", threads=1) as store:
            live = aio.LiveVolume(store, real)
            waiting = [asyncio.create_task(live.stats()) for _ in range(3)]
            await begun(held)
            assert await store.volumes() == []  # while the connection is busy
            held.go_on.set()
            assert await asyncio.gather(*waiting) == [{}, {}, {}]
        real.close.assert_not_called()
        with pytest.raises(onionskin.StateError, match="closed"):
            await live.info()
        await live.close()
        real.close.assert_called_once_with()
        await live.close()

    asyncio.run(main())


def test_functions_that_report_progress_are_awaited_and_stopped_with_their_task(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(range(256)) * (1 << 15))
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        async with aio.Store(tmp_path / "vms") as store:
            size = await store.run_with_progress(
                import_image, store.sync, tmp_path / "image", "web", progress=lambda *figures: seen.append(figures)
            )
            assert size == 1 << 23
            assert seen[-1] == (size, size)
            await stopped(store)
            assert [one.name for one in await store.volumes()] == ["web"]

    async def stopped(store: aio.Store) -> None:
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def held(*args: object, progress: Callable[[int, int], object]) -> None:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(300)
            import_image(*args, progress=progress)  # type: ignore[arg-type]

        task = asyncio.create_task(store.run_with_progress(held, store.sync, tmp_path / "image", "cut short"))
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
