"""QEMU's monitor (QMP), over the qemu.qmp library, for callers that are no coroutines.

What must hold: every command has a time limit. QEMU drains its disks before it stops, so a command can wait for a disk
server that is gone.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from onionskin.errors import StateError

SECONDS = 30.0
JOB_POLL_SECONDS = 0.0005


class MonitorError(StateError):
    """QEMU refused a command, did not answer in time, or has ended."""


class Monitor:
    """A connection to QEMU. A context manager. Any thread may call it.

    Parameters
    ----------
    path : Path
        QEMU's socket.
    name : str
        What the machine is called in errors.
    """

    def __init__(self, path: Path, name: str, *, seconds: float = SECONDS) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="onionskin qmp", daemon=True)
        self._thread.start()
        self._client = QMPClient(name)
        self._heard: list[tuple[EventListener, Callable[[dict[str, Any]], None]]] = []
        try:
            self._await(self._client.connect(str(path)), "connect", seconds)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. QEMU goes on. Further calls do nothing."""
        if self._loop.is_closed():
            return
        try:
            self._await(self._client.disconnect(), "disconnect", SECONDS)
        except (MonitorError, QMPError, OSError, EOFError):
            pass  # the other end is gone
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float = SECONDS) -> Any:
        """Run a command, and return what it returns.

        Raises
        ------
        MonitorError
            QEMU refused it, or did not answer within `seconds`: then it may still be carried out.
        """
        return self._await(self._client.execute(command, arguments), command, seconds)

    def run_job(self, command: str, arguments: dict[str, Any], *, seconds: float = SECONDS) -> None:
        """Run a command that starts a job, and wait until the job has ended well."""
        self._await(self._job(command, arguments), command, seconds)

    async def _job(self, command: str, arguments: dict[str, Any]) -> None:
        job = f"onionskin-{command}"
        await self._client.execute(command, {**arguments, "job-id": job})
        while True:
            jobs: Any = await self._client.execute("query-jobs")
            (found,) = [one for one in jobs if one["id"] == job]
            if found["status"] == "concluded":
                break
            await asyncio.sleep(JOB_POLL_SECONDS)
        await self._client.execute("job-dismiss", {"id": job})
        if error := found.get("error"):
            raise MonitorError(f"QEMU of machine {self._name!r}: {command}: {error}")

    def _await(self, work: Coroutine[Any, Any, Any], what: str, seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self._loop)
        try:
            return future.result()
        except (TimeoutError, asyncio.TimeoutError):
            raise MonitorError(
                f"QEMU of machine {self._name!r} did not answer {what!r} within {seconds:g} s; is the server of its disks alive?"
            ) from None
        except ExecuteError as error:
            raise MonitorError(f"QEMU of machine {self._name!r} refused {what!r}: {error.error.desc}") from None
        except (QMPError, OSError, EOFError) as error:
            raise MonitorError(f"QEMU of machine {self._name!r}: {what!r}: {error}; has it ended?") from error
        except BaseException:
            future.cancel()
            raise
