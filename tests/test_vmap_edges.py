"""Batches and arrays at the edge: empty, of one, 0-d, of size zero, unmapped, of keys, and out_axes=None."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import (
    COMBINE,
    DISCRETE,
    ENTRIES,
    ENTRIES_AND_METHODS,
    METHODS,
    SCALARS,
    SEQUENTIAL,
    SEVERAL,
    VECTORISED,
    Foreign,
    arguments,
    assert_same,
    expected_calls,
    made,
    opaque,
    whole_numbers,
)
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

import batchrules

methods = pytest.mark.parametrize(("entry", "method"), ENTRIES_AND_METHODS)
NESTED_LEGACY = "a registered primitive is mapped once for each vmap, which this method refuses: see test_register.py"
ways = pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])


def maybe_jit(function, jit):
    return jax.jit(function) if jit else function


@ways
@pytest.mark.parametrize("foreign_function", [SEVERAL, DISCRETE], ids=lambda f: f.name)
@methods
def test_empty_batch_makes_no_call(entry, method, foreign_function, jit):
    args = arguments(foreign_function, (0, None), 0)
    with made(entry, foreign_function, method) as foreign:
        result = foreign.run(maybe_jit(jax.vmap(foreign.call, (0, None)), jit), *args)
    assert_same(result, jax.vmap(foreign_function.twin, (0, None))(*args))
    assert foreign.log.count == 0


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
@methods
def test_empty_axis_among_nested_ones_makes_no_call(entry, method, sizes):
    if (entry, method) == ("register", "legacy_vectorized"):
        pytest.skip(NESTED_LEGACY)
    nest = lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0))  # noqa: E731
    args = [whole_numbers((sizes[0], 3), 0), whole_numbers((sizes[1], 3), 1)]
    with made(entry, COMBINE, method, batch_size=2) as foreign:
        result = foreign.run(jax.jit(nest(foreign.call)), *args)
    assert_same(result, nest(COMBINE.twin)(*args))
    assert foreign.log.count == 0


@pytest.mark.parametrize(("in_axes", "jit"), [((0, 0), True), ((0, None), True), ((None, 0), False)], ids=str)
@methods
def test_batch_of_one(entry, method, in_axes, jit):
    args = arguments(SEVERAL, in_axes, 1)
    with made(entry, SEVERAL, method) as foreign:
        result = foreign.run(maybe_jit(jax.vmap(foreign.call, in_axes), jit), *args)
    assert_same(result, jax.vmap(SEVERAL.twin, in_axes)(*args))
    assert foreign.log.count == 1


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1)], ids=str)
@methods
def test_axes_of_one_among_nested_ones(entry, method, sizes):
    if (entry, method) == ("register", "legacy_vectorized"):
        pytest.skip(NESTED_LEGACY)
    nest = lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0))  # noqa: E731
    args = [whole_numbers((sizes[1], 3), 0), whole_numbers((sizes[0], 3), 1)]
    with made(entry, SEVERAL, method) as foreign:
        result = foreign.run(jax.jit(nest(foreign.call)), *args)
    assert_same(result, nest(SEVERAL.twin)(*args))
    assert foreign.log.count == expected_calls(method, sizes[0] * sizes[1])


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
@methods
def test_scalars(entry, method, in_axes):
    args = arguments(SCALARS, in_axes, 3)
    with made(entry, SCALARS, method) as foreign:
        result = foreign.run(jax.vmap(foreign.call, in_axes), *args)
    assert_same(result, jax.vmap(SCALARS.twin, in_axes)(*args))


def _with_empty(xp, x, y):
    return {"empty": x[..., None] * y[..., None, :], "sum": xp.sum(x, axis=-1) + xp.sum(y, axis=-1)}


EMPTY = Foreign("empty", _with_empty, ((0,), (3,)))


@pytest.mark.parametrize("in_axes", [(0, 0), (1, None), (None, 0)], ids=str)
@methods
def test_arrays_of_size_zero(entry, method, in_axes):
    args = arguments(EMPTY, in_axes, 4)
    with made(entry, EMPTY, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, in_axes)), *args)
    assert_same(result, jax.vmap(EMPTY.twin, in_axes)(*args))


@ways
@methods
def test_a_call_that_no_argument_is_mapped_of_is_made_once(entry, method, jit):
    x, y = arguments(COMBINE, (None, None), 4)
    z = np.arange(12.0).reshape(4, 3)
    around = lambda call: jax.vmap(lambda z: call(x, y) + z)  # noqa: E731
    with made(entry, COMBINE, method) as foreign:
        result = foreign.run(maybe_jit(around(foreign.call), jit), z)
    assert_same(result, around(COMBINE.twin)(z))
    assert foreign.log.given == [((3,), (3,))]


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@methods
def test_out_axes_none_of_a_call_that_is_not_mapped(entry, method, jit):
    x, y = arguments(COMBINE, (None, None), 4)
    with made(entry, COMBINE, method) as foreign:
        function = jax.vmap(lambda _: foreign.call(x, y), out_axes=None)
        assert_same(foreign.run(maybe_jit(function, jit), np.zeros(4)), COMBINE.twin(x, y))


OUT_AXES = {"both": 0, "first": 0, "second": None}


@ways
@pytest.mark.parametrize("batch_size", [None, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("entry", ["device", "register"])
def test_out_axes_none_of_an_output_that_does_not_depend_on_the_axis(entry, size, batch_size, jit):
    args = arguments(SEVERAL, (0, None), size)
    with made(entry, SEVERAL, "expand_dims", batch_size=batch_size) as foreign:
        result = foreign.run(maybe_jit(jax.vmap(foreign.call, (0, None), OUT_AXES), jit), *args)
    assert_same(result, jax.vmap(SEVERAL.twin, (0, None), OUT_AXES)(*args))


@pytest.mark.parametrize("entry", ["device", "register"])
def test_out_axes_none_in_nested_vmaps(entry):
    x, y = whole_numbers((4, 3), 0), whole_numbers((2, 3), 1)
    both = lambda f: jax.vmap(  # noqa: E731
        jax.vmap(f, (0, None), {"both": 0, "first": 0, "second": None}),
        (None, 0),
        {"both": 0, "first": None, "second": 0},
    )
    with made(entry, SEVERAL, "expand_dims") as foreign:
        assert_same(foreign.run(jax.jit(both(foreign.call)), x, y), both(SEVERAL.twin)(x, y))


@pytest.mark.parametrize("entry", ["device", "register"])
def test_out_axes_none_of_an_output_that_depends_on_the_axis_is_refused(entry):
    args = arguments(SEVERAL, (None, 0), 4)
    with made(entry, SEVERAL, "expand_dims") as foreign, pytest.raises(ValueError, match="out_axes"):
        jax.vmap(foreign.call, (None, 0), OUT_AXES)(*args)


@pytest.mark.parametrize("size", [1, 4])
def test_a_host_call_broadcasts_what_leads_with_1(size):
    """Its shapes were promised when it was traced, so every output is mapped."""
    args = arguments(SEVERAL, (0, None), size)
    with made("host", SEVERAL, "expand_dims") as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, (0, None))), *args)
        assert_same(result, jax.vmap(SEVERAL.twin, (0, None))(*args))
        with pytest.raises(ValueError, match="out_axes"):
            jax.vmap(foreign.call, (0, None), OUT_AXES)(*args)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::2, ::-1],
        lambda a: np.asfortranarray(a)[:4, :3],
        lambda a: a.T[:4, 1:4],
        lambda a: np.broadcast_to(a[:1, :3], (4, 3)),
    ],
    ids=["strided", "column-major", "transposed", "broadcast"],
)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_numpy_arguments_in_any_layout(entry, view, jit):
    x = view(whole_numbers((8, 8), 0)[:, : 3 if view(np.zeros((8, 8))).shape[1] != 3 else 8])
    y = whole_numbers((8, 3), 1)[::-2]
    for method in ("sequential", "expand_dims"):
        with made(entry, COMBINE, method) as foreign:
            result = foreign.run(maybe_jit(jax.vmap(foreign.call), jit), x, y)
        assert_same(result, jax.vmap(COMBINE.twin)(x, y))


@pytest.mark.parametrize("entry", ENTRIES)
def test_python_numbers_and_numpy_scalars(entry):
    with made(entry, SCALARS, "sequential") as foreign:
        assert_same(foreign.call(2.0, np.float64(3.0)), jnp.asarray(1.0))
        assert_same(jax.vmap(foreign.call, (0, None))(np.arange(3.0), 1.0), jnp.array([-1.0, 0.0, 3.0]))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_mapped_axes_of_different_sizes(entry, method):
    with made(entry, COMBINE, method) as foreign, pytest.raises(ValueError, match="inconsistent sizes"):
        jax.vmap(foreign.call)(np.zeros((3, 3)), np.zeros((4, 3)))


def draw(key, x):
    """A random number and a new key."""
    return jax.random.uniform(key, x.shape) + x, jax.random.fold_in(key, 1)


@contextlib.contextmanager
def random_call(entry, method):
    """`draw` behind an entry point that takes typed keys."""
    if entry == "device":
        yield batchrules.device_call(draw, method=method)
        return
    primitive = Primitive("draw")
    primitive.multiple_results = True
    primitive.def_impl(lambda *args: xla.apply_primitive(primitive, *args))
    primitive.def_abstract_eval(lambda key, x: (x, key))
    mlir.register_lowering(primitive, mlir.lower_fun(draw))
    batchrules.register(primitive, method)
    try:
        yield lambda key, x: tuple(primitive.bind(key, x))
    finally:
        batchrules.unregister(primitive)


def same_draws(result, wanted):
    np.testing.assert_array_equal(result[0], wanted[0])
    assert result[1].dtype == wanted[1].dtype
    np.testing.assert_array_equal(jax.random.key_data(result[1]), jax.random.key_data(wanted[1]))


KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.mark.parametrize(("in_axes", "jit"), [((0, 0), True), ((0, None), False), ((None, 0), True)], ids=str)
@pytest.mark.parametrize("method", SEQUENTIAL)
@pytest.mark.parametrize("entry", ["device", "register"])
def test_typed_keys(entry, method, in_axes, jit):
    args = [a if axis == 0 else a[0] for a, axis in zip((KEYS, np.arange(12.0).reshape(4, 3)), in_axes, strict=True)]
    args[1] = jnp.asarray(args[1])
    with random_call(entry, method) as call:
        same_draws(maybe_jit(jax.vmap(call, in_axes), jit)(*args), jax.vmap(draw, in_axes)(*args))


@pytest.mark.parametrize("entry", ["device", "register"])
def test_typed_keys_in_nested_vmaps_and_empty_batches(entry):
    nest = lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0))  # noqa: E731
    xs = jnp.arange(6.0).reshape(2, 3)
    with random_call(entry, "sequential") as call:
        same_draws(jax.jit(nest(call))(KEYS, xs), nest(draw)(KEYS, xs))
        same_draws(jax.jit(nest(call))(KEYS[:0], xs), nest(draw)(KEYS[:0], xs))


@pytest.mark.parametrize("entry", ["device", "register"])
@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
def test_typed_keys_by_a_method_that_the_function_cannot_take_them_by(entry, method):
    """Drawing takes a single key, and says so."""
    with random_call(entry, method) as call, pytest.raises(ValueError, match="accepts a single key"):
        jax.jit(jax.vmap(call))(KEYS, jnp.zeros((4, 3)))


@pytest.mark.parametrize("method", VECTORISED)
def test_typed_keys_are_led_as_other_arguments_are(method):
    """A function that takes keys with a leading dimension."""

    def data(key, x):
        raw = jax.random.key_data(key).astype("float64").sum(-1)
        return raw[..., None] + x

    call = batchrules.device_call(data, method=method)
    xs = jnp.arange(12.0).reshape(4, 3)
    assert_same(jax.jit(jax.vmap(call))(KEYS, xs), jax.vmap(data)(KEYS, xs))
    if method != "legacy_vectorized":
        assert_same(jax.jit(jax.vmap(call, (None, 0)))(KEYS[1], xs), jax.vmap(data, (None, 0))(KEYS[1], xs))


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_typed_keys_are_refused_by_a_host_call(method):
    call = batchrules.host_call(lambda key: key, jax.ShapeDtypeStruct((), "uint32"), method=method, name="drawn")
    for function in (jax.vmap(call), jax.jit(jax.vmap(call))):
        with pytest.raises(TypeError, match=r"'drawn': the argument 'key' is a typed PRNG key.*jax.random.key_data"):
            function(KEYS)


@methods
def test_raw_keys_are_arrays_as_others(entry, method):
    fold = Foreign("fold", lambda xp, key, x: (key[..., ::-1], x + 1), ((2,), ()))  # noqa: ARG005
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    with made(entry, fold, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call)), keys, np.arange(4.0))
    assert_same(result, jax.vmap(fold.twin)(keys, np.arange(4.0)))


@pytest.mark.parametrize("method", METHODS)
def test_a_primitive_with_one_result_and_no_other_rule(method):
    primitive = opaque(COMBINE, log=_NoLog())
    with pytest.raises(NotImplementedError, match="Batching rule"):
        jax.vmap(primitive.bind)(np.zeros((2, 3)), np.zeros((2, 3)))
    batchrules.register(primitive, method)
    args = arguments(COMBINE, (0, 0), 2)
    assert_same(jax.vmap(primitive.bind)(*map(jnp.asarray, args)), [jax.vmap(COMBINE.twin)(*args)])
    batchrules.unregister(primitive)


class _NoLog:
    def add(self, args):
        """Forget it."""
