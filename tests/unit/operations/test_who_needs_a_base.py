"""A merge into the base is refused where others need the base as it is, and the refusal names them."""

from pathlib import Path

import pytest

import onionskin


def test_who_else_stands_on_what_would_be_merged_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 16))
    with (
        onionskin.Store(tmp_path / "store") as store,
        store.create("web", base=tmp_path / "base.raw") as web,
    ):
        web.write(0, b"x")
        web.snapshot("clean")
        web.write(0, b"y")
        web.snapshot("left")
        web.revert("clean")
        web.write(0, b"z")
        store.fork("web", names=["job"])
        web.snapshot("now")
        with pytest.raises(onionskin.StateError, match=r"needed as it is by job, web@clean, web@left, web@now; merge"):
            web.merge_into_base()
