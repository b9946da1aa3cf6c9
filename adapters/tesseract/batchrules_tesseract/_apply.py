"""`apply_tesseract`: a Tesseract as a JAX function."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from batchrules import ArraySpec, Schema, host_call
from batchrules_tesseract._endpoints import Apply, Jacobian, Jvp, NoJacobian, Site, Vjp
from batchrules_tesseract._form import fill
from batchrules_tesseract._inputs import Inputs, divide
from batchrules_tesseract._memory import Memory, memory_of
from batchrules_tesseract._outputs import Outputs, from_abstract_eval, from_schema, from_user
from batchrules_tesseract._targets import as_tesseract, in_process, name_of

VMAP_METHODS = (None, "sequential", "expand_dims", "broadcast_all", "auto", "auto_experimental")

# What host_call's messages tell a user to do, who has none of its options.
_METHOD = "Pass vmap_method= to apply_tesseract, one of 'sequential', 'expand_dims', 'broadcast_all', 'auto'."
_BATCH = (
    "Make the Tesseract handle a leading dimension, or pass vmap_method='sequential' to apply_tesseract. A Tesseract "
    "with random results needs verify=False."
)
_SECOND = "A Tesseract has no endpoint for second derivatives; take differences of its first ones."

_CHECK_VARIABLE = "TESSERACT_JAX_CHECK_STATIC_OUTPUTS"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Options:
    """The options of a call, as given. Compares by value."""

    method: str | None
    materialize_jacobian: bool | None
    check_static: bool
    batch_size: int | None
    executor: int | Executor | None
    max_in_flight: int | None
    verify: bool | float
    on_error: str


def apply_tesseract(  # noqa: PLR0913  # options, all keyword-only
    tesseract: Any,
    inputs: Any,
    *,
    vmap_method: str | None = None,
    materialize_jacobian: bool | None = None,
    check_static_outputs: bool | None = None,
    batch_size: int | None = None,
    executor: int | Executor | None = None,
    max_in_flight: int | None = None,
    verify: bool | float = True,
    on_error: str = "raise",
    result_shape: Any = None,
) -> Any:
    """Call a Tesseract as part of a JAX program.

    It works under `jax.jit`, `jax.vmap`, `jax.jvp`, `jax.grad`, `jax.jacfwd`, `jax.jacrev` and every composition of
    them, as far as the Tesseract has the endpoints. A batch is one call where the method is vectorised, however many
    vmaps are nested; a Jacobian is one call too.

    Args:
        tesseract: A `tesseract_core.Tesseract`, a `TesseractClient`, a URL, or a sequence of URLs that serve the same
            Tesseract (each call goes to the least busy one).
        inputs: A dict with the fields of the input schema. Arrays, and numbers where the schema has an array, are
            data; everything else is part of the program.
        vmap_method: What one call is given under `jax.vmap`: `"sequential"` (one element), `"expand_dims"` (the batch,
            other arrays leading with 1), `"broadcast_all"` (the batch in every array), or `"auto"`, also written
            `"auto_experimental"`: the batch where the schema proves it safe, else one element. With None, `jax.vmap`
            is an error.
        materialize_jacobian: Whether batched (co)tangents of one point are multiplied with a Jacobian from the
            jacobian endpoint. None: if there is one.
        check_static_outputs: Whether to warn of outputs that are no arrays and differ from what abstract_eval said,
            which is what is returned. None: as the variable TESSERACT_JAX_CHECK_STATIC_OUTPUTS says, or yes.
        batch_size: The most elements that a vectorised call is given; None for all.
        executor: How calls are made at the same time: a number of threads, or a `concurrent.futures.Executor`. Have
            three to four threads for each worker. A Tesseract in this process is called in order all the same.
        max_in_flight: The most tasks that wait or run in the executor.
        verify: Whether the first vectorised calls are checked against single ones; a float sets the tolerance.
        on_error: `"raise"`, or `"nan"` for NaN where elements of a batch fail.
        result_shape: What ONE call returns, for a Tesseract without abstract_eval: a dict like the outputs with
            `jax.ShapeDtypeStruct` for each array, or a function of the inputs that returns one.

    Returns:
        The outputs: a dict with the fields of the output schema, and JAX arrays.

    Raises:
        TypeError: An input that is no array where the schema has one, or a traced one where it has none.
        ValueError: An unknown method; outputs whose shapes nothing tells; 64-bit outputs with x64 off; a derivative in
            an input, or of an output, that is not differentiable.
        NotImplementedError: `jax.vmap` without a method, or a derivative that no endpoint gives.
        TesseractError: The call failed; see the kinds of it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from batchrules_tesseract import apply_tesseract
        >>> def flow(x):
        ...     return apply_tesseract("http://localhost:8000", {"x": x}, vmap_method="auto")["y"]
        >>> ys = jax.jit(jax.vmap(flow))(jnp.ones((64, 3)))  # doctest: +SKIP
    """
    options = Options(
        method=_checked_method(vmap_method),
        materialize_jacobian=materialize_jacobian,
        check_static=_checks_static(check_static_outputs),
        batch_size=batch_size,
        executor=executor,
        max_in_flight=max_in_flight,
        verify=verify,
        on_error=on_error,
    )
    target = as_tesseract(tesseract)
    memory = memory_of(target)
    divided = divide(inputs, memory.document)
    outputs = _outputs(target, memory, divided, result_shape)
    key = (divided.form, _shapes(divided), outputs.form, tuple(outputs.shapes.items()), options)
    call = memory.calls.get(key, lambda: _host_call(target, divided, outputs, options))
    return fill(outputs.form, call(divided.arrays))


def _outputs(target: Any, memory: Memory, inputs: Inputs, result_shape: Any) -> Outputs:
    if result_shape is not None:
        return from_user(result_shape, inputs, memory.document)
    key = (inputs.form, _shapes(inputs))
    if "abstract_eval" in target.available_endpoints:
        return memory.outputs.get(key, lambda: from_abstract_eval(target, inputs, memory.document))
    return memory.outputs.get(None, lambda: from_schema(memory.document, name_of(target)))


def _shapes(inputs: Inputs) -> tuple[Any, ...]:
    return tuple((path, array.shape, array.dtype) for path, array in inputs.arrays.items())


def _host_call(target: Any, inputs: Inputs, outputs: Outputs, options: Options) -> Any:
    site = Site(
        tesseract=target,
        name=name_of(target),
        inputs=inputs.form,
        ranks=tuple((path, len(array.shape)) for path, array in inputs.arrays.items()),
        outputs=outputs.form,
        paths=tuple(outputs.shapes),
        differentiable=outputs.differentiable,
        check_static=options.check_static,
    )
    local = in_process(target)
    return host_call(
        Apply(site),
        outputs.shapes,
        method=_method(options, outputs),
        schema=_core_schema(inputs),
        batch_size=options.batch_size,
        executor=None if local else options.executor,
        max_in_flight=None if local else options.max_in_flight,
        verify=options.verify,
        on_error=options.on_error,
        allow_jax=local,
        name=site.name,
        remedies=_remedies(target, options),
        **_derivatives(target, site, options),
    )


def _derivatives(target: Any, site: Site, options: Options) -> dict[str, Any]:
    """The endpoints that there are and that are wanted."""
    known = set(target.available_endpoints)
    endpoints: dict[str, Any] = {}
    if "jacobian_vector_product" in known:
        endpoints["jvp"] = Jvp(site)
    if "vector_jacobian_product" in known:
        endpoints["vjp"] = Vjp(site)
    if "jacobian" in known and options.materialize_jacobian is not False:
        endpoints["jacobian"] = Jacobian(site)
    elif options.materialize_jacobian:
        endpoints["jacobian"] = NoJacobian(site)
    return endpoints


def _remedies(target: Any, options: Options) -> dict[str, str]:
    """What messages tell the user of this Tesseract to do."""
    left_out = options.materialize_jacobian is False and "jacobian" in target.available_endpoints
    jacobian = (
        "or leave materialize_jacobian=False out: its jacobian endpoint serves both modes"
        if left_out
        else "or a jacobian endpoint, which serves both modes"
    )
    return {
        "method": _METHOD,
        "batch": _BATCH,
        "derivatives": "Give the Tesseract a vector_jacobian_product endpoint (reverse mode), a "
        f"jacobian_vector_product endpoint (forward mode), {jacobian}. Or differentiate with respect to other "
        "arguments (argnums), or keep its inputs constant with jax.lax.stop_gradient.",
        "jvp": "The Tesseract has no jacobian_vector_product endpoint. Use reverse mode (jax.grad, jax.vjp, "
        f"jax.jacrev), or give the Tesseract that endpoint, {jacobian}.",
        "vjp": "The Tesseract has no vector_jacobian_product endpoint. Use forward mode (jax.jvp, jax.jacfwd), or give "
        f"the Tesseract that endpoint, {jacobian}.",
        "second": _SECOND,
    }


def _core_schema(inputs: Inputs) -> Schema:
    # Without dtypes: the Tesseract casts, and says so where it cannot.
    return Schema(
        {
            f"inputs.{path}": ArraySpec(spec.shape, differentiable=spec.differentiable)
            for path, spec in inputs.specs.items()
        }
    )


def _method(options: Options, outputs: Outputs) -> str | None:
    # Outputs of fixed rank cannot come back with a leading dimension, whatever the inputs take.
    if options.method == "auto" and not outputs.grows:
        return "sequential"
    return options.method


def _checked_method(method: Any) -> str | None:
    if method not in VMAP_METHODS:
        raise ValueError(f"unknown vmap_method {method!r}. Choose one of {', '.join(map(repr, VMAP_METHODS))}.")
    return "auto" if method == "auto_experimental" else method


def _checks_static(given: bool | None) -> bool:  # noqa: FBT001  # None, True and False are the option's values
    if given is not None:
        return given
    text = os.environ.get(_CHECK_VARIABLE, "yes").strip().lower()
    if text not in (*_YES, *_NO):
        raise ValueError(f"{_CHECK_VARIABLE} is {text!r}; set it to one of {', '.join((*_YES, *_NO))}.")
    return text in _YES
