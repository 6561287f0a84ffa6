"""The command line: ``onionskin VERB NAME``.

Each verb is a few lines over `onionskin.Store` and `onionskin.Volume`. ``app`` lists the verbs, ``exit_status`` holds
the exit statuses, ``arguments`` the types of arguments, and ``output`` prints.
"""

import atexit
import gc
import os
import sys
import threading
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process, and end it with a documented status."""
    gc.set_threshold(50_000, 10, 10)  # else it goes through all that is imported, again and again: a tenth of a start
    try:
        from onionskin.cli.app import onionskin
        from onionskin.cli.output import open_standard_streams

        open_standard_streams()
        onionskin()
        raise AssertionError("the command line returned instead of ending")
    except SystemExit as ended:
        status = int(ended.code or 0)
    except KeyboardInterrupt:  # before or behind a verb: the imports take long enough to be interrupted
        status = 130
    _end(status)


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
