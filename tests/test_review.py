"""What a stranger's review found: each case was wrong, in silence or with a misleading error."""

import enum
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import io_callback

import batchrules
from batchrules import ArraySpec

X = np.arange(6.0).reshape(2, 3)
ELEMENT = jax.ShapeDtypeStruct((3,), "float64")
SCALAR = jax.ShapeDtypeStruct((), "float64")


def test_auto_is_not_misled_by_paths_that_collide():
    @batchrules.device_call(schema={"d.a.b": ArraySpec()})
    def times(d):
        return d["a.b"] * d["a"]["b"]

    d = {"a.b": jnp.ones((3, 3)), "a": {"b": jnp.arange(3.0)}}
    assert times.method_for(d).method == "sequential"
    assert np.array_equal(jax.vmap(times)(d), np.ones((3, 3)) * np.arange(3.0)[:, None])


def test_vjp_answer_with_other_keys_is_refused():
    def other_keys(args, cotangents, needed):
        return ({"b_bar": cotangents, "c": cotangents},)

    f = batchrules.device_call(lambda p: p["a"] * p["b"], vjp=other_keys)
    with pytest.raises(batchrules.ResultError, match=r"expected the keys .*'a', 'b'"):
        jax.grad(lambda p: f(p).sum())({"a": jnp.ones(3), "b": jnp.ones(3)})


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_numpy_statics_that_differ_in_a_sign_stay_different(dtype):
    call = batchrules.host_call(lambda x, s: x * np.copysign(1.0, s.real), ELEMENT, static_argnames="s")
    zero = np.zeros((), dtype)[()]
    plus, minus = jax.jit(lambda x: (call(x, zero), call(x, -zero)))(X[1])
    assert np.array_equal(plus, -np.asarray(minus))


def test_elements_of_a_transposed_array_are_read_only():
    def spoil(x, y):
        x += y
        return x.sum()

    call = batchrules.host_call(spoil, SCALAR, method="sequential")
    mapped = jax.vmap(jax.vmap(jax.vmap(call, (0, None)), (0, None)), (None, 0))
    with pytest.raises(batchrules.ReadOnlyArgumentError):
        mapped(np.asfortranarray(np.ones((2, 3, 2))), np.arange(4.0))


def test_nested_host_call_cannot_change_its_callers_array():
    def spoil(x):
        x[...] = 0
        return x

    inner = batchrules.host_call(spoil, ELEMENT)
    outer = batchrules.host_call(lambda x: (y := x.copy(), inner(y))[1], ELEMENT)
    with pytest.raises(batchrules.ReadOnlyArgumentError):
        outer(X[0])


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_masked_results_are_refused(method):
    call = batchrules.host_call(lambda x: np.ma.masked_greater(x, 1), ELEMENT, method=method)
    for run in (call, jax.jit(call)):
        with pytest.raises((batchrules.ResultError, jax.errors.JaxRuntimeError), match="masked array"):
            jax.block_until_ready(run(X[0]))
    with pytest.raises(batchrules.ResultError, match="masked array"):
        jax.vmap(call)(X)


def test_masked_argument_of_a_nested_call_is_refused():
    inner = batchrules.host_call(lambda x: x.sum(), SCALAR)
    outer = batchrules.host_call(lambda x: inner(np.ma.masked_greater(x, 1)), SCALAR)
    with pytest.raises(TypeError, match="no masks"):
        outer(X[0])


def test_python_float_for_a_small_integer_is_refused():
    call = batchrules.host_call(lambda x: 2.7, jax.ShapeDtypeStruct((), ml_dtypes.int4))  # noqa: ARG005
    with pytest.raises(batchrules.ResultError, match="a float does not fit"):
        call(1.0)


@pytest.mark.parametrize("value", [enum.IntEnum("E", {"TWO": 2}).TWO, type("F", (float,), {})(2.0)])
def test_subclasses_of_python_numbers_are_numbers(value):
    assert batchrules.host_call(lambda x: value, SCALAR)(1.0) == 2.0  # noqa: ARG005


@pytest.mark.parametrize(
    "effect",
    [
        lambda x: io_callback(lambda _: None, None, x),
        lambda x: io_callback(lambda _: None, None, x, ordered=True),
        lambda x: jax.debug.print("{x}", x=x, ordered=True),
    ],
)
def test_side_effects_in_a_device_call_are_refused(effect):
    @batchrules.device_call
    def loud(x):
        effect(x)
        return x

    with pytest.raises(TypeError, match="device_call 'loud' has side effects"):
        jax.jit(loud)(1.0)


@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all", "legacy_vectorized"])
def test_device_function_never_sees_more_than_batch_size(method):
    @batchrules.device_call(method=method, batch_size=2)
    def small(x):
        if x.ndim == 2 and x.shape[0] > 2:
            raise ValueError("at most 2 rows")
        return x * 2

    assert np.array_equal(jax.vmap(small)(np.ones((5, 3))), np.full((5, 3), 2.0))


@pytest.mark.parametrize("fn", [lambda x: (x, x) if x.ndim == 1 else x, lambda x: x if x.ndim == 1 else (x, x)])
def test_device_function_that_changes_its_outputs_with_the_batch(fn):
    with pytest.raises(batchrules.BatchContractError, match="the same outputs"):
        jax.vmap(batchrules.device_call(fn, method="broadcast_all"))(X)


def test_device_function_that_changes_its_dtype_with_the_batch():
    f = batchrules.device_call(lambda x: x if x.ndim == 1 else x.astype("float32"), method="broadcast_all")
    with pytest.raises(batchrules.BatchContractError, match=r"dtype float32: expected \(2, 3\) and float64"):
        jax.vmap(f)(X)


def test_natural_vjp_where_an_output_depends_on_nothing_mapped():
    def twin(x, y):
        return x * y, jnp.sin(y)

    f = batchrules.device_call(twin, method="expand_dims", vjp=lambda args, ct, _: jax.vjp(twin, *args)[1](ct))

    def loss(fun):
        return jax.vmap(jax.grad(lambda x, y: sum(part.sum() for part in fun(x, y)), (0, 1)), (0, None))(X, X[1])

    for got, want in zip(loss(f), loss(twin), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_committed_array_and_a_number_run_at_once_with_the_original_exception():
    def fail(x, y):
        raise KeyError(float(x + y))

    x = jax.device_put(1.0, jax.devices()[1])
    with pytest.raises(KeyError):
        batchrules.host_call(fail, SCALAR)(x, 1.0)
    result = batchrules.host_call(lambda x, y: x + y, SCALAR)(x, 1.0)
    assert result.devices() == {jax.devices()[1]}


@pytest.mark.parametrize(
    ("operands", "in_axes", "text"),
    [
        ((X, X), (None, None), "one size; got none mapped"),
        ((X, X), (5, None), "no axis 5 in an operand of shape"),
        ((1.0, X), (0, 0), r"no axis 0 in an operand of shape \(\)"),
        ((X, X), (0, 1), r"one size; got \[2, 3\]"),
        ((X, X), (0,), "for each of the 2 operands"),
        ((X, X), 0, "for each of the 2 operands"),
    ],
)
def test_method_for_of_a_primitive_checks_in_axes(operands, in_axes, text):
    primitive = jax.make_jaxpr(jnp.add)(1.0, 2.0).eqns[0].primitive
    batchrules.register(primitive, "sequential")
    try:
        with pytest.raises(ValueError, match=text):
            batchrules.registered(primitive).method_for(*operands, in_axes=in_axes)
    finally:
        batchrules.unregister(primitive)


@pytest.mark.parametrize(
    "decorate", [batchrules.device_call, functools.partial(batchrules.host_call, result_shape=ELEMENT)]
)
def test_method_for_takes_static_arguments(decorate):
    call = decorate(lambda x, n: x * n, method="broadcast_all", static_argnames="n")
    assert call.method_for(X, 3, in_axes=(0, None)).method == "broadcast_all"
    assert call.method_for(X, n=3).method == "broadcast_all"


def test_key_error_in_a_method_function_stays_the_users():
    table = {}
    primitive = jax.make_jaxpr(jnp.add)(1.0, 2.0).eqns[0].primitive
    batchrules.register(primitive, lambda params: table["no such kind"])  # noqa: ARG005
    try:
        with pytest.raises(KeyError, match="no such kind"):
            batchrules.registered(primitive).method_for(X, X, in_axes=(0, 0))
    finally:
        batchrules.unregister(primitive)


def test_small_floats_of_every_kind_are_taken():
    dtype = ml_dtypes.float8_e4m3fnuz
    call = batchrules.host_call(lambda x: x, jax.ShapeDtypeStruct((2,), dtype))
    assert call(np.ones(2, dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [np.longdouble, ">f8", "V4"])
def test_dtypes_that_jax_cannot_hold_are_refused_at_once(dtype):
    with pytest.raises(TypeError, match="which JAX cannot hold"):
        batchrules.host_call(lambda x: x, result_shape=np.empty((), dtype))
    with pytest.raises(TypeError, match="which JAX cannot hold"):
        batchrules.host_call(lambda x: x, SCALAR)(np.empty((), dtype))


def test_other_errors_about_reading_only_are_left_alone():
    def closed(_):
        raise ValueError("the database is opened read-only")

    with pytest.raises(ValueError, match="the database") as info:
        batchrules.host_call(closed, SCALAR)(1.0)
    assert not isinstance(info.value, batchrules.ReadOnlyArgumentError)


@pytest.mark.parametrize("schema", [{"X": ArraySpec()}, {"args.0": ArraySpec()}])
def test_schema_paths_that_no_argument_can_have(schema):
    for decorate in (batchrules.device_call, functools.partial(batchrules.host_call, result_shape=ELEMENT)):
        with pytest.raises(ValueError, match=r"the parameters are \['x'\]"):
            decorate(lambda x: x, schema=schema)


def test_schema_as_a_sequence_goes_by_position():
    call = batchrules.host_call(lambda x: x, ELEMENT, schema=[ArraySpec((..., 3), "int32")])
    with pytest.raises(TypeError, match="'x' has dtype float64, but the schema takes int32"):
        call(X[0])


def test_signature_is_held_against_the_results_too():
    call = batchrules.host_call(lambda x: x, ELEMENT, signature="(i)->(i),()")
    with pytest.raises(ValueError, match="describes 2 results, but the call has 1"):
        call(X[0])


def test_register_takes_a_signature():
    primitive = jax.make_jaxpr(jnp.add)(1.0, 2.0).eqns[0].primitive
    batchrules.register(primitive, "auto", signature="(),()->()")
    try:
        choice = batchrules.registered(primitive).method_for(X, X, in_axes=(0, 0))
        assert choice.reason == (
            "auto is expand_dims: the signature '(),()->()' says that the function handles leading dimensions itself"
        )
        assert np.array_equal(jax.jit(jax.vmap(primitive.bind))(X, X), X + X)
        with pytest.raises(ValueError, match=r"primitive 'add': the signature .* describes 2 array arguments"):
            batchrules.registered(primitive).method_for(X, in_axes=(0,))
    finally:
        batchrules.unregister(primitive)


def test_gradient_past_a_call_with_integer_results_only():
    rank = batchrules.host_call(lambda x: np.int64(x > 1), jax.ShapeDtypeStruct((), "int64"))
    assert jax.grad(lambda x: x * rank(x).astype("float64"))(2.0) == 1.0


def test_method_of_a_class_with_a_static_self():
    class Model:
        factor = 3.0

        @batchrules.host_call(result_shape=ELEMENT, static_argnames="self")
        def scaled(self, x):
            return x * self.factor

    assert np.array_equal(jax.jit(jax.vmap(Model().scaled))(X), X * 3)


def test_function_that_keeps_its_argument_does_not_see_later_changes():
    kept = []
    source = np.ones((2, 3))
    jax.vmap(batchrules.host_call(lambda x: (kept.append(x), x)[1], ELEMENT, method="sequential"))(source)
    source[...] = 5
    assert kept[0][0] == 1.0
