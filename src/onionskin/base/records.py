"""Records: classes of named values, which cost an import no more than a class does.

The module `dataclasses` compiles the methods of each class when its module is imported, which takes about a millisecond,
and a verb of the command line is a process that would compile twenty of them. The methods of records are shared.

What must hold: to whoever uses it a record is a dataclass of the same fields: keywords and defaults, equality, hash and
repr, patterns, copies and pickles, and the functions of `dataclasses`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, dataclass_transform, overload

from onionskin.base.named_tuples import NamedTuple

__all__ = ["as_dict", "field", "record", "replaced"]

Kind = TypeVar("Kind", bound=type)
One = TypeVar("One")


class _Field(NamedTuple):
    default_factory: "Callable[[], Any]"
    hash: bool


def field(*, default_factory: "Callable[[], Any]", hash: bool = True) -> Any:
    """Give a field a default that is made anew for each record; without `hash` it does not count in the hash."""
    return _Field(default_factory, hash)


def as_dict(of: Any) -> dict[str, Any]:
    """Return the fields of a record by their names; their values are not copied."""
    return dict(zip(of.__match_args__, of._values(), strict=True))


def replaced(of: One, **changes: Any) -> One:
    """Return a record that differs in these fields, as `dataclasses.replace` does."""
    return of.__replace__(**changes)  # type: ignore[attr-defined,no-any-return]


class _AsDataclass:
    """What `dataclasses` and `inspect` ask a dataclass for, made when they ask."""

    def __init__(self, find: "Callable[[type], Any]") -> None:
        self._find = find

    def __get__(self, of: Any, kind: type) -> Any:
        return self._find(kind)


def _dataclass_like(kind: type) -> type:
    """Return a dataclass of the fields of a record, or of the record that a class inherits from."""
    record_kind: Any = next(one for one in kind.__mro__ if "_setters" in one.__dict__)
    if record_kind is _Record:
        raise AttributeError(f"{kind.__qualname__} is no record")
    found: type | None = record_kind.__dict__.get("_like")
    if found is None:  # two threads may make one each, and either is good
        found = record_kind._like = _made_dataclass(record_kind)
    return found


def _made_dataclass(kind: Any) -> type:
    import dataclasses

    factories: dict[str, _Field] = kind._factories
    made = {
        name: dataclasses.field(default_factory=one.default_factory, hash=one.hash) for name, one in factories.items()
    }
    annotations = {name: kind.__annotations__[name] for name in kind.__match_args__}
    like = type(kind.__name__, (), {"__annotations__": annotations, **kind._defaults, **made})
    return dataclasses.dataclass(frozen=issubclass(kind, _Frozen))(like)


def _signature(kind: Any) -> Any:
    import inspect

    if kind.__init__ is not _Record.__init__:
        raise AttributeError(f"{kind.__qualname__} says itself what it is made of")
    return inspect.signature(_dataclass_like(kind))


class _Record:
    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()
    __dataclass_fields__ = _AsDataclass(lambda kind: _dataclass_like(kind).__dataclass_fields__)  # type: ignore[attr-defined]
    __dataclass_params__ = _AsDataclass(lambda kind: _dataclass_like(kind).__dataclass_params__)  # type: ignore[attr-defined]
    __signature__ = _AsDataclass(_signature)
    _setters: ClassVar[tuple[Callable[[Any, Any], None], ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}
    _factories: ClassVar[dict[str, _Field]] = {}

    def __init__(self, *values: Any, **named: Any) -> None:
        if named or len(values) != len(self._setters):
            values = self._completed(values, named)
        for set_value, value in zip(self._setters, values, strict=True):
            set_value(self, value)

    def _completed(self, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Return a value for each field, or raise the TypeError that a function of these arguments raises."""
        kind, names = type(self).__qualname__, self.__match_args__
        if len(values) > len(names):
            raise TypeError(f"{kind} has {len(names)} fields, and {len(values)} values were given")
        found = dict(zip(names, values, strict=False))
        for name in named:
            if name not in names:
                raise TypeError(f"{kind} has no field {name!r}")
            if name in found:
                raise TypeError(f"{kind} was given {name!r} twice")
        found |= named
        for name in names:
            if name in found:
                continue
            if name in self._defaults:
                found[name] = self._defaults[name]
            elif name in self._factories:
                found[name] = self._factories[name].default_factory()
            else:
                raise TypeError(f"{kind} wants a value for {name!r}")
        return tuple(found[name] for name in names)

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self.__match_args__])

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in as_dict(self).items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()

    def __replace__(self, **changes: Any) -> Any:
        return type(self)(**as_dict(self) | changes)


_Record.__annotations__ = {}  # `typing.get_type_hints` of a record is to give its fields, and nothing else


class _Frozen(_Record):
    __slots__ = ()

    def __hash__(self) -> int:  # type: ignore[override]
        unhashed = [name for name, one in self._factories.items() if not one.hash]
        return hash(tuple([value for name, value in as_dict(self).items() if name not in unhashed]))

    def __setattr__(self, name: str, value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot set {name!r} of a {type(self).__qualname__}")

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete {name!r} of a {type(self).__qualname__}")


@overload
def record(kind: Kind, /) -> Kind: ...


@overload
def record(*, frozen: bool) -> "Callable[[Kind], Kind]": ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(kind: Any = None, /, *, frozen: bool = True) -> Any:
    """Make a record of a class whose annotations are its fields, in their order. It has slots, and is frozen by default."""
    if kind is None:
        return lambda one: record(one) if frozen else _made(one, _Record)
    return _made(kind, _Frozen)


def _made(kind: Any, base: type) -> Any:
    if hasattr(kind, "__post_init__"):
        raise TypeError(f"{kind.__qualname__} has a __post_init__, which records do not call: make it a dataclass")
    names = tuple(kind.__annotations__)
    body = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    given = {name: body.pop(name) for name in names if name in body}
    body["__slots__"] = body["__match_args__"] = names
    body["_defaults"] = {name: value for name, value in given.items() if not isinstance(value, _Field)}
    body["_factories"] = {name: value for name, value in given.items() if isinstance(value, _Field)}
    bases = (base, *(one for one in kind.__bases__ if one is not object))
    made: Any = type(kind.__name__, bases, body)
    made._setters = tuple([made.__dict__[name].__set__ for name in names])
    return made
