"""`explain`: what a program will do to foreign code, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval as pe

from batchrules._explain_blocks import Block, founds, total
from batchrules._explain_foreign import is_foreign
from batchrules._explain_found import Found, Surrounds
from batchrules._explain_report import Report
from batchrules._explain_site import read
from batchrules._explain_values import equations_in, fresh, jaxpr_of
from batchrules._explain_walk import Walker

# Up to jax 0.7 `jax.pmap` gives something with a `trace` too, which forgets the devices.
_JITTED: Any = type(jax.jit(lambda: None))


def explain(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Tell what a function will do to foreign code. The function is traced; no foreign call is made.

    The report says what `jax.jit` of the function does: calls whose result nothing uses are not made, equal calls are
    one call, and a call that is the same in every pass of a loop is made before the loop. XLA may find more calls
    equal than the report does. Outside `jax.jit`, all calls are made.

    Args:
        fun: Any function that JAX can trace: `f`, `jax.grad(f)`, `jax.vmap(f, in_axes)`, `jax.jit(f)`.
        *args: Its arguments: arrays, or `jax.ShapeDtypeStruct`s in their place. What is no array (Python numbers,
            strings, functions) is passed as it is.
        **kwargs: Its keyword arguments, in the same way.

    Returns:
        A `Report`, to be printed: each place that calls foreign code (`host_call`, `device_call`, registered
        primitives), with the method and why, the calls, their elements and bytes, and hints.

    Raises:
        TypeError: `fun` is not callable.
        MissingEndpointError: The program needs a derivative that was not given.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"), method="broadcast_all")
        ... def norm(x):
        ...     return np.sqrt((x * x).sum(-1))
        >>> report = batchrules.explain(jax.vmap(norm), jnp.ones((1000, 3)))
        >>> site = report.sites[0]
        >>> print(site.method, "-", site.calls, "call,", site.elements, "elements,", site.bytes_in, "bytes in")
        broadcast_all - 1 call, 1000 elements, 12000 bytes in
    """
    if not callable(fun):
        raise TypeError(
            f"explain: fun must be a function; got {fun!r} of type {type(fun).__name__}. Pass the function and then "
            "its arguments: explain(f, x), not explain(f(x))."
        )
    closed = _traced(fun, args, kwargs)
    traced = jaxpr_of(closed)
    jaxpr = pe.dce_jaxpr(traced, [True] * len(traced.outvars))[0]
    walker = Walker(read)
    walker.note_constants(closed)
    block = Block(0, Surrounds(), merges=not _on_several_devices(args, kwargs, jaxpr))
    walker.run(jaxpr, [fresh() for _ in jaxpr.invars], block)
    found = founds(block.entries)
    notes = (*_dropped(traced, jaxpr), *_merged(walker.merged))
    return Report(tuple(f.site() for f in found), total(block.entries), notes, tuple(_hints(found)))


def _traced(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(fun, _JITTED):
        # It knows which of its arguments are static.
        jitted: Any = fun
        return jitted.trace(*args, **kwargs).jaxpr
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [_is_array(leaf) for leaf in leaves]

    def of_arrays(*moving: Any) -> Any:
        source = iter(moving)
        given, keywords = jax.tree.unflatten(
            tree, [next(source) if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True)]
        )
        return fun(*given, **keywords)

    moving = [leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array]
    return jax.make_jaxpr(of_arrays)(*moving)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _on_several_devices(args: Any, kwargs: Any, jaxpr: Any) -> bool:
    """Whether the devices have to agree who calls: equal calls are then not found to be equal."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves((args, kwargs))]
    if any(len(getattr(sharding, "device_set", ())) > 1 for sharding in shardings):
        return True
    return any(eqn.primitive.name in ("shard_map", "sharding_constraint") for eqn in equations_in(jaxpr))


def _dropped(before: Any, after: Any) -> list[str]:
    all_of_it, used = (sum(is_foreign(eqn) for eqn in equations_in(jaxpr)) for jaxpr in (before, after))
    count = all_of_it - used
    if not count:
        return []
    which = "1 call site gives" if count == 1 else f"{count} call sites give"
    return [f"{which} nothing that is used, and jax.jit drops it; outside jax.jit it is called all the same"]


def _merged(count: int) -> list[str]:
    if not count:
        return []
    which = "1 call equals" if count == 1 else f"{count} calls equal"
    return [f"{which} another one, whose result jax.jit takes; outside jax.jit it is called all the same"]


def _hints(found: Sequence[Found]) -> list[str]:
    """The hints of all sites, each with the sites that it is about."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for number, site in enumerate(found, 1):
        for hint in site.hints:
            numbers.setdefault((site.name, hint), []).append(str(number))
    return [f"({', '.join(which)}) {name}: {hint}" for (name, hint), which in numbers.items()]
