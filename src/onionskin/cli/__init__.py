"""The command line: ``onionskin VERB NAME``.

Each verb is a few lines over `onionskin.Store` and `onionskin.Volume`. The list of them is in ``verbs``, exit
statuses are in ``statuses``, names in ``names``, what is printed in ``output``.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process, and end it with a documented status."""
    try:
        from onionskin.cli.output import open_standard_streams
        from onionskin.cli.verbs import onionskin

        open_standard_streams()
    except KeyboardInterrupt:  # the imports take long enough to be interrupted
        sys.exit(130)
    onionskin()
