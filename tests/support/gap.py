"""Has a process of a machine killed in a gap between two steps of its supervisor: `gaps/sitecustomize.py` does it there."""

import os
from pathlib import Path

import pytest

_DIRECTORY = Path(__file__).parent / "gaps"


class Armed:
    """The next gap in which somebody is killed. Supervisors that are started in its environment look at it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def environment(self) -> dict[str, str]:
        """Return what has Python look at it, besides what the environment has."""
        paths = [str(_DIRECTORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"ONIONSKIN_GAP": str(self._path), "PYTHONPATH": os.pathsep.join(paths)}

    @property
    def _met(self) -> Path:
        return self._path.with_suffix(".met")

    @property
    def is_met(self) -> bool:
        """Whether somebody was killed."""
        return self._met.exists()

    def arm(self, where: str, victim: str) -> None:
        """Have `victim` killed once, "before" or "after" a step. It may be the number of a process, too."""
        self._met.unlink(missing_ok=True)
        self._path.write_text(f"{where} {victim}")

    def disarm(self) -> bool:
        """Have nobody killed any more. Return whether somebody was."""
        self._path.unlink(missing_ok=True)
        return self.is_met


class Gap(Armed):
    """One for a test: supervisors that are started from now on look at it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(path)
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)
