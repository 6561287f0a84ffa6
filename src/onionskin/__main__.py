"""The program: ``onionskin`` as it is installed, and ``python -m onionskin``.

What must hold: importing this module imports nothing else, so that `main` is the first that a process does.
"""


def main() -> None:
    """Run the command line of this process, which ends it.

    Until a verb has begun there is nothing to undo. So Ctrl-C ends the process as it ends any program: Python would show
    where in which import it was interrupted.
    """
    import _signal  # type: ignore[import-not-found]  # not signal, which is written in Python and takes its time

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # else it is ignored, as in a job of a script
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from onionskin.cli import main as run

    run()


if __name__ == "__main__":
    main()
