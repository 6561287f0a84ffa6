"""What a process that does nothing but serve sets for itself, so that no client waits for the upkeep of the interpreter
or of the system, and many volumes can be open.

What must hold: a failure here changes nothing but how long clients wait, and how many volumes and clients there may be.
"""

import fcntl
import gc
import os
from contextlib import suppress
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

DESCRIPTORS = 4096
GARBAGE_OBJECTS = 20_000  # a hundred forks are 4,000


def keep_collections_short() -> None:
    """Leave what is there by now to no collection of garbage, and begin one less often.

    Called once what is needed has been imported. It stays until the end, and to go through all of it took 10 to 20 ms, in
    which no export could be opened.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])


def allow_all_descriptors() -> None:
    """Let this process have as many descriptors as the system lets it have.

    The usual limit, 1024, is for programs that use `select`, which this one does not. A volume takes several.
    """
    with suppress(OSError, ValueError):
        _, hard = getrlimit(RLIMIT_NOFILE)
        setrlimit(RLIMIT_NOFILE, (hard, hard))


def make_room_for_descriptors() -> None:
    """Have the system make the table of this process's descriptors as large as it may become.

    Called before there is another thread. In a process with threads each growth of the table, from 64 on, waits for all
    processors to have left what reads it (`synchronize_rcu`): 3 to 11 ms, three times while the first hundred clients come.
    """
    with suppress(OSError, ValueError):
        soft, _ = getrlimit(RLIMIT_NOFILE)
        count = DESCRIPTORS if soft < 0 else min(soft, DESCRIPTORS)  # RLIM_INFINITY is -1
        with open(os.devnull, "rb") as some:  # there may be no descriptor 0
            os.close(fcntl.fcntl(some.fileno(), fcntl.F_DUPFD_CLOEXEC, count - 1))


def share_of_descriptors_left() -> float:
    """Return which share of the descriptors that this process may have is left; 0 where there is none."""
    soft, _ = getrlimit(RLIMIT_NOFILE)
    try:
        least = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the least number that is free
    except OSError:
        return 0.0
    os.close(least)
    return 1.0 if soft <= 0 else 1 - least / soft
