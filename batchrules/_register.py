"""`register`, `unregister`, `registered`: a batching rule for a primitive that exists already."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.core
from jax.interpreters import batching

from batchrules import _hijax, _rules
from batchrules._jax_versions import Primitive
from batchrules._legacy_leads import without_lead_p
from batchrules._mapped_bind import MappedBind
from batchrules._methods import Choice, Lead, check_batch_size, check_method
from batchrules._registration import NOTHING, BatchInfo, Method, Registration
from batchrules._schema import Schema, as_schema, as_signature

_lock = threading.RLock()
_registrations: dict[Any, Registration] = {}


def register(  # noqa: PLR0913  # options, all keyword-only
    primitive: Any,
    method: Method,
    *,
    batch_size: int | None = None,
    schema: Any = None,
    signature: str | None = None,
    update_params: Callable[[dict[str, Any], BatchInfo], dict[str, Any]] | None = None,
    call: Callable[..., Any] | None = None,
) -> None:
    """Give a primitive a batching rule, in place of the one it has, if any.

    Registering again replaces the rule. Functions that were jitted before keep the rule they were traced with, until
    `jax.clear_caches()`.

    Args:
        primitive: A `jax.extend.core.Primitive`, or a HiJAX primitive class of `jax.experimental.hijax`. A primitive
            without a public name is found through `jax.make_jaxpr(f)(*args).eqns[0].primitive`.
        method: What one bind is given under `jax.vmap`: `"sequential"`, `"sequential_unrolled"`, `"expand_dims"`,
            `"broadcast_all"`, `"legacy_vectorized"`, `"auto"`, or a function from the primitive's parameters to one
            of these, such as `lambda params: params["vmap_method"]`.
        batch_size: The most elements that a vectorised bind is given; None for all. (With 1, an output that depends on
            no mapped operand cannot be told from the others.)
        schema: A `Schema` with the paths `args.0`, `args.1`, ..., or a sequence of `ArraySpec`. For `auto`.
        signature: A NumPy gufunc signature such as `"(i,j),(j)->(i)"`: the primitive handles leading dimensions itself,
            by broadcasting. For `auto`.
        update_params: `update_params(params, batch) -> params` for vectorised binds of a primitive whose parameters
            hold shapes, layouts or aliases; `batch` is a `BatchInfo`. See `ffi_update_params`. Two names in the
            parameters are read, as JAX's own primitives have them: `result_avals`, and `input_output_aliases`, whose
            operands always lead with the size of the batch.
        call: For a HiJAX class, and only there: `call(self, *args)` applies the operation to arrays of any leading
            shape.

    Raises:
        TypeError: Not a primitive, or an option of the wrong type.
        ValueError: An unknown method, or a batch size below 1.

    Example:
        >>> import jax, jax.numpy as jnp, batchrules
        >>> from jax.extend.core import Primitive
        >>> double_p = Primitive("double")
        >>> @double_p.def_impl
        ... def double(x):
        ...     return 2 * x
        >>> @double_p.def_abstract_eval
        ... def double_shape(x):
        ...     return x
        >>> batchrules.register(double_p, method="expand_dims")
        >>> print(jax.vmap(double_p.bind)(jnp.arange(3)))
        [0 2 4]
    """
    where = f"register({getattr(primitive, 'name', None) or getattr(primitive, '__name__', primitive)!r})"
    is_class = _hijax.is_primitive_class(primitive)
    _check_primitive(primitive, where, call, update_params, is_class=is_class)
    registration = Registration(
        primitive,
        method if callable(method) else check_method(method, where),
        check_batch_size(batch_size, where),
        _checked_schema(schema, where),
        as_signature(signature, where),
        _checked_function(update_params, "update_params", where),
        call,
    )
    with _lock:
        standing = _registrations.get(primitive)
        install = _hijax.install if is_class else _install_primitive
        before = install(registration)
        kept = before if standing is None else standing.before
        _registrations[primitive] = replace(registration, before=kept)


def unregister(primitive: Any) -> None:
    """Take a registered rule away and give back the one that stood there before the first `register`.

    Args:
        primitive: The primitive, or the HiJAX class.

    Raises:
        ValueError: Nothing is registered for it.

    Example:
        >>> import batchrules
        >>> from jax.extend.core import Primitive
        >>> halve_p = Primitive("halve")
        >>> batchrules.register(halve_p, "broadcast_all")
        >>> batchrules.unregister(halve_p)
    """
    with _lock:
        registration = _registrations.pop(primitive, None)
        if registration is None:
            raise ValueError(f"unregister: nothing is registered for {primitive!r}; register gives it a rule first.")
        before = registration.before
        if _hijax.is_primitive_class(primitive):
            _hijax.restore(primitive, before)
        elif before is NOTHING:
            batching.fancy_primitive_batchers.pop(primitive, None)
        else:
            batching.fancy_primitive_batchers[primitive] = before


def registered(primitive: Any) -> Registration | None:
    """Tell how a primitive is registered.

    Args:
        primitive: The primitive, or the HiJAX class.

    Returns:
        Its `Registration`, or None if `register` gave it no rule.

    Example:
        >>> import batchrules
        >>> from jax.extend.core import Primitive
        >>> halve_p = Primitive("halve")
        >>> batchrules.registered(halve_p) is None
        True
    """
    return _registrations.get(primitive)


def _check_primitive(primitive: Any, where: str, call: Any, update_params: Any, *, is_class: bool) -> None:
    if not is_class and not isinstance(primitive, Primitive):
        raise TypeError(
            f"{where}: expected a jax.extend.core.Primitive or a HiJAX primitive class; got a "
            f"{type(primitive).__name__}. The primitive of a function is "
            "jax.make_jaxpr(function)(*args).eqns[0].primitive; for a function as a whole use device_call or host_call."
        )
    if is_class and call is None:
        raise TypeError(
            f"{where}: a HiJAX primitive class needs call=: call(self, *args) must apply the operation to arrays of "
            "any leading shape."
        )
    _checked_function(call, "call", where)
    if is_class and update_params is not None:
        raise TypeError(
            f"{where}: update_params= is for ordinary primitives; a HiJAX class makes its own parameters in call=."
        )
    if not is_class and call is not None:
        raise TypeError(f"{where}: call= is for HiJAX primitive classes; an ordinary primitive is bound as it is.")


def _checked_schema(schema: Any, where: str) -> Schema | None:
    checked = as_schema(schema, where)
    unknown = [path for path in checked or () if not re.fullmatch(r"args\.\d+", path)]
    if unknown:
        raise ValueError(f"{where}: the schema has {unknown}, but the operands of a primitive are args.0, args.1, ...")
    return checked


def _checked_function(function: Any, option: str, where: str) -> Any:
    if function is not None and not callable(function):
        raise TypeError(f"{where}: {option} must be a function or None; got {function!r}.")
    return function


def _install_primitive(registration: Registration) -> Any:
    before = batching.fancy_primitive_batchers.get(registration.primitive, NOTHING)
    batching.fancy_primitive_batchers[registration.primitive] = functools.partial(_batch_primitive, registration)
    return before


def _batch_primitive(
    registration: Registration,
    axis_data: Any,
    operands: Sequence[Any],
    dims: Sequence[int | None],
    **params: Any,
) -> tuple[Any, Any]:
    primitive = registration.primitive
    if all(dim is None for dim in dims):
        outputs = primitive.bind(*operands, **params)
        return outputs, [None] * len(outputs) if primitive.multiple_results else None
    in_batched = tuple(dim is not None for dim in dims)
    arrays = [_rules.to_front(x, dim) for x, dim in zip(operands, dims, strict=True)]
    apply = _PrimitiveBind(registration, axis_data, in_batched, params)
    bind = MappedBind(registration, axis_data, in_batched, params, apply, apply.results(arrays))
    values, out_dims = bind.run(arrays)
    return (values, out_dims) if primitive.multiple_results else (values[0], out_dims[0])


@dataclass(eq=False)
class _PrimitiveBind:
    """Binds a primitive, with its parameters adapted where the bind is vectorised."""

    registration: Registration
    axis_data: Any
    in_batched: tuple[bool, ...]
    params: dict[str, Any]

    def __call__(self, choice: Choice, arrays: Sequence[Any], size: int | None) -> Sequence[Any]:
        """Bind one element (size None) or so many at once."""
        primitive = self.registration.primitive
        params = self.params if size is None else self._updated(choice, size)
        if choice.method == "legacy_vectorized":
            arrays = self._refusing_another_map(choice, arrays)
        outputs = primitive.bind(*arrays, **params)
        return outputs if primitive.multiple_results else [outputs]

    def _refusing_another_map(self, choice: Choice, arrays: Sequence[Any]) -> list[Any]:
        where = self.registration.where
        return [
            without_lead_p.bind(x, where=where) if lead is Lead.NOTHING else x
            for x, lead in zip(arrays, choice.leads, strict=True)
        ]

    def results(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """What each output of one element is; the arrays have their mapped axis in front."""
        if "result_avals" in self.params:
            return self.params["result_avals"]
        elements = [
            jax.core.ShapedArray(array.shape[1:] if batched else array.shape, array.dtype)
            for array, batched in zip(arrays, self.in_batched, strict=True)
        ]
        primitive = self.registration.primitive
        outputs, _ = primitive.abstract_eval(*elements, **self.params)
        return outputs if primitive.multiple_results else [outputs]

    def _updated(self, choice: Choice, size: int) -> dict[str, Any]:
        registration = self.registration
        if registration.update_params is None:
            return self.params
        led = tuple(lead is not Lead.NOTHING for lead in choice.leads)
        info = BatchInfo(self.axis_data.size, self.axis_data.name, self.in_batched, choice.method, size, led)
        params = registration.update_params(dict(self.params), info)
        if not isinstance(params, dict):
            raise TypeError(
                f"{registration.where}: update_params must return the dict of parameters; it returned {params!r}."
            )
        return params
