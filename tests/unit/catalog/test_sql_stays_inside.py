"""No SQL stands outside `catalog/`: all other modules ask by the names of the queries."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog.connection import Connection

PACKAGE = Path(onionskin.__file__).parent

# What takes an SQL condition, or a column, of a table.
GENERIC = (
    *("rows", "sound_rows", "rows_in", "row", "values", "values_in", "values_found", "pairs_found"),
    *("has", "count", "delete", "delete_all"),
)
CONDITION = re.compile(
    r"(=|<|>)\s*\?|\?\s*,\s*\?|\bIN \(|\b(ORDER|GROUP) BY\b|\bIS (NOT )?NULL\b|\bNOT EXISTS\b|\bLIMIT (\?|\d)"
    r"|\b(SELECT|DELETE|UPDATE) .*\b(FROM|SET)\b|\bINSERT INTO\b|\b(kind|role|wipe|name|sealed) *!?= *['\d]"
)


def sql_in(source: str) -> Iterator[str]:
    """Yield the line of each SQL condition in a module, and of each call of what takes one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CONDITION.search(node.value):
            yield f"{node.lineno}: {node.value[:60]!r} is SQL"
        if isinstance(node, ast.Attribute) and node.attr in GENERIC and _is_catalog(node.value):
            yield f"{node.lineno}: .{node.attr} is for modules of the catalog alone"


def _is_catalog(owner: ast.expr) -> bool:
    return ast.unparse(owner).rpartition(".")[2] in ("catalog", "_catalog")


def modules_outside() -> list[str]:
    """Return all modules but those of the catalog, as paths from the package."""
    files = (file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
    return sorted(str(file) for file in files if file.parts[0] != "catalog")


def test_no_module_outside_the_catalog_has_sql() -> None:
    found = {f"{file}:{line}" for file in modules_outside() for line in sql_in((PACKAGE / file).read_text())}
    assert found == set()


def test_what_takes_a_condition_is_what_the_connection_has_for_it() -> None:
    taking = {
        name
        for name, method in vars(Connection).items()
        if not name.startswith("_") and {"condition", "column", "columns"} & set(_parameters(method))
    }
    assert taking == set(GENERIC)


def _parameters(method: object) -> tuple[str, ...]:
    code = getattr(method, "__code__", None)
    return code.co_varnames[: code.co_argcount] if code else ()


@pytest.mark.parametrize(
    "planted",
    [
        'catalog.row(LayerRow, "id = ?", id)',
        'catalog.rows(SnapshotRow, f"volume = ? ORDER BY name LIMIT {most}", id)',
        "store._opened.catalog.rows(VolumeRow)",
        "self._opened.store.catalog.sound_rows(BaseRow)",
        'catalog.rows_in(SegmentRow, "id", ids)',
        "condition = \"kind != 'base-merge'\"",
        "found = catalog.has",
        'text = "SELECT id FROM layers"',
    ],
)
def test_sql_that_is_planted_is_found(planted: str) -> None:
    assert list(sql_in(planted))


@pytest.mark.parametrize(
    "planted", ["catalog.volume_with_id(id)", "catalog.insert(row)", 'print("drop these?")', "names.count(1)"]
)
def test_what_asks_by_name_is_left_alone(planted: str) -> None:
    assert not list(sql_in(planted))
