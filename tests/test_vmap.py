"""One `jax.vmap` over an opaque call, by every method, against `jax.vmap` over its twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import (
    COMBINE,
    DISCRETE,
    ENTRIES_AND_METHODS,
    RANKS,
    SCALARS,
    SEVERAL,
    VECTORISED,
    arguments,
    assert_same,
    expected_calls,
    made,
)

import batchrules

N = 4
ways = pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
methods = pytest.mark.parametrize(("entry", "method"), ENTRIES_AND_METHODS)


def maybe_jit(function, jit):
    return jax.jit(function) if jit else function


@pytest.mark.parametrize(
    "in_axes", [(0, 0, 0), (1, -1, 0), (-1, None, None), (None, 1, None), (None, None, -1), (2, 0, None)], ids=str
)
@methods
def test_in_axes(entry, method, in_axes):
    args = arguments(RANKS, in_axes, N)
    with made(entry, RANKS, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, in_axes)), *args)
    assert_same(result, jax.vmap(RANKS.twin, in_axes)(*args))
    assert foreign.log.count == expected_calls(method, N)


@pytest.mark.parametrize("in_axes", [(1, -1, 0), (None, 0, None)], ids=str)
@methods
def test_in_axes_outside_jit(entry, method, in_axes):
    args = arguments(RANKS, in_axes, N)
    with made(entry, RANKS, method) as foreign:
        result = foreign.run(jax.vmap(foreign.call, in_axes), *args)
    assert_same(result, jax.vmap(RANKS.twin, in_axes)(*args))
    assert foreign.log.count == expected_calls(method, N)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
@pytest.mark.parametrize(("entry", "method"), [pair for pair in ENTRIES_AND_METHODS if pair[1] in VECTORISED])
def test_batch_size(entry, method, batch_size):
    args = arguments(RANKS, (0, None, 0), N)
    with made(entry, RANKS, method, batch_size=batch_size) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, (0, None, 0))), *args)
    assert_same(result, jax.vmap(RANKS.twin, (0, None, 0))(*args))
    assert foreign.log.count == expected_calls(method, N, batch_size)


@pytest.mark.parametrize(
    ("in_axes", "out_axes"),
    [
        ((None, 1), 0),
        ((-1, None), {"both": 1, "first": 0, "second": -1}),
        ((0, 0), {"both": 0, "first": -1, "second": 1}),
    ],
    ids=["None, 1", "-1, None", "0, 0"],
)
@methods
def test_out_axes_of_several_outputs(entry, method, in_axes, out_axes):
    args = arguments(SEVERAL, in_axes, N)
    with made(entry, SEVERAL, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, in_axes, out_axes)), *args)
    assert_same(result, jax.vmap(SEVERAL.twin, in_axes, out_axes)(*args))
    assert foreign.log.count == expected_calls(method, N)


@pytest.mark.parametrize("foreign_function", [DISCRETE, SCALARS], ids=lambda f: f.name)
@methods
def test_integer_boolean_and_scalar_outputs(entry, method, foreign_function):
    args = arguments(foreign_function, (0, None), N)
    with made(entry, foreign_function, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, (0, None))), *args)
    assert_same(result, jax.vmap(foreign_function.twin, (0, None))(*args))


@ways
@methods
def test_unbatched(entry, method, jit):
    args = arguments(RANKS, (None, None, None), N)
    with made(entry, RANKS, method) as foreign:
        result = foreign.run(maybe_jit(foreign.call, jit), *args)
    assert_same(result, RANKS.twin(*args))
    assert foreign.log.given == [RANKS.shapes]


def nested(call):
    """The call with its arguments and its result inside containers."""

    def function(model, rest):
        result = call(model["matrix"], rest[0][0], *rest[1:])
        return [{"result": result}, ()]

    return function


@pytest.mark.parametrize(
    "in_axes",
    [({"matrix": 1}, ([0], None)), (None, ([None], -1)), ({"matrix": -1}, 0)],
    ids=str,
)
@methods
def test_in_axes_in_nested_containers(entry, method, in_axes):
    flat_axes = [
        axes[0] if isinstance(axes, list) else axes
        for axes in (
            in_axes[0]["matrix"] if isinstance(in_axes[0], dict) else in_axes[0],
            *(in_axes[1] if isinstance(in_axes[1], tuple) else (in_axes[1], in_axes[1])),
        )
    ]
    matrix, vector, scalar = arguments(RANKS, flat_axes, N)
    trees = ({"matrix": matrix}, ([vector], scalar))
    with made(entry, RANKS, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(nested(foreign.call), in_axes)), *trees)
    assert_same(result, jax.vmap(nested(RANKS.twin), in_axes)(*trees))


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("entry", ["host", "device", "register"])
def test_collectives_over_a_named_axis_around_a_call(entry, method):
    def around(call):
        def function(x, y):
            total = jax.lax.psum(call(x, y), "i")
            return call(total, y) - jax.lax.axis_index("i").astype(y.dtype)

        return jax.vmap(function, (0, None), axis_name="i")

    args = arguments(COMBINE, (0, None), N)
    with made(entry, COMBINE, method) as foreign:
        assert_same(foreign.run(jax.jit(around(foreign.call)), *args), around(COMBINE.twin)(*args))


@pytest.mark.parametrize("entry_point", [batchrules.host_call, batchrules.device_call])
def test_keyword_arguments_are_mapped_along_axis_0(entry_point):
    xp, options = (np, {"result_shape": jax.ShapeDtypeStruct((2,), "float64")})
    if entry_point is batchrules.device_call:
        xp, options = jnp, {}
    call = entry_point(
        lambda matrix, *, vector, scalar: RANKS(xp, matrix, vector, scalar), method="expand_dims", **options
    )
    matrix, vector, scalar = arguments(RANKS, (0, 0, 0), N)
    result = jax.jit(jax.vmap(call))(matrix, scalar=scalar, vector=vector)
    assert_same(result, jax.vmap(RANKS.twin)(matrix, vector, scalar))


@methods
def test_the_last_element_is_as_good_as_the_first(entry, method):
    """A batch whose elements are all different, and long enough to show a chunk that was lost or repeated."""
    size = 11
    args = [np.arange(size * 3.0).reshape(size, 3), np.arange(3.0)]
    with made(entry, COMBINE, method, batch_size=4) as foreign:
        result = foreign.run(jax.vmap(foreign.call, (0, None)), *args)
    assert_same(result, jnp.asarray(args[0] ** 2 * args[1] - 2 * args[1] + args[0]))
    assert foreign.log.count == expected_calls(method, size, 4)
