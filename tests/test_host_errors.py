"""Bad input to `host_call`: each a clear error that names the function and the argument."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

import batchrules

F64 = jax.ShapeDtypeStruct((), "float64")
XS = np.arange(4.0)


def step(x):
    return x * 2


def make(fn=step, result_shape=lambda *args: args[0], **options):
    return batchrules.host_call(fn, result_shape, **options)


def raises(kind, *texts):
    """An error whose text contains all these pieces."""
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(text)})" for text in texts))


# --- options, when decorated ------------------------------------------------------------------------------

NAMES = "'sequential', 'expand_dims', 'broadcast_all', 'legacy_vectorized', 'auto'"


@pytest.mark.parametrize(
    ("options", "kind", "texts"),
    [
        ({"method": "vectorized"}, ValueError, ["unknown method 'vectorized'", f"Choose one of {NAMES}"]),
        ({"method": 3}, TypeError, ["method must be one of", "got 3 of type int"]),
        (
            {"method": "sequential_unrolled"},
            ValueError,
            ["'sequential_unrolled'", "use 'sequential'", "registered"],
        ),
        ({"batch_size": 0}, ValueError, ["batch_size must be at least 1", "got 0"]),
        ({"batch_size": -1}, ValueError, ["batch_size must be at least 1", "got -1"]),
        ({"batch_size": True}, TypeError, ["batch_size must be an int", "got True of type bool"]),
        ({"batch_size": 2.5}, TypeError, ["batch_size must be an int", "got 2.5 of type float"]),
        ({"batch_size": "4"}, TypeError, ["batch_size must be an int", "got '4' of type str"]),
        ({"result_shape": None}, TypeError, ["result_shape is missing", "jax.ShapeDtypeStruct"]),
        ({"result_shape": 3}, TypeError, ["result_shape is 3 of type int", "has no shape and dtype"]),
        ({"result_shape": {"a": (F64, "b")}}, TypeError, ["result_shape['a.1'] is 'b' of type str"]),
        ({"schema": "x"}, TypeError, ["schema must be a Schema", "got 'x' of type str"]),
        ({"schema": 3}, TypeError, ["schema must be a Schema", "got 3 of type int"]),
        ({"schema": {"x": (3,)}}, TypeError, ["'x' needs an ArraySpec", "got (3,) of type tuple"]),
        ({"schema": {1: batchrules.ArraySpec()}}, TypeError, ["a path is a string", "got 1"]),
        ({"signature": "(i)->"}, ValueError, ["'(i)->' is not a gufunc signature", "(i,j),(j)->(i)"]),
        ({"signature": 3}, TypeError, ["signature must be a string", "got 3"]),
        ({"static_argnames": "n"}, ValueError, ["static_argnames names ['n']", "the parameters are ['x']"]),
        (
            {"static_argnames": (0,)},
            TypeError,
            ["static_argnames must be a string or a sequence of strings", "(0,)"],
        ),
        (
            {"static_argnames": 0},
            TypeError,
            ["static_argnames must be a string or a sequence of strings", "0"],
        ),
        ({"allow_jax": 1}, TypeError, ["allow_jax must be True or False", "got 1"]),
    ],
    ids=str,
)
def test_bad_option(options, kind, texts):
    with raises(kind, *texts) as info:
        make(**options)
    assert "step" in str(info.value) or "Schema" in str(info.value)


def test_without_a_method_an_argument_is_not_mapped():
    def double_vjp(args, cotangents, needed):
        del args, needed
        return (2 * cotangents,)

    call = batchrules.host_call(lambda x: 2 * x, lambda x: x, method=None, vjp=double_vjp, name="step")
    assert float(jax.jit(call)(1.5)) == 3.0
    assert jax.jacrev(call)(np.ones(3)).shape == (3, 3)  # only cotangents are mapped
    with raises(NotImplementedError, "host_call 'step'", "none was given", NAMES):
        jax.vmap(call)(np.ones(3))


@pytest.mark.parametrize("fn", [3, "step", F64])
def test_fn_that_is_no_function(fn):
    with raises(TypeError, "fn must be a function", "@host_call(result_shape=...)"):
        batchrules.host_call(fn, F64)


@pytest.mark.parametrize(
    "leaf",
    [
        SimpleNamespace(shape=(-1,), dtype="float64"),
        SimpleNamespace(shape=(2.5,), dtype="float64"),
        SimpleNamespace(shape=None, dtype="float64"),
        SimpleNamespace(shape=(None, 3), dtype="float64"),
        SimpleNamespace(shape=(), dtype=None),
        SimpleNamespace(shape=(), dtype="no such type"),
        SimpleNamespace(shape=(), dtype="O"),
        SimpleNamespace(shape=(), dtype="U3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("late", [True, False])
def test_promise_that_no_array_can_keep(leaf, late):
    """Whatever stands in `result_shape`, the error comes before the function is called, and names it."""
    with pytest.raises((TypeError, ValueError), match="host_call 'step': result_shape"):
        make(result_shape=(lambda x: leaf) if late else leaf)(1.0)  # noqa: ARG005


def test_promise_of_a_typed_prng_key():
    with raises(TypeError, "result_shape promises key<fry>", "key data"):
        make(result_shape=jax.eval_shape(lambda: jax.random.key(0)))


def test_result_shape_function_that_returns_something_else():
    with raises(TypeError, "host_call 'step': result_shape is 3 of type int"):
        make(result_shape=lambda x: 3)(1.0)  # noqa: ARG005


@pytest.mark.parametrize(
    ("shape", "kind", "text"),
    [
        ((3, ...), ValueError, "may only come first"),
        ((-3,), ValueError, "a dimension cannot be negative; got -3"),
        ((2.5,), TypeError, "a dimension is an int, None or a leading `...`; got 2.5"),
        ((True,), TypeError, "got True"),
        ("ab", TypeError, "shape must be a tuple"),
        (3, TypeError, "shape must be a tuple"),
    ],
)
def test_bad_shape_in_an_array_spec(shape, kind, text):
    with raises(kind, "ArraySpec", text):
        batchrules.ArraySpec(shape)


# --- arguments, when called -------------------------------------------------------------------------------


def ways(call):
    return call, jax.jit(call), jax.vmap(call)


UNHOLDABLE = ([object()], "O"), (["a"], "U1"), ([b"a"], "S1"), ([0], "M8[s]"), ([(0.0,)], [("a", "f4")])


@pytest.mark.parametrize("array", [np.array(*given) for given in UNHOLDABLE], ids=lambda array: array.dtype.kind)
def test_arrays_that_jax_cannot_hold(array):
    with raises(TypeError, "host_call 'step': the argument 'x' is an array of dtype", "static_argnames"):
        make()(array)


@pytest.mark.parametrize("value", ["text", object(), {1, 2}, b"bytes", range(3)], ids=lambda v: type(v).__name__)
def test_unknown_container(value):
    with raises(TypeError, f"host_call 'step': the argument 'x' is a {type(value).__name__}", "nor", "static_argnames"):
        make()(value)


@pytest.mark.parametrize("way", range(3))
def test_typed_prng_key(way):
    keys = jax.random.split(jax.random.key(0), 3)
    with raises(TypeError, "host_call 'step': the argument 'x' is a typed PRNG key", "jax.random.key_data"):
        ways(make())[way](keys)


@pytest.mark.parametrize("way", range(3))
def test_raw_prng_key_is_an_array(way):
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    np.testing.assert_array_equal(ways(make(lambda x: x + np.uint32(1)))[way](keys), keys + np.uint32(1))


def takes_n(x, n):
    return x * len(n)


@pytest.mark.parametrize("value", [[1], {"a": 1}, np.ones(2), ([],)], ids=str)
@pytest.mark.parametrize("keyword", [True, False])
def test_static_argument_that_is_not_hashable(keyword, value):
    call = make(takes_n, static_argnames="n")
    with raises(TypeError, "the static argument 'n' has the type", type(value).__name__, "not hashable"):
        call(1.0, n=value) if keyword else call(1.0, value)


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_static_argument_that_is_traced(transform, keyword):
    call = make(takes_n, static_argnames="n")
    function = (lambda x, n: call(x, n=n)) if keyword else call
    with raises(TypeError, "host_call 'takes_n': the static argument 'n' is a traced value", "float64[]"):
        transform(function)(*((1.0, 2.0) if transform is jax.jit else (XS, XS)))


def test_mapped_axes_of_different_sizes():
    call = make(lambda x, y: x + y)
    with raises(ValueError, "inconsistent sizes"):
        jax.vmap(call)(np.ones(3), np.ones(4))


@pytest.mark.parametrize("args", [(), (1.0, 2.0)])
def test_wrong_number_of_arguments_is_found_when_traced(args):
    """Not in the middle of the program's run, where JAX would bury it."""
    called = []
    call = make(called.append, F64, name="one")
    with pytest.raises(TypeError, match="argument"):
        jax.make_jaxpr(call)(*args)
    assert not called


def test_unknown_keyword_is_found_when_traced():
    with pytest.raises(TypeError, match="speed"):
        jax.make_jaxpr(lambda x: make(step, F64)(x, speed=1.0))(1.0)


SCHEMA = {"x": batchrules.ArraySpec((..., 3), "float64")}


@pytest.mark.parametrize("way", range(3))
def test_argument_that_does_not_fit_the_schema(way):
    function = ways(make(schema=SCHEMA))[way]
    with raises(ValueError, "host_call 'step': the argument 'x' has shape", "but the schema takes (..., 3)"):
        function(np.ones((5, 4)))
    with raises(TypeError, "the argument 'x' has dtype float32, but the schema takes float64", "astype('float64')"):
        function(np.ones((5, 3), "float32"))


def test_schema_of_one_element_is_not_of_the_batch():
    call = make(schema={"x": batchrules.ArraySpec((3,))})
    assert jax.vmap(call)(np.ones((5, 3))).shape == (5, 3)
    with raises(ValueError, "has shape (5, 3), but the schema takes (3,)", "jax.vmap adds the batch"):
        call(np.ones((5, 3)))


@pytest.mark.parametrize("signature", ["(),()->()", "(i)->(i)"])
def test_signature_that_does_not_fit_the_call(signature):
    call = make(signature=signature)
    with raises(ValueError, "host_call 'step'", f"the signature {signature!r}"):
        jax.vmap(call)(XS)


# --- auto -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method", "texts"),
    [
        ({}, "sequential", ["auto is sequential", "without a schema or a signature nothing proves"]),
        ({"schema": SCHEMA}, "expand_dims", ["auto is expand_dims", "the schema lets every argument"]),
        (
            {"schema": {"x": batchrules.ArraySpec((3,))}},
            "sequential",
            ["'x'", "does not let it take a leading"],
        ),
        ({"schema": {}}, "sequential", ["does not describe", "'x'"]),
        ({"signature": "(i)->(i)"}, "expand_dims", ["the signature '(i)->(i)' says"]),
        ({"method": "broadcast_all"}, "broadcast_all", ["method='broadcast_all' was asked for"]),
    ],
    ids=str,
)
def test_method_for_says_what_and_why_and_calls_nothing(options, method, texts):
    called = []

    def noted(x):
        called.append(x)

    choice = make(noted, **options).method_for(np.ones((2, 3)))
    assert choice.method == method
    assert all(text in choice.reason for text in texts)
    assert not called


def test_method_for_with_ranks_that_differ():
    call = make(lambda x, s: x * s, schema={"x": batchrules.ArraySpec(), "s": batchrules.ArraySpec()})
    choice = call.method_for(np.ones((2, 3)), np.ones(2))
    assert choice.method == "sequential"
    assert "the element ranks differ ('x' has 1, 's' has 0)" in choice.reason
    assert call.method_for(np.ones((2, 3)), np.float64(1.0), in_axes=(0, None)).method == "expand_dims"


# --- results ----------------------------------------------------------------------------------------------

METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")
PAIR = (F64, jax.ShapeDtypeStruct((3,), "float64"))


def error_of(call, way, *args):
    """The text of the error: eagerly the original, under jit JAX's with ours at its end."""
    if way == "eager":
        with pytest.raises(ValueError, match="step") as info:
            call(*args)
        assert isinstance(info.value, batchrules.ResultError | batchrules.BatchContractError)
        return str(info.value)
    with pytest.raises(jax.errors.JaxRuntimeError) as info:
        jax.block_until_ready(jax.jit(call)(*args))
    return str(info.value)


@pytest.mark.parametrize("way", ["eager", "jit"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("result", "promised", "got"),
    [
        (lambda x: (x,), "(*, *)", "(*,)"),
        (lambda x: (x, x, x), "(*, *)", "(*, *, *)"),
        (lambda x: [x, x], "(*, *)", "[*, *]"),
        (lambda x: {"a": x, "b": x}, "(*, *)", "{'a': *, 'b': *}"),
        (lambda x: None, "(*, *)", "None"),  # noqa: ARG005
        (lambda x: x, "(*, *)", "*"),
    ],
)
def test_result_of_another_structure(method, way, result, promised, got):
    call = jax.vmap(make(result, PAIR, method=method, name="step"))
    text = error_of(call, way, XS)
    assert f"expected {promised}, got {got} (a * is an array)" in text


@pytest.mark.parametrize("way", ["eager", "jit"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "int64", "complex128"])
def test_result_of_another_dtype(method, way, dtype):
    call = jax.vmap(make(lambda x: x.astype(dtype), F64, method=method, name="step"))
    text = error_of(call, way, XS)
    assert f"the result has dtype {dtype}, but result_shape promises float64" in text
    assert "result.astype('float64')" in text


@pytest.mark.parametrize("way", ["eager", "jit"])
def test_result_of_another_shape_names_the_output_and_the_element(way):
    def fn(x, y):
        wrong = x == 2 and y == 1
        return x, np.zeros(4 if wrong else 3)

    call = make(fn, PAIR, method="sequential", name="step")
    nested = jax.vmap(jax.vmap(call, in_axes=(None, 0)), in_axes=(0, None))
    text = error_of(nested, way, XS, XS[:3])
    assert "host_call 'step' at element (2, 1): output '1' has shape (4,)" in text
    assert "result_shape promises (3,) for one element" in text


@pytest.mark.parametrize("way", ["eager", "jit"])
def test_result_of_another_shape_in_the_fast_loop(way):
    """One flat array in, one out: there the loop is bare, and checks all the same."""
    call = jax.vmap(make(lambda x: np.zeros((2,) if x == 3 else ()), F64, method="sequential", name="step"))
    assert "at element (3,): the result has shape (2,)" in error_of(call, way, XS)


@pytest.mark.parametrize("way", ["eager", "jit"])
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("lead", [(), (2,), (5,), (4, 4)], ids=str)
def test_vectorised_output_that_leads_with_neither_n_nor_one(method, way, lead):
    call = jax.vmap(make(lambda x: np.zeros((*lead, 3)), PAIR[1], method=method, name="step"))  # noqa: ARG005
    text = error_of(call, way, XS)
    assert f"a batch of 4 elements at once (method {method!r})" in text
    assert "arguments x (4,)" in text or "(4,)" in text
    assert f"the result has shape {(*lead, 3)}" in text
    assert ("expected (4, 3) or (1, 3)" if method == "expand_dims" else "expected (4, 3).") in text
    assert "use method='sequential'" in text


@pytest.mark.parametrize("method", ["broadcast_all", "legacy_vectorized"])
def test_output_that_leads_with_one_is_for_expand_dims_only(method):
    one = lambda x: np.full((1, 3), 7.0)  # noqa: ARG005, E731
    with raises(batchrules.BatchContractError, "has shape (1, 3): expected (4, 3)."):
        jax.vmap(make(one, PAIR[1], method=method, name="step", verify=False))(XS)
    result = jax.vmap(make(one, PAIR[1], method="expand_dims", name="step", verify=False))(XS)
    np.testing.assert_array_equal(result, np.full((4, 3), 7.0))


def test_output_checks_hold_for_each_chunk():
    call = jax.vmap(make(lambda x: x[:2], F64, method="expand_dims", batch_size=3, name="step"))
    with raises(batchrules.BatchContractError, "a batch of 3 elements", "has shape (2,): expected (3,) or (1,)"):
        call(XS)


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1.5, "int32", "a float does not fit"),
        (1j, "float64", "a complex does not fit"),
        (2, "bool", "a int does not fit"),
        (300, "int8", "it is out of range"),
        (-1, "uint8", "it is out of range"),
    ],
)
def test_python_number_that_does_not_fit(value, dtype, text):
    with raises(batchrules.ResultError, f"the result is {value!r}", f"promises {dtype}", text):
        make(lambda x: value, jax.ShapeDtypeStruct((), dtype), name="step")(1.0)  # noqa: ARG005


@pytest.mark.parametrize(("value", "dtype"), [(1, "float32"), (True, "int8"), (1.5, "bfloat16"), (2, "complex64")])
def test_python_number_that_fits(value, dtype):
    result = make(lambda x: value, jax.ShapeDtypeStruct((), jnp.dtype(dtype)))(1.0)  # noqa: ARG005
    assert result.dtype == dtype
    assert result == jnp.asarray(value, dtype)


# --- what the function does -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "jit vmap", "nested vmap", "vmap where"])
def test_function_that_writes_into_its_argument(way, method):
    def writes(x, y):
        y += 1
        return x + y

    call = make(writes, F64, method=method)
    if way == "nested vmap":
        function, args = jax.vmap(jax.vmap(call, in_axes=(0, None))), (np.ones((2, 3)), np.ones(2))
    elif way == "vmap where":
        function, args = jax.vmap(call.where), (np.array([True, False, True]), XS[:3], XS[:3].copy())
    else:
        function = {"eager": call, "jit": jax.jit(call)}.get(way, jax.vmap(call))
        function = jax.jit(function) if way == "jit vmap" else function
        args = (XS, XS.copy()) if "vmap" in way else (np.float64(1.0), np.float64(1.0))
    kind = jax.errors.JaxRuntimeError if "jit" in way else batchrules.ReadOnlyArgumentError
    with raises(kind, "host_call 'writes' writes into one of its arguments", "x = x.copy()"):
        jax.block_until_ready(function(*args))


@pytest.mark.parametrize("method", METHODS)
def test_function_that_writes_into_an_argument_whose_memory_is_in_another_order(method):
    """Its mapped axes cannot be merged without a copy, which is read-only as the argument is."""

    def writes(x):
        x += 1
        return x

    call = jax.vmap(jax.vmap(make(writes, lambda x: x, method=method)))
    turned = Format(Layout((2, 1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    xs = jax.device_put(np.arange(24.0).reshape(2, 3, 4), turned)
    assert not np.asarray(xs).flags.c_contiguous
    with raises(batchrules.ReadOnlyArgumentError, "host_call 'writes' writes into one of its arguments"):
        call(xs)


@pytest.mark.parametrize("mapped", [True, False])
def test_eager_call_leaves_the_callers_numpy_array_alone(mapped):
    """It is the caller's own memory, and JAX arrays promise never to change."""

    def writes(x):
        x[...] = -1
        return x

    mine = XS.copy()
    with pytest.raises(batchrules.ReadOnlyArgumentError):
        (jax.vmap(make(writes)) if mapped else make(writes))(mine)
    np.testing.assert_array_equal(mine, XS)


def test_later_element_that_writes_into_its_argument():
    """After the first element the loop is bare."""

    def writes(x):
        if x[0] > 3:
            x[0] = 0
        return x

    with raises(batchrules.ReadOnlyArgumentError, "host_call 'writes' writes into one of its arguments"):
        jax.vmap(make(writes))(np.arange(8.0).reshape(4, 2))


def jnp_inside(x):
    return np.asarray(jnp.sin(x) + 1)


USES = {
    "jnp": jnp_inside,
    "jit": lambda x: np.asarray(jax.jit(lambda y: y * 2)(x)),
    "grad": lambda x: np.asarray(jax.grad(lambda y: y * y)(float(x.sum()))) + 0 * x,
    "device_put": lambda x: np.asarray(jax.device_put(x)),
}


@pytest.mark.parametrize("way", ["eager", "jit", "vmap"])
@pytest.mark.parametrize("use", USES)
def test_function_that_uses_jax_inside(use, way):
    call = make(USES[use], name="step")
    function = {"eager": call, "jit": jax.jit(call), "vmap": jax.vmap(call)}[way]
    kind = jax.errors.JaxRuntimeError if way == "jit" else batchrules.JaxInsideHostFunctionError
    for _ in range(2):  # until it has passed once, it is guarded
        with raises(kind, "host_call 'step' uses JAX inside", "deadlock", "allow_jax=True", "device_call"):
            jax.block_until_ready(function(XS))


@pytest.mark.parametrize("use", ["jnp", "jit", "device_put"])
def test_function_that_may_use_jax_inside(use):
    call = make(USES[use], allow_jax=True)
    np.testing.assert_array_equal(call(XS), USES[use](XS))
    np.testing.assert_array_equal(jax.vmap(call)(XS), USES[use](XS))


def test_host_call_inside_a_function_that_may_use_jax():
    inner = make()
    outer = make(lambda x: np.asarray(inner(x)) + 1, allow_jax=True)
    np.testing.assert_array_equal(outer(XS), 2 * XS + 1)


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, StopIteration])
@pytest.mark.parametrize("mapped", [True, False])
def test_eager_failure_is_the_original(mapped, kind):
    original = kind("from the simulator")

    def fails(_):
        raise original

    call = make(fails)
    with pytest.raises(kind) as info:
        (jax.vmap(call) if mapped else call)(XS)
    assert info.value is original


def test_failure_under_jit_ends_with_the_foreign_text_and_jax_stays_usable():
    def fails(_):
        raise LookupError("from the simulator")

    with pytest.raises(jax.errors.JaxRuntimeError) as info:
        jax.block_until_ready(jax.jit(make(fails))(XS))
    assert str(info.value).rstrip().endswith("LookupError: from the simulator")
    np.testing.assert_array_equal(jax.jit(make())(XS), 2 * XS)


@pytest.mark.parametrize("mapped", [True, False])
def test_export(mapped):
    call = jax.vmap(make()) if mapped else make()
    with raises(batchrules.ExportError, "host_call 'step' cannot be exported with jax.export"):
        jax.export.export(jax.jit(call))(XS)


def test_export_on_several_devices(auto_mesh):
    sharding = jax.sharding.NamedSharding(auto_mesh, jax.sharding.PartitionSpec("x"))
    argument = jax.ShapeDtypeStruct(XS.shape, XS.dtype, sharding=sharding)
    with raises(batchrules.ExportError, "host_call 'step' cannot be exported"):
        jax.export.export(jax.jit(make()))(argument)


@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd, jax.jacrev])
def test_derivative_of_a_function_without_endpoints(differentiate):
    with pytest.raises(batchrules.DerivativeError, match="host_call 'step'"):
        jax.block_until_ready(differentiate(make())(1.0))


# --- 64-bit types, a setting of the whole process ---------------------------------------------------------


def run(body):
    root = str(pathlib.Path(batchrules.__file__).parent.parent)
    text = "import jax, numpy as np, batchrules\n" + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_64_bit_types():
    out = run("""
        def attempt(action):
            try:
                print(action())
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                print(type(error).__name__, str(error).splitlines()[-1])

        double = jax.ShapeDtypeStruct((), np.float64)
        single = jax.ShapeDtypeStruct((), np.float32)
        class Promise:
            shape, dtype = (), np.dtype("int64")
        def step(x):
            return np.float64(x)
        attempt(lambda: batchrules.host_call(step, Promise))
        attempt(lambda: batchrules.host_call(step, Promise()))
        attempt(lambda: batchrules.host_call(step, lambda x: Promise())(1.0))
        attempt(lambda: batchrules.host_call(step, single)(1.0))
        attempt(lambda: jax.jit(jax.vmap(batchrules.host_call(step, single)))(np.ones(3)))
        small = jax.ShapeDtypeStruct((), np.int32)
        attempt(lambda: batchrules.host_call(lambda x: x.dtype.itemsize, small)(np.ones(3)))
        inner = batchrules.host_call(lambda x: x * 2, single)
        attempt(lambda: batchrules.host_call(lambda x: inner(np.float64(x)), single)(1.5))
    """)
    lines = out.splitlines()
    text = "result_shape promises int64, but 64-bit types are off in JAX. Promise int32, or turn them on"
    assert "host_call" in lines[0]
    assert all(line.startswith("ValueError host_call 'step': ") and text in line for line in lines[1:3])
    wrong = "dtype float64, but result_shape promises float32"
    assert lines[3].startswith("ResultError host_call 'step': ")
    assert wrong in lines[3]
    assert wrong in lines[4]
    assert lines[5:] == ["4", "3.0"]


def test_python_numbers_without_64_bit_types():
    """Under `jax.jvp` a Python number comes as it is, and must not be one of 64 bits for that."""
    out = run("""
        def vjp(args, cotangents, needed):
            return (cotangents / (2 * np.sqrt(args[0])),)
        def jvp(args, tangents):
            return tangents[0] / (2 * np.sqrt(args[0]))
        root = batchrules.host_call(np.sqrt, jax.ShapeDtypeStruct((), np.float32), jvp=jvp, vjp=vjp)
        print(jax.grad(root)(4.0), jax.jvp(root, (4.0,), (1.0,))[1], jax.jacfwd(root)(4.0), root(4.0))
    """)
    assert out.split() == ["0.25", "0.25", "0.25", "2.0"]


@pytest.mark.skipif(not hasattr(jax, "enable_x64"), reason="a public context for 64-bit types came with jax 0.8")
def test_64_bit_types_for_a_while_do_not_give_wrong_results():
    """The setting is one thread's, and callbacks run on a thread of XLA's: right or an error, never wrong."""
    out = run("""
        with jax.enable_x64(True):
            call = batchrules.host_call(lambda x: x + 1e-12, jax.ShapeDtypeStruct((), np.float64))
            for number, function in enumerate((call, jax.vmap(call), jax.jit(call), jax.jit(jax.vmap(call)))):
                x = np.ones(3) if number % 2 else np.float64(1.0)
                try:
                    result = jax.block_until_ready(function(x))
                except (ValueError, TypeError, jax.errors.JaxRuntimeError) as error:
                    print("error")
                else:
                    same = result.dtype == np.float64 and np.all(np.asarray(result) == 1 + 1e-12)
                    print("right" if same else result)
    """)
    assert set(out.split()) <= {"right", "error"}
    assert out.split()[0] == "right"
