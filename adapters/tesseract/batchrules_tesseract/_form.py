"""The form of inputs and outputs: containers and static values, with places for arrays. Compares by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Slot:
    """Where an array stands.

    Attributes:
        path: Its path, as the Tesseract writes it.
    """

    path: str


@dataclass(frozen=True)
class Constant:
    """A value that is no array. Compares with its type: 1, 1.0 and True are three values.

    Attributes:
        path: Its path.
        value: The value.
    """

    path: str
    value: Any = field(compare=False)
    key: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (type(self.value), _identity(self.value)))


@dataclass(frozen=True)
class Fields:
    """A dict, or the fields of a model."""

    keys: tuple[str, ...]
    children: tuple[Form, ...]


@dataclass(frozen=True)
class Items:
    """A list or a tuple."""

    kind: type
    children: tuple[Form, ...]


Form = Slot | Constant | Fields | Items


def fill(form: Form, arrays: Mapping[str, Any]) -> Any:
    """The value of that form with these arrays, by path."""
    match form:
        case Slot(path):
            return arrays[path]
        case Fields(keys, children):
            return {key: fill(child, arrays) for key, child in zip(keys, children, strict=True)}
        case Items(kind, children):
            return kind(fill(child, arrays) for child in children)
        case Constant():
            return form.value


def take(form: Form, value: Any, found: Found) -> None:
    """Take a value of that form apart: its arrays and its constants, by path.

    Raises:
        Exception: What `found.wrong` makes, where the value has another form.
    """
    if isinstance(form, Slot):
        found.arrays[form.path] = value
    elif isinstance(form, Constant):
        found.constants[form.path] = value
    else:
        if not _has_form(value, form):
            raise found.wrong(form, value)
        inside = value if isinstance(form, Items) else [value[key] for key in form.keys]
        for item, child in zip(inside, form.children, strict=True):
            take(child, item, found)


def _has_form(value: Any, form: Fields | Items) -> bool:
    if isinstance(form, Fields):
        return isinstance(value, Mapping) and set(value) == set(form.keys)
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(form.children)


@dataclass(frozen=True)
class Found:
    """What `take` found, and what it raises for a value of another form."""

    wrong: Callable[[Form, Any], Exception]
    arrays: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


def constants(form: Form) -> Iterator[Constant]:
    """The constants of a form."""
    if isinstance(form, Constant):
        yield form
    elif not isinstance(form, Slot):
        for child in form.children:
            yield from constants(child)


def _identity(value: Any) -> Any:
    # The text tells 0.0 from -0.0, and one NaN from no other.
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
