"""Tables whose columns the user chooses: -o, -H, -p, --sort and --reverse of the verbs that list.

What must hold: with -H each row is one line, its cells are parted by one tab each, and no cell holds a tab. With -p a cell is
the number itself, in bytes or in seconds since 1970. A column that takes long is found out only where it is asked for.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import reduce
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.records import record
from onionskin.cli import output

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Listed = TypeVar("Listed")
Cell = str | int | datetime | None


@record
class Column(Generic[Listed]):
    """One column: what it is called behind -o and in the heading, and what it shows of a row.

    A number is a size in bytes if `is_size`. None stands for what is not there, or was not found out.
    """

    name: str
    heading: str
    of: Callable[[Listed], Cell]
    is_size: bool = False
    is_number: bool = False
    is_slow: bool = False

    def shown(self, row: Listed) -> str:
        """Write a cell for people."""
        value = self.of(row)
        if isinstance(value, datetime):
            return output.when(value)
        if value is None or value == "":
            return "-" if value is None else ""
        return output.size(int(value)) if self.is_size else str(value)

    def exact(self, row: Listed) -> str:
        """Write a cell for programs."""
        value = self.of(row)
        if isinstance(value, datetime):
            return str(int(value.timestamp()))
        return "-" if value is None else str(value)


class _SortedBy(NamedTuple):
    """A column to sort by."""

    column: str
    is_descending: bool


@record
class Asked:
    """What the options ask for."""

    columns: tuple[str, ...] | None
    without_header: bool
    exact: bool
    sort: tuple["_SortedBy", ...]
    reverse: bool


class _ColumnsType(click.ParamType):  # type: ignore[type-arg]
    """Names of columns, with commas between them."""

    name = "COLUMN,..."

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Take the list apart, or fail as a usage error."""
        if isinstance(value, tuple):
            return value
        wanted = tuple(name.strip() for name in value.split(","))
        for name in wanted:
            if name not in self.names:
                self.fail(f"there is no column {name!r}; there are {', '.join(self.names)}", param, ctx)
        return wanted

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Offer the columns that are not in the list yet."""
        from click.shell_completion import CompletionItem

        lead, comma, last = incomplete.rpartition(",")
        taken = lead.split(",")
        return [
            CompletionItem(f"{lead}{comma}{name}") for name in self.names if name.startswith(last) and name not in taken
        ]


class _SortType(click.ParamType):  # type: ignore[type-arg]
    """Names of columns to sort by, with commas between them, and a minus before those whose greatest comes first."""

    name = "COLUMN,..."

    def __init__(self, names: Sequence[str]) -> None:
        self.columns = _ColumnsType(names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[_SortedBy, ...]:
        """Take the list apart, or fail as a usage error."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        names = self.columns.convert(",".join(word.removeprefix("-") for word in words), param, ctx)
        return tuple(_SortedBy(name, word.startswith("-")) for name, word in zip(names, words, strict=True))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Offer the columns that are not in the list yet."""
        return self.columns.shell_complete(ctx, param, incomplete)


def column_options(columns: "Sequence[Column[Any]]") -> Callable[[Any], Any]:
    """Give a verb the options; it takes them as `asked`."""
    names = [column.name for column in columns]
    options = (
        click.option("-o", "--columns", type=_ColumnsType(names), help=f"Show these columns: {', '.join(names)}."),
        click.option("-H", "without_header", is_flag=True, help="Print no heading, and one tab between columns."),
        click.option("-p", "exact", is_flag=True, help="Print exact numbers: bytes, and seconds since 1970."),
        click.option(
            "--sort",
            "-s",
            type=_SortType(names),
            multiple=True,
            help="Sort by these columns, the first of them first; -COLUMN has the greatest first.",
        ),
        click.option("--reverse", is_flag=True, help="Reverse the order."),
    )

    def decorate(verb: Any) -> Any:
        def with_options(
            *, columns: Any, without_header: bool, exact: bool, sort: Any, reverse: bool, **rest: Any
        ) -> Any:
            by = tuple(one for several in sort for one in several)
            return verb(asked=Asked(columns, without_header, exact, by, reverse), **rest)

        with_options.__doc__ = verb.__doc__
        with_options.__name__ = verb.__name__
        with_options.__click_params__ = getattr(verb, "__click_params__", [])  # type: ignore[attr-defined]
        return reduce(lambda made, option: option(made), reversed(options), with_options)

    return decorate


def is_asked(asked: Asked, columns: "Sequence[Column[Listed]]") -> bool | None:
    """Whether the slow columns are to be found out; None where the verb decides."""
    slow = {column.name for column in columns if column.is_slow}
    if any(by.column in slow for by in asked.sort):
        return True
    return None if asked.columns is None else bool(slow.intersection(asked.columns))


def in_order(asked: Asked, columns: "Sequence[Column[Listed]]", rows: "Sequence[Listed]") -> "list[Listed]":
    """Sort rows as asked; those without a value come last, and rows of one value stay as they were."""
    found = list(rows)
    if not asked.sort:
        return found[::-1] if asked.reverse else found
    by_name = {column.name: column for column in columns}
    for by in reversed(asked.sort):  # sorting keeps the order of what is equal, so the first column comes last
        of = by_name[by.column].of
        known = [row for row in found if of(row) is not None]
        known.sort(key=of, reverse=by.is_descending != asked.reverse)  # type: ignore[arg-type]  # all are of one type
        found = known + [row for row in found if of(row) is None]
    return found


def draw(asked: Asked, columns: "Sequence[Column[Listed]]", rows: "Sequence[Listed]", default: Sequence[str]) -> str:
    """Draw a table of the columns asked for; where none are, of those named by default."""
    by_name = {column.name: column for column in columns}
    chosen = [by_name[name] for name in asked.columns or default]
    cells = [[column.exact(row) if asked.exact else column.shown(row) for column in chosen] for row in rows]
    if asked.without_header:
        return "\n".join("\t".join(map(output.exact_cell, row)) for row in cells)
    right = " ".join(column.heading for column in chosen if column.is_size or column.is_number)
    return output.table([column.heading for column in chosen], cells, right=right)
