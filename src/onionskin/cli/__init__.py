"""The command line: ``onionskin VERB NAME``.

Each verb is a few lines over `onionskin.Store` and `onionskin.Volume`. ``app`` lists the verbs, ``exit_status`` holds
the exit statuses, ``arguments`` the types of arguments, and ``output`` prints.
"""

import _thread
import atexit
import gc
import os
import signal
import sys
import threading
import time
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process, and end it with a documented status."""
    sys.unraisablehook = _interrupt_again
    gc.set_threshold(50_000, 10, 10)  # else it goes through all that is imported, again and again: a tenth of a start
    try:
        status = _status()
        _leave_interrupts_to_the_system()
    except KeyboardInterrupt:  # before or behind a verb
        _leave_interrupts_to_the_system()
        status = 130
    _end(status)


def _status() -> int:
    try:
        from onionskin.cli.app import onionskin
        from onionskin.cli.output import open_standard_streams

        open_standard_streams()
        onionskin()
        raise AssertionError("the command line returned instead of ending")
    except SystemExit as ended:
        return int(ended.code or 0)


def _leave_interrupts_to_the_system() -> None:
    """Have Ctrl-C end the process at once and without a word, unless it is ignored: nothing is left to be undone."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupt the main thread once more where Ctrl-C came in code whose exceptions nobody gets, as a callback's.

    Python would show a traceback, and go on: a server would not have heard the signal.
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    told = [False]
    _thread.start_new_thread(_interrupt_when, (told,))
    # No call may stand behind this: Python looks for signals after calls, and in here one would be lost again.
    told[0] = True


def _interrupt_when(told: list[bool]) -> None:
    while not told[0]:
        time.sleep(0.001)
    _thread.interrupt_main()


def _end(status: int) -> NoReturn:
    """End the process: at once if nobody is left who waits for its end, as after nearly all verbs.

    A verb closes what it opens, and its output is flushed. What Python does besides, at the end of a process, is to take all
    modules apart: a twentieth of a short verb.
    """
    is_awaited = atexit._ncallbacks() > 0 or threading.active_count() > 1
    if not is_awaited:
        os._exit(status)
    gc.freeze()  # what was imported is not gone through once more
    sys.exit(status)
