"""Our named tuples, beside those that the standard library makes of the same fields."""

import copy
import inspect
import pickle
from typing import Any, NamedTuple

import pytest

from onionskin.base.named_tuples import NamedTuple as Light


class Ours(Light):
    """A row."""

    name: str
    size: int = 3

    def twice(self) -> int:
        return 2 * self.size


class Theirs(NamedTuple):
    """A row."""

    name: str
    size: int = 3


@pytest.mark.parametrize(("given", "named"), [(("a",), {}), (("a", 5), {}), ((), {"size": 5, "name": "a"})])
def test_a_named_tuple_is_made_as_one_of_typing_is(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, theirs = Ours(*given, **named), Theirs(*given, **named)
    assert ours == theirs == tuple(theirs) and hash(ours) == hash(theirs)
    assert repr(ours).replace("Ours", "Theirs") == repr(theirs)
    assert (ours.name, ours.size, ours.twice()) == (*theirs, 2 * theirs.size)
    assert ours._asdict() == theirs._asdict()
    assert ours._replace(size=7) == theirs._replace(size=7) and type(ours._replace(size=7)) is Ours


@pytest.mark.parametrize(
    ("given", "named"), [((), {}), (("a", 1, 2), {}), (("a",), {"name": "b"}), (("a",), {"none": 1}), ((), {"size": 1})]
)
def test_arguments_that_do_not_fit_are_refused(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    for kind in (Ours, Theirs):
        with pytest.raises(TypeError):
            kind(*given, **named)


def test_what_is_asked_of_a_named_tuple_is_answered_as_by_one_of_typing() -> None:
    assert issubclass(Ours, tuple) and Ours.__doc__ == Theirs.__doc__
    for asked in ("_fields", "_field_defaults", "__match_args__"):
        assert getattr(Ours, asked) == getattr(Theirs, asked)
    assert str(inspect.signature(Ours)) == str(inspect.signature(Theirs))
    assert Ours._make(["a", 5]) == Theirs._make(["a", 5])


def test_a_named_tuple_takes_no_other_attributes() -> None:
    one = Ours("a")
    for name in ("size", "other"):
        with pytest.raises(AttributeError):
            setattr(one, name, 4)


def test_a_named_tuple_is_copied_pickled_and_matched() -> None:
    one = Ours("a", 5)
    for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one and type(other) is Ours
    match one:
        case Ours(name, size):
            assert (name, size) == ("a", 5)
        case _:
            raise AssertionError
