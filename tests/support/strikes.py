"""Interrupts Python at the N-th call or return, so that a test can walk over all of them: see strikes.c."""

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("strikes.c")


def _build() -> Path:
    """Compile strikes.c, once for each version of it."""
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"onionskin-strikes-{os.getuid()}-{version}.so"
    if not target.exists():
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            compiler = ["cc"]
        staged = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", staged, SOURCE], check=True)
        staged.replace(target)
    return target


class Strikes:
    """Strikes the main thread once, at an event that is chosen."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(str(_build()))
        self._library.strikes_arm.argtypes = [ctypes.c_long, ctypes.c_int]
        self._library.strikes_seen.restype = ctypes.c_long
        self._profile = ctypes.pythonapi.PyEval_SetProfile
        self._profile.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._profile.restype = None
        self._event = ctypes.cast(self._library.strikes_event, ctypes.c_void_p)

    def begin(self, at: int, number: int = signal.SIGINT) -> None:
        """Count from here, and strike at that event; 0 is none."""
        self._library.strikes_arm(at, number)
        self._profile(self._event, None)

    def end(self) -> int:
        """Count no more. Returns how many events there were."""
        self._profile(None, None)
        return int(self._library.strikes_seen())

    def interrupted(self, at: int, call: Callable[[], object], number: int = signal.SIGINT) -> KeyboardInterrupt | None:
        """Strike at an event of a call, and return the interrupt with all that its traceback keeps, if it is raised."""
        try:
            self.begin(at, number)
            call()
            self.end()
        except KeyboardInterrupt as interrupt:
            self.end()
            return interrupt
        return None
