"""One to three nested `jax.vmap`s over different arguments: right results, and as few calls as the method allows."""

import math

import jax
import numpy as np
import pytest
from foreign import (
    COMBINE,
    ENTRIES_AND_METHODS,
    RANKS,
    SEVERAL,
    VECTORISED,
    assert_same,
    expected_calls,
    made,
    whole_numbers,
    with_axis,
)

SIZES = (2, 3, 4)
# For each vmap, the outermost first, its in_axes.
NESTS = {
    "same argument twice": [(0, None, None), (0, None, None)],
    "one argument each": [(None, None, 0), (None, 0, None)],
    "argument by argument": [(0, None, None), (None, 0, None), (None, None, 0)],
    "overlapping": [(1, 0, None), (None, -1, 0)],
    "all, then some": [(0, 0, 0), (-1, None, None)],
    "some, then all": [(None, None, 0), (0, 1, 0)],
    "three, mixed": [(0, None, -1), (None, 1, None), (2, None, 0)],
}
# A primitive is mapped once for each vmap, so what it gets under legacy_vectorized is not always clear.
CASES = [(e, m) for e, m in ENTRIES_AND_METHODS if (e, m) != ("register", "legacy_vectorized")]


def nested(function, nest, out_axes=0):
    for in_axes in reversed(nest):
        function = jax.vmap(function, in_axes, out_axes)
    return function


def nested_arguments(foreign, nest, sizes=SIZES):
    """Arguments for nested vmaps: axes are taken away from the outside, so they are put in from the inside."""
    shapes = list(foreign.shapes)
    for in_axes, size in reversed(list(zip(nest, sizes, strict=False))):
        shapes = [with_axis(shape, axis, size) for shape, axis in zip(shapes, in_axes, strict=True)]
    return [whole_numbers(shape, i) for i, shape in enumerate(shapes)]


def elements(nest, sizes=SIZES):
    return math.prod(sizes[: len(nest)])


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
@pytest.mark.parametrize(("entry", "method"), CASES)
def test_nested(entry, method, nest):
    args = nested_arguments(RANKS, nest)
    with made(entry, RANKS, method) as foreign:
        result = foreign.run(jax.jit(nested(foreign.call, nest)), *args)
    assert_same(result, nested(RANKS.twin, nest)(*args))
    assert foreign.log.count == expected_calls(method, elements(nest))
    if entry != "register" and method in VECTORISED:
        (shapes,) = foreign.log.given
        assert_one_leading_dimension(shapes, method, nest)


def assert_one_leading_dimension(shapes, method, nest):
    """However many vmaps, a host or device call leads with one dimension: N, or 1 or nothing for unmapped arguments."""
    mapped = [any(in_axes[i] is not None for in_axes in nest) for i in range(3)]
    unmapped = {"expand_dims": (1,), "broadcast_all": (elements(nest),), "legacy_vectorized": ()}[method]
    leads = [shape[: len(shape) - len(element)] for shape, element in zip(shapes, RANKS.shapes, strict=True)]
    assert leads == [(elements(nest),) if is_mapped else unmapped for is_mapped in mapped]


@pytest.mark.parametrize("nest", [NESTS["overlapping"], NESTS["three, mixed"]], ids=["overlapping", "three, mixed"])
@pytest.mark.parametrize(("entry", "method"), CASES)
def test_nested_outside_jit(entry, method, nest):
    args = nested_arguments(RANKS, nest)
    with made(entry, RANKS, method) as foreign:
        result = foreign.run(nested(foreign.call, nest), *args)
    assert_same(result, nested(RANKS.twin, nest)(*args))
    assert foreign.log.count == expected_calls(method, elements(nest))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("method", VECTORISED)
@pytest.mark.parametrize("entry", ["host", "device"])
def test_batch_size_counts_elements_of_all_axes(entry, method, batch_size):
    nest = NESTS["argument by argument"]
    args = nested_arguments(RANKS, nest)
    with made(entry, RANKS, method, batch_size=batch_size) as foreign:
        result = foreign.run(jax.jit(nested(foreign.call, nest)), *args)
    assert_same(result, nested(RANKS.twin, nest)(*args))
    assert foreign.log.count == math.ceil(24 / batch_size)


@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_batch_size_of_a_primitive_counts_elements_of_each_axis(method, batch_size):
    nest = [(0, None), (0, 0)]
    args = nested_arguments(COMBINE, nest, (5, 4))
    with made("register", COMBINE, method, batch_size=batch_size) as foreign:
        result = foreign.run(jax.jit(nested(foreign.call, nest)), *args)
    assert_same(result, nested(COMBINE.twin, nest)(*args))
    assert foreign.log.count == math.ceil(5 / batch_size) * math.ceil(4 / batch_size)


@pytest.mark.parametrize("out_axes", [0, {"both": -1, "first": 0, "second": 1}], ids=str)
@pytest.mark.parametrize(("entry", "method"), CASES)
def test_nested_out_axes_where_outputs_depend_on_some_axes_only(entry, method, out_axes):
    nest = [(0, None), (None, 0)]
    args = nested_arguments(SEVERAL, nest)

    def both(call):
        return jax.vmap(jax.vmap(call, nest[1], 0), nest[0], out_axes)

    with made(entry, SEVERAL, method) as foreign:
        assert_same(foreign.run(jax.jit(both(foreign.call)), *args), both(SEVERAL.twin)(*args))


@pytest.mark.parametrize(("entry", "method"), CASES)
def test_the_same_axis_mapped_in_any_order(entry, method):
    """Vmap over x outside and y inside is the transpose of the other order."""
    x, y = nested_arguments(COMBINE, [(0, None), (None, 0)])
    with made(entry, COMBINE, method) as foreign:
        outer_x = jax.jit(nested(foreign.call, [(0, None), (None, 0)]))(x, y)
        outer_y = jax.jit(nested(foreign.call, [(None, 0), (0, None)]))(x, y)
    np.testing.assert_array_equal(outer_x, np.swapaxes(outer_y, 0, 1))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
@pytest.mark.parametrize("entry", ["host", "device", "register"])
def test_an_axis_that_passes_by_makes_no_more_calls(entry, method):
    """The middle vmap maps nothing of the call."""
    x, y = nested_arguments(COMBINE, [(0, None), (None, 0)])
    z = np.arange(5.0)

    def around(call):
        inner = jax.vmap(call, (None, 0))
        middle = jax.vmap(lambda x, y, z: inner(x, y) + z, (None, None, 0))
        return jax.vmap(middle, (0, None, None))

    with made(entry, COMBINE, method) as foreign:
        result = foreign.run(jax.jit(around(foreign.call)), x, y, z)
    assert_same(result, around(COMBINE.twin)(x, y, z))
    assert foreign.log.count == expected_calls(method, 6)
