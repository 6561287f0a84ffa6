"""Records, beside dataclasses of the same fields."""

import copy
import dataclasses
import inspect
import pickle
import typing
from typing import Any

import pytest

from onionskin.base.records import as_dict, field, record


@record
class Ours:
    """A record."""

    name: str
    size: int = 3
    labels: dict[str, str] = field(default_factory=dict, hash=False)

    def twice(self) -> int:
        return 2 * self.size


@dataclasses.dataclass(frozen=True, slots=True)
class Theirs:
    """A dataclass."""

    name: str
    size: int = 3
    labels: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)


@record(frozen=False)
class Node:
    """A record that changes."""

    children: "list[Node]" = field(default_factory=list)


@pytest.mark.parametrize(
    ("given", "named"),
    [(("a",), {}), ((), {"name": "a", "size": 5}), (("a", 5, {"x": "y"}), {}), (("a",), {"labels": {"x": "y"}})],
)
def test_a_record_is_made_as_a_dataclass_is(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, theirs = Ours(*given, **named), Theirs(*given, **named)
    assert as_dict(ours) == dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert repr(ours).replace("Ours", "Theirs") == repr(theirs)
    assert hash(ours) == hash(theirs)
    assert ours == Ours(*given, **named) and ours != Ours("other")
    assert ours.twice() == 2 * ours.size


@pytest.mark.parametrize(
    ("given", "named"), [((), {}), (("a", 1, {}, 4), {}), (("a",), {"name": "b"}), (("a",), {"x": 1})]
)
def test_arguments_that_do_not_fit_are_refused(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    for kind in (Ours, Theirs):
        with pytest.raises(TypeError):
            kind(*given, **named)


def test_a_record_is_frozen_and_has_slots() -> None:
    one = Ours("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.size = 4  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.size
    assert not hasattr(one, "__dict__")


def test_a_record_that_changes_has_no_hash_and_its_own_defaults() -> None:
    one, other = Node(), Node()
    one.children = [other]
    other.children.append(Node())
    assert one.children[0].children and not Node().children
    with pytest.raises(TypeError):
        hash(one)


def test_the_functions_of_dataclasses_take_a_record() -> None:
    one = Ours("a", 5)
    assert dataclasses.is_dataclass(Ours) and dataclasses.is_dataclass(one)
    assert [each.name for each in dataclasses.fields(one)] == ["name", "size", "labels"]
    assert dataclasses.replace(one, size=6) == Ours("a", 6)
    assert str(inspect.signature(Ours)).startswith("(name: str, size: int = 3, labels:")


def test_a_record_is_copied_pickled_and_matched() -> None:
    one = Ours("a", 5, {"x": "y"})
    assert one == copy.copy(one) == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
    match one:
        case Ours(name, size):
            assert (name, size) == ("a", 5)
        case _:
            raise AssertionError


class Below(Ours):
    """A class that inherits from a record, and is none itself."""


class BelowTheirs(Theirs):
    """The same, of a dataclass."""


@dataclasses.dataclass(frozen=True)
class More(Ours):
    """A dataclass with a field more than a record."""

    more: int = 7


def test_a_class_that_inherits_from_a_record_is_a_dataclass_too() -> None:
    assert dataclasses.is_dataclass(Below) and inspect.signature(Below) == inspect.signature(Ours)
    assert dataclasses.asdict(Below("a")) == dataclasses.asdict(BelowTheirs("a"))
    assert dataclasses.replace(Below("a"), size=4) == Below("a", 4) != Ours("a", 4)


def test_a_dataclass_inherits_the_fields_of_a_record() -> None:
    one = More("a", more=8)
    assert dataclasses.asdict(one) == {"name": "a", "size": 3, "labels": {}, "more": 8}
    assert list(inspect.signature(More).parameters) == ["name", "size", "labels", "more"]
    assert pickle.loads(pickle.dumps(one)) == copy.copy(one) == one != More("a")
    assert hash(dataclasses.replace(More("a"), more=8)) == hash(dataclasses.replace(one, labels={}))
    with pytest.raises(TypeError, match="cannot inherit non-frozen"):
        dataclasses.dataclass(type("Changing", (Ours,), {}))


def test_the_fields_of_a_record_are_made_once_and_nothing_else_is_one() -> None:
    assert dataclasses.fields(Ours)[0] is dataclasses.fields(Ours("a"))[0]
    assert not any(dataclasses.is_dataclass(kind) for kind in Ours.__mro__[1:])
    assert list(typing.get_type_hints(Ours)) == ["name", "size", "labels"]


def test_two_kinds_with_the_same_values_differ() -> None:
    assert Ours("a") != Theirs("a") and Ours("a") != ("a", 3, {})


def test_a_record_that_would_not_be_completed_is_refused() -> None:
    with pytest.raises(TypeError, match="__post_init__"):

        @record
        class Completed:
            size: int

            def __post_init__(self) -> None:
                raise AssertionError
