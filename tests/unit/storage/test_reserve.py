"""The room that a store sets aside, where two set it aside at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onionskin.base.paths import FilePath
from onionskin.storage import reserve as module
from onionskin.storage.layout import Layout
from onionskin.storage.locks import locked_directory
from onionskin.storage.reserve import Reserve

MARK = b"of the first one"


def test_room_that_another_has_just_set_aside_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were given up and made anew, whoever needs it meanwhile would not find it, and somebody else might take it."""
    layout = Layout(FilePath(tmp_path))

    @contextmanager
    def after_another(path: FilePath, *, alone: bool) -> Iterator[bool]:
        monkeypatch.undo()
        Reserve(layout, read_only=False).make()
        with open(layout.reserve, "r+b") as file:
            file.write(MARK)
        with locked_directory(path, alone=alone) as is_locked:
            yield is_locked

    monkeypatch.setattr(module, "locked_directory", after_another)
    Reserve(layout, read_only=False).make()
    assert Path(layout.reserve).read_bytes().startswith(MARK)
