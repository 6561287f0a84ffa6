"""QEMU's monitor (QMP), over the qemu.qmp library, for callers that are no coroutines.

What must hold: every command has a time limit. QEMU drains its disks before it stops, so a command can wait for a disk
server that is gone. What timed out may still be carried out later, so a caller who must know asks again (`request`).
"""

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

from onionskin.base.lazy import logger
from onionskin.base.sockets import connect_unix, credentials_of
from onionskin.base.threads import Thread
from onionskin.control.client import is_stopped, what_lets_it_go_on
from onionskin.errors import StateError

try:
    from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate
    from qemu.qmp import StateError as DisconnectedError
except ImportError as error:
    raise StateError(
        f"machines need the Python library qemu.qmp, which cannot be loaded ({error}); pip install 'onionskin[machine]'"
    ) from error

SECONDS = 30.0
CLOSE_SECONDS = 2.0
LOOK_SECONDS = 0.5  # after so long it is looked again whether what answers late is at it
JOB_PREFIX = "onionskin-"
_NO_EVENT = "none"  # as QEMU calls no event of its own
# Behind each of these, whether a machine is stopped has to be asked.
_ENDS_OF_RUNNING = ("STOP", "SUSPEND", "SUSPEND_DISK", "SHUTDOWN", "GUEST_PANICKED")
_log = logger(__name__)


class MonitorError(StateError):
    """QEMU refused a command, did not answer in time, or has ended."""


class MonitorTimeout(MonitorError):
    """QEMU did not answer in time. It may still carry the command out."""


class Standstill:
    """What QEMU reports of a machine that stands still, or is about to: whether it goes on, or is reset, nevertheless.

    Attributes
    ----------
    stands : bool
        Whether it stood still at any time since.
    went_on, was_reset : bool
    """

    def __init__(self, *, stands: bool) -> None:
        self.stands: bool = stands
        self.went_on: bool = False
        self.was_reset: bool = False

    def hear(self, event: str) -> None:
        """Take note of an event, in the order in which QEMU sent them: all that came before a reply are heard before it."""
        if event == "STOP":
            self.stands = True
        elif self.stands:
            self.went_on |= event == "RESUME"
            self.was_reset |= event == "RESET"


class Monitor:
    """A connection to QEMU. A context manager. Any thread may call it.

    Parameters
    ----------
    path : Path
        QEMU's socket. It may be longer than what the name of a socket may have.
    name : str
        What the machine is called in errors.
    seconds : float
        For QEMU to answer at all.
    on_event : callable, optional
        Is given the name and the data of each event of QEMU, in a thread of its own. It must not call this object.

    Attributes
    ----------
    pid : int
        The process that listens there; 0 where it cannot be seen from here.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        seconds: float = SECONDS,
        on_event: "Callable[[str, dict[str, Any]], None] | None" = None,
    ) -> None:
        self._name = name
        connection = connect_unix(path, seconds=seconds)
        self.pid: int = credentials_of(connection)[0]
        connection.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="onionskin qmp", daemon=True)
        self._thread.start()
        self._client = QMPClient(name)
        # The library keeps each event for whoever asks for it later, and nobody does: a guest may cause any number of them.
        self._client.events.names.add(_NO_EVENT)
        self._dismissals: set[asyncio.Future[Any]] = set()
        self._numbers = itertools.count()
        self._guard = threading.Lock()
        self._is_closed = False
        self._standstill = Standstill(stands=False)
        self._is_live = False
        self._client.register_listener(EventListener((*_ENDS_OF_RUNNING, "RESUME", "RESET"), self._hear_of_standstill))
        try:
            if on_event is not None:
                self._listen(on_event)
            self._await(self._client.connect(connection), "connect", seconds)
        except BaseException:
            connection.close()
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_broken(self) -> bool:
        """Whether the connection has ended, and nobody closed it: it takes no command any more."""
        return not self._is_closed and self._client.runstate is not Runstate.RUNNING

    @property
    def is_live(self) -> bool:
        """Whether QEMU reported that the machine goes on, and nothing since that may have ended that.

        QEMU reports each stop as it happens, and answers a question late while a guest runs. The guest may sleep.
        """
        return self._is_live and not self._is_closed and self._client.runstate is Runstate.RUNNING

    def close(self) -> None:
        """Disconnect. QEMU goes on. Further calls do nothing."""
        with self._guard:
            if self._is_closed:
                return
            self._is_closed = True  # what others ask for from here on is refused, as nobody would carry it out
            try:
                # The other end may be gone, or have said what no QEMU says: the library raises that here, whatever it was.
                with suppress(Exception):
                    self._await(self._client.disconnect(), "disconnect", CLOSE_SECONDS, at_end=True)
            finally:
                self._end()

    def _end(self) -> None:
        """End the loop once no task of it is left: one that is left would say so when it is collected."""
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        seconds: float = SECONDS,
        seconds_max: float = 0.0,
        is_at_it: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Run a command, and return what it returns.

        Behind `seconds` it is waited on, up to `seconds_max`, as long as `is_at_it` and QEMU was not stopped by a signal.

        Raises
        ------
        MonitorTimeout
            QEMU did not answer in time. It may still carry the command out.
        MonitorError
            QEMU refused it, or has ended.
        """
        work = self._client.execute(command, arguments)
        return self._await(work, command, seconds, max(seconds, seconds_max), is_at_it)

    def execute_all(
        self, commands: Sequence[tuple[str, dict[str, Any] | None]], *, seconds: float = SECONDS
    ) -> list[Any]:
        """Run commands in this order, and return what they return. None waits for the answer to the one before it.

        QEMU carries out those behind one that it refuses, too.

        Raises
        ------
        MonitorTimeout, MonitorError
            As for `execute`: of the first one that failed.
        """
        return self.ask_all(commands, seconds=seconds)()

    def ask_all(
        self, commands: Sequence[tuple[str, dict[str, Any] | None]], *, seconds: float = SECONDS
    ) -> Callable[[], list[Any]]:
        """Ask for commands as `execute_all` does, and return what waits for the answers: QEMU is at it meanwhile."""

        async def run() -> list[Any]:
            asked = (self._client.execute(*command) for command in commands)
            found = await asyncio.gather(*asked, return_exceptions=True)
            for (command, _), one in zip(commands, found, strict=True):
                if isinstance(one, ExecuteError):
                    raise self._refused(command, one)
                if isinstance(one, BaseException):
                    raise one
            return found

        future = self._begin(run(), commands[0][0], seconds)
        return lambda: list(self._end_of(future, commands[0][0], seconds))

    def request(self, command: str, arguments: dict[str, Any] | None = None) -> None:
        """Ask for a command behind all that were asked for, and wait for nothing."""

        async def run() -> None:
            with suppress(QMPError, OSError, EOFError, asyncio.CancelledError):
                await self._client.execute(command, arguments)

        work = run()
        try:
            asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # it was closed
            work.close()

    def run_job(
        self,
        command: str,
        arguments: dict[str, Any],
        *,
        then: Sequence[tuple[str, dict[str, Any] | None]] = (),
        meanwhile: Callable[[], object] = lambda: None,
        seconds: float = SECONDS,
    ) -> list[Any]:
        """Run a command that starts a job, and wait until the job has ended well.

        `then` is asked for with how it ended, and this returns what it returns. `meanwhile` is called while the job runs; the
        end of the job is waited for also where that fails. QEMU is asked behind both: so all is heard that it reported until
        `meanwhile` had ended.
        """
        failed: list[BaseException] = []
        has_ended = asyncio.Event()

        def guarded() -> None:
            try:
                meanwhile()
            except BaseException as error:  # which is not QEMU's
                failed.append(error)
            finally:
                with suppress(RuntimeError):  # the connection was closed
                    self._loop.call_soon_threadsafe(has_ended.set)

        answers = self._await(self._job(command, arguments, then, has_ended), command, seconds, meanwhile=guarded)
        if failed:
            raise failed[0]
        return list(answers)

    async def _job(
        self,
        command: str,
        arguments: dict[str, Any],
        then: Sequence[tuple[str, dict[str, Any] | None]],
        behind: asyncio.Event,
    ) -> list[Any]:
        # Each has a name of its own: one that timed out may still run.
        job = f"{JOB_PREFIX}{command}-{os.getpid()}-{next(self._numbers)}"
        # A machine may stand still meanwhile: it is not asked again and again, and the job is dismissed behind its end.
        with self._client.listener("JOB_STATUS_CHANGE", lambda event: _has_ended(event, job)) as ended:
            await self._client.execute(command, {**arguments, "job-id": job})
            await ended.get()
        await behind.wait()
        asked = (self._client.execute(*one) for one in (("query-jobs", None), *then))
        jobs, *answers = await asyncio.gather(*asked)
        found = next((one for one in cast("list[Any]", jobs) if one["id"] == job), None)
        if found is None:
            raise MonitorError(f"QEMU of machine {self._name!r}: {command}: its job is gone")
        self._dismissals = {task for task in self._dismissals if not task.done()}
        self._dismissals.add(asyncio.ensure_future(self._client.execute("job-dismiss", {"id": job})))
        if error := found.get("error"):
            raise MonitorError(f"QEMU of machine {self._name!r}: {command}: {error}")
        return answers

    def watch(self, *, stands: bool) -> Standstill:
        """Note from now on whether a machine goes on, or is reset, that stands still, or is stopped next."""
        self._standstill = Standstill(stands=stands)
        return self._standstill

    def _hear_of_standstill(self, event: Any) -> bool:
        """Hear an event as it is read, before any reply behind it, and keep none."""
        name = str(event["event"])
        self._standstill.hear(name)
        if name != "RESET":
            self._is_live = name == "RESUME"
        return False

    def _refused(self, command: str, error: ExecuteError) -> MonitorError:
        return MonitorError(f"QEMU of machine {self._name!r} refused {command!r}: {error}")

    def _listen(self, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        events = EventListener()
        self._client.register_listener(events)

        async def tell() -> None:
            async for event in events:
                try:
                    on_event(str(event["event"]), dict(event.get("data", {})))  # type: ignore[call-overload]
                except Exception:
                    _log.exception("an event of machine %r", self._name)

        asyncio.run_coroutine_threadsafe(tell(), self._loop)

    def _await(
        self,
        work: Coroutine[Any, Any, Any],
        what: str,
        seconds: float,
        seconds_max: float = 0.0,
        is_at_it: Callable[[], bool] = lambda: False,
        *,
        meanwhile: Callable[[], object] = lambda: None,
        at_end: bool = False,
    ) -> Any:
        future = self._begin(work, what, max(seconds, seconds_max), at_end=at_end)
        return self._end_of(future, what, seconds, seconds_max, is_at_it, meanwhile)

    def _begin(self, work: Coroutine[Any, Any, Any], what: str, limit: float, *, at_end: bool = False) -> "Future[Any]":
        if self._is_closed and not at_end:
            work.close()
            raise MonitorError(f"QEMU of machine {self._name!r}: {what!r}: the connection was closed")
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, limit), self._loop)

    def _end_of(
        self,
        future: "Future[Any]",
        what: str,
        seconds: float,
        seconds_max: float = 0.0,
        is_at_it: Callable[[], bool] = lambda: False,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Any:
        begun, limit = time.monotonic(), max(seconds, seconds_max)
        try:
            meanwhile()
            # The loop may end before it sees this.
            wait([future], seconds if limit > seconds else limit + CLOSE_SECONDS)
            while not future.done() and time.monotonic() < begun + limit and not is_stopped(self.pid) and is_at_it():
                wait([future], LOOK_SECONDS)
            return future.result(0)
        except TimeoutError:
            future.cancel()
            waited = max(seconds, round(time.monotonic() - begun - CLOSE_SECONDS))
            raise MonitorTimeout(
                f"QEMU of machine {self._name!r} did not answer {what!r} within {waited:g} s; {self._why_silent()}"
            ) from None
        except ExecuteError as error:
            raise self._refused(what, error) from None
        except (QMPError, OSError, EOFError) as error:
            said = "it is being disconnected" if isinstance(error, DisconnectedError) else error
            raise MonitorError(
                f"QEMU of machine {self._name!r}: {what!r}: {said}; has it ended? 'onionskin machine status' says so"
            ) from error
        except BaseException:
            future.cancel()
            raise

    def _why_silent(self) -> str:
        if is_stopped(self.pid):
            return f"its process {self.pid} was stopped ({what_lets_it_go_on(self.pid)} lets it go on)"
        return "is the server of its disks alive?"


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _has_ended(event: Any, job: str) -> bool:
    return bool(event["data"]["id"] == job and event["data"]["status"] in ("concluded", "null"))
