"""`host_call`: a Python function on the host as a JAX function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import jax

from batchrules import _batch, _host_where, _operands, _placement
from batchrules._bound import BoundHostCall
from batchrules._dispatch import check_dispatch
from batchrules._host_body import Endpoint, Primal
from batchrules._host_context import FirstCall, inside_numpy_only
from batchrules._host_options import HostOptions, check_keywords, check_nan, checked_remedies, conduct_of, endpoints_of
from batchrules._host_primitive import host_call_p
from batchrules._host_site import HostSite
from batchrules._host_trust import Trust
from batchrules._inspect import recorded_call
from batchrules._methods import HOST_METHODS, Choice, MethodRequest, check_batch_size, check_method
from batchrules._options import checked_bool, checked_endpoints
from batchrules._promise import promised
from batchrules._schema import as_schema, as_signature
from batchrules._signature import Call, Parameters
from batchrules._values import hashable, label_of


class HostCall:
    """A host function that can be used like any JAX function; made by `host_call`.

    Calling it runs the function on NumPy arrays and gives JAX arrays. Under `jax.jit` the compiled program calls it;
    under `jax.vmap` the mapped axes are recorded, and one callback runs the whole batch.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        result_shape: Any,
        parameters: Parameters,
        options: HostOptions,
        given: Mapping[str, Any],
    ) -> None:
        functools.update_wrapper(self, fn)
        self._given = given
        self._fn = hashable(fn)
        self._options = options
        self._result_shape = result_shape
        self._parameters = parameters
        self._first_call = FirstCall(fn, options.name, allow_jax=options.conduct.allow_jax)
        self._trust = Trust()
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
        return site.body.tree(outputs)

    def where(self, mask: Any, /, *args: Any, otherwise: Any = None, **kwargs: Any) -> Any:
        """Call the host function only where a mask is True.

        Under `jax.vmap`, `jax.lax.cond` runs both branches for every element and `while_loop` runs finished elements
        on; this makes no call for an element whose mask is False, and a vectorised method is given only the others.

        Args:
            mask: A boolean scalar (of one element; `jax.vmap` adds the batch).
            *args: The arguments of the function.
            otherwise: What stands for the result where the mask is False: a tree like it, or a number for all of it;
                None for zeros. Derivatives go through it there.
            **kwargs: The keyword arguments of the function.

        Returns:
            The result, a tree of arrays.

        Raises:
            TypeError: A mask that is no boolean scalar, or an `otherwise` that is not like the result.

        Example:
            >>> import jax, jax.numpy as jnp, numpy as np, batchrules
            >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
            ... def root(x):
            ...     return np.sqrt(x)
            >>> xs = jnp.array([4.0, -1.0, 9.0], dtype="float32")
            >>> print(jax.vmap(lambda x: root.where(x >= 0, x, otherwise=-1.0))(xs))
            [ 2. -1.  3.]
        """
        call = self._parameters.divide(args, kwargs)
        name = self._options.name
        if inside_numpy_only() and not any(isinstance(leaf, jax.Array) for leaf in [mask, *call.leaves]):
            site = self._site(call, _numpy(call))
            others = _host_where.checked_otherwise(otherwise, site)
            wanted = _host_where.as_bool(mask, name)
            return self._run_without_jax(call) if wanted else _host_where.in_numpy(others, site)
        flag = _host_where.checked_mask(mask, name)
        operands = _placement.aligned([flag, *_operands.as_operands(call, name)])
        site = _host_where.masked(self._site(call, operands[1:]))
        others = _host_where.in_jax(_host_where.checked_otherwise(otherwise, site), site)
        outputs = host_call_p.bind(*operands, site=site, axes=())
        pairs = zip(outputs, _placement.like(others, outputs), strict=True)
        chosen = [jax.lax.select(operands[0], output, other) for output, other in pairs]
        return site.body.tree(chosen)

    @property
    def host_function(self) -> Callable[..., Any]:
        """The Python function that is called on the host."""
        return self._fn

    def replace(self, **options: Any) -> HostCall:
        """The same function with other options. It shares nothing with this one, and is checked anew.

        Args:
            **options: Options of `host_call`, in place of those that were given.

        Returns:
            A host call.

        Raises:
            TypeError: An option that `host_call` does not have.

        Example:
            >>> import jax, batchrules
            >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"))
            ... def total(x):
            ...     return x.sum(axis=-1)
            >>> total.replace(method="expand_dims")
            <host_call 'total' method='expand_dims'>
        """
        return host_call(self._fn, self._result_shape, **{**self._given, **options})

    def as_endpoint(self) -> Endpoint:
        """This call as a derivative endpoint of another: its function, with the derivatives that it has itself."""
        return Endpoint(self._fn, self._first_call, self._options.endpoints)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method: the instance is the first argument, static or a container of arrays."""
        return self if instance is None else BoundHostCall(self, instance)

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
        arrays = _numpy(call)
        site = self._site(call, arrays)
        from batchrules._host_runners import runner  # noqa: PLC0415  # loaded with the first run

        outputs = runner(site, (), [array.shape for array in arrays])(*arrays)
        # A copy, because the array may be a buffer that the function goes on using.
        return site.body.tree([output.copy() for output in outputs])

    def _site(self, call: Call, operands: Sequence[Any]) -> HostSite:
        options = self._options
        check_keywords(options.endpoints, call, options.name)
        _operands.check_schema(options.schema, call.paths, operands, options.name)
        results, tree = promised(self._promise(call, operands), options.name)
        _operands.check_signature(options.signature, len(call.paths), len(results), options.name)
        check_nan(options.conduct.on_error, results, options.name)
        return HostSite(
            body=Primal(self._fn, call.structure, tree, options.name, options.endpoints, self._first_call),
            name=options.name,
            paths=call.paths,
            results=results,
            request=MethodRequest(options.method, options.schema, options.signature, options.name),
            batch_size=options.batch_size,
            conduct=options.conduct,
            trust=self._trust,
            remedies=options.remedies,
        )

    def _promise(self, call: Call, operands: Sequence[Any]) -> Any:
        if not callable(self._result_shape):
            return self._result_shape
        shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
        args, kwargs = call.structure.assemble(shapes)
        return self._result_shape(*args, **kwargs)


def _numpy(call: Call) -> list[Any]:
    return [_operands.as_numpy(leaf) for leaf in call.leaves]


def host_call(  # noqa: PLR0913  # options, all keyword-only
    fn: Callable[..., Any] | None = None,
    result_shape: Any = None,
    *,
    method: str | None = "auto",
    schema: Any = None,
    batch_size: int | None = None,
    executor: int | Executor | None = None,
    max_in_flight: int | None = None,
    jvp: Callable[..., Any] | None = None,
    vjp: Callable[..., Any] | None = None,
    jacobian: Callable[..., Any] | None = None,
    verify: bool | float = True,
    on_error: str = "raise",
    signature: str | None = None,
    static_argnames: str | Sequence[str] = (),
    pass_outputs: bool = False,
    skip_zero: bool = False,
    allow_jax: bool = False,
    progress: bool | str = False,
    name: str | None = None,
    remedies: Mapping[str, str] | None = None,
) -> Any:
    """Make a JAX function of a Python function that runs on the host: NumPy, SciPy, ctypes, HTTP, a subprocess.

    The result works under `jax.jit`, `jax.vmap` (nested too), `jax.lax.scan`, `cond` and `while_loop`,
    `jax.checkpoint` and `jax.shard_map`, and with derivative endpoints under `jax.jvp`, `grad`, `jacfwd`, `jacrev` and
    `hessian`. It must have no side effects: calls whose result nothing uses are not made, and equal calls in one
    program may be one call.

    Args:
        fn: The function. It is given NumPy arrays (read-only) and must return what `result_shape` says. Without it,
            `host_call` is a decorator.
        result_shape: A pytree of things with `.shape` and `.dtype`, or a function of the arguments (arrays as
            `jax.ShapeDtypeStruct`) that returns one. Always for ONE element, however the call is mapped. An
            `ArraySpec` with `differentiable=False` marks an output without derivatives.
        method: What one call is given under `jax.vmap`: `"sequential"`, `"expand_dims"`, `"broadcast_all"`,
            `"legacy_vectorized"`, or `"auto"`: `expand_dims` where the schema or signature proves it safe, else
            `sequential`. None refuses `jax.vmap` over an argument.
        schema: A `Schema`, or a mapping from path to `ArraySpec`: which shapes the function takes, for `auto`, and
            which arguments have derivatives.
        batch_size: The most elements that a vectorised call is given; None for all.
        executor: How the calls of a batch are issued: None, in order; an int, that many threads; or any
            `concurrent.futures.Executor`, of which only `submit` is used (loky, Dask's `Client.get_executor()`).
        max_in_flight: The most tasks that an executor is given before one has finished; None for no bound.
        jvp: `jvp(args, tangents) -> output tangents`. `tangents` is like `args`, with None where an input has none;
            the answer is a tree like the result, with None for zero.
        vjp: `vjp(args, cotangents, needed) -> cotangents`. `cotangents` is like the result, with None where an output
            is unused or has no derivative; `needed` is like `args`, with bools; the answer is like `args`, and may be
            None where not needed. Complex numbers follow JAX: cotangents are not conjugated.
        jacobian: `jacobian(args, needed) -> blocks`: a tree like the result, and in the place of each output a tree
            like `args` of arrays of shape `(*output, *argument)`; None where not needed. Serves both modes where `jvp`
            or `vjp` is missing, and (co)tangents mapped over unmapped arguments: `jax.jacobian` is one call.
            All endpoints are host functions, batched by the same method. One that is a `host_call` with endpoints of
            its own gives second derivatives.
        verify: Whether vectorised calls are checked on two elements that differ, called on their own: the first ones of
            each element shape, and a later one now and then. A number is the relative tolerance.
        on_error: `"raise"`; or `"nan"`: the elements that fail become NaN, the others keep their results, and one
            warning tells which.
        signature: A NumPy gufunc signature such as `"(i,j),(j)->(i)"`: the function handles leading dimensions
            itself, by broadcasting. For `auto`.
        static_argnames: Parameters that are values of the program and not data. They must be hashable.
        pass_outputs: Whether the endpoints are given the call's own result, as the keyword `outputs`.
        skip_zero: Whether a sequential derivative makes no call for an element whose (co)tangents are all zero.
        allow_jax: Whether the function may use JAX inside. It can deadlock; see the error that says so. Calls are then
            made in order, never by an executor.
        progress: Whether a bar shows the elements of its batches while they run, as `progress()` does for all
            functions; a string is what stands before the bar.
        name: What messages call the function; its `__name__` by default.
        remedies: For a library that wraps the call: what messages tell its users to do, in place of options of
            `host_call`. A mapping from `"method"` (`jax.vmap` without a method), `"batch"` (a batch that is not treated
            element by element), `"derivatives"` (no endpoint at all), `"jvp"` and `"vjp"` (none for forward, for
            reverse mode) and `"second"` (none for a derivative of a derivative) to sentences.

    Returns:
        A callable that takes and gives JAX arrays (pytrees of them), or a decorator.

    Raises:
        TypeError: Something that is not callable, no `result_shape`, or an option of the wrong type.
        ValueError: An unknown method, a batch size below 1, a malformed signature, an unknown remedy, a 64-bit result
            with x64 off.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> def norm_vjp(args, cotangents, needed):
        ...     (x,) = args
        ...     return (cotangents * x / np.sqrt((x * x).sum()),)
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"), vjp=norm_vjp)
        ... def norm(x):
        ...     return np.sqrt((x * x).sum()).astype("float32")
        >>> xs = jnp.array([[3.0, 4.0], [6.0, 8.0]], dtype="float32")
        >>> print(jax.jit(jax.vmap(norm))(xs))
        [ 5. 10.]
        >>> print(jax.vmap(jax.grad(norm))(xs))
        [[0.6 0.8]
         [0.6 0.8]]
    """
    given = {
        "method": method, "schema": schema, "batch_size": batch_size, "executor": executor,
        "max_in_flight": max_in_flight, "jvp": jvp, "vjp": vjp, "jacobian": jacobian, "verify": verify,
        "on_error": on_error, "signature": signature, "static_argnames": static_argnames,
        "pass_outputs": pass_outputs, "skip_zero": skip_zero, "allow_jax": allow_jax, "progress": progress,
        "name": name, "remedies": remedies,
    }  # fmt: skip
    if fn is None:
        return functools.partial(host_call, result_shape=result_shape, **given)
    label = label_of(fn, name, "host_call")
    if result_shape is None:
        raise TypeError(
            f"{label}: result_shape is missing. Say what ONE call returns: a pytree of jax.ShapeDtypeStruct(shape, "
            "dtype), or a function of the arguments that returns one; an empty tuple for a function without results."
        )
    parameters = Parameters(fn, static_argnames, label)
    flags = {
        "skip_zero": checked_bool(skip_zero, "skip_zero", label),
        "allow_jax": checked_bool(allow_jax, "allow_jax", label),
        "progress": _own_bar(progress, label),
    }
    passing = {"allow_jax": allow_jax, "pass_outputs": checked_bool(pass_outputs, "pass_outputs", label)}
    options = HostOptions(
        method=None if method is None else check_method(method, label, HOST_METHODS),
        schema=as_schema(parameters.named(schema), label),
        batch_size=check_batch_size(batch_size, label),
        signature=as_signature(signature, label),
        endpoints=endpoints_of(checked_endpoints(jvp, vjp, jacobian, label), passing, label),
        conduct=conduct_of(check_dispatch(executor, max_in_flight, label), verify, on_error, flags, label),
        remedies=checked_remedies(remedies, label),
        name=label,
    )
    parameters.check_schema(options.schema)
    return HostCall(fn, result_shape, parameters, options, given)


def _own_bar(progress: Any, where: str) -> Any:
    if progress is False:
        return None
    from batchrules._progress import own_bar  # noqa: PLC0415  # loaded by who asks for a bar

    return own_bar(progress, where)
