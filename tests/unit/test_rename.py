"""A handle follows its volume, and not its name."""

from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


def test_an_open_volume_that_is_renamed_goes_on_under_its_new_name(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=8 * BLOCK) as web:
        web.write(0, b"x" * BLOCK)
        web.snapshot("a")
        web.write(0, b"y" * 2 * BLOCK)
        with onionskin.Store(tmp_path / "store") as other:
            other.rename("web", "www")
            other.create("web", size=BLOCK).close()
        assert web.name == "www"
        assert [row.snapshot for row in web.usage()] == ["a", None]
        assert web.diff("a")["length"].sum() == 2 * BLOCK


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = onionskin.Store(tmp_path / "store")
    store.close()
    with pytest.raises(onionskin.StateError, match="closed"):
        store.volumes()
