"""`check_batching`: a function against its own one-element calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from batchrules._host_call import HostCall
from batchrules._methods import HOST_METHODS, METHODS, check_method
from batchrules._testing_cases import Axes, all_patterns
from batchrules._testing_check import Checker, first_calls, last_call
from batchrules._testing_comparisons import Tolerance
from batchrules._testing_leaves import Example, example_of
from batchrules._testing_modes import MODES, Request, check_derivatives
from batchrules._testing_mutation import check_arguments_kept
from batchrules._testing_report import Report
from batchrules._testing_run import Flat, Subject, Target
from batchrules._testing_ways import Space, plan


@dataclass(frozen=True)
class Options:
    """What a check was asked for, besides the function and its arguments.

    The last three are for registered primitives: whether nested vmaps are promised to work, what is added to a cause,
    and the function with `batch_size=2`.
    """

    in_axes: Any = None
    endpoints: Sequence[str] | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)
    seed: int = 0
    nests: bool = True
    hint: str = ""
    chunked: Callable[..., Any] | None = None


def check_batching(  # noqa: PLR0913  # options, all keyword-only
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any = None,
    methods: Sequence[str] | None = None,
    endpoints: Sequence[str] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> Report:
    """Check that a function gives for a batch, and under derivatives, what it gives element by element.

    It is run under `jax.vmap` (every choice of mapped arguments, other axes, negative ones, `out_axes`, nested, a batch
    of one, an empty batch, equal elements, arrays that are not contiguous), `jax.jit` and `batch_size`, and compared
    with calls of one element. Its derivatives of one element are compared with differences of calls, forward with
    reverse mode, and their batches (`vmap` of `jvp`, `vjp`, `grad`, `jacfwd`, `jacrev`, and each of `vmap`) with those
    of one element. The function is called some hundred times, and by compiled programs too.

    Args:
        fun: A `host_call`, a `device_call`, or any other function that JAX can trace.
        *args: An example of one element: arrays, random keys, and pytrees of them. Further elements are made from it.
            Floating-point numbers are moved by up to a quarter; integers stay within the range of their array (a single
            one, between 1 and it); random keys are folded.
        in_axes: As for `jax.vmap`: which arguments to map, and along which axes. A list of such tuples tries each.
            None tries every choice.
        methods: For a `host_call`: the methods to check it with, one after another, in place of its own.
        endpoints: The modes that must have derivatives, out of `"jvp"` and `"vjp"`; an empty tuple leaves derivatives
            out. None checks those that are there.
        rtol: The relative tolerance; None for one that fits each dtype (1e-9 in 64 bits, 1e-4 in 32, 5e-2 in 16).
        atol: The absolute tolerance; None for one that follows from the size of the numbers.
        seed: What the other elements, tangents and cotangents follow from.

    Returns:
        A `Report` of how many cases were tried, by transformation, and of what was left out. It prints as a table.

    Raises:
        BatchDisagreement: Something disagrees. The text lists each cause with the smallest case that shows it.
        TypeError: An argument that is no array, or `methods` for a function that has none.
        ValueError: No arguments, an unknown method or mode, or `in_axes` that does not fit.

    Example:
        >>> import jax, numpy as np, batchrules
        >>> from batchrules.testing import check_batching
        >>> @batchrules.host_call(
        ...     result_shape=jax.ShapeDtypeStruct((3,), "float32"), method="expand_dims", verify=False
        ... )
        ... def normalised(x):
        ...     return x / np.linalg.norm(x)  # of the whole batch
        >>> try:
        ...     check_batching(normalised, np.array([1.0, 2.0, 3.0], "float32"))
        ... except AssertionError as error:
        ...     print(str(error).splitlines()[1])
          1. the result of an element depends on the other elements of the batch (through x)
    """
    label = f"check_batching({name_of(fun)})"
    options = Options(in_axes, checked_modes(endpoints, label), Tolerance(rtol, atol), seed)
    chosen = _checked_methods(fun, methods, label)
    example = example_of(fun, args, seed, label)
    checker = Checker(Report(label if methods is None else f"{label}, methods {', '.join(methods)}"))
    for method in chosen:
        prefix = f"method {method!r}: " if method is not None else ""
        check_function(checker, _with_method(fun, method), example, options, prefix)
    return checker.finish()


def check_function(checker: Checker, fun: Callable[..., Any], example: Example, options: Options, prefix: str) -> None:
    """Every check of one function."""
    subject = _subject(fun, example, options)
    target = Target(subject, subject.name, example.leaves, lambda flat: flat, options.tolerance)
    if not first_calls(checker, target) or not check_arguments_kept(checker, fun, example):
        return
    outputs = target.alone([0] * len(example.leaves))
    target.outputs = tuple(_output_names(fun, example))
    space = Space(example.leaves, outputs, _patterns(options.in_axes, example, checker.report.name), options.nests)
    checker.run(target, plan(space), prefix)
    if options.endpoints is None or options.endpoints:
        check_derivatives(checker, Request(target, space, options.endpoints, options.seed, prefix))
    last_call(checker, target)


def name_of(fun: Any) -> str:
    """What messages call a function."""
    if isinstance(fun, functools.partial):
        return name_of(fun.func)
    return str(getattr(fun, "__name__", None) or type(fun).__name__)


def checked_modes(endpoints: Any, where: str) -> Sequence[str] | None:
    """The modes, if they are known."""
    if endpoints is None:
        return None
    modes = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(f"{where}: endpoints must be out of 'jvp' and 'vjp'; got {unknown}.")
    return modes


def checked_names(methods: Any, allowed: Sequence[str], where: str) -> Sequence[str]:
    """The methods, if they are known."""
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise TypeError(f"{where}: methods must be a sequence of methods' names; got {methods!r}.")
    if not methods:
        raise ValueError(f"{where}: methods is empty, so nothing would be checked. Leave it out, or name some.")
    return [check_method(method, where, allowed) for method in methods]


def _checked_methods(fun: Any, methods: Any, where: str) -> Sequence[str | None]:
    if not callable(fun):
        raise TypeError(f"{where}: expected a function; got {fun!r}.")
    if methods is None:
        return (None,)
    if not hasattr(_innermost(fun), "replace"):
        raise TypeError(
            f"{where}: methods= is for a host_call, which can be given another method; got a "
            f"{type(fun).__name__}. Leave methods out, or make a function with each method."
        )
    return checked_names(methods, HOST_METHODS if isinstance(_innermost(fun), HostCall) else METHODS, where)


def _innermost(fun: Any) -> Any:
    return _innermost(fun.func) if isinstance(fun, functools.partial) else fun


def _replaced(fun: Any, **options: Any) -> Any:
    """The function with other options, inside `functools.partial` too."""
    if isinstance(fun, functools.partial):
        return functools.partial(_replaced(fun.func, **options), *fun.args, **fun.keywords)
    return fun.replace(**options)


def _with_method(fun: Any, method: str | None) -> Any:
    if method is not None:
        return _replaced(fun, method=method)
    # A call of its own, which has not yet been found to handle batches, or not to.
    return _replaced(fun) if hasattr(_innermost(fun), "replace") else fun


def _subject(fun: Any, example: Example, options: Options) -> Subject:
    flat, name = flattened(fun, example), name_of(fun)
    if not isinstance(_innermost(fun), HostCall):
        chunked = None if options.chunked is None else flattened(options.chunked, example)
        return Subject(name, flat, chunked, traced=True, hint=options.hint)
    chunked = flattened(_replaced(fun, batch_size=2), example)
    unverified = flattened(_replaced(fun, verify=False), example)
    in_chunks = flattened(_replaced(fun, verify=False, batch_size=2), example)
    return Subject(name, flat, chunked, Subject(name, unverified, in_chunks))


def flattened(fun: Callable[..., Any], example: Example) -> Flat:
    """The function of the example's arrays, that gives the arrays of its result."""

    def flat(*arrays: Any) -> list[Any]:
        return jax.tree.leaves(fun(*example.arguments(arrays)))

    return flat


def _output_names(fun: Callable[..., Any], example: Example) -> Iterator[str]:
    result = fun(*example.arguments([leaf.array(leaf.value) for leaf in example.leaves]))
    for keys, _ in jax.tree_util.tree_flatten_with_path(result)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        yield f"output {path!r}" if path else "the result"


def _patterns(in_axes: Any, example: Example, where: str) -> list[Axes]:
    """The choices of mapped leaves, the fewest first."""
    if in_axes is None:
        return all_patterns(example.leaves)
    several = in_axes if isinstance(in_axes, list) else [in_axes]
    found = [_flat_axes(axes, example, where) for axes in several]
    if not found:
        raise ValueError(f"{where}: in_axes is an empty list, so nothing would be mapped.")
    return sorted(found, key=lambda axes: sum(axis is not None for axis in axes))


def _flat_axes(in_axes: Any, example: Example, where: str) -> Axes:
    """The axis of each leaf."""
    args = example.arguments(range(len(example.leaves)))
    axes: list[int | None] = []
    try:
        jax.tree.map(
            lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part))),
            (in_axes,) * len(args) if isinstance(in_axes, int) else in_axes,
            args,
            is_leaf=lambda node: node is None,
        )
    except ValueError as error:
        raise ValueError(f"{where}: in_axes={in_axes!r} does not fit the {len(args)} arguments: {error}") from error
    _check_axes(axes, example, where)
    return tuple(axes)


def _check_axes(axes: Sequence[Any], example: Example, where: str) -> None:
    if all(axis is None for axis in axes):
        raise ValueError(f"{where}: in_axes maps no argument. Give at least one an axis.")
    for axis, leaf in zip(axes, example.leaves, strict=True):
        rank = len(leaf.shape) + 1
        if axis is not None and not (isinstance(axis, int) and -rank <= axis < rank):
            raise ValueError(
                f"{where}: in_axes gives {leaf.name!r} the axis {axis!r}. The example is one element of shape "
                f"{leaf.shape}, so a batch has {rank} dimensions: give an int from {-rank} to {rank - 1}, or None."
            )
