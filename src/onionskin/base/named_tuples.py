"""Named tuples, which cost an import no more than a class does.

The module `typing` looks at each annotation of a named tuple when its module is imported, and compiles a function for it:
0.3 ms for each. A verb of the command line is a process, and the rows of the catalog alone are fourteen of them.

What must hold: to whoever uses it, it is what `typing.NamedTuple` makes of the same fields. Type checkers take it for that.
"""

from collections import _tuplegetter  # type: ignore[attr-defined]  # what those of the standard library have, in C
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

__all__ = ["NamedTuple"]

One = TypeVar("One", bound="_NamedTuple")


class _Kind(type):
    _fields: tuple[str, ...]
    _field_defaults: dict[str, Any]
    __match_args__: tuple[str, ...]

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> "_Kind":
        kind = super().__new__(cls, name, bases, {"__slots__": (), **namespace})
        if tuple not in bases:
            kind._name_fields(tuple(kind.__annotations__), namespace)
        return kind

    def _name_fields(cls, fields: tuple[str, ...], defaults: dict[str, Any]) -> None:
        cls._fields = cls.__match_args__ = fields  # type: ignore[misc]
        cls._field_defaults = {field: defaults[field] for field in fields if field in defaults}
        for index, field in enumerate(fields):
            setattr(cls, field, _tuplegetter(index, f"Alias for field number {index}"))

    @property
    def __signature__(cls) -> Any:
        from inspect import Parameter, Signature

        return Signature(
            [
                Parameter(
                    field,
                    Parameter.POSITIONAL_OR_KEYWORD,
                    default=cls._field_defaults.get(field, Parameter.empty),
                    annotation=cls.__annotations__[field],
                )
                for field in cls._fields
            ]
        )


class _NamedTuple(tuple[Any, ...], metaclass=_Kind):
    _fields: ClassVar[tuple[str, ...]] = ()
    _field_defaults: ClassVar[dict[str, Any]] = {}

    def __new__(cls: type[One], *values: Any, **named: Any) -> One:
        if named or len(values) != len(cls._fields):
            values = cls._completed(values, named)
        return tuple.__new__(cls, values)

    @classmethod
    def _completed(cls, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Return a value for each field, or raise the TypeError that a function of these arguments raises."""
        if len(values) > len(cls._fields):
            raise TypeError(f"{cls.__qualname__} has {len(cls._fields)} fields, and {len(values)} values were given")
        given = dict(zip(cls._fields, values, strict=False))
        for name in named:
            if name not in cls._fields or name in given:
                raise TypeError(f"{cls.__qualname__} {'was given twice' if name in given else 'has no field'} {name!r}")
        found = {**cls._field_defaults, **given, **named}
        missing = [name for name in cls._fields if name not in found]
        if missing:
            raise TypeError(f"{cls.__qualname__} wants a value for {', '.join(missing)}")
        return tuple([found[name] for name in cls._fields])

    @classmethod
    def _make(cls: type[One], values: Iterable[Any]) -> One:
        return cls(*values)

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def _replace(self: One, **changes: Any) -> One:
        return type(self)(**self._asdict() | changes)

    __replace__ = _replace

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)


if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    NamedTuple = _NamedTuple
