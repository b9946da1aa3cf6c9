"""Hypothesis strategies for arrays, mapped axes, batches and schemas.

Hypothesis is imported when one is made: it is no dependency of batchrules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _trees
from batchrules._schema import ArraySpec, Schema

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# Every kind of number; 64 bits only where JAX has them.
KINDS = ("float32", "float64", "bfloat16", "float16", "complex64", "int32", "uint8", "bool")
_SHAPES = ((), (3,), (1,), (2, 3), (0, 2))


@dataclass(frozen=True)
class Batch:
    """A batch for `jax.vmap`.

    Attributes:
        size: The number of elements.
        in_axes: For each argument its mapped axis, or None.
        arguments: The arguments, mapped axes included.
    """

    size: int
    in_axes: tuple[int | None, ...]
    arguments: tuple[np.ndarray[Any, Any], ...]

    def element(self, index: int) -> tuple[np.ndarray[Any, Any], ...]:
        """The arguments of one element."""
        pairs = zip(self.arguments, self.in_axes, strict=True)
        return tuple(array if axis is None else np.take(array, index, axis) for array, axis in pairs)


def _strategies() -> Any:
    try:
        from hypothesis import strategies  # noqa: PLC0415  # no dependency of the rest
    except ImportError as error:
        raise ImportError(
            "the strategies of batchrules.testing need Hypothesis: pip install 'batchrules[testing]'"
        ) from error
    return strategies


def _composite(function: Callable[..., Any]) -> SearchStrategy[Any]:
    return _strategies().composite(function)()


def arrays(dtype: Any = None, shape: Sequence[int] | None = None) -> SearchStrategy[np.ndarray[Any, Any]]:
    """Arrays of small numbers, hardly ever equal, of every dtype that JAX knows; 0-d and empty ones too.

    The numbers are exact in every dtype, and so are their sums: multiples of a quarter between -8 and 8, and whole
    numbers for integers (0 to 15 for unsigned ones).

    Args:
        dtype: The dtype, a strategy for it, or None for any of `float32`, `float64` (where 64-bit types are on),
            `bfloat16`, `float16`, `complex64`, `int32`, `uint8`, `bool`.
        shape: The shape, a strategy for it, or None for one of `()`, `(3,)`, `(1,)`, `(2, 3)`, `(0, 2)`.

    Returns:
        A strategy for NumPy arrays.

    Example:
        >>> from batchrules.testing import arrays
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5)
        ... @given(arrays("float32", (2, 3)))
        ... def test(x):
        ...     assert x.shape == (2, 3) and x.dtype == "float32"
        >>> test()
    """
    st = _strategies()
    dtypes = _as_strategy(dtype, _known_dtypes())
    shapes = _as_strategy(shape, _SHAPES)

    def draw_array(draw: DrawFn) -> np.ndarray[Any, Any]:
        # A seed, and not number by number: arrays shrink by shape and dtype.
        return _array(jnp.dtype(draw(dtypes)), tuple(draw(shapes)), draw(st.integers(0, 2**16)))

    return _composite(draw_array)


def _known_dtypes() -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if jnp.dtype(jax.dtypes.canonicalize_dtype(jnp.dtype(kind))) == jnp.dtype(kind))


def _as_strategy(given: Any, otherwise: Sequence[Any]) -> Any:
    st = _strategies()
    if given is None:
        return st.sampled_from(list(otherwise))
    return given if isinstance(given, st.SearchStrategy) else st.just(given)


def _array(dtype: Any, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(bool)
    if jnp.issubdtype(dtype, np.integer):
        low, high = (0, 16) if jnp.issubdtype(dtype, np.unsignedinteger) else (-8, 9)
        return random.integers(low, high, shape).astype(dtype)
    quarters = random.integers(-32, 33, (2, *shape)) / 4
    return (quarters[0] + 1j * quarters[1] if dtype.kind == "c" else quarters[0]).astype(dtype)


def axes(ndim: int, *, optional: bool = True) -> SearchStrategy[int | None]:
    """Mapped axes of an array of which one element has so many dimensions: positive, negative, and None.

    Args:
        ndim: The number of dimensions of one element. The batched array has one more.
        optional: Whether None, an unmapped array, is among them.

    Returns:
        A strategy for an int from `-ndim - 1` to `ndim`, or None.

    Raises:
        TypeError: `ndim` is not an int.
        ValueError: `ndim` is negative.

    Example:
        >>> from batchrules.testing import axes
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5)
        ... @given(axes(2))
        ... def test(axis):
        ...     assert axis is None or -3 <= axis <= 2
        >>> test()
    """
    if isinstance(ndim, bool) or not isinstance(ndim, int):
        raise TypeError(f"axes: ndim must be an int, the number of dimensions of one element; got {ndim!r}.")
    if ndim < 0:
        raise ValueError(f"axes: ndim must be at least 0; got {ndim}.")
    st = _strategies()
    mapped = st.integers(-ndim - 1, ndim)
    return st.one_of(st.none(), mapped) if optional else mapped


def in_axes(args: Sequence[Any]) -> SearchStrategy[tuple[int | None, ...]]:
    """`in_axes` for `jax.vmap`: an axis or None for each argument, at least one mapped.

    Args:
        args: For each argument an example of one element, an array (or anything with `.shape`).

    Returns:
        A strategy for tuples.

    Raises:
        ValueError: No arguments, so nothing can be mapped.

    Example:
        >>> import numpy as np
        >>> from batchrules.testing import in_axes
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5)
        ... @given(in_axes([np.zeros((3,)), np.zeros(())]))
        ... def test(chosen):
        ...     assert len(chosen) == 2 and chosen != (None, None)
        >>> test()
    """
    ndims = [len(np.shape(arg)) for arg in args]
    if not ndims:
        raise ValueError("in_axes: there are no arguments, so nothing can be mapped.")

    def draw_axes(draw: DrawFn) -> tuple[int | None, ...]:
        one = draw(_strategies().integers(0, len(ndims) - 1))
        return tuple(draw(axes(ndim, optional=i != one)) for i, ndim in enumerate(ndims))

    return _composite(draw_axes)


def batches(*args: Any, sizes: SearchStrategy[int] | None = None) -> SearchStrategy[Batch]:
    """Batches of elements like an example, for `jax.vmap`.

    Args:
        *args: For each argument an example of one element: an array or a number, for its shape and dtype.
        sizes: The sizes of the batch; None for 0 to 4.

    Returns:
        A strategy for a `Batch`: its `size`, its `in_axes`, its `arguments`, and `element(index)`.

    Raises:
        TypeError: An argument that is not an array.
        ValueError: No arguments.

    Example:
        >>> import jax, numpy as np
        >>> from batchrules.testing import batches
        >>> from hypothesis import given, settings
        >>> def scale(x, s):
        ...     return x * s
        >>> @settings(max_examples=5, deadline=None)
        ... @given(batches(np.zeros(3, "float32"), np.zeros((), "float32")))
        ... def test(batch):
        ...     result = jax.vmap(scale, batch.in_axes)(*batch.arguments)
        ...     for i in range(batch.size):
        ...         assert np.array_equal(result[i], scale(*batch.element(i)))
        >>> test()
    """
    for position, arg in enumerate(args):
        if not _trees.is_array(arg):
            raise TypeError(f"batches: argument {position} must be an array or a number; got a {type(arg).__name__}.")
    examples = [np.asarray(jnp.asarray(arg)) for arg in args]
    chosen_axes = in_axes(examples)
    chosen_sizes = _strategies().integers(0, 4) if sizes is None else sizes

    def draw_batch(draw: DrawFn) -> Batch:
        size, chosen = draw(chosen_sizes), draw(chosen_axes)
        shapes = [_with_axis(example.shape, axis, size) for example, axis in zip(examples, chosen, strict=True)]
        pairs = zip(examples, shapes, strict=True)
        return Batch(size, chosen, tuple(draw(arrays(example.dtype, shape)) for example, shape in pairs))

    return _composite(draw_batch)


def _with_axis(shape: tuple[int, ...], axis: int | None, size: int) -> tuple[int, ...]:
    if axis is None:
        return shape
    place = axis % (len(shape) + 1)
    return (*shape[:place], size, *shape[place:])


def schemas(paths: Sequence[str] | None = None) -> SearchStrategy[Schema]:
    """Schemas: fixed and free dimensions, any number of leading ones, dtypes, and some without derivatives.

    Args:
        paths: The paths to describe; None for one to three of `x`, `y`, `params.w`, `args.0`.

    Returns:
        A strategy for a `Schema`.

    Example:
        >>> from batchrules.testing import schemas
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5)
        ... @given(schemas(["x", "w"]))
        ... def test(schema):
        ...     assert set(schema) == {"x", "w"}
        >>> test()
    """
    st = _strategies()
    dimensions = st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=3)

    def draw_spec(draw: DrawFn) -> ArraySpec:
        lead: tuple[Any, ...] = (...,) if draw(st.booleans()) else ()
        dtype = draw(st.one_of(st.none(), st.sampled_from(_known_dtypes())))
        named = None if dtype is None else jnp.dtype(dtype)
        return ArraySpec((*lead, *draw(dimensions)), named, draw(st.booleans()))

    spec = _composite(draw_spec)
    if paths is not None:
        return st.fixed_dictionaries(dict.fromkeys(paths, spec)).map(Schema)
    names = st.sampled_from(["x", "y", "params.w", "args.0"])
    return st.dictionaries(names, spec, min_size=1, max_size=3).map(Schema)
