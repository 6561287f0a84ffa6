"""What a deletion of many forks of one snapshot would drop is found without reading all of them for each of them."""

from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import Catalog
from onionskin.operations import losses

BLOCK = 4096


def test_the_losses_of_many_forks_are_found_with_one_look_at_what_they_stand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    select = Catalog._select

    def counted(catalog: Catalog, kind: type, condition: str, values: tuple[object, ...]) -> list[object]:
        nonlocal read
        found = select(catalog, kind, condition, values)
        read += len(found)
        return found

    with onionskin.Store(tmp_path / "store") as store:
        with store.create("golden", size=16 * BLOCK) as golden:
            golden.write(0, b"g" * BLOCK)
            golden.snapshot("clean")
        names = store.fork("golden@clean", count=200)
        with store.open(names[7]) as fork:
            fork.write(0, b"f" * BLOCK)
        monkeypatch.setattr(Catalog, "_select", counted)
        loss = losses.of_delete(store._opened, names, recursive=False)
    assert loss.bytes_freed == BLOCK
    assert read < 20 * len(names)
