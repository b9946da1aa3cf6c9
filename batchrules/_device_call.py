"""`device_call`: a batching method and derivatives for JAX-traceable code around an opaque device operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core

from batchrules import _operands, _placement, _trees
from batchrules._bound import BoundDeviceCall
from batchrules._device_body import Endpoints
from batchrules._device_endpoints import Primal
from batchrules._device_primitive import choose, device_call_p
from batchrules._device_site import DeviceSite
from batchrules._finite_difference import Difference
from batchrules._inspect import recorded_call
from batchrules._methods import Choice, MethodRequest, check_batch_size, check_method
from batchrules._options import checked_bool, checked_endpoints
from batchrules._recording import Result
from batchrules._schema import Schema, Signature, as_schema, as_signature
from batchrules._signature import Call, Parameters
from batchrules._values import hashable, label_of


@dataclass(frozen=True)
class DeviceOptions:
    """The options of a device call, checked."""

    method: str
    batch_size: int | None
    schema: Schema | None
    signature: Signature | None
    endpoints: Endpoints
    name: str


class DeviceCall:
    """A JAX-traceable function that is batched as a whole; made by `device_call`."""

    def __init__(self, fn: Callable[..., Any], parameters: Parameters, options: DeviceOptions) -> None:
        functools.update_wrapper(self, fn)
        self._fn = hashable(fn)
        self._options = options
        self._parameters = parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, as part of a JAX program or at once."""
        call = self._parameters.divide(args, kwargs)
        self._check_keywords(call)
        operands = _placement.aligned([_placement.as_operand(leaf) for leaf in call.leaves])
        _operands.check_schema(self._options.schema, call.paths, operands, self._options.name)
        site, tree = self._site(call, operands)
        outputs = device_call_p.bind(*operands, site=site, axes=())
        return _trees.unflatten(tree, outputs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method: the instance is the first argument, static or a container of arrays."""
        return self if instance is None else BoundDeviceCall(self, instance)

    def __repr__(self) -> str:
        """The name and the method."""
        return f"<{self._options.name} method={self._options.method!r}>"

    def method_for(self, *args: Any, in_axes: Any = 0, **kwargs: Any) -> Choice:
        """Tell which method `jax.vmap(self, in_axes)(*args)` would use, and why.

        Args:
            *args: Batched arguments, as `jax.vmap` would be given.
            in_axes: As for `jax.vmap`.
            **kwargs: Keyword arguments, mapped along axis 0, as `jax.vmap` does.

        Returns:
            A `Choice` with the name of the method and the reason in words.

        Example:
            >>> import jax.numpy as jnp, batchrules
            >>> double = batchrules.device_call(lambda x: 2 * x, signature="(n)->(n)")
            >>> double.method_for(jnp.ones((4, 3))).method
            'expand_dims'
        """
        recorded = recorded_call(device_call_p, self._parameters.with_statics(self, kwargs), args, in_axes)
        return choose(recorded.site, recorded.axes, recorded.shapes)

    def _check_keywords(self, call: Call) -> None:
        if self._options.endpoints.given and call.structure.has_keyword_arrays:
            raise TypeError(
                f"{self._options.name}: with a jvp, vjp or jacobian endpoint, arrays must be positional "
                "parameters, since endpoints are given a tuple of them; pass them by position, or name them in "
                "static_argnames."
            )

    def _site(self, call: Call, operands: Sequence[Any]) -> tuple[DeviceSite, _trees.Structure]:
        options = self._options
        primal = Primal(self._fn, call.structure, options.name, options.endpoints)
        element = _traced(primal, operands)
        _operands.check_signature(options.signature, len(call.paths), len(element.results), options.name)
        request = MethodRequest(options.method, options.schema, options.signature, options.name)
        site = DeviceSite(
            body=primal, name=options.name, paths=call.paths, results=element.results, request=request,
            batch_size=options.batch_size, axis_names=element.axis_names,
        )  # fmt: skip
        return site, element.tree


@dataclass(frozen=True)
class _Element:
    """What tracing one element tells: its outputs, their structure, and the named axes that the function uses."""

    results: tuple[Result, ...]
    tree: _trees.Structure
    axis_names: frozenset[Any]


def _traced(primal: Primal, operands: Sequence[Any]) -> _Element:
    """Trace one element."""
    seen: list[Any] = []

    def traced(*leaves: Any) -> list[Any]:
        result = primal.result(leaves)
        flat, tree = _trees.flatten(result)
        paths = _trees.paths(result)
        _check_outputs(flat, paths, primal.name)
        seen.append((tree, paths))
        return flat

    jaxpr = jax.make_jaxpr(traced)(*operands)
    _refuse_traced_constants(jaxpr.consts, primal.name)
    tree, paths = seen[-1]
    results = tuple(Result(p, aval.shape, aval.dtype) for p, aval in zip(paths, jaxpr.out_avals, strict=True))
    return _Element(results, tree, _axis_names(jaxpr.effects, primal.name))


def _axis_names(effects: Any, name: str) -> frozenset[Any]:
    """The named axes that a function has collectives over; an error if it has side effects."""
    named = frozenset(effect.name for effect in effects if hasattr(effect, "name"))
    # An unordered jax.debug.print may come, or not come, as elsewhere in JAX.
    kept = [str(effect) for effect in effects if not hasattr(effect, "name") and str(effect) != "Debug"]
    if kept:
        raise TypeError(
            f"{name} has side effects ({', '.join(sorted(kept))}), which a device call cannot keep: it may be run "
            "once, several times or not at all. Move them out of the function."
        )
    return named


def _check_outputs(leaves: Sequence[Any], paths: Sequence[str], name: str) -> None:
    for leaf, path in zip(leaves, paths, strict=True):
        if not _trees.is_array(leaf):
            place = f"as output {path!r}" if path else "as its result"
            raise TypeError(f"{name} returned a {type(leaf).__name__} {place}, where an array belongs.")


def _refuse_traced_constants(constants: Sequence[Any], name: str) -> None:
    for constant in constants:
        if isinstance(constant, jax.core.Tracer):
            raise TypeError(
                f"{name} closes over a traced value, {jax.typeof(constant)}, which its batching rule and derivatives "
                "would not see. Make it an argument."
            )


def _refuse_differences(endpoints: Sequence[Any], where: str) -> None:
    if any(isinstance(endpoint, Difference) for endpoint in endpoints):
        raise TypeError(
            f"{where}: finite_difference is for host_call: its endpoints run on the host, in NumPy. Leave it out, and "
            "JAX differentiates the code of the function; if it cannot, give jvp=, vjp= or jacobian= in JAX."
        )


def device_call(  # noqa: PLR0913  # options, all keyword-only
    fn: Callable[..., Any] | None = None,
    *,
    method: str = "auto",
    batch_size: int | None = None,
    schema: Any = None,
    signature: str | None = None,
    jvp: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
    jacobian: Callable[..., Any] | None = None,
    pass_outputs: bool = False,
    static_argnames: str | Sequence[str] = (),
    name: str | None = None,
) -> Any:
    """Give JAX-traceable code around an opaque device operation a batching method, and derivatives.

    For `jax.ffi.ffi_call`, Pallas, Triton or Warp kernels: the function is traced on the shapes that the method gives
    it, batched or not, and JAX never looks for batching rules inside it. However many `jax.vmap`s there are, it sees
    one leading dimension.

    Args:
        fn: The function. Without it, `device_call` is a decorator.
        method: What one call is given under `jax.vmap`; see `host_call`, and `"sequential_unrolled"`.
        batch_size: The most elements that a vectorised call is given; None for all.
        schema: A `Schema`, or a mapping from path to `ArraySpec`: which shapes the function takes. For `auto`.
        signature: A NumPy gufunc signature such as `"(i,j),(j)->(i)"`. For `auto`.
        jvp: `jvp(args, tangents) -> output tangents`; `tangents` is like `args`, with None where there is none.
        vjp: `vjp(args, cotangents, needed) -> cotangents`; `cotangents` is like the result, with None where there is
            none; `needed` is like `args`, with bools; the answer is like `args`, and may be None where not needed.
            Without any endpoint, derivatives go through the body. All are batched by the same method.
        jacobian: `jacobian(args, needed) -> blocks`: a tree like the result, and in the place of each output a tree
            like `args` of arrays of shape `(*output, *argument)`; None where not needed. One serves both modes.
        pass_outputs: Whether the endpoints are given the call's result as the keyword `outputs`.
        static_argnames: Parameters that are values of the program and not data. They must be hashable.
        name: What messages call the function; its `__name__` by default.

    Returns:
        A callable that takes and gives JAX arrays (pytrees of them), or a decorator.

    Raises:
        TypeError: Something that is not callable, or an option of the wrong type.
        ValueError: An unknown method, a batch size below 1, a malformed signature.

    Example:
        >>> import jax, jax.numpy as jnp, batchrules
        >>> @batchrules.device_call(method="broadcast_all")
        ... def scale(x, factor):
        ...     return x * factor[..., None]  # a kernel that handles a leading dimension
        >>> print(jax.vmap(scale, in_axes=(0, None))(jnp.ones((2, 3)), jnp.array(2.0)))
        [[2. 2. 2.]
         [2. 2. 2.]]
    """
    if fn is None:
        return functools.partial(
            device_call, method=method, batch_size=batch_size, schema=schema, signature=signature, jvp=jvp, vjp=vjp,
            jacobian=jacobian, pass_outputs=pass_outputs, static_argnames=static_argnames, name=name,
        )  # fmt: skip
    label = label_of(fn, name, "device_call")
    _refuse_differences((jvp, vjp, jacobian), label)
    parameters = Parameters(fn, static_argnames, label)
    options = DeviceOptions(
        method=check_method(method, label),
        batch_size=check_batch_size(batch_size, label),
        schema=as_schema(parameters.named(schema), label),
        signature=as_signature(signature, label),
        endpoints=Endpoints(
            **checked_endpoints(jvp, vjp, jacobian, label),
            pass_outputs=checked_bool(pass_outputs, "pass_outputs", label),
        ),
        name=label,
    )
    parameters.check_schema(options.schema)
    return DeviceCall(fn, parameters, options)
