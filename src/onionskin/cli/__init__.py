"""The command line: ``onionskin VERB NAME``.

Each verb is a few lines over `onionskin.Store` and `onionskin.Volume`. ``app`` lists the verbs, ``exit_status`` holds
the exit statuses, ``arguments`` the types of arguments, and ``output`` prints.
"""

import atexit
import gc
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process, and end it with a documented status."""
    _collect_seldom()
    try:
        from onionskin.cli.app import onionskin
        from onionskin.cli.output import open_standard_streams

        open_standard_streams()
    except KeyboardInterrupt:  # the imports take long enough to be interrupted
        sys.exit(130)
    onionskin()


def _collect_seldom() -> None:
    """Keep the garbage collector from going through all that is imported, again and again, which no verb throws away.

    That takes a tenth of a start, and as much of the end. What a verb leaves in circles is still collected.
    """
    gc.set_threshold(50_000, 10, 10)
    atexit.register(gc.freeze)
