"""A context that holds something is for one block: whoever enters it again is told so, and the first block keeps all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.base.held import held


def test_a_context_that_is_entered_in_its_own_block_goes_on_holding() -> None:
    let_go = []

    @held
    def hold() -> Iterator[int]:
        try:
            yield 1
        finally:
            let_go.append(1)

    context = hold()
    with context:
        with pytest.raises(RuntimeError, match="entered once"):
            context.__enter__()
        assert let_go == []
    assert let_go == [1]
    with pytest.raises(RuntimeError, match="entered once"):
        context.__enter__()


def test_a_temporary_fork_is_not_dropped_by_entering_it_again(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            web.snapshot("clean")
        temporary = store.temporary("web@clean")
        with temporary as fork:
            with pytest.raises(RuntimeError, match="another one"):
                temporary.__enter__()
            assert fork.name in store and fork.write(0, b"x") == 1
        assert list(store) == ["web"]
