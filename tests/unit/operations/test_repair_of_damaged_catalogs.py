"""`check --repair` in a store whose catalog is damaged: a file that only seems to be nobody's is kept."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from onionskin import Store

DAMAGES = {
    "a segment": (
        "UPDATE segments SET slots = -5 WHERE role = 'sealed'",
        "UPDATE segments SET slots = 2 WHERE slots = -5",
    ),
    "a layer": (
        "UPDATE layers SET size_bytes = -1 WHERE sealed",
        "UPDATE layers SET size_bytes = 1048576 WHERE sealed",
    ),
    "the id of a segment": (
        "UPDATE segments SET id = CAST(x'00' || id AS BLOB) WHERE role = 'sealed'",
        "UPDATE segments SET id = substr(id, 2) WHERE role = 'sealed'",
    ),
}


def change(store: Path, statement: str) -> None:
    with closing(sqlite3.connect(store / "catalog.db")) as catalog, catalog:
        catalog.execute("PRAGMA ignore_check_constraints = ON")
        assert catalog.execute(statement).rowcount == 1


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    with Store(tmp_path / "store") as store, store.create("web", size="1M") as web:
        web.write(0, b"kept" * 2048)
        web.snapshot("a")
    return tmp_path / "store"


@pytest.mark.parametrize("damaged", list(DAMAGES))
def test_repair_keeps_the_files_of_a_row_that_cannot_be_read(store_path: Path, damaged: str) -> None:
    harm, mend = DAMAGES[damaged]
    change(store_path, harm)
    with Store(store_path) as store:
        problems = store.check(repair=True)
    assert "error" in {problem.severity for problem in problems}
    seeming = [problem for problem in problems if problem.what == "a file that no row names"]
    assert seeming
    assert all("restore the catalog" in problem.advice for problem in seeming)
    change(store_path, mend)
    with Store(store_path) as store, store.open("web", snapshot="a") as view:
        assert view.read(0, 8192) == b"kept" * 2048


def test_check_says_that_pages_of_the_catalog_are_damaged(store_path: Path) -> None:
    """A page that one query reads may be hidden from another."""
    with closing(sqlite3.connect(store_path / "catalog.db")) as catalog:
        (page,) = catalog.execute(
            "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = 'segments'"
        ).fetchone()
        (page_bytes,) = catalog.execute("PRAGMA page_size").fetchone()
    contents = bytearray((store_path / "catalog.db").read_bytes())
    count = (page - 1) * page_bytes + 3  # the cells of the page: an index that has none finds nothing
    contents[count : count + 2] = bytes(2)
    (store_path / "catalog.db").write_bytes(contents)
    with Store(store_path) as store:
        problems = store.check()
    assert any(problem.severity == "error" and problem.where.endswith("catalog.db") for problem in problems), problems
