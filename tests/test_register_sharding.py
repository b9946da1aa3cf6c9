"""Registered primitives over four devices: right on each of them, and of the right type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import METHODS, SEQUENTIAL, as_array
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla
from jax.sharding import PartitionSpec as P
from sharded import EXPLICIT, JAX_VERSION, assert_right_everywhere, auto, explicit, put, types, using

import batchrules
from batchrules import _jax_versions

XS, YS = np.arange(24.0).reshape(8, 3), np.arange(24.0)[::-1].reshape(8, 3) * 2
WIDE, ROW = np.arange(64.0).reshape(8, 8), np.arange(8.0)


def combined(x, y):
    """Two outputs; the second depends on `y` alone."""
    rank = max(x.ndim, y.ndim)
    missing = x.ndim != y.ndim
    x, y = (a if a.ndim == rank else a[None] for a in (x, y))
    second = jnp.broadcast_to(y + 1, np.broadcast_shapes(x.shape, y.shape)) if missing else y + 1
    return [x * 2 - y, second]


def typed(*avals):
    """The types of its results: where one operand is repeated, it is sharded as the other."""
    x, y = avals
    promised = jax.eval_shape(combined, *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals))
    longest = max(avals, key=lambda aval: aval.ndim)

    def spec(result):
        alike = [a for a in (x, y) if a.shape == result.shape] or [longest]
        return tuple(alike[0].sharding.spec)

    return [_jax_versions.result_type(longest, r.shape, r.dtype, spec(r)) for r in promised]


@pytest.fixture(scope="module")
def primitive():
    """A primitive whose lowering is plain XLA, so that it may be split; JAX knows no batching rule for it."""
    made = Primitive("combined")
    made.multiple_results = True
    made.def_impl(functools.partial(xla.apply_primitive, made))
    made.def_abstract_eval(typed)
    mlir.register_lowering(made, mlir.lower_fun(combined))
    return made


@pytest.fixture
def register(primitive):
    """Registers it, and gives the function that binds it."""

    def registered(method, **options):
        batchrules.register(primitive, method, **options)
        return lambda x, y: tuple(primitive.bind(as_array(x), as_array(y)))

    yield registered
    if batchrules.registered(primitive):
        batchrules.unregister(primitive)


def twin(x, y):
    return 2 * x - y, y + 1


# For each program: the transformation, its arguments, the dimension of each that is sharded.
PROGRAMS = {
    "both": (jax.vmap, (XS, YS), (0, 0)),
    "first alone": (lambda f: jax.vmap(f, (0, None)), (XS, YS[0]), (0, None)),
    "second alone": (lambda f: jax.vmap(f, (None, 0)), (XS[0], YS), (None, 0)),
    "axis 1": (lambda f: jax.vmap(f, (1, None), (1, 0)), (XS.T, YS[0]), (1, None)),
    "sharded inside": (lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0)), (XS, YS[:3]), (0, None)),
    "sharded outside": (lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0)), (XS[:3], YS), (None, 0)),
    "sharded twice inside": (
        lambda f: jax.vmap(jax.vmap(f, (None, 0)), (None, 1)),
        (XS[0], np.stack([YS, YS], 1)),
        (None, 0),
    ),
}


def spread(args, dims, mesh, axis):
    specs = [() if dim is None else (*[None] * dim, axis) for dim in dims]
    return [put(arg, mesh, *spec) for arg, spec in zip(args, specs, strict=True)]


WAYS = [(method, *EXPLICIT["x"]) for method in METHODS if method != "legacy_vectorized"] + [
    ("expand_dims", *EXPLICIT["a of ab"]),
    ("sequential", *EXPLICIT["ab"]),
]


@pytest.mark.parametrize(("method", "names", "axis"), WAYS, ids=str)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_explicit(register, program, method, names, axis):
    """The built-in rule raises, or loses the sharding in the type."""
    transform, plain, dims = program
    mesh = explicit(*names)
    with using(mesh):
        args = spread(plain, dims, mesh, axis)
        result = jax.jit(transform(register(method)))(*args)
        wanted = jax.jit(transform(twin))(*args)
        assert_right_everywhere(result, wanted)
        assert types(result) == types(wanted)


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None)], ids=str)
def test_explicit_with_legacy_vectorized(register, in_axes):
    mesh = explicit("x")
    plain = (XS, YS if in_axes[1] == 0 else YS[0])
    with using(mesh):
        args = spread(plain, in_axes, mesh, "x")
        result = jax.jit(jax.vmap(register("legacy_vectorized"), in_axes))(*args)
        assert_right_everywhere(result, jax.vmap(twin, in_axes)(*plain))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
def test_explicit_in_chunks(register, method, batch_size):
    """Each device has two elements."""
    mesh = explicit("x")
    with using(mesh):
        args = spread((XS, YS[0]), (0, None), mesh, "x")
        result = jax.jit(jax.vmap(register(method, batch_size=batch_size), (0, None)))(*args)
        assert_right_everywhere(result, jax.vmap(twin, (0, None))(XS, YS[0]))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_explicit_outside_jit(register, method):
    mesh = explicit("x")
    with using(mesh):
        args = spread((XS, YS), (0, 0), mesh, "x")
        assert_right_everywhere(jax.vmap(register(method))(*args), twin(XS, YS))


@pytest.mark.parametrize("spec", [(None, "b"), ("a", "b")], ids=str)
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_elements_that_are_sharded_stay_so(register, method, spec):
    """A primitive has rules of its own for that."""
    mesh = explicit("a", "b")
    with using(mesh):
        args = put(WIDE, mesh, *spec), put(ROW, mesh, "b")
        result = jax.jit(jax.vmap(register(method), (0, None)))(*args)
        wanted = jax.jit(jax.vmap(twin, (0, None)))(*args)
        assert_right_everywhere(result, wanted)
        # jax 0.7 loses the sharding of an element that is repeated inside a shard_map.
        assert types(result) == types(wanted) or JAX_VERSION < (0, 8)


@pytest.mark.parametrize(("names", "axis"), [(("x",), "x"), (("a", "b"), "a")], ids=["1-d", "2-d"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_auto(register, method, names, axis):
    args = spread((XS, YS[0]), (0, None), auto(*names), axis)
    result = jax.jit(jax.vmap(register(method), (0, None)))(*args)
    assert_right_everywhere(result, jax.vmap(twin, (0, None))(XS, YS[0]))


SHARD_MAPS = {
    "1-d": (("x",), "x", None),
    "2-d, one axis in use": (("a", "b"), "a", None),
    "2-d, both": (("a", "b"), ("a", "b"), None),
    "2-d, one manual": (("a", "b"), "a", {"a"}),
}


def mapped_over(case, function, out_specs):
    names, axis, manual = case
    options = {"axis_names": manual} if manual else {}
    return jax.shard_map(function, mesh=auto(*names), in_specs=(P(axis), P(axis)), out_specs=out_specs, **options)


@pytest.mark.parametrize("case", SHARD_MAPS.values(), ids=SHARD_MAPS)
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_shard_map(register, method, case):
    program = mapped_over(case, jax.vmap(register(method)), P(case[1]))
    assert_right_everywhere(jax.jit(program)(XS, YS), twin(XS, YS))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_a_varying_result_is_not_taken_for_a_replicated_one(register, method):
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(mapped_over(SHARD_MAPS["1-d"], jax.vmap(register(method)), P()))(XS, YS)


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_shard_map_over_nothing(register, method):
    program = mapped_over(SHARD_MAPS["1-d"], jax.vmap(register(method)), P("x"))
    assert_right_everywhere(jax.jit(program)(XS[:0], YS[:0]), twin(XS[:0], YS[:0]))


@pytest.mark.parametrize("method", [*SEQUENTIAL, "broadcast_all"])
def test_spmd_axis_name(register, method):
    mesh = auto("x")
    with using(mesh):
        program = jax.jit(jax.vmap(register(method), spmd_axis_name="x"))
        assert_right_everywhere(program(put(XS, mesh, "x"), put(YS, mesh, "x")), twin(XS, YS))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    yield
    jax.clear_caches()
