"""Stores, volumes and machines for programs that use asyncio: a call that can take longer than a millisecond is awaited.

Each method calls the method of the same name of `onionskin.Store`, `Volume`, `LiveVolume`, `Machine` or `MachinePool`, in a
thread of a bounded pool. What must hold:

- An await ends when its call has ended, even if the task was cancelled. When CancelledError is raised, the operation has
  happened or has not, no part of it is under way, and no thread still reads or writes a buffer of the caller.
- A cancelled call that had not begun does not begin. A call that reports progress is told to stop when it reports next.
- A volume, store or connection that a cancelled call opened is closed again, and a pool that it started is ended.
- `close` waits for the calls that are under way, and no cancellation cuts it short.
- Reads and writes have threads of their own, so that they do not wait behind merges.
"""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeVar

import onionskin.control.client
import onionskin.machine.machine
import onionskin.machine.pool
import onionskin.store
import onionskin.volume
from onionskin.base.progress import Progress
from onionskin.catalog.tree import Snapshot
from onionskin.errors import OnionskinError, StateError
from onionskin.operations.check import Problem
from onionskin.operations.fork_usage import ForkUsage
from onionskin.operations.holds import Hold
from onionskin.operations.lineage import Ancestor
from onionskin.operations.listing import TreeNode, VolumeInfo
from onionskin.operations.prune import Retention
from onionskin.operations.usage import Usage

if TYPE_CHECKING:
    import socket

    import numpy.typing

    from onionskin.base.annotations import (
        AnyPath,
        Bytes,
        ExtentArray,
        MachineState,
        OpenMode,
        ReadableBuffer,
        SnapshotMode,
        WipePolicy,
        WritableBuffer,
    )
    from onionskin.catalog import Defaults
    from onionskin.machine.taken import MachineSnapshot
    from onionskin.operations.chain_members import ChainLayer
    from onionskin.operations.layering import Layering
    from onionskin.operations.machine_tree import MachineSnapshotInfo
    from onionskin.operations.machine_usage import MachineUsage
    from onionskin.operations.machines import MachineInfo
    from onionskin.operations.store_info import StoreInfo

    Array = numpy.typing.NDArray[Any]

THREADS = 8

Given = ParamSpec("Given")
Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])


class _Ended(Protocol):
    """What ends with a block of ``async with``."""

    async def __aexit__(self, *error: object) -> None: ...


Opened = TypeVar("Opened", bound=_Ended)


def _twin_of(twin: object) -> Callable[[Method], Method]:
    """Append the documentation of the awaited method to the one line that a method has itself."""

    def document(method: Method) -> Method:
        method.__doc__ = f"{inspect.getdoc(method) or ''}\n\n{inspect.getdoc(twin) or ''}"
        return method

    return document


class Store:
    """A directory that holds volumes, opened by ``async with Store(path)`` or by ``await Store(path)``.

    Parameters
    ----------
    path, create, trust, group
        As for `onionskin.Store`.
    threads : int
        The number of reads and writes that run at a time, and also of other calls. Further calls wait.

    Attributes
    ----------
    path : pathlib.Path
        The directory, as it was given.

    Notes
    -----
    An await ends when its call has ended. So a cancelled task goes on for as long as the call takes, and a timeout may
    come late. A call with `progress` stops soon, and a call that had not begun does not begin. When CancelledError is
    raised, the operation has happened or has not, as after a kill. No part of it is under way, and the store and its
    volumes can be used. A volume that was being opened is closed again.

    A `progress` is called in the event loop, with the latest figures. An exception that it raises ends the operation,
    as in the other API, and the await raises it.

    Any event loop may use a store, and several may use it at once.
    """

    def __init__(
        self,
        path: "AnyPath",
        *,
        create: bool = True,
        trust: bool = False,
        group: str | int | None = None,
        threads: int = THREADS,
    ) -> None:
        self.path: Path = Path(path)
        self._calls = _Calls(f"store {path}", _Threads(threads))
        self._make = partial(onionskin.store.Store, path, create=create, trust=trust, group=group)
        self._opening_guard = threading.Lock()
        self._sync: onionskin.store.Store | None = None

    @property
    def sync(self) -> "onionskin.store.Store":
        """The `onionskin.Store` that does the work, for calls that may block."""
        if self._sync is None:
            raise StateError(f"store {self.path} is not open: use it with 'async with', or await it first")
        return self._sync

    def __repr__(self) -> str:
        return f"<aio {self._sync!r}>" if self._sync is not None else f"<aio Store {self.path} not open>"

    async def _opened(self) -> "Store":
        def open() -> None:
            with self._opening_guard:  # of two tasks that await it one opens it
                if self._sync is None:
                    self._sync = self._make()

        if self._sync is None:
            try:
                await self._calls.run(open)
            except BaseException:
                await self.close()
                raise
        return self

    def __await__(self) -> "Generator[Any, None, Store]":
        return self._opened().__await__()

    async def __aenter__(self) -> "Store":
        return await self._opened()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Run any function in a thread of the store, like the store's own methods.

        For functions that report progress there is `run_with_progress`.

        Parameters
        ----------
        function : callable
            The function. It may use `sync` of this store and of its volumes.
        *args, **kwargs
            The arguments that it is called with.

        Returns
        -------
        object
            What the function returns.
        """
        return await self._calls.run(partial(function, *args, **kwargs))

    async def run_with_progress(
        self, function: Callable[..., Result], *args: Any, progress: Progress | None = None, **kwargs: Any
    ) -> Result:
        """Run a function that reports its progress in a thread of the store, and stop it if the task is cancelled.

        `onionskin.delta.delta` and `onionskin.delta.apply` are such functions, and so are `onionskin.images.import_image` and
        `onionskin.images.export_image`.

        Parameters
        ----------
        function : callable
            The function, which takes `progress` by keyword. It may use `sync` of this store and of its volumes.
        *args, **kwargs
            The other arguments that it is called with.
        progress : callable, optional
            Called in the event loop, with the latest figures.

        Returns
        -------
        object
            What the function returns.
        """
        return await self._calls.run_with_progress(progress, lambda report: function(*args, progress=report, **kwargs))

    def _opening(self, open: "Callable[[], onionskin.volume.Volume]") -> "Opening[Volume]":
        async def opened() -> Volume:
            return Volume(self, await self._calls.run(open, undo=onionskin.volume.Volume.close))

        return Opening(opened)

    # ---- volumes ----

    @_twin_of(onionskin.store.Store.create)
    def create(
        self,
        name: str,
        *,
        base: "AnyPath | None" = None,
        size: "int | str | None" = None,
        block_size: int | None = None,
        wipe: "WipePolicy | None" = None,
        digest: bool = False,
        base_format: "Literal['raw'] | None" = None,
    ) -> "Opening[Volume]":
        """Await `onionskin.Store.create`, or use it with ``async with``."""
        return self._opening(
            partial(
                self.sync.create,
                name,
                base=base,
                size=size,
                block_size=block_size,
                wipe=wipe,
                digest=digest,
                base_format=base_format,
            )
        )

    @_twin_of(onionskin.store.Store.open)
    def open(
        self, name: str, *, snapshot: str | None = None, verify: bool = False, mode: "OpenMode" = "w"
    ) -> "Opening[Volume]":
        """Await `onionskin.Store.open`, or use it with ``async with``."""
        return self._opening(partial(self.sync.open, name, snapshot=snapshot, verify=verify, mode=mode))

    @_twin_of(onionskin.store.Store.clone)
    async def clone(
        self, name: str, snapshot: str, new_name: str | None = None, *, wipe: "WipePolicy | None" = None
    ) -> None:
        """Await `onionskin.Store.clone`."""
        await self.run(self.sync.clone, name, snapshot, new_name, wipe=wipe)

    @_twin_of(onionskin.store.Store.delete)
    async def delete(self, *names: str, recursive: bool = False) -> int:
        """Await `onionskin.Store.delete`."""
        return await self.run(self.sync.delete, *names, recursive=recursive)

    @_twin_of(onionskin.store.Store.snapshot_group)
    async def snapshot_group(self, names: "Mapping[str, str | None]", note: str = "") -> "dict[str, Snapshot]":
        """Await `onionskin.Store.snapshot_group`."""
        return await self.run(self.sync.snapshot_group, names, note)

    @_twin_of(onionskin.store.Store.fork)
    async def fork(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        names: "Sequence[str] | None" = None,
        count: int | None = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> list[str]:
        """Await `onionskin.Store.fork`."""
        return await self.run(
            self.sync.fork,
            source,
            snapshot,
            names=names,
            count=count,
            pattern=pattern,
            idempotency_key=idempotency_key,
            lifetime=lifetime,
            labels=labels,
            wipe=wipe,
        )

    @_twin_of(onionskin.store.Store.fork_group)
    async def fork_group(
        self,
        sources: "Mapping[str, str | None]",
        *,
        count: int | None = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> dict[str, list[str]]:
        """Await `onionskin.Store.fork_group`."""
        return await self.run(
            self.sync.fork_group,
            sources,
            count=count,
            pattern=pattern,
            idempotency_key=idempotency_key,
            lifetime=lifetime,
            labels=labels,
            wipe=wipe,
        )

    @_twin_of(onionskin.store.Store.forks_of)
    async def forks_of(self, source: str, snapshot: str | None = None) -> list[str]:
        """Await `onionskin.Store.forks_of`."""
        return await self.run(self.sync.forks_of, source, snapshot)

    @_twin_of(onionskin.store.Store.lineage)
    async def lineage(self, name: str) -> list[Ancestor]:
        """Await `onionskin.Store.lineage`."""
        return await self.run(self.sync.lineage, name)

    @_twin_of(onionskin.store.Store.expire)
    async def expire(self, *, dry_run: bool = False) -> list[str]:
        """Await `onionskin.Store.expire`."""
        return await self.run(self.sync.expire, dry_run=dry_run)

    @_twin_of(onionskin.store.Store.temporary)
    @asynccontextmanager
    async def temporary(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        name: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> "AsyncIterator[Volume]":
        """Use `onionskin.Store.temporary` with ``async with``."""
        block = self.sync.temporary(source, snapshot, name=name, lifetime=lifetime, wipe=wipe)
        opened = await self._calls.run(block.__enter__, undo=lambda _: block.__exit__(None, None, None))
        volume = Volume(self, opened)
        try:
            yield volume
        finally:
            try:
                with suppress(OSError, OnionskinError):  # what it could not make durable goes anyway
                    await volume.close()
            finally:
                await self._calls.finish(partial(block.__exit__, None, None, None))

    @_twin_of(onionskin.store.Store.rename)
    async def rename(self, name: str, new_name: str) -> None:
        """Await `onionskin.Store.rename`."""
        await self.run(self.sync.rename, name, new_name)

    @_twin_of(onionskin.store.Store.set_wipe)
    async def set_wipe(self, name: str, wipe: "WipePolicy") -> None:
        """Await `onionskin.Store.set_wipe`."""
        await self.run(self.sync.set_wipe, name, wipe)

    @_twin_of(onionskin.store.Store.defaults)
    async def defaults(self) -> "Defaults":
        """Await `onionskin.Store.defaults`."""
        return await self.run(self.sync.defaults)

    @_twin_of(onionskin.store.Store.set_lifetime)
    async def set_lifetime(self, name: str, lifetime: "str | float | timedelta | None") -> None:
        """Await `onionskin.Store.set_lifetime`."""
        await self.run(self.sync.set_lifetime, name, lifetime)

    @_twin_of(onionskin.store.Store.set_labels)
    async def set_labels(self, name: str, labels: "Mapping[str, str | None]") -> dict[str, str]:
        """Await `onionskin.Store.set_labels`."""
        return await self.run(self.sync.set_labels, name, labels)

    @_twin_of(onionskin.store.Store.set_defaults)
    async def set_defaults(self, *, wipe: "WipePolicy | None" = None, block_size: int | None = None) -> "Defaults":
        """Await `onionskin.Store.set_defaults`."""
        return await self.run(self.sync.set_defaults, wipe=wipe, block_size=block_size)

    @_twin_of(onionskin.store.Store.rename_snapshot)
    async def rename_snapshot(self, volume: str, old: str, new: str) -> None:
        """Await `onionskin.Store.rename_snapshot`."""
        await self.run(self.sync.rename_snapshot, volume, old, new)

    @_twin_of(onionskin.store.Store.set_note)
    async def set_note(self, volume: str, snapshot: str, note: str) -> None:
        """Await `onionskin.Store.set_note`."""
        await self.run(self.sync.set_note, volume, snapshot, note)

    @_twin_of(onionskin.store.Store.hold)
    async def hold(
        self,
        volume: str,
        snapshot: "str | Sequence[str]",
        holder: str,
        *,
        guid: "str | Sequence[str] | None" = None,
    ) -> None:
        """Await `onionskin.Store.hold`."""
        await self.run(self.sync.hold, volume, snapshot, holder, guid=guid)

    @_twin_of(onionskin.store.Store.unhold)
    async def unhold(
        self,
        volume: str,
        snapshot: "str | Sequence[str]",
        holder: str,
        *,
        guid: "str | Sequence[str] | None" = None,
    ) -> None:
        """Await `onionskin.Store.unhold`."""
        await self.run(self.sync.unhold, volume, snapshot, holder, guid=guid)

    @_twin_of(onionskin.store.Store.holds)
    async def holds(self, volume: str | None = None, snapshot: str | None = None) -> list[Hold]:
        """Await `onionskin.Store.holds`."""
        return await self.run(self.sync.holds, volume, snapshot)

    @_twin_of(onionskin.store.Store.relocate)
    async def relocate(self, name: str, *, base: "AnyPath", trust: bool = False, verify: bool = False) -> None:
        """Await `onionskin.Store.relocate`."""
        await self.run(self.sync.relocate, name, base=base, trust=trust, verify=verify)

    @_twin_of(onionskin.store.Store.prune)
    async def prune(
        self,
        volume: str,
        *,
        keep_last: int = 0,
        keep_hourly: int = 0,
        keep_daily: int = 0,
        keep_weekly: int = 0,
        keep_monthly: int = 0,
        keep_yearly: int = 0,
        keep_within: timedelta | None = None,
        zone: tzinfo = UTC,
        dry_run: bool = False,
    ) -> list[Retention]:
        """Await `onionskin.Store.prune`."""
        return await self.run(
            self.sync.prune,
            volume,
            keep_last=keep_last,
            keep_hourly=keep_hourly,
            keep_daily=keep_daily,
            keep_weekly=keep_weekly,
            keep_monthly=keep_monthly,
            keep_yearly=keep_yearly,
            keep_within=keep_within,
            zone=zone,
            dry_run=dry_run,
        )

    # ---- looking ----

    @_twin_of(onionskin.store.Store.create_machine)
    async def create_machine(
        self,
        name: str,
        *,
        disks: Sequence[str] = (),
        memory: "int | str",
        wipe: "WipePolicy | None" = None,
        **configuration: Any,
    ) -> "Machine":
        """Await `onionskin.Store.create_machine`."""
        create = partial(self.sync.create_machine, disks=disks, memory=memory, wipe=wipe, **configuration)
        return Machine(self, await self.run(create, name))

    @_twin_of(onionskin.store.Store.open_machine)
    async def open_machine(self, name: str) -> "Machine":
        """Await `onionskin.Store.open_machine`."""
        return Machine(self, await self.run(self.sync.open_machine, name))

    @_twin_of(onionskin.store.Store.machines)
    async def machines(self, *, labels: "Mapping[str, str] | None" = None) -> "list[MachineInfo]":
        """Await `onionskin.Store.machines`."""
        return await self.run(self.sync.machines, labels=labels)

    @_twin_of(onionskin.store.Store.machine_info)
    async def machine_info(self, name: str) -> "MachineInfo":
        """Await `onionskin.Store.machine_info`."""
        return await self.run(self.sync.machine_info, name)

    @_twin_of(onionskin.store.Store.machine_snapshots)
    async def machine_snapshots(self, name: str) -> "list[MachineSnapshotInfo]":
        """Await `onionskin.Store.machine_snapshots`."""
        return await self.run(self.sync.machine_snapshots, name)

    @_twin_of(onionskin.store.Store.machine_usage)
    async def machine_usage(self, name: str) -> "list[MachineUsage]":
        """Await `onionskin.Store.machine_usage`."""
        return await self.run(self.sync.machine_usage, name)

    @_twin_of(onionskin.store.Store.machine_lineage)
    async def machine_lineage(self, name: str) -> list[Ancestor]:
        """Await `onionskin.Store.machine_lineage`."""
        return await self.run(self.sync.machine_lineage, name)

    @_twin_of(onionskin.store.Store.fork_machine)
    async def fork_machine(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        names: "Sequence[str] | None" = None,
        count: int | None = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> list[str]:
        """Await `onionskin.Store.fork_machine`."""
        return await self.run(
            self.sync.fork_machine,
            source,
            snapshot,
            names=names,
            count=count,
            pattern=pattern,
            idempotency_key=idempotency_key,
            lifetime=lifetime,
            labels=labels,
            wipe=wipe,
        )

    @_twin_of(onionskin.store.Store.delete_machines)
    async def delete_machines(self, *names: str, recursive: bool = False) -> int:
        """Await `onionskin.Store.delete_machines`."""
        return await self.run(self.sync.delete_machines, *names, recursive=recursive)

    @_twin_of(onionskin.store.Store.rename_machine)
    async def rename_machine(self, name: str, new_name: str) -> None:
        """Await `onionskin.Store.rename_machine`."""
        await self.run(self.sync.rename_machine, name, new_name)

    @_twin_of(onionskin.store.Store.volumes)
    async def volumes(
        self, *, labels: "Mapping[str, str] | None" = None, space: bool = True, owned: bool = False
    ) -> list[VolumeInfo]:
        """Await `onionskin.Store.volumes`."""
        return await self.run(self.sync.volumes, labels=labels, space=space, owned=owned)

    @_twin_of(onionskin.store.Store.info)
    async def info(self, name: str) -> VolumeInfo:
        """Await `onionskin.Store.info`."""
        return await self.run(self.sync.info, name)

    @_twin_of(onionskin.store.Store.store_info)
    async def store_info(self) -> "StoreInfo":
        """Await `onionskin.Store.store_info`."""
        return await self.run(self.sync.store_info)

    @_twin_of(onionskin.store.Store.chain)
    async def chain(self, name: str, snapshot: str | None = None) -> "list[ChainLayer]":
        """Await `onionskin.Store.chain`."""
        return await self.run(self.sync.chain, name, snapshot)

    @_twin_of(onionskin.store.Store.snapshots)
    async def snapshots(self, name: str) -> list[Snapshot]:
        """Await `onionskin.Store.snapshots`."""
        return await self.run(self.sync.snapshots, name)

    @_twin_of(onionskin.store.Store.tree)
    async def tree(self) -> list[TreeNode]:
        """Await `onionskin.Store.tree`."""
        return await self.run(self.sync.tree)

    @_twin_of(onionskin.store.Store.usage)
    async def usage(self, name: str) -> list[Usage]:
        """Await `onionskin.Store.usage`."""
        return await self.run(self.sync.usage, name)

    @_twin_of(onionskin.store.Store.usage_of_forks)
    async def usage_of_forks(self, source: str, snapshot: str | None = None) -> list[ForkUsage]:
        """Await `onionskin.Store.usage_of_forks`."""
        return await self.run(self.sync.usage_of_forks, source, snapshot)

    @_twin_of(onionskin.store.Store.bytes_freed_by_merge)
    async def bytes_freed_by_merge(self, volume: str, snapshots: "str | Sequence[str]") -> int | None:
        """Await `onionskin.Store.bytes_freed_by_merge`."""
        return await self.run(self.sync.bytes_freed_by_merge, volume, snapshots)

    @_twin_of(onionskin.store.Store.diff)
    async def diff(self, name: str, a: str | None = None, b: str | None = None) -> "ExtentArray":
        """Await `onionskin.Store.diff`."""
        return await self.run(self.sync.diff, name, a, b)

    @_twin_of(onionskin.store.Store.layering)
    async def layering(self, name: str, snapshot: str | None = None) -> "Layering":
        """Await `onionskin.Store.layering`."""
        return await self.run(self.sync.layering, name, snapshot)

    @_twin_of(onionskin.store.Store.check)
    async def check(self, *, repair: bool = False) -> list[Problem]:
        """Await `onionskin.Store.check`."""
        return await self.run(self.sync.check, repair=repair)

    @_twin_of(onionskin.store.Store.finish_work)
    async def finish_work(self) -> None:
        """Await `onionskin.Store.finish_work`."""
        await self.run(self.sync.finish_work)

    @_twin_of(onionskin.store.Store.close)
    async def close(self) -> None:
        """Await `onionskin.Store.close`, after all calls that are under way in the store and its volumes."""
        await self._calls.end(lambda: None if self._sync is None else self._sync.close())
        self._calls.threads.end()


class Opening(Generic[Opened]):
    """What is to be opened or begun. Await it, or use it with ``async with``, once: the call begins then."""

    def __init__(self, open: "Callable[[], Coroutine[Any, Any, Opened]]") -> None:
        self._open = open
        self._opened: Opened | None = None

    def __await__(self) -> "Generator[Any, None, Opened]":
        return self._open().__await__()

    async def __aenter__(self) -> "Opened":
        self._opened = await self._open()
        return self._opened

    async def __aexit__(self, *error: object) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(*error)


class Volume:
    """One open volume. `Store.create` and `Store.open` return it, and ``async with`` flushes and closes it.

    Its properties (`name`, `size_bytes`, `block_size`, `wipe`, `writable`, `closed`) need no await. The documentation
    of `Store` says what holds when an await is cancelled.
    """

    def __init__(self, store: Store, sync: "onionskin.volume.Volume") -> None:
        self._store = store
        self._sync = sync
        self._calls = _Calls(f"volume {sync.name!r}", store._calls.threads, within=store._calls)

    @property
    def store(self) -> Store:
        """The store in which the volume was opened."""
        return self._store

    @property
    def sync(self) -> "onionskin.volume.Volume":
        """The `onionskin.Volume` that does the work, for calls that may block."""
        return self._sync

    @property
    def name(self) -> str:
        """The volume's present name, also after it was renamed."""
        return self._sync.name

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return self._sync.size_bytes

    @property
    def block_size(self) -> int:
        """The unit of copy-on-write, in bytes."""
        return self._sync.block_size

    @property
    def wipe(self) -> "WipePolicy":
        """What happens to freed space, ``"release"`` or ``"zero"``."""
        return self._sync.wipe

    @property
    def writable(self) -> bool:
        """Whether this is the head, and not a view of a snapshot."""
        return self._sync.writable

    @property
    def closed(self) -> bool:
        """Whether the volume was closed."""
        return self._sync.closed

    def __repr__(self) -> str:
        return f"<aio {self._sync!r}>"

    async def __aenter__(self) -> "Volume":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _bytes(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return await self._calls.run(partial(function, *args, **kwargs), of_bytes=True)

    async def _run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return await self._calls.run(partial(function, *args, **kwargs))

    # ---- bytes ----

    @_twin_of(onionskin.volume.Volume.read)
    async def read(self, offset: int, length: int) -> bytes:
        """Await `onionskin.Volume.read`."""
        return await self._bytes(self._sync.read, offset, length)

    @_twin_of(onionskin.volume.Volume.readinto)
    async def readinto(self, offset: int, buffer: "WritableBuffer") -> int:
        """Await `onionskin.Volume.readinto`."""
        return await self._bytes(self._sync.readinto, offset, buffer)

    @_twin_of(onionskin.volume.Volume.write)
    async def write(self, offset: int, data: "ReadableBuffer") -> int:
        """Await `onionskin.Volume.write`."""
        return await self._bytes(self._sync.write, offset, data)

    @_twin_of(onionskin.volume.Volume.read_blocks)
    async def read_blocks(self, block_indices: "Sequence[int] | Array", out: "Bytes | None" = None) -> "Bytes":
        """Await `onionskin.Volume.read_blocks`."""
        return await self._bytes(self._sync.read_blocks, block_indices, out)

    @_twin_of(onionskin.volume.Volume.write_blocks)
    async def write_blocks(self, block_indices: "Sequence[int] | Array", data: "ReadableBuffer") -> None:
        """Await `onionskin.Volume.write_blocks`."""
        await self._bytes(self._sync.write_blocks, block_indices, data)

    @_twin_of(onionskin.volume.Volume.zero)
    async def zero(self, offset: int, length: int) -> None:
        """Await `onionskin.Volume.zero`."""
        await self._bytes(self._sync.zero, offset, length)

    @_twin_of(onionskin.volume.Volume.trim)
    async def trim(self, offset: int, length: int) -> None:
        """Await `onionskin.Volume.trim`."""
        await self._bytes(self._sync.trim, offset, length)

    @_twin_of(onionskin.volume.Volume.view)
    async def view(self, offset: int, length: int) -> "Bytes":
        """Await `onionskin.Volume.view`. Reading the array may wait for the disk and block the event loop."""
        return await self._bytes(self._sync.view, offset, length)

    @_twin_of(onionskin.volume.Volume.flush)
    async def flush(self) -> None:
        """Await `onionskin.Volume.flush`."""
        await self._bytes(self._sync.flush)

    @_twin_of(onionskin.volume.Volume.resize)
    async def resize(self, size: "int | str", *, force: bool = False) -> None:
        """Await `onionskin.Volume.resize`."""
        await self._run(self._sync.resize, size, force=force)

    @_twin_of(onionskin.volume.Volume.extents)
    async def extents(self) -> "ExtentArray":
        """Await `onionskin.Volume.extents`."""
        return await self._run(self._sync.extents)

    # ---- snapshots ----

    @_twin_of(onionskin.volume.Volume.parent)
    async def parent(self) -> Snapshot | None:
        """Await the property `onionskin.Volume.parent`."""
        return await self._run(lambda: self._sync.parent)

    @_twin_of(onionskin.volume.Volume.head_changed)
    async def head_changed(self) -> bool:
        """Await the property `onionskin.Volume.head_changed`."""
        return await self._run(lambda: self._sync.head_changed)

    @_twin_of(onionskin.volume.Volume.snapshots)
    async def snapshots(self) -> list[Snapshot]:
        """Await the property `onionskin.Volume.snapshots`."""
        return await self._run(lambda: self._sync.snapshots)

    @_twin_of(onionskin.volume.Volume.snapshot)
    async def snapshot(self, name: str | None = None, note: str = "", *, guid: str | None = None) -> Snapshot:
        """Await `onionskin.Volume.snapshot`."""
        return await self._run(self._sync.snapshot, name, note, guid=guid)

    @_twin_of(onionskin.volume.Volume.revert)
    async def revert(self, name: str, *, guid: str | None = None) -> None:
        """Await `onionskin.Volume.revert`."""
        await self._run(self._sync.revert, name, guid=guid)

    @_twin_of(onionskin.volume.Volume.discard)
    async def discard(
        self, name: "str | Sequence[str]", *, recursive: bool = False, guid: "str | Sequence[str] | None" = None
    ) -> None:
        """Await `onionskin.Volume.discard`."""
        await self._run(self._sync.discard, name, recursive=recursive, guid=guid)

    @_twin_of(onionskin.volume.Volume.merge)
    async def merge(self, name: "str | Sequence[str]", *, guid: "str | Sequence[str] | None" = None) -> None:
        """Await `onionskin.Volume.merge`."""
        await self._run(self._sync.merge, name, guid=guid)

    @_twin_of(onionskin.volume.Volume.merge_into_base)
    async def merge_into_base(
        self,
        upto: str | None = None,
        *,
        progress: Progress | None = None,
        threads: int = 0,
        bytes_per_second: int = 0,
    ) -> None:
        """Await `onionskin.Volume.merge_into_base`. A cancelled task cancels the merge."""
        merge = partial(self._sync.merge_into_base, upto, threads=threads, bytes_per_second=bytes_per_second)
        await self._calls.run_with_progress(progress, lambda report: merge(progress=report))

    @_twin_of(onionskin.volume.Volume.flatten)
    async def flatten(self, *, progress: Progress | None = None) -> None:
        """Await `onionskin.Volume.flatten`. A cancelled task ends the copy."""
        await self._calls.run_with_progress(progress, lambda report: self._sync.flatten(progress=report))

    @_twin_of(onionskin.volume.Volume.export)
    async def export(self, path: "AnyPath", *, progress: Progress | None = None) -> None:
        """Await `onionskin.Volume.export`. A cancelled task ends the export, and no image is left."""
        await self._calls.run_with_progress(progress, lambda report: self._sync.export(path, progress=report))

    @_twin_of(onionskin.volume.Volume.diff)
    async def diff(self, a: str, b: str | None = None) -> "ExtentArray":
        """Await `onionskin.Volume.diff`."""
        return await self._run(self._sync.diff, a, b)

    @_twin_of(onionskin.volume.Volume.usage)
    async def usage(self) -> list[Usage]:
        """Await `onionskin.Volume.usage`."""
        return await self._run(self._sync.usage)

    @_twin_of(onionskin.volume.Volume.layering)
    async def layering(self) -> "Layering":
        """Await `onionskin.Volume.layering`."""
        return await self._run(self._sync.layering)

    @_twin_of(onionskin.volume.Volume.close)
    async def close(self) -> None:
        """Await `onionskin.Volume.close`, after all calls that are under way."""
        await self._calls.end(self._sync.close)


@_twin_of(onionskin.control.client.connect)
def connect(store: Store, name: str) -> Opening["LiveVolume"]:
    """Await `onionskin.connect`, or use it with ``async with``. The store is one of `onionskin.aio`, which is open."""
    call = partial(onionskin.control.client.connect, store.sync, name)

    async def connected() -> LiveVolume:
        return LiveVolume(store, await store._calls.run(call, undo=onionskin.control.client.LiveVolume.close))

    return Opening(connected)


class LiveVolume:
    """A volume that another process serves. `connect` returns it, and ``async with`` closes the connection.

    Its calls run one after the other, also those of several tasks. Only `name` needs no await. The documentation of `Store`
    says what holds when an await is cancelled.
    """

    def __init__(self, store: Store, sync: "onionskin.control.client.LiveVolume") -> None:
        self._sync = sync
        # A thread of its own: calls that wait for their turn take none of the store's, and do not begin if cancelled.
        self._calls = _Calls(f"the connection to volume {sync.name!r}", _Threads(1), within=store._calls)

    @property
    def sync(self) -> "onionskin.control.client.LiveVolume":
        """The `onionskin.LiveVolume` that does the work, for calls that may block."""
        return self._sync

    @property
    def name(self) -> str:
        """The volume's name, also after `rename`."""
        return self._sync.name

    def __repr__(self) -> str:
        return f"<aio {self._sync!r}>"

    async def __aenter__(self) -> "LiveVolume":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return await self._calls.run(partial(function, *args, **kwargs))

    @_twin_of(onionskin.control.client.LiveVolume.size_bytes)
    async def size_bytes(self) -> int:
        """Await the property `onionskin.LiveVolume.size_bytes`."""
        return await self._run(lambda: self._sync.size_bytes)

    @_twin_of(onionskin.control.client.LiveVolume.block_size)
    async def block_size(self) -> int:
        """Await the property `onionskin.LiveVolume.block_size`."""
        return await self._run(lambda: self._sync.block_size)

    @_twin_of(onionskin.control.client.LiveVolume.snapshots)
    async def snapshots(self) -> list[Snapshot]:
        """Await the property `onionskin.LiveVolume.snapshots`."""
        return await self._run(lambda: self._sync.snapshots)

    @_twin_of(onionskin.control.client.LiveVolume.parent)
    async def parent(self) -> Snapshot | None:
        """Await the property `onionskin.LiveVolume.parent`."""
        return await self._run(lambda: self._sync.parent)

    @_twin_of(onionskin.control.client.LiveVolume.head_changed)
    async def head_changed(self) -> bool:
        """Await the property `onionskin.LiveVolume.head_changed`."""
        return await self._run(lambda: self._sync.head_changed)

    @_twin_of(onionskin.control.client.LiveVolume.info)
    async def info(self) -> dict[str, Any]:
        """Await `onionskin.LiveVolume.info`."""
        return await self._run(self._sync.info)

    @_twin_of(onionskin.control.client.LiveVolume.stats)
    async def stats(self) -> dict[str, Any]:
        """Await `onionskin.LiveVolume.stats`."""
        return await self._run(self._sync.stats)

    @_twin_of(onionskin.control.client.LiveVolume.usage)
    async def usage(self) -> list[Usage]:
        """Await `onionskin.LiveVolume.usage`."""
        return await self._run(self._sync.usage)

    @_twin_of(onionskin.control.client.LiveVolume.diff)
    async def diff(self, a: str, b: str | None = None) -> "ExtentArray":
        """Await `onionskin.LiveVolume.diff`."""
        return await self._run(self._sync.diff, a, b)

    @_twin_of(onionskin.control.client.LiveVolume.read)
    async def read(self, offset: int, length: int) -> bytes:
        """Await `onionskin.LiveVolume.read`."""
        return await self._run(self._sync.read, offset, length)

    @_twin_of(onionskin.control.client.LiveVolume.trim)
    async def trim(self, offset: int, length: int) -> None:
        """Await `onionskin.LiveVolume.trim`."""
        await self._run(self._sync.trim, offset, length)

    @_twin_of(onionskin.control.client.LiveVolume.zero)
    async def zero(self, offset: int, length: int) -> None:
        """Await `onionskin.LiveVolume.zero`."""
        await self._run(self._sync.zero, offset, length)

    @_twin_of(onionskin.control.client.LiveVolume.flush)
    async def flush(self) -> None:
        """Await `onionskin.LiveVolume.flush`."""
        await self._run(self._sync.flush)

    @_twin_of(onionskin.control.client.LiveVolume.resize)
    async def resize(self, size: "int | str", *, force: bool = False) -> None:
        """Await `onionskin.LiveVolume.resize`."""
        await self._run(self._sync.resize, size, force=force)

    @_twin_of(onionskin.control.client.LiveVolume.snapshot)
    async def snapshot(self, name: str | None = None, note: str = "") -> Snapshot:
        """Await `onionskin.LiveVolume.snapshot`."""
        return await self._run(self._sync.snapshot, name, note)

    @_twin_of(onionskin.control.client.LiveVolume.revert)
    async def revert(self, name: str, *, guid: str | None = None) -> None:
        """Await `onionskin.LiveVolume.revert`."""
        await self._run(self._sync.revert, name, guid=guid)

    @_twin_of(onionskin.control.client.LiveVolume.discard)
    async def discard(
        self, name: "str | Sequence[str]", *, recursive: bool = False, guid: "str | Sequence[str] | None" = None
    ) -> None:
        """Await `onionskin.LiveVolume.discard`."""
        await self._run(self._sync.discard, name, recursive=recursive, guid=guid)

    @_twin_of(onionskin.control.client.LiveVolume.merge)
    async def merge(self, name: "str | Sequence[str]", *, guid: "str | Sequence[str] | None" = None) -> None:
        """Await `onionskin.LiveVolume.merge`."""
        await self._run(self._sync.merge, name, guid=guid)

    @_twin_of(onionskin.control.client.LiveVolume.rename)
    async def rename(self, new_name: str) -> None:
        """Await `onionskin.LiveVolume.rename`."""
        await self._run(self._sync.rename, new_name)

    @_twin_of(onionskin.control.client.LiveVolume.merge_into_base)
    async def merge_into_base(
        self,
        upto: str | None = None,
        *,
        progress: Progress | None = None,
        threads: int = 0,
        bytes_per_second: int = 0,
    ) -> None:
        """Await `onionskin.LiveVolume.merge_into_base`. A cancelled task cancels the merge, and ends the connection."""
        merge = partial(self._sync.merge_into_base, upto, threads=threads, bytes_per_second=bytes_per_second)
        await self._calls.run_with_progress(progress, lambda report: merge(progress=report))

    @_twin_of(onionskin.control.client.LiveVolume.close)
    async def close(self) -> None:
        """Await `onionskin.LiveVolume.close`, after all calls that are under way."""
        try:
            await self._calls.end(self._sync.close)
        finally:
            self._sync.close()  # also behind a store that was closed, where no call is made any more
            self._calls.threads.end()


class Machine:
    """A machine. `Store.create_machine` and `Store.open_machine` return it. It holds nothing, so it need not be closed.

    Only `name` needs no await. `run` and `be_pool` are not here, because they take a whole process. The documentation of
    `Store` says what holds when an await is cancelled; so a cancelled `stop` goes on for as long as the guest has.
    """

    def __init__(self, store: Store, sync: "onionskin.machine.machine.Machine") -> None:
        self._store = store
        self._sync = sync

    @property
    def store(self) -> Store:
        """The store in which the machine was opened."""
        return self._store

    @property
    def sync(self) -> "onionskin.machine.machine.Machine":
        """The `onionskin.Machine` that does the work, for calls that may block."""
        return self._sync

    @property
    def name(self) -> str:
        """As it was called when it was opened."""
        return self._sync.name

    def __repr__(self) -> str:
        return f"<aio {self._sync!r}>"

    async def _run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return await self._store.run(function, *args, **kwargs)

    # ---- looking ----

    @_twin_of(onionskin.machine.machine.Machine.state)
    async def state(self) -> "MachineState":
        """Await the property `onionskin.Machine.state`."""
        return await self._run(lambda: self._sync.state)

    @_twin_of(onionskin.machine.machine.Machine.configuration)
    async def configuration(self) -> "onionskin.MachineConfiguration":
        """Await the property `onionskin.Machine.configuration`."""
        return await self._run(lambda: self._sync.configuration)

    @_twin_of(onionskin.machine.machine.Machine.snapshots)
    async def snapshots(self) -> "list[MachineSnapshotInfo]":
        """Await the property `onionskin.Machine.snapshots`."""
        return await self._run(lambda: self._sync.snapshots)

    @_twin_of(onionskin.machine.machine.Machine.info)
    async def info(self) -> "MachineInfo":
        """Await `onionskin.Machine.info`."""
        return await self._run(self._sync.info)

    @_twin_of(onionskin.machine.machine.Machine.status)
    async def status(self) -> dict[str, Any]:
        """Await `onionskin.Machine.status`."""
        return await self._run(self._sync.status)

    @_twin_of(onionskin.machine.machine.Machine.console)
    async def console(self) -> "socket.socket":
        """Await `onionskin.Machine.console`. If the task is cancelled, the connection is closed."""
        return await self._store._calls.run(self._sync.console, undo=lambda connection: connection.close())

    # ---- running ----

    @_twin_of(onionskin.machine.machine.Machine.start)
    async def start(self, *, paused: bool = False, fresh: bool = False) -> None:
        """Await `onionskin.Machine.start`."""
        await self._run(self._sync.start, paused=paused, fresh=fresh)

    @_twin_of(onionskin.machine.machine.Machine.stop)
    async def stop(self, timeout: float | None = None, *, force: bool = False) -> None:
        """Await `onionskin.Machine.stop`."""
        await self._run(self._sync.stop, timeout, force=force)

    @_twin_of(onionskin.machine.machine.Machine.pause)
    async def pause(self) -> bool:
        """Await `onionskin.Machine.pause`."""
        return await self._run(self._sync.pause)

    @_twin_of(onionskin.machine.machine.Machine.resume)
    async def resume(self) -> None:
        """Await `onionskin.Machine.resume`."""
        await self._run(self._sync.resume)

    @_twin_of(onionskin.machine.machine.Machine.tell)
    async def tell(self, hostname: str | None = None, *, clock: bool = True) -> list[str]:
        """Await `onionskin.Machine.tell`."""
        return await self._run(self._sync.tell, hostname, clock=clock)

    # ---- snapshots ----

    @_twin_of(onionskin.machine.machine.Machine.snapshot)
    async def snapshot(
        self, name: str | None = None, note: str = "", *, mode: "SnapshotMode | None" = None, freeze: bool = False
    ) -> "MachineSnapshot":
        """Await `onionskin.Machine.snapshot`."""
        return await self._run(self._sync.snapshot, name, note, mode=mode, freeze=freeze)

    @_twin_of(onionskin.machine.machine.Machine.revert)
    async def revert(self, name: str) -> None:
        """Await `onionskin.Machine.revert`."""
        await self._run(self._sync.revert, name)

    @_twin_of(onionskin.machine.machine.Machine.revert_to_beginning)
    async def revert_to_beginning(self) -> None:
        """Await `onionskin.Machine.revert_to_beginning`."""
        await self._run(self._sync.revert_to_beginning)

    @_twin_of(onionskin.machine.machine.Machine.merge)
    async def merge(self, names: "str | Sequence[str]") -> list[str]:
        """Await `onionskin.Machine.merge`."""
        return await self._run(self._sync.merge, names)

    @_twin_of(onionskin.machine.machine.Machine.discard)
    async def discard(self, names: "str | Sequence[str]", *, recursive: bool = False) -> list[str]:
        """Await `onionskin.Machine.discard`."""
        return await self._run(self._sync.discard, names, recursive=recursive)

    @_twin_of(onionskin.machine.machine.Machine.hold)
    async def hold(self, snapshot: "str | Sequence[str]", holder: str) -> None:
        """Await `onionskin.Machine.hold`."""
        await self._run(self._sync.hold, snapshot, holder)

    @_twin_of(onionskin.machine.machine.Machine.unhold)
    async def unhold(self, snapshot: "str | Sequence[str]", holder: str) -> None:
        """Await `onionskin.Machine.unhold`."""
        await self._run(self._sync.unhold, snapshot, holder)

    @_twin_of(onionskin.machine.machine.Machine.holds)
    async def holds(self, snapshot: str | None = None) -> "list[Hold]":
        """Await `onionskin.Machine.holds`."""
        return await self._run(self._sync.holds, snapshot)

    @_twin_of(onionskin.machine.machine.Machine.rename_snapshot)
    async def rename_snapshot(self, old: str, new: str) -> None:
        """Await `onionskin.Machine.rename_snapshot`."""
        await self._run(self._sync.rename_snapshot, old, new)

    @_twin_of(onionskin.machine.machine.Machine.set_note)
    async def set_note(self, snapshot: str, note: str) -> None:
        """Await `onionskin.Machine.set_note`."""
        await self._run(self._sync.set_note, snapshot, note)

    @_twin_of(onionskin.machine.machine.Machine.prune)
    async def prune(
        self,
        *,
        keep_last: int = 0,
        keep_hourly: int = 0,
        keep_daily: int = 0,
        keep_weekly: int = 0,
        keep_monthly: int = 0,
        keep_yearly: int = 0,
        keep_within: timedelta | None = None,
        zone: tzinfo = UTC,
        dry_run: bool = False,
    ) -> "list[Retention]":
        """Await `onionskin.Machine.prune`."""
        return await self._run(
            self._sync.prune,
            keep_last=keep_last,
            keep_hourly=keep_hourly,
            keep_daily=keep_daily,
            keep_weekly=keep_weekly,
            keep_monthly=keep_monthly,
            keep_yearly=keep_yearly,
            keep_within=keep_within,
            zone=zone,
            dry_run=dry_run,
        )

    @_twin_of(onionskin.machine.machine.Machine.delete)
    async def delete(self, *, recursive: bool = False) -> int:
        """Await `onionskin.Machine.delete`."""
        return await self._run(self._sync.delete, recursive=recursive)

    @_twin_of(onionskin.machine.machine.Machine.fork)
    async def fork(
        self,
        snapshot: str,
        *,
        count: int | None = None,
        names: "Sequence[str] | None" = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
        network: bool = False,
        start: bool = True,
    ) -> "list[Machine]":
        """Await `onionskin.Machine.fork`. If the task is cancelled meanwhile, either none is left or all of them run."""
        forks = await self._run(
            self._sync.fork,
            snapshot,
            count=count,
            names=names,
            pattern=pattern,
            idempotency_key=idempotency_key,
            lifetime=lifetime,
            labels=labels,
            wipe=wipe,
            network=network,
            start=start,
        )
        return [Machine(self._store, one) for one in forks]

    @_twin_of(onionskin.machine.machine.Machine.pool)
    def pool(self, snapshot: str, *, warm: int = 4) -> "Opening[MachinePool]":
        """Await `onionskin.Machine.pool`, or use it with ``async with``. If that is cancelled, the pool is ended."""
        call = partial(self._sync.pool, snapshot, warm=warm)

        async def started() -> MachinePool:
            pool = await self._store._calls.run(call, undo=onionskin.machine.pool.MachinePool.stop)
            return MachinePool(self._store, pool)

        return Opening(started)

    @_twin_of(onionskin.machine.machine.Machine.pools)
    async def pools(self) -> "list[MachinePool]":
        """Await `onionskin.Machine.pools`."""
        return [MachinePool(self._store, one) for one in await self._run(self._sync.pools)]


class MachinePool:
    """Forks of a snapshot that are ready to run. `Machine.pool` and `Machine.pools` return it, and ``async with`` ends it.

    Only `snapshot` needs no await. The documentation of `Store` says what holds when an await is cancelled.
    """

    def __init__(self, store: Store, sync: "onionskin.machine.pool.MachinePool") -> None:
        self._store = store
        self._sync = sync

    @property
    def sync(self) -> "onionskin.machine.pool.MachinePool":
        """The `onionskin.MachinePool` that does the work, for calls that may block."""
        return self._sync

    @property
    def snapshot(self) -> str:
        """The snapshot."""
        return self._sync.snapshot

    def __repr__(self) -> str:
        return f"<aio {self._sync!r}>"

    async def __aenter__(self) -> "MachinePool":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._store._calls.finish(self._sync.stop)

    async def _run(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return await self._store.run(function, *args, **kwargs)

    @_twin_of(onionskin.machine.pool.MachinePool.is_there)
    async def is_there(self) -> bool:
        """Await the property `onionskin.MachinePool.is_there`."""
        return await self._run(lambda: self._sync.is_there)

    @_twin_of(onionskin.machine.pool.MachinePool.status)
    async def status(self) -> dict[str, Any]:
        """Await `onionskin.MachinePool.status`."""
        return await self._run(self._sync.status)

    @_twin_of(onionskin.machine.pool.MachinePool.wait)
    async def wait(self) -> None:
        """Await `onionskin.MachinePool.wait`."""
        await self._run(self._sync.wait)

    @_twin_of(onionskin.machine.pool.MachinePool.stop)
    async def stop(self) -> None:
        """Await `onionskin.MachinePool.stop`."""
        await self._run(self._sync.stop)


class _Threads:
    """The two pools of threads of a store: one for reads and writes, one for other calls. They start when needed."""

    def __init__(self, count: int) -> None:
        self.of_bytes: Executor = ThreadPoolExecutor(count, thread_name_prefix="onionskin bytes")
        self.others: Executor = ThreadPoolExecutor(count, thread_name_prefix="onionskin aio")

    def end(self) -> None:
        """Join the threads. No call is under way. Idempotent."""
        self.of_bytes.shutdown()
        self.others.shutdown()


class _Calls:
    """The calls under way of one store or volume.

    Parameters
    ----------
    what : str
        The store or volume, for errors.
    threads : _Threads
    within : _Calls, optional
        For a volume: the calls of its store, which include the calls of the volume.
    """

    def __init__(self, what: str, threads: _Threads, *, within: "_Calls | None" = None) -> None:
        self.threads = threads
        self._what = what
        self._within = within
        self._under_way: set[Future[Any]] = set()
        self._is_closing = self._is_closed = False

    async def run(
        self,
        call: Callable[[], Result],
        *,
        of_bytes: bool = False,
        undo: Callable[[Result], object] | None = None,
        stop: Callable[[], None] | None = None,
    ) -> Result:
        """Run a call in a thread and wait for its end.

        If the task is cancelled meanwhile and the call has begun, `stop` is called; when the call has returned, `undo`
        is called with its result. An exception of the call becomes the cause of the CancelledError.
        """
        if self._is_closing or (self._within is not None and self._within._is_closing):
            raise StateError(f"{self._what} is closed, or is being closed; open it again")
        future = self._submit(call, self.threads.of_bytes if of_bytes else self.threads.others)

        def cancel() -> None:
            if not future.cancel() and stop is not None:
                stop()

        interrupted = await _end_of(future, cancel)
        if interrupted is None:
            return future.result()
        failure = None if future.cancelled() else future.exception()
        if undo is not None and failure is None and not future.cancelled():
            undone = self._submit(partial(undo, future.result()), self.threads.others)
            await _end_of(undone)
            failure = undone.exception()
        raise interrupted from failure

    async def finish(self, call: Callable[[], object]) -> None:
        """Run a call that ends what was begun: also where the task is cancelled before it has begun, or a close waits."""
        if self._is_closed:
            raise StateError(f"{self._what} is closed; open it again")
        future = self._submit(call, self.threads.others)
        interrupted = await _end_of(future)
        failure = future.exception()
        if interrupted is not None:
            raise interrupted from failure
        if failure is not None:
            raise failure

    async def run_with_progress(self, progress: Progress | None, call: Callable[[Progress], Result]) -> Result:
        """Run a call that reports its progress, and stop it if the task is cancelled."""
        report = _Report(progress)
        result = await self.run(lambda: call(report), stop=report.stop)
        if report.error is not None:  # `progress` raised it too late to end the call
            raise report.error
        return result

    async def end(self, close: Callable[[], None]) -> None:
        """Begin no more calls, wait for those under way, and close. If closing fails, calls can be made as before."""
        self._is_closing = True
        interrupted: asyncio.CancelledError | None = None
        while under_way := tuple(self._under_way):
            interrupted = await _end_of(under_way[0]) or interrupted
        if not self._is_over():
            future = self._submit(close, self.threads.others)
            interrupted = await _end_of(future) or interrupted
            if failure := future.exception():
                self._is_closing = False
                raise failure
        self._is_closed = True
        if interrupted is not None:
            raise interrupted

    def _is_over(self) -> bool:
        """Return whether the store or volume was closed. With a store, its volumes are closed too."""
        return self._is_closed or (self._within is not None and self._within._is_closed)

    def _submit(self, call: Callable[[], Result], pool: Executor) -> "Future[Result]":
        future = pool.submit(call)
        owner: _Calls | None = self
        while owner is not None:
            owner._under_way.add(future)
            future.add_done_callback(owner._under_way.discard)
            owner = owner._within
        return future


async def _end_of(future: "Future[Any]", cancel: Callable[[], object] = lambda: None) -> asyncio.CancelledError | None:
    """Wait until a call has ended, even if the task is cancelled. For each cancellation, call `cancel`.

    Return the last cancellation, which the caller raises.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    interrupted: asyncio.CancelledError | None = None

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    future.add_done_callback(tell)
    while not ended.is_set():
        try:
            await ended.wait()
        except asyncio.CancelledError as error:
            interrupted = error
            cancel()
    return interrupted


class _Report:
    """Passes progress from a thread to the event loop, and a request to stop from the event loop to the thread."""

    def __init__(self, progress: Progress | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._progress = progress
        self._guard = threading.Lock()
        self._latest: tuple[int, int] | None = None  # figures that `progress` was not called with yet
        self.error: BaseException | None = None  # if set, it ends the operation

    def __call__(self, done: int, total: int) -> None:
        """Take figures, in the thread of the operation; raise `error` there if it is set."""
        if self.error is not None:
            raise self.error
        if self._progress is None:
            return
        with self._guard:
            is_waiting, self._latest = self._latest is not None, (done, total)
        if not is_waiting:
            self._loop.call_soon_threadsafe(self._tell, self._progress)

    def _tell(self, progress: Progress) -> None:
        with self._guard:
            latest, self._latest = self._latest, None
        if latest is None or self.error is not None:
            return
        try:
            progress(*latest)
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """Make the operation end when it reports next."""
        if self.error is None:
            self.error = StateError("the task that waited for it was cancelled")


__all__ = ["LiveVolume", "Machine", "MachinePool", "Opening", "Store", "Volume", "connect"]
