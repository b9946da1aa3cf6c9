"""`device_call`: how it is called, what it returns, where it may stand, and what it refuses."""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import COMBINE, METHODS, VECTORISED, arguments, assert_same, expected_calls, made, whole_numbers

import batchrules
from batchrules import BatchContractError, device_call


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A container that only JAX knows."""

    weight: Any
    bias: Any
    kind: str = dataclasses.field(default="linear", metadata={"static": True})


X = whole_numbers((4, 3), 0)


def test_as_a_decorator_and_as_a_function():
    @device_call
    def plain(x):
        """Twice."""
        return 2 * x

    @device_call(method="expand_dims", name="special")
    def named(x):
        return 2 * x

    made_of_a_lambda = device_call(lambda x: 2 * x, method="sequential")
    for call in (plain, named, made_of_a_lambda):
        np.testing.assert_array_equal(call(X), 2 * X)
    assert (plain.__name__, plain.__doc__) == ("plain", "Twice.")
    assert repr(plain) == "<device_call 'plain' method='auto'>"
    assert repr(named) == "<device_call 'special' method='expand_dims'>"


TREES = {
    "dict": {"b": np.ones(3), "a": {"z": np.arange(3.0), "y": ()}},
    "namedtuple": Point(np.ones(3), {"deep": np.arange(3.0)}),
    "None": (None, {"x": np.ones(3), "none": None}),
    "ordered": collections.OrderedDict(z=np.ones(3), a=np.zeros(3)),
    "jax dataclass": Model(np.ones(3), [np.zeros(3)], kind="cubic"),
}


@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "jit vmap", "scan", "grad"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_containers_arrive_and_return_as_they_are(tree, way):
    seen = []

    def identity(tree):
        seen.append(jax.tree.structure(tree))
        return tree

    call = device_call(identity, method="expand_dims")
    function = {
        "eager": call,
        "jit": jax.jit(call),
        "vmap": jax.vmap(call),
        "jit vmap": jax.jit(jax.vmap(call)),
        "scan": lambda tree: jax.lax.scan(lambda _, part: (None, call(part)), None, tree)[1],
        "grad": jax.grad(lambda tree: sum((leaf * leaf / 2).sum() for leaf in jax.tree.leaves(call(tree)))),
    }[way]
    assert_same(function(tree), jax.tree.map(jnp.asarray, tree))
    assert set(seen) == {jax.tree.structure(tree)}


def test_arguments_by_name_defaults_and_static_ones():
    @functools.partial(device_call, method="expand_dims", static_argnames=("power", "mode"))
    def function(x, scale=3.0, *, power=2, mode="plus"):
        x = x**power
        scaled = x * (
            scale if np.ndim(scale) == np.ndim(x) else jnp.asarray(scale).reshape((-1,) + (1,) * (x.ndim - 1))
        )
        return scaled if mode == "plus" else -scaled

    wanted = {"power": 3, "mode": "minus"}
    np.testing.assert_array_equal(function(X[0]), 3 * X[0] ** 2)
    np.testing.assert_array_equal(function(scale=2.0, x=X[0], power=3), 2 * X[0] ** 3)
    np.testing.assert_array_equal(jax.jit(lambda x: function(x, 2.0, **wanted))(X[0]), -2 * X[0] ** 3)
    np.testing.assert_array_equal(jax.vmap(lambda x: function(x, 2.0, **wanted))(X), -2 * X**3)
    np.testing.assert_array_equal(jax.vmap(function)(X, np.arange(4.0)), np.arange(4.0)[:, None] * X**2)
    gradient = jax.jit(jax.vmap(jax.grad(lambda x: function(x, power=3).sum())))(X)
    np.testing.assert_array_equal(gradient, 9 * X**2)


def test_static_arguments_that_compare_equal_are_kept_apart():
    call = device_call(lambda x, n: x / n if isinstance(n, float) else x // n, static_argnames="n")
    program = jax.jit(lambda x: (call(x, 2), call(x, 2.0)))
    np.testing.assert_array_equal(program(jnp.array([3.0])), [[1.0], [1.5]])


AROUND = ("scan", "while_loop", "cond", "switch", "checkpoint", "jit", "map", "fori_loop")
# Two methods under all of them, and the others under two.
ARRANGEMENTS = [(around, method) for around in AROUND for method in ("sequential", "expand_dims")] + [
    (around, method)
    for around in ("scan", "cond")
    for method in ("sequential_unrolled", "broadcast_all", "legacy_vectorized")
]


@pytest.mark.parametrize(("around", "method"), ARRANGEMENTS)
def test_control_flow_around(around, method):
    def program(call, x, y):
        return {
            "scan": lambda: jax.lax.scan(lambda c, row: (call(c, row), c), x, jnp.stack([y, x, y])),
            "while_loop": lambda: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, call(c[1], y)), (0, x)),
            "cond": lambda: jax.lax.cond(x.sum() > 0, lambda: call(x, y), lambda: call(y, x)),
            "switch": lambda: jax.lax.switch(y[0].astype(int) % 2, [call, lambda x, y: x + y], x, y),
            "checkpoint": lambda: jax.checkpoint(call)(x, y),
            "jit": lambda: jax.jit(call)(x, y),
            "map": lambda: jax.lax.map(lambda row: call(row, y), jnp.stack([x, y, x])),
            "fori_loop": lambda: jax.lax.fori_loop(0, 3, lambda i, c: call(c, y) + i, x),
        }[around]()

    args = [np.clip(a, -1, 1) for a in arguments(COMBINE, (0, None), 4)]
    call = device_call(lambda x, y: COMBINE(jnp, x, y), method=method)
    result = jax.jit(jax.vmap(functools.partial(program, call), (0, None)))(*args)
    assert_same(result, jax.vmap(functools.partial(program, COMBINE.twin), (0, None))(*args))


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_control_flow_inside(method):
    def loop(xp, x):
        del xp
        start = (jnp.zeros(()), x)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.where(c[1] > 0, c[1] * 2, c[1])), start)[
            1
        ]

    call = device_call(functools.partial(loop, jnp), method=method)
    np.testing.assert_array_equal(jax.jit(jax.vmap(call))(X), np.where(X > 0, 8 * X, X))


def test_a_call_inside_a_call():
    inner = device_call(lambda x: x * x, method="sequential")
    outer = device_call(lambda x: inner(x) + 1, method="expand_dims")
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(outer)))(np.stack([X, X])), np.stack([X * X + 1] * 2))
    np.testing.assert_array_equal(jax.vmap(jax.grad(lambda x: outer(x).sum()))(X), 2 * X)


def test_vmap_inside_a_call_and_around_it():
    call = device_call(lambda x: jax.vmap(jnp.dot, (-1, -1))(x, x), method="sequential")
    batch = np.stack([X, 2 * X])
    np.testing.assert_array_equal(jax.jit(jax.vmap(call))(batch), (batch**2).sum(1))


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.jacfwd], ids=lambda f: f.__name__)
def test_closing_over_a_traced_value_is_refused(transform):
    """Its batching rule and derivatives would not see it."""

    def program(x):
        call = device_call(lambda y: x * y, name="closure")
        return call(jnp.ones(())) + x

    arg = jnp.ones(3) if transform is jax.vmap else jnp.ones(())
    with pytest.raises(TypeError, match=r"device_call 'closure' closes over a traced value.*Make it an argument"):
        transform(program)(arg)


def test_closing_over_the_carry_of_a_loop_is_refused():
    def step(carry, x):
        return device_call(lambda y: carry * y, name="closure")(x), None

    with pytest.raises(TypeError, match="closes over a traced value"):
        jax.lax.scan(step, jnp.ones(()), jnp.ones(3))


def test_closing_over_constants():
    table, scale = jnp.arange(3.0), np.float64(2)
    call = device_call(lambda x: x * table.reshape((1,) * (x.ndim - 1) + (3,)) * scale, method="expand_dims")
    wanted = 2 * np.arange(3.0) * X
    np.testing.assert_array_equal(jax.jit(jax.vmap(call))(X), wanted)
    np.testing.assert_array_equal(jax.vmap(call)(X), wanted)
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(jax.grad(lambda x: call(x).sum())))(X), np.ones((4, 1)) * 2 * np.arange(3.0)
    )


def test_a_collective_over_the_mapped_axis_is_refused():
    call = device_call(lambda x: jax.lax.psum(x, "i"), method="sequential", name="summing")
    with pytest.raises(TypeError, match=r"device_call 'summing' has a collective over the axis 'i'"):
        jax.vmap(call, axis_name="i")(X)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda _: "text", r"device_call 'odd' returned a str as its result, where an array belongs"),
        (
            lambda x: {"a": x, "b": object()},
            r"device_call 'odd' returned a object as output 'b', where an array belongs",
        ),
    ],
    ids=["str", "object inside"],
)
def test_what_is_not_an_array_is_refused_as_a_result(returned, text):
    with pytest.raises(TypeError, match=text):
        device_call(returned, name="odd")(X)


def test_python_numbers_as_results():
    call = device_call(lambda x: (x.sum(), 3, 2.5, True), method="sequential")
    result = jax.jit(jax.vmap(call))(X)
    for got, want in zip(result, (X.sum(1), [3] * 4, [2.5] * 4, [True] * 4), strict=True):
        np.testing.assert_array_equal(got, want)


def test_no_results_and_no_arguments():
    assert device_call(lambda x: ())(X) == ()  # noqa: ARG005
    assert jax.jit(jax.vmap(device_call(lambda x: None)))(X) is None  # noqa: ARG005
    np.testing.assert_array_equal(device_call(lambda: jnp.arange(3))(), np.arange(3))
    np.testing.assert_array_equal(jax.jit(device_call(lambda: jnp.arange(3)))(), np.arange(3))


@pytest.mark.parametrize("method", VECTORISED)
def test_an_output_of_the_wrong_shape_is_reported(method):
    call = device_call(lambda x: x.T, method=method, name="turned")
    with pytest.raises(
        BatchContractError,
        match=r"device_call 'turned' was given a batch of 4 elements at once \(method '.*'\), with operands of shape "
        r"\(4, 3\), and output 0 has shape \(3, 4\).*: expected \(4, 3\)",
    ):
        jax.jit(jax.vmap(call))(X)


REFUSED = [
    ((3,), {}, TypeError, r"device_call: fn must be a function; got 3"),
    ((np.sin,), {"method": "vmap"}, ValueError, r"device_call 'sin': unknown method 'vmap'\. Choose one of"),
    ((np.sin,), {"batch_size": 0}, ValueError, r"device_call 'sin': batch_size must be at least 1"),
    ((np.sin,), {"batch_size": True}, TypeError, r"batch_size must be an int.*got True of type bool"),
    ((np.sin,), {"batch_size": 1.5}, TypeError, r"batch_size must be an int.*got 1\.5 of type float"),
    ((np.sin,), {"schema": 3}, TypeError, r"device_call 'sin': schema must be a Schema"),
    ((np.sin,), {"signature": "i->i"}, ValueError, r"device_call 'sin': 'i->i' is not a gufunc signature"),
    ((np.sin,), {"jvp": 3}, TypeError, r"device_call 'sin': jvp must be a function or None; got 3"),
    ((np.sin,), {"vjp": "x"}, TypeError, r"device_call 'sin': vjp must be a function or None; got 'x'"),
    ((lambda x: x,), {"static_argnames": "y"}, ValueError, r"names \['y'\], but the parameters are \['x'\]"),
    ((lambda x: x,), {"static_argnames": 3}, TypeError, r"static_argnames must be a string or a sequence.*got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "text"), REFUSED)
def test_refused(args, options, error, text):
    with pytest.raises(error, match=text):
        device_call(*args, **options)


def test_arguments_that_are_refused():
    call = device_call(lambda x, n: x, static_argnames="n", name="picky")  # noqa: ARG005
    with pytest.raises(
        TypeError, match=r"device_call 'picky': the static argument 'n' has the type list, which is not hashable"
    ):
        call(X, [1])
    with pytest.raises(TypeError, match=r"the static argument 'n' is a traced value"):
        jax.jit(call)(X, 3)
    with pytest.raises(
        TypeError, match=r"device_call 'picky': the argument 'x' is a object, which is neither an array"
    ):
        call(object(), 1)
    with pytest.raises(TypeError, match=r"device_call 'picky'\(x, n\) was called with other arguments"):
        call(X)


def test_a_schema_is_checked_for_one_element():
    schema = {"x": batchrules.ArraySpec((..., 3), "float64")}
    call = device_call(lambda x: 2 * x, method="auto", schema=schema, name="rows")
    np.testing.assert_array_equal(jax.vmap(call)(X), 2 * X)
    with pytest.raises(
        ValueError, match=r"device_call 'rows': the argument 'x' has shape \(4,\), but the schema takes \(\.\.\., 3\)"
    ):
        jax.vmap(call, 1)(X)
    with pytest.raises(TypeError, match=r"the argument 'x' has dtype int64, but the schema takes float64"):
        call(np.arange(3))


@pytest.mark.parametrize("endpoint", ["jvp", "vjp", "jacobian"])
def test_endpoints_and_arrays_by_keyword_only(endpoint):
    call = device_call(lambda x, *, y: x * y, **{endpoint: lambda *args: args[0]}, name="keyword")
    text = r"device_call 'keyword': with a jvp, vjp or jacobian endpoint, arrays must be positional parameters"
    with pytest.raises(TypeError, match=text):
        call(X, y=X)


@pytest.mark.parametrize("method", METHODS)
def test_equal_calls_and_unused_ones(method):
    """A call whose result nothing uses is not made."""
    args = arguments(COMBINE, (0, None), 4)
    with made("device", COMBINE, method) as foreign:

        def program(x, y):
            foreign.call(y, x)
            return foreign.call(x, y)

        foreign.run(jax.jit(jax.vmap(program, (0, None))), *args)
    assert foreign.log.count == expected_calls(method, 4)


def test_programs_are_cached():
    """The same call, made anew, is the same program."""
    traced = []

    def function(x):
        traced.append(1)
        return x * 2

    call = device_call(function, method="expand_dims")
    program = jax.jit(jax.vmap(call))
    for _ in range(3):
        program(X)
    count = len(traced)
    program(X + 1)
    assert len(traced) == count


def test_it_can_be_lowered_and_compiled_ahead_of_time():
    call = device_call(lambda x: x * 2, method="expand_dims")
    compiled = jax.jit(jax.vmap(call)).lower(jax.ShapeDtypeStruct((4, 3), "float64")).compile()
    np.testing.assert_array_equal(compiled(X), 2 * X)
    assert jax.eval_shape(jax.vmap(call), X).shape == (4, 3)


@pytest.mark.parametrize(("method", "loops"), [("sequential", 2), ("sequential_unrolled", 0)])
def test_loops_in_the_program(method, loops):
    """One for each mapped axis, or none where they are unrolled."""
    call = device_call(jnp.sin, method=method)
    program = jax.jit(jax.vmap(jax.vmap(call))).lower(X).as_text()
    assert program.count("stablehlo.while") == loops
