"""Finite differences: derivatives of a black box from a few more calls of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules import _trees

Array = np.ndarray[Any, Any]

SCHEMES = ("central", "forward", "complex_step")
_COMPLEX_STEP = 1e-20


@dataclass(frozen=True)
class Difference:
    """A scheme, a step, and the function that is differenced.

    Attributes:
        function: The function.
        scheme: One of `SCHEMES`.
        step: The step, relative to the size of the arguments; None for the scheme's own.
    """

    function: Callable[..., Any]
    scheme: str
    step: float | None

    def relative_step(self, dtype: np.dtype[Any]) -> float:
        """The step for numbers of size 1."""
        if self.step is not None:
            return self.step
        if self.scheme == "complex_step":
            return _COMPLEX_STEP
        eps = float(jnp.finfo(dtype).eps)
        return eps ** (1 / 3) if self.scheme == "central" else eps**0.5


@dataclass(frozen=True)
class DirectionalDifference(Difference):
    """A `jvp` endpoint: the difference along the tangents."""

    def __call__(self, args: tuple[Any, ...], tangents: Any, **keywords: Any) -> Any:
        """The output tangents of one element."""
        keywords.pop("outputs", None)
        leaves = [np.asarray(leaf) for leaf in _trees.flatten(args)[0]]
        given = _trees.matched(tangents, args)
        return self.along(args, [(leaf, tangent) for leaf, tangent in zip(leaves, given, strict=True)], keywords)

    def along(self, args: Any, moves: Sequence[tuple[Array, Any]], keywords: dict[str, Any]) -> Any:
        """The difference of the function along one direction."""
        tree = _trees.flatten(args)[1]
        step = step_along(self, [move for move in moves if move[1] is not None])
        signs = {"central": (1, -1), "forward": (1, 0), "complex_step": (1j,)}[self.scheme]
        results = []
        for sign in signs:
            moved = [x if t is None else perturbed(x, t, sign * step) for x, t in moves]
            results.append(self.function(*_trees.unflatten(tree, moved), **keywords))
        leaves = [[np.asarray(leaf) for leaf in _trees.flatten(result)[0]] for result in results]
        outputs = [difference(self.scheme, values, np.asarray(step)) for values in zip(*leaves, strict=True)]
        return _trees.unflatten(_trees.flatten(results[0])[1], outputs)


@dataclass(frozen=True)
class ColumnDifference(Difference):
    """A `jacobian` endpoint: the difference along each entry of each argument that is needed."""

    def __call__(self, args: tuple[Any, ...], needed: Any, **keywords: Any) -> Any:
        """The blocks of one element."""
        keywords.pop("outputs", None)
        leaves, tree = _trees.flatten(args)
        wanted = _trees.matched(needed, args)
        blocks = [self._block(args, i, keywords) if flag else None for i, flag in enumerate(wanted)]
        del leaves
        structure = next(block for block in blocks if block is not None)[1]
        rows = [
            _trees.unflatten(tree, [None if block is None else block[0][j] for block in blocks])
            for j in range(structure.count)
        ]
        return _trees.unflatten(structure, rows)

    def _block(self, args: Any, argument: int, keywords: dict[str, Any]) -> tuple[list[Array], Any]:
        leaves = [np.asarray(leaf) for leaf in _trees.flatten(args)[0]]
        along = DirectionalDifference(self.function, self.scheme, self.step)
        columns, structure = [], None
        for direction in directions(leaves[argument]):
            moves = [(x, direction if i == argument else None) for i, x in enumerate(leaves)]
            outputs, structure = _trees.flatten(along.along(args, moves, keywords))
            columns.append(outputs)
        shape = leaves[argument].shape
        stacked = [np.stack(parts, axis=-1) for parts in zip(*columns, strict=True)]
        return [x.reshape(*x.shape[:-1], *shape) for x in stacked], structure


@dataclass(frozen=True)
class FiniteDifference:
    """Derivative endpoints made by differences; made by `finite_difference`. `**` passes both to `host_call`.

    Attributes:
        jvp: The `jvp` endpoint.
        jacobian: The `jacobian` endpoint.
    """

    jvp: DirectionalDifference
    jacobian: ColumnDifference

    def keys(self) -> Iterator[str]:
        """The options of `host_call` that these are."""
        return iter(("jvp", "jacobian"))

    def __getitem__(self, name: str) -> Difference:
        """One of them, by name."""
        return {"jvp": self.jvp, "jacobian": self.jacobian}[name]


def finite_difference(fn: Callable[..., Any], scheme: str = "central", step: float | None = None) -> FiniteDifference:
    """Make derivative endpoints of a black box by finite differences.

    Given to a `host_call`, all the directions of all the elements go out as one batch, by that call's own method and
    executor: `jax.jacobian` of a vectorised function is one call. Reverse mode takes one direction for each entry of
    the arguments, and is therefore for few arguments.

    The truncation error falls with the step and the rounding error grows with it; the default balances them. For an
    argument `x` and a tangent `t` the step is `h = r * max(1, max|x|) / max|t|`, where `r` is

    * `eps**(1/3)` for `"central"`, `(f(x + h t) - f(x - h t)) / 2h`: an error of about `eps**(2/3)`;
    * `eps**(1/2)` for `"forward"`, `(f(x + h t) - f(x)) / h`: an error of about `eps**(1/2)`, at half the price;
    * `1e-20` for `"complex_step"`, `imag(f(x + i h t)) / h`: no rounding error at all, for functions that are analytic
      and take complex numbers.

    Sources: J. Nocedal and S. Wright, Numerical Optimization, 2nd ed., section 8.1 (the first two); W. Squire and
    G. Trapp, Using complex variables to estimate derivatives of real functions, SIAM Review 40 (1998) 110-112.

    Args:
        fn: The function that is differenced, as it is given to `host_call`. It takes and returns NumPy arrays.
        scheme: `"central"`, `"forward"` or `"complex_step"`.
        step: The relative step `r`, in place of the scheme's own.

    Returns:
        An object with `jvp` and `jacobian`, to be passed on: `host_call(fn, shape, **finite_difference(fn))`.

    Raises:
        TypeError: `fn` is no function, or `step` no number.
        ValueError: An unknown scheme, or a step that is not positive.

    Example:
        >>> import jax, numpy as np, batchrules
        >>> def cube(x):
        ...     return (x**3).sum()
        >>> f = batchrules.host_call(cube, jax.ShapeDtypeStruct((), "float32"), **batchrules.finite_difference(cube))
        >>> print(np.round(jax.grad(f)(np.array([1.0, 2.0], "float32")), 1))
        [ 3. 12.]
    """
    if not callable(fn):
        raise TypeError(f"finite_difference: fn must be a function; got {fn!r} of type {type(fn).__name__}.")
    if scheme not in SCHEMES:
        raise ValueError(f"finite_difference: scheme must be one of {', '.join(map(repr, SCHEMES))}; got {scheme!r}.")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float)):
        raise TypeError(f"finite_difference: step must be a number or None; got {step!r}.")
    if step is not None and not 0 < step < float("inf"):
        raise ValueError(f"finite_difference: step must be positive and finite; got {step!r}.")
    function = getattr(fn, "host_function", fn)
    return FiniteDifference(DirectionalDifference(function, scheme, step), ColumnDifference(function, scheme, step))


def step_along(how: Difference, moves: Sequence[tuple[Array, Array]], lead: int = 0) -> Array:
    """The step along one direction, for each of the elements that so many leading axes count."""
    largest, longest, relative = 1.0, 0.0, 0.0
    for x, t in moves:
        axes = tuple(range(lead, x.ndim))
        largest = np.maximum(largest, np.abs(x).max(axis=axes, initial=0.0).astype(np.float64))
        longest = np.maximum(longest, np.abs(t).max(axis=tuple(range(lead, t.ndim)), initial=0.0).astype(np.float64))
        relative = max(relative, how.relative_step(x.dtype))
    # A direction of zeros has the derivative zero, with any step.
    return relative * np.asarray(largest) / np.where(np.asarray(longest) > 0, longest, 1.0)


def perturbed(x: Array, t: Array, step: Any) -> Array:
    """`x + step * t`, in the dtype of `x`, or complex for an imaginary step."""
    if np.iscomplexobj(step) and not np.iscomplexobj(x):
        return (x + step * t).astype(np.result_type(x.dtype, np.complex64))
    return (x + step * t).astype(x.dtype)


def difference(scheme: str, values: Sequence[Array], step: Array) -> Array:
    """The derivative from the values at the perturbed points; `step` lines up with their leading dimensions."""
    aligned = step.reshape(step.shape + (1,) * (values[0].ndim - step.ndim))
    dtype = values[0].dtype
    if scheme == "complex_step":
        return (values[0].imag / aligned).astype(values[0].imag.dtype)
    wide = values[0] - values[1] if dtype.kind in "fcV" else np.subtract(*(v.astype("float64") for v in values))
    return (wide / (2 * aligned if scheme == "central" else aligned)).astype(dtype)


def directions(x: Array) -> Iterator[Array]:
    """The unit vectors of the space that an array lives in."""
    for place in np.ndindex(x.shape):
        unit = np.zeros_like(x)
        unit[place] = 1
        yield unit
