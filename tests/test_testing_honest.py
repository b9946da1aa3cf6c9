"""Honest functions of every kind pass, what could not be checked is told, and bad input is refused."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules
from batchrules.testing import Report, check_batching

X = np.array([1.0, -2.0, 3.0])


def host(function, result, **options):
    return batchrules.host_call(function, result, **options)


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "complex64", "complex128", "int32", "uint8", "bool"]
)
def test_every_dtype(dtype, method):
    x = np.array([1, 0, 3]).astype(jnp.dtype(dtype))
    function = host(lambda x: x[..., ::-1], jax.ShapeDtypeStruct((3,), x.dtype), method=method)
    assert check_batching(function, x).total > 15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_derivatives_in_every_dtype(dtype):
    x = X.astype(jnp.dtype(dtype))

    # No Python number: times one, bfloat16 becomes float32 before NumPy 2.1.
    def vjp(args, cotangents, needed):
        return ((args[0] + args[0]) * cotangents,)

    def jvp(args, tangents):
        return (args[0] + args[0]) * tangents[0]

    function = host(lambda x: x * x, jax.ShapeDtypeStruct((3,), x.dtype), method="expand_dims", jvp=jvp, vjp=vjp)
    report = check_batching(function, x, endpoints=("jvp", "vjp"))
    assert report.counts["vmap of vjp"] > 0
    assert any("bfloat16 is too coarse" in reason for reason in report.left_out) == (dtype == "bfloat16")
    assert any("Jacobians" in reason for reason in report.left_out) == (dtype == "complex64")


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: jnp.maximum(x, 0.0), id="a kink"),
        pytest.param(lambda x: 1e8 * x + jnp.sin(x), id="large numbers"),
        pytest.param(lambda x: 1e-12 * x * x, id="small numbers"),
        pytest.param(jnp.round, id="steps"),
        pytest.param(lambda x: jnp.where(x > 1, jnp.nan, x), id="not finite"),
        pytest.param(jnp.cumsum, id="a sum along its own axis"),
    ],
)
def test_rough_functions(function):
    check_batching(function, np.array([0.0, 2.0, -1.0], "float32"), in_axes=0)


def test_a_tree_of_several_kinds():
    def function(state, flag, count, key):
        noise = jax.random.normal(key, (2,), "float32")
        moved = jnp.where(flag, state["x"] + noise, state["x"])
        return {"moved": moved, "count": count + 1, "key": jax.random.split(key)[0]}

    args = ({"x": np.ones(2, "float32")}, np.array(True), np.array(3, "int32"), jax.random.key(0))
    report = check_batching(
        function, *args, in_axes=[(0, 0, 0, 0), ({"x": None}, None, None, 0), (0, None, None, None)]
    )
    assert report.counts["vmap"] > 10


def test_raw_keys():
    check_batching(lambda key: jax.random.bits(key, (3,)), jax.random.PRNGKey(0))


def test_a_device_call():
    @batchrules.device_call(method="broadcast_all")
    def scale(x, s):
        return x * s[..., None]

    report = check_batching(scale, X, np.array(2.0), in_axes=[(0, None), (None, 0)])
    assert report.left_out == []


def test_outputs_without_derivatives():
    @batchrules.host_call(
        result_shape={
            "value": jax.ShapeDtypeStruct((3,), "float64"),
            "label": batchrules.ArraySpec((), "float64", differentiable=False),
            "count": jax.ShapeDtypeStruct((), "int32"),
        },
        vjp=lambda args, cotangents, _: (np.cos(args[0]) * cotangents["value"],),
        method="expand_dims",
    )
    def function(x):
        count = np.full(x.shape[:-1], 3, "int32")
        return {"value": np.sin(x), "label": np.floor(x[..., 0]), "count": count}

    report = check_batching(function, X)
    assert report.counts["vjp of vmap"] > 0


def test_arguments_without_derivatives():
    @batchrules.host_call(
        result_shape=jax.ShapeDtypeStruct((3,), "float64"),
        schema={"x": batchrules.ArraySpec(), "table": batchrules.ArraySpec(differentiable=False)},
        jvp=lambda args, tangents: args[1] * tangents[0],
        method="expand_dims",
    )
    def function(x, table):
        return x * table

    report = check_batching(function, X, X + 5, endpoints=["jvp"])
    assert report.counts["jacfwd of vmap"] > 0
    assert any("table, declared not to be differentiable" in reason for reason in report.left_out)


def test_static_arguments_by_partial():
    @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((3,), "float64"), static_argnames="times")
    def function(x, times):
        return x * times

    check_batching(functools.partial(function, times=3), X, methods=["sequential", "expand_dims"])


def test_in_axes_are_what_vmap_takes():
    def function(x, y):
        return x * y["y"]

    args = (np.ones((2, 3)), {"y": np.ones((2, 3))})
    one = check_batching(function, *args, in_axes=(1, {"y": None}), endpoints=())
    two = check_batching(function, *args, in_axes=[(1, None), (None, -1)], endpoints=())
    every = check_batching(function, *args, endpoints=())
    assert one.counts["jit of vmap"] == 1
    assert two.counts["jit of vmap"] == 2
    assert every.counts["jit of vmap"] == 3


def test_the_function_is_left_as_it_was():
    """The check of batches of the function itself has not been made."""
    calls = []

    def double(x):
        calls.append(x.shape)
        return 2 * x

    function = host(double, jax.ShapeDtypeStruct((3,), "float64"), method="expand_dims")
    check_batching(function, X)
    calls.clear()
    jax.vmap(function)(np.stack([X, 2 * X]))
    assert calls == [(2, 3), (3,), (3,)]


def test_a_report_prints_as_a_table():
    report = check_batching(host(np.sin, jax.ShapeDtypeStruct((3,), "float64"), name="sine"), X)
    assert isinstance(report, Report)
    lines = str(report).splitlines()
    assert lines[0] == f"check_batching({report.name[15:]}: {report.total} cases agree with one-element calls"
    assert "  jit of vmap" in "\n".join(lines)
    assert lines[-1].startswith("  not tried: derivatives: MissingEndpointError")


def test_a_tolerance_of_ones_own():
    """A solver that stops early: it depends on the batch, a little."""
    function = host(
        lambda x: x * (1 + 1e-5 * (x.ndim - 1)),
        jax.ShapeDtypeStruct((3,), "float64"),
        method="expand_dims",
        verify=1e-3,
    )
    check_batching(function, X, rtol=1e-4)
    check_batching(function, X, atol=1e-3)
    with pytest.raises(AssertionError, match=r"is 1 times what one-element calls give|come out differently"):
        check_batching(function, X)
    with pytest.raises(AssertionError, match=r"the check of batches of the function itself \(verify=\) refuses"):
        check_batching(function.replace(verify=True), X, rtol=1e-4)


def test_warnings_of_the_function_are_passed_on():
    def loud(x):
        warnings.warn("too hot", RuntimeWarning, stacklevel=1)
        return x

    function = host(loud, jax.ShapeDtypeStruct((3,), "float64"), method="sequential")
    with pytest.warns(RuntimeWarning, match="too hot"):
        check_batching(function, X)


def test_an_example_that_fails():
    def positive(x):
        if (x < 0).any():
            raise ValueError("x must not be negative")
        return x

    with pytest.raises(ValueError, match="x must not be negative") as caught:
        check_batching(host(positive, jax.ShapeDtypeStruct((3,), "float64")), X)
    assert "Give an example around which the function is defined" in "".join(caught.value.__notes__)


REFUSED = {
    "no arguments": (lambda: check_batching(jnp.sin), ValueError, "no array among the example's arguments"),
    "a string": (lambda: check_batching(jnp.sin, "x"), TypeError, "is a str, and not an array"),
    "no function": (lambda: check_batching(3, X), TypeError, "expected a function; got 3"),
    "methods of a JAX function": (
        lambda: check_batching(jnp.sin, X, methods=["sequential"]), TypeError, "methods= is for a host_call",
    ),
    "no methods": (
        lambda: check_batching(host(np.sin, X), X, methods=[]), ValueError, "methods is empty",
    ),
    "an unknown method": (
        lambda: check_batching(host(np.sin, X), X, methods=["fast"]), ValueError, "unknown method 'fast'",
    ),
    "a mode": (lambda: check_batching(jnp.sin, X, endpoints=["hvp"]), ValueError, "endpoints must be out of"),
    "an axis": (lambda: check_batching(jnp.sin, X, in_axes=2), ValueError, "from -2 to 1, or None"),
    "nothing mapped": (lambda: check_batching(jnp.sin, X, in_axes=(None,)), ValueError, "maps no argument"),
    "too many axes": (lambda: check_batching(jnp.sin, X, in_axes=(0, 0)), ValueError, "does not fit the 1 arguments"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
