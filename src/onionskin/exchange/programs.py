"""Programs of the system that read or write an image for this process.

What must hold: a program that was started for a block has ended when the block ends, also where an interrupt comes as it is
started: nobody would read what it writes, or wait for it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onionskin.base.held import held
from onionskin.base.lazy import Later
from onionskin.base.signals import DeferredInterrupt

if TYPE_CHECKING:
    import subprocess
else:
    subprocess = Later("subprocess")


@held
def running(command: Sequence[str], **how: Any) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a program whose output is read in the block. It is killed where it has not ended by then.

    Parameters
    ----------
    command : sequence of str
    **how
        As for `subprocess.Popen`.
    """
    process = None
    try:
        with DeferredInterrupt():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, **how)
        yield process
    finally:
        if process is not None:
            try:
                _end(process)
            except BaseException:  # an interrupt
                _end(process)
                raise


def status_of(process: "subprocess.Popen[bytes]") -> int:
    """Return the exit status of a program whose output has ended. An interrupt waits for that.

    One that comes as `wait` takes its lock would leave that taken, and the next call would wait for ever.
    """
    with DeferredInterrupt():
        return process.wait()


def _end(process: "subprocess.Popen[bytes]") -> None:
    with DeferredInterrupt():
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
