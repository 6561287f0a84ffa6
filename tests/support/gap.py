"""Has a process of a machine killed in a gap between two steps of its supervisor: `gaps/sitecustomize.py` does it there."""

import os
from pathlib import Path

import pytest

_DIRECTORY = Path(__file__).parent / "gaps"


class Gap:
    """The next gap in which somebody is killed. Supervisors that are started from now on look at it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        monkeypatch.setenv("ONIONSKIN_GAP", str(path))
        paths = [str(_DIRECTORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    @property
    def _met(self) -> Path:
        return self._path.with_suffix(".met")

    @property
    def is_met(self) -> bool:
        """Whether somebody was killed."""
        return self._met.exists()

    def arm(self, where: str, victim: str) -> None:
        """Have `victim` killed once, "before" or "after" a step."""
        self._met.unlink(missing_ok=True)
        self._path.write_text(f"{where} {victim}")

    def disarm(self) -> bool:
        """Have nobody killed any more. Return whether somebody was."""
        self._path.unlink(missing_ok=True)
        return self.is_met
