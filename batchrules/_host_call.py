"""`host_call`: a Python function on the host as a JAX function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from batchrules import _batch, _operands, _placement, _trees
from batchrules._host_context import FirstCall, inside_numpy_only
from batchrules._host_function import HostFunction
from batchrules._host_primitive import host_call_p
from batchrules._host_runner import Runner
from batchrules._inspect import recorded_call
from batchrules._methods import HOST_METHODS, Choice, MethodRequest, check_batch_size, check_method
from batchrules._promise import promised
from batchrules._schema import Schema, Signature, as_schema, as_signature
from batchrules._signature import Call, Parameters
from batchrules._values import hashable, label_of


@dataclass(frozen=True)
class HostOptions:
    """The options of a host call, checked."""

    method: str
    schema: Schema | None
    batch_size: int | None
    signature: Signature | None
    allow_jax: bool
    name: str


class HostCall:
    """A host function that can be used like any JAX function; made by `host_call`.

    Calling it runs the function on NumPy arrays and gives JAX arrays. Under `jax.jit` the compiled program calls it;
    under `jax.vmap` the mapped axes are recorded, and one callback runs the whole batch.
    """

    def __init__(self, fn: Callable[..., Any], result_shape: Any, parameters: Parameters, options: HostOptions) -> None:
        functools.update_wrapper(self, fn)
        self._fn = hashable(fn)
        self._options = options
        self._result_shape = result_shape
        self._parameters = parameters
        self._first_call = FirstCall(fn, options.name, allow_jax=options.allow_jax)
        if not callable(result_shape):
            promised(result_shape, options.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the host function, as part of a JAX program or at once."""
        call = self._parameters.divide(args, kwargs)
        if inside_numpy_only() and not any(isinstance(leaf, jax.Array) for leaf in call.leaves):
            return self._run_without_jax(call)
        operands = _placement.aligned(_operands.as_operands(call, self._options.name))
        site = self._site(call, operands)
        outputs = host_call_p.bind(*operands, site=site, axes=())
        return _trees.unflatten(site.result_tree, outputs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method: the instance is the first argument, static or a container of arrays."""
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        """The name and the method."""
        return f"<{self._options.name} method={self._options.method!r}>"

    def method_for(self, *args: Any, in_axes: Any = 0, **kwargs: Any) -> Choice:
        """Tell which method `jax.vmap(self, in_axes)(*args)` would use, and why. Nothing is called.

        Args:
            *args: Batched arguments, as `jax.vmap` would be given.
            in_axes: As for `jax.vmap`.
            **kwargs: Keyword arguments, mapped along axis 0, as `jax.vmap` does.

        Returns:
            A `Choice` with the name of the method and the reason in words.

        Example:
            >>> import jax, numpy as np, batchrules
            >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
            ... def total(x):
            ...     return x.sum()
            >>> total.method_for(np.ones((4, 3), "float32")).method
            'sequential'
        """
        recorded = recorded_call(host_call_p, self._parameters.with_statics(self, kwargs), args, in_axes)
        site = recorded.site
        return _batch.choose_for(site.request, recorded.axes, site.paths, recorded.shapes)

    def _run_without_jax(self, call: Call) -> Any:
        """A host call made by a host function: straight to the function, since JAX may be waiting for us."""
        arrays = [_operands.as_numpy(leaf) for leaf in call.leaves]
        site = self._site(call, arrays)
        outputs = Runner(site, (), [array.shape for array in arrays])(*arrays)
        # A copy, because the array may be a buffer that the function goes on using.
        return _trees.unflatten(site.result_tree, [output.copy() for output in outputs])

    def _site(self, call: Call, operands: Sequence[Any]) -> HostFunction:
        options = self._options
        _operands.check_schema(options.schema, call.paths, operands, options.name)
        results, tree = promised(self._promise(call, operands), options.name)
        _operands.check_signature(options.signature, len(call.paths), len(results), options.name)
        return HostFunction(
            function=self._fn,
            name=options.name,
            structure=call.structure,
            paths=call.paths,
            result_tree=tree,
            results=results,
            request=MethodRequest(options.method, options.schema, options.signature, options.name),
            batch_size=options.batch_size,
            allow_jax=options.allow_jax,
            first_call=self._first_call,
        )

    def _promise(self, call: Call, operands: Sequence[Any]) -> Any:
        if not callable(self._result_shape):
            return self._result_shape
        shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
        args, kwargs = call.structure.assemble(shapes)
        return self._result_shape(*args, **kwargs)


def host_call(  # noqa: PLR0913  # options, all keyword-only
    fn: Callable[..., Any] | None = None,
    result_shape: Any = None,
    *,
    method: str = "auto",
    schema: Any = None,
    batch_size: int | None = None,
    signature: str | None = None,
    static_argnames: str | Sequence[str] = (),
    allow_jax: bool = False,
    name: str | None = None,
) -> Any:
    """Make a JAX function of a Python function that runs on the host: NumPy, SciPy, ctypes, HTTP, a subprocess.

    The result works under `jax.jit`, `jax.vmap` (nested too), `jax.lax.scan`, `cond` and `while_loop`,
    `jax.checkpoint` and `jax.shard_map`. It must have no side effects: calls whose result nothing uses are not made,
    and equal calls in one program may be one call.

    Args:
        fn: The function. It is given NumPy arrays (read-only) and must return what `result_shape` says. Without it,
            `host_call` is a decorator.
        result_shape: A pytree of things with `.shape` and `.dtype`, or a function of the arguments (arrays as
            `jax.ShapeDtypeStruct`) that returns one. Always for ONE element, however the call is mapped.
        method: What one call is given under `jax.vmap`: `"sequential"`, `"expand_dims"`, `"broadcast_all"`,
            `"legacy_vectorized"`, or `"auto"`: `expand_dims` where the schema or signature proves it safe, else
            `sequential`.
        schema: A `Schema`, or a mapping from path to `ArraySpec`: which shapes the function takes. For `auto`.
        batch_size: The most elements that a vectorised call is given; None for all.
        signature: A NumPy gufunc signature such as `"(i,j),(j)->(i)"`: the function handles leading dimensions
            itself, by broadcasting. For `auto`.
        static_argnames: Parameters that are values of the program and not data. They must be hashable.
        allow_jax: Whether the function may use JAX inside. It can deadlock; see the error that says so.
        name: What messages call the function; its `__name__` by default.

    Returns:
        A callable that takes and gives JAX arrays (pytrees of them), or a decorator.

    Raises:
        TypeError: Something that is not callable, no `result_shape`, or an option of the wrong type.
        ValueError: An unknown method, a batch size below 1, a malformed signature, a 64-bit result with x64 off.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
        ... def norm(x):
        ...     return np.sqrt((x * x).sum()).astype("float32")
        >>> xs = jnp.array([[3.0, 4.0], [6.0, 8.0]], dtype="float32")
        >>> print(jax.jit(jax.vmap(norm))(xs))
        [ 5. 10.]
    """
    if fn is None:
        return functools.partial(
            host_call, result_shape=result_shape, method=method, schema=schema, batch_size=batch_size,
            signature=signature, static_argnames=static_argnames, allow_jax=allow_jax, name=name,
        )  # fmt: skip
    label = label_of(fn, name, "host_call")
    if result_shape is None:
        raise TypeError(
            f"{label}: result_shape is missing. Say what ONE call returns: a pytree of jax.ShapeDtypeStruct(shape, "
            "dtype), or a function of the arguments that returns one; an empty tuple for a function without results."
        )
    parameters = Parameters(fn, static_argnames, label)
    options = HostOptions(
        method=check_method(method, label, HOST_METHODS),
        schema=as_schema(parameters.named(schema), label),
        batch_size=check_batch_size(batch_size, label),
        signature=as_signature(signature, label),
        allow_jax=_checked_bool(allow_jax, label),
        name=label,
    )
    parameters.check_schema(options.schema)
    return HostCall(fn, result_shape, parameters, options)


def _checked_bool(allow_jax: Any, where: str) -> bool:
    if not isinstance(allow_jax, bool):
        raise TypeError(f"{where}: allow_jax must be True or False; got {allow_jax!r}.")
    return allow_jax
