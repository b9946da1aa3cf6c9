"""What foreign code says about its arrays: `ArraySpec` for one, `Schema` for all, and gufunc signatures."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np

Dimension = int | None | EllipsisType

_CORE = r"\(\s*(?:[A-Za-z_0-9]+\s*(?:,\s*[A-Za-z_0-9]+\s*)*)?\)"
_SIGNATURE = re.compile(rf"^\s*(?:{_CORE}(?:\s*,\s*{_CORE})*)?\s*->\s*{_CORE}(?:\s*,\s*{_CORE})*\s*$")


@dataclass(frozen=True)
class ArraySpec:
    """What foreign code takes, or gives, at one place.

    Args:
        shape: A tuple of sizes. None is a free dimension. A first entry of `...` stands for any number of leading
            dimensions, so `(..., 3)` takes `(3,)` and `(10, 3)`, and the default `(...,)` takes any shape.
        dtype: The dtype, or None for any.
        differentiable: Whether derivatives exist there. Only floating-point and complex arrays ever have any.

    Raises:
        TypeError: A shape that is not a sequence, a dimension that is not an int, None or `...`, an unknown dtype.
        ValueError: A negative size, or `...` anywhere but first.

    Example:
        >>> from batchrules import ArraySpec
        >>> ArraySpec((..., 3), "float32").takes((5, 3))
        True
        >>> ArraySpec((None, 3)).takes((5, 5, 3))
        False
    """

    shape: tuple[Dimension, ...] = (...,)
    dtype: Any = None
    differentiable: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _checked_shape(self.shape))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def any_rank(self) -> bool:
        """Whether any number of leading dimensions is taken."""
        return self.shape[:1] == (...,)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape fits."""
        fixed = self.shape[1:] if self.any_rank else self.shape
        if len(shape) < len(fixed) or (len(shape) > len(fixed) and not self.any_rank):
            return False
        trailing = tuple(shape)[len(shape) - len(fixed) :]
        return all(want is None or want == got for want, got in zip(fixed, trailing, strict=True))

    def __str__(self) -> str:
        """The shape as people write it, `*` for a free dimension."""
        names = {None: "*", ...: "..."}
        inside = ", ".join(names.get(d, str(d)) if not isinstance(d, int) else str(d) for d in self.shape)
        return f"({inside},)" if len(self.shape) == 1 else f"({inside})"


def _checked_shape(shape: Any) -> tuple[Dimension, ...]:
    if shape is ...:
        return (...,)
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"ArraySpec: shape must be a tuple of int, None or a leading `...`; got {shape!r}.")
    for position, dimension in enumerate(shape):
        _check_dimension(dimension, position, shape)
    return tuple(d if d is None or d is ... else operator.index(d) for d in shape)


def _check_dimension(dimension: Any, position: int, shape: Any) -> None:
    if dimension is None:
        return
    if dimension is ...:
        if position > 0:
            raise ValueError(f"ArraySpec: `...` may only come first in a shape; got {tuple(shape)!r}.")
        return
    if isinstance(dimension, bool) or not hasattr(dimension, "__index__"):
        raise TypeError(f"ArraySpec: a dimension is an int, None or a leading `...`; got {dimension!r} in {shape!r}.")
    if dimension < 0:
        raise ValueError(f"ArraySpec: a dimension cannot be negative; got {dimension} in {tuple(shape)!r}.")


class Schema(Mapping[str, ArraySpec]):
    """The arrays that foreign code takes, by path.

    A path is the name of the parameter and, inside a container, its keys and indices joined by dots: `x`,
    `params.w`, `layers.0.bias`. The operands of a primitive are `args.0`, `args.1`, and so on; an argument
    taken by `*args` is `args.` and its position in the call. A plain sequence of specs means the operands in order.

    Args:
        specs: A mapping from path to `ArraySpec`, or a sequence of `ArraySpec` for positional operands.

    Raises:
        TypeError: A path that is not a string, or an entry that is not an `ArraySpec`.

    Example:
        >>> from batchrules import ArraySpec, Schema
        >>> schema = Schema({"x": ArraySpec((..., 3)), "rate": ArraySpec(())})
        >>> str(schema["x"])
        '(..., 3)'
    """

    def __init__(self, specs: Mapping[str, ArraySpec] | Sequence[ArraySpec]) -> None:
        named = specs if isinstance(specs, Mapping) else {f"args.{i}": spec for i, spec in enumerate(specs)}
        for path, spec in named.items():
            if not isinstance(path, str):
                raise TypeError(f"Schema: a path is a string such as 'x' or 'params.w'; got {path!r}.")
            if not isinstance(spec, ArraySpec):
                raise TypeError(f"Schema: {path!r} needs an ArraySpec; got {spec!r} of type {type(spec).__name__}.")
        self._specs = dict(named)
        self._key = frozenset(self._specs.items())

    def __getitem__(self, path: str) -> ArraySpec:
        """The spec at a path."""
        return self._specs[path]

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(self._specs)

    def __len__(self) -> int:
        """How many arrays are described."""
        return len(self._specs)

    def __hash__(self) -> int:
        """Schemas compare by value, so that equal calls stay equal."""
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        """Whether the other schema says the same."""
        return isinstance(other, Schema) and self._key == other._key

    def __repr__(self) -> str:
        """The entries, as given."""
        return f"Schema({self._specs!r})"


def as_schema(schema: Any, where: str) -> Schema | None:
    """A `Schema` from what a user passed as `schema=`."""
    if schema is None or isinstance(schema, Schema):
        return schema
    if isinstance(schema, str) or not isinstance(schema, Mapping | Sequence):
        raise TypeError(
            f"{where}: schema must be a Schema, a mapping from path to ArraySpec, or a sequence of ArraySpec; "
            f"got {schema!r} of type {type(schema).__name__}."
        )
    return Schema(schema)


@dataclass(frozen=True)
class Signature:
    """A NumPy gufunc signature: the core dimensions of each argument and result.

    Source: https://numpy.org/doc/stable/reference/c-api/generalized-ufuncs.html
    """

    text: str
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]


def as_signature(signature: Any, where: str) -> Signature | None:
    """Parse a gufunc signature such as `"(i,j),(j)->(i)"`."""
    if signature is None or isinstance(signature, Signature):
        return signature
    if not isinstance(signature, str):
        raise TypeError(f"{where}: signature must be a string such as '(i,j),(j)->(i)'; got {signature!r}.")
    if not _SIGNATURE.match(signature):
        raise ValueError(
            f"{where}: {signature!r} is not a gufunc signature. Write the core dimensions of each array argument, "
            "an arrow, and those of each result: '(i,j),(j)->(i)'; '()' is a scalar."
        )
    inputs, outputs = signature.split("->")
    return Signature(signature, _cores(inputs), _cores(outputs))


def _cores(text: str) -> tuple[tuple[str, ...], ...]:
    groups = re.findall(r"\(([^)]*)\)", text)
    return tuple(tuple(name.strip() for name in group.split(",") if name.strip()) for group in groups)
