"""The command line: ``onionskin VERB NAME``.

Each verb is a few lines over `onionskin.Store` and `onionskin.Volume`. ``app`` lists the verbs, ``exit_status`` holds
the exit statuses, ``arguments`` the types of arguments, and ``output`` prints.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process, and end it with a documented status."""
    try:
        from onionskin.cli.app import onionskin
        from onionskin.cli.output import open_standard_streams

        open_standard_streams()
    except KeyboardInterrupt:  # the imports take long enough to be interrupted
        sys.exit(130)
    onionskin()
