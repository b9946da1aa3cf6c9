"""`check_register`: the rule of a registered primitive against its one-element binds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from batchrules import _hijax
from batchrules._methods import METHODS, method_of
from batchrules._register import register, registered
from batchrules._registration import Registration
from batchrules._testing_batching import Options, check_function, checked_modes, checked_names
from batchrules._testing_check import Checker
from batchrules._testing_comparisons import Tolerance
from batchrules._testing_leaves import Example, example_of
from batchrules._testing_report import Report

CHUNK = 2


def check_register(  # noqa: PLR0913  # options, all keyword-only
    primitive: Any,
    *args: Any,
    params: Mapping[str, Any] | None = None,
    call: Callable[..., Any] | None = None,
    in_axes: Any = None,
    methods: Sequence[str] | None = None,
    endpoints: Sequence[str] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> Report:
    """Check that a registered primitive gives for a batch what it gives element by element.

    As `check_batching` does for functions; with `batch_size=2` too. A rule whose `update_params` forgets a shape, an
    axis or a layout gives an error, or something else than the single binds.

    While it runs, the primitive is registered in other ways; the registration that it had comes back at the end. If
    `call` holds a `jit` or the like, JAX's programs are forgotten, since they hold the rules they were batched by.

    Args:
        primitive: The registered primitive, or HiJAX primitive class.
        *args: An example of one element, as for `check_batching`: the operands, or what `call` takes.
        params: The parameters of one bind.
        call: Applies the primitive to one element, in place of `primitive.bind(*args, **params)`. A HiJAX class needs
            it: `call=lambda x: Scale(jax.typeof(x), 3)(x)`.
        in_axes: As for `check_batching`.
        methods: Methods to register it with, one after another, in place of the one that it has.
        endpoints: As for `check_batching`; the derivatives are the primitive's own.
        rtol: As for `check_batching`.
        atol: As for `check_batching`.
        seed: As for `check_batching`.

    Returns:
        A `Report` of how many cases were tried, by transformation, and of what was left out.

    Raises:
        BatchDisagreement: Something disagrees. The text lists each cause with the smallest case that shows it.
        TypeError: A HiJAX class without `call`, `params` beside `call`, or an argument that is no array.
        ValueError: Nothing is registered for the primitive; or as `check_batching`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> from jax.extend.core import Primitive
        >>> from jax.interpreters import mlir
        >>> from batchrules.testing import check_register
        >>> def total(x, *, axis):
        ...     return x.sum(axis=axis)
        >>> total_p = Primitive("total")
        >>> _ = total_p.def_impl(total)
        >>> _ = total_p.def_abstract_eval(
        ...     lambda x, *, axis: jax.core.ShapedArray(x.shape[:axis] + x.shape[axis + 1 :], x.dtype)
        ... )
        >>> mlir.register_lowering(total_p, mlir.lower_fun(total, multiple_results=False))
        >>> batchrules.register(total_p, "expand_dims")  # the axis is another one in a batch
        >>> try:
        ...     check_register(total_p, np.ones((3, 3), "float32"), params={"axis": 0})
        ... except AssertionError as error:
        ...     print("update_params" in str(error))
        True
        >>> batchrules.register(
        ...     total_p, "expand_dims", update_params=lambda params, batch: {"axis": params["axis"] + 1}
        ... )
        >>> check_register(total_p, np.ones((3, 3), "float32"), params={"axis": 0}).left_out
        ["jvp: NotImplementedError: Differentiation rule for 'total' not implemented", ...]
        >>> batchrules.unregister(total_p)
    """
    name = getattr(primitive, "name", None) or getattr(primitive, "__name__", repr(primitive))
    label = f"check_register({name})"
    registration = registered(primitive)
    if registration is None:
        raise ValueError(f"{label}: nothing is registered for {primitive!r}. Give it a rule first, with register.")
    function = _applied(primitive, params, call, str(name), label)
    options = Options(in_axes, checked_modes(endpoints, label), Tolerance(rtol, atol), seed)
    chosen = [None] if methods is None else checked_names(methods, METHODS, label)
    example = example_of(function if call is None else call, args, seed, label)
    checker = Checker(Report(label if methods is None else f"{label}, methods {', '.join(methods)}"))
    for method in chosen:
        changed = registration if method is None else replace(registration, method=method)
        prefix = f"method {method!r}: " if method is not None else ""
        _check(checker, changed, (function, example, options), dict(params or {}), prefix)
    return checker.finish()


def _applied(primitive: Any, params: Any, call: Any, name: str, where: str) -> Callable[..., Any]:
    """The function of one element."""
    if call is None and _hijax.is_primitive_class(primitive):
        raise TypeError(
            f"{where}: a HiJAX class needs call=, a function that makes the primitive for one element's arguments and "
            "applies it: call=lambda x: Scale(jax.typeof(x), 3)(x)."
        )
    if call is not None and params is not None:
        raise TypeError(f"{where}: params= is for primitive.bind; call= takes its place, so put them there.")

    def applied(*operands: Any) -> Any:
        return primitive.bind(*operands, **(params or {})) if call is None else call(*operands)

    applied.__name__ = name
    return applied


def _check(
    checker: Checker,
    registration: Registration,
    what: tuple[Callable[..., Any], Example, Options],
    params: dict[str, Any],
    prefix: str,
) -> None:
    function, example, options = what
    method = method_of(registration.method, params, registration.where) if callable(registration.method) else None
    method = method or registration.method
    options = replace(
        options,
        # Each vmap binds anew, and this method does not say which operands it has given a dimension.
        nests=method != "legacy_vectorized",
        hint=_hint(registration, params) if method not in {"sequential", "sequential_unrolled"} else "",
        chunked=_with_rule(function, replace(registration, batch_size=CHUNK), example),
    )
    with _rule(registration, forget=_keeps_programs(function, example)):
        check_function(checker, function, example, options, prefix)


def _hint(registration: Registration, params: Mapping[str, Any]) -> str:
    if not params:
        return ""
    if registration.update_params is None:
        return f"; there is no update_params that fits the parameters {dict(params)} to a batch"
    return f"; look at what update_params makes of the parameters {dict(params)}"


def _with_rule(function: Callable[..., Any], registration: Registration, example: Example) -> Callable[..., Any]:
    """The function, under another rule: `vmap` looks for the rule while the function runs."""
    forget = _keeps_programs(function, example)

    def under_rule(*operands: Any) -> Any:
        with _rule(registration, forget=forget):
            return function(*operands)

    return under_rule


def _keeps_programs(function: Callable[..., Any], example: Example) -> bool:
    """Whether there are programs inside, as of a `jit`: JAX keeps them with the rules that they were batched by."""
    arrays = [leaf.array(leaf.value) for leaf in example.leaves]
    equations = jax.make_jaxpr(lambda *leaves: function(*example.arguments(leaves)))(*arrays).eqns
    return any(hasattr(value, "eqns") for equation in equations for value in equation.params.values())


@contextlib.contextmanager
def _rule(registration: Registration, *, forget: bool) -> Iterator[None]:
    """Inside, the primitive is registered so; `forget` drops the programs that JAX keeps."""
    standing = registered(registration.primitive)
    if standing is None or standing == registration:
        yield
        return
    _set(registration, forget=forget)
    try:
        yield
    finally:
        _set(standing, forget=forget)


def _set(registration: Registration, *, forget: bool) -> None:
    if forget:
        jax.clear_caches()
    register(
        registration.primitive,
        registration.method,
        batch_size=registration.batch_size,
        schema=registration.schema,
        signature=None if registration.signature is None else registration.signature.text,
        update_params=registration.update_params,
        call=registration.call,
    )
