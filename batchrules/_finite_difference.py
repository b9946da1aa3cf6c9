"""Finite differences: derivatives of a black box from a few more calls of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from batchrules import _precision, _trees
from batchrules._errors import NotDifferentiableError
from batchrules._sites import select
from batchrules._values import hashable

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
        eps = _precision.epsilon(dtype)
        return eps ** (1 / 3) if self.scheme == "central" else eps**0.5


@dataclass(frozen=True)
class DirectionalDifference(Difference):
    """A `jvp` endpoint: the difference along the tangents."""

    def __call__(self, args: tuple[Any, ...], tangents: Any, **keywords: Any) -> Any:
        """The output tangents of one element."""
        keywords.pop("outputs", None)
        leaves = [np.asarray(leaf) for leaf in _trees.flatten(args)[0]]
        given = _trees.matched(tangents, args)
        moves = [(x, None if t is None else np.asarray(t, x.dtype)) for x, t in zip(leaves, given, strict=True)]
        return self.along(args, moves, keywords)

    def along(self, args: Any, moves: Sequence[tuple[Array, Any]], keywords: dict[str, Any]) -> Any:
        """The difference of the function along one direction."""
        tree = _trees.flatten(args)[1]
        moving = [move for move in moves if move[1] is not None]
        if self.scheme == "complex_step":
            check_real(self, [x for x, _ in moving], "arguments", "finite_difference")
        step = step_along(self, moving)
        signs = {"central": (1, -1), "forward": (1, 0), "complex_step": (1j,)}[self.scheme]
        values = []
        for sign in signs:
            moved = [x if t is None else perturbed(x, t, sign * step) for x, t in moves]
            outputs, structure = _trees.flatten(self.function(*_trees.unflatten(tree, moved), **keywords))
            # Copies, because the next call may use the same buffers.
            values.append(([np.array(output) for output in outputs], structure))
        leaves, structure = [value[0] for value in values], values[0][1]
        if self.scheme == "complex_step" and moving and not all(map(np.iscomplexobj, leaves[0])):
            raise NotDifferentiableError(
                "finite_difference: 'complex_step' calls the function with complex numbers, and it returned real "
                "ones: it lost the derivative. Use scheme='central', or make the function keep the imaginary part."
            )
        outputs = [difference(self.scheme, values, np.asarray(step)) for values in zip(*leaves, strict=True)]
        return _trees.unflatten(structure, outputs)


@dataclass(frozen=True)
class ColumnDifference(Difference):
    """A `jacobian` endpoint: the difference along each entry of each argument that is needed."""

    def __call__(self, args: tuple[Any, ...], needed: Any, **keywords: Any) -> Any:
        """The blocks of one element."""
        keywords.pop("outputs", None)
        leaves, tree = _trees.flatten(args)
        flags = _trees.matched(needed, args)
        wanted = [
            bool(flag) and jnp.issubdtype(np.asarray(x).dtype, np.inexact)
            for x, flag in zip(leaves, flags, strict=True)
        ]
        check_real(self, select([np.asarray(x) for x in leaves], wanted), "arguments", "finite_difference")
        if not any(wanted):
            return None
        blocks = [self._block(args, i, keywords) if is_wanted else None for i, is_wanted in enumerate(wanted)]
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
        return [x.reshape((*x.shape[:-1], *shape)) for x in stacked], structure


@dataclass(frozen=True)
class FiniteDifference:
    """Derivative endpoints made by differences; made by `finite_difference`. `**` passes both to `host_call`.

    Attributes:
        jvp: The `jvp` endpoint.
        jacobian: The `jacobian` endpoint.

    Example:
        >>> import numpy as np, batchrules
        >>> sorted(dict(**batchrules.finite_difference(np.sin)))
        ['jacobian', 'jvp']
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
    argument `x` and a tangent `t` the step is `h = r * max(1, max|x|) / max|t|`, the maxima over where `t` is not zero,
    and `r` is

    * `eps**(1/3)` for `"central"`, `(f(x + h t) - f(x - h t)) / 2h`: an error of about `eps**(2/3)`;
    * `eps**(1/2)` for `"forward"`, `(f(x + h t) - f(x)) / h`: an error of about `eps**(1/2)`, at half the price;
    * `1e-20` for `"complex_step"`, `imag(f(x + i h t)) / h`: no rounding error at all, for functions that are analytic
      and take complex numbers, in real arguments and with real results.

    Complex arguments are served in forward mode only.

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
    step = step.item() if isinstance(step, np.generic) else step
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float)):
        raise TypeError(f"finite_difference: step must be a number or None; got {step!r}.")
    if step is not None and not 0 < step < float("inf"):
        raise ValueError(f"finite_difference: step must be positive and finite; got {step!r}.")
    function = hashable(getattr(fn, "host_function", fn))
    return FiniteDifference(DirectionalDifference(function, scheme, step), ColumnDifference(function, scheme, step))


def step_along(how: Difference, moves: Sequence[tuple[Array, Array]], lead: int = 0) -> Array:
    """The step along one direction, for each of the elements that so many leading axes count.

    Only what moves in this direction counts: an argument beside it may be of another size.
    """
    size, length, relative = (np.asarray(start, np.float64) for start in (1.0, 0.0, 0.0))
    for x, t in moves:
        element = tuple(range(lead, x.ndim))
        tangent = np.abs(t).astype(np.float64)
        moving = np.where(tangent > 0, np.abs(x).astype(np.float64), 0.0)
        own = tangent.max(axis=element, initial=0.0)
        size = np.maximum(size, moving.max(axis=element, initial=0.0))
        length = np.maximum(length, own)
        relative = np.maximum(relative, np.where(own > 0, how.relative_step(x.dtype), 0.0))
    step = relative * size / np.where(length > 0, length, 1.0)
    # A direction of zeros has the derivative zero, with any step; so has an element that `where` masks, even at NaN.
    return np.where((length > 0) & np.isfinite(step), step, 1.0)


def check_real(how: Difference, arrays: Sequence[Any], what: str, where: str) -> None:
    """Raise for complex numbers where a scheme or a mode takes real ones only."""
    if any(jnp.issubdtype(array.dtype, np.complexfloating) for array in arrays):
        raise NotDifferentiableError(
            f"{where}: finite differences by {how.scheme!r} take real {what} here, and one is complex. Forward mode "
            "with scheme='central' or 'forward' takes complex numbers; or give endpoints of your own."
        )


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
