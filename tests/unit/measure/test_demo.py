"""How the demo looks for what must be gone, beside the thread that frees it."""

from pathlib import Path

import pytest

from onionskin.measure import demo

MARK = b"0123456789abcdef"


@pytest.mark.parametrize("before_bytes", [0, 1, 90, 100, 112, 184])
def test_a_mark_is_found_wherever_the_pieces_that_are_read_divide_it(tmp_path: Path, monkeypatch, before_bytes) -> None:
    monkeypatch.setattr(demo, "_CHUNK_BYTES", 100)
    path = tmp_path / "file"
    path.write_bytes(b"." * before_bytes + MARK + b"." * 50)
    assert demo._finds(tmp_path, MARK)
    path.write_bytes(b"." * before_bytes + MARK[:-1] + b"." * 50 + MARK[-1:])
    assert not demo._finds(tmp_path, MARK)


def test_files_that_are_cut_or_unlinked_while_the_demo_looks_hold_no_mark(tmp_path: Path, monkeypatch) -> None:
    cut, gone = tmp_path / "cut", tmp_path / "gone"
    for path in (cut, gone):
        path.write_bytes(bytes(1 << 20) + MARK)

    def free(path: Path) -> bool:
        path.write_bytes(b"") if path == cut else path.unlink()
        return True

    monkeypatch.setattr(Path, "is_file", free)
    assert not demo._finds(tmp_path, MARK)
