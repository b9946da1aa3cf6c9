"""Device calls and their derivatives over four devices: right on each of them, and of the right type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import nest, of_all, total
from foreign import Foreign
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import EXPLICIT, JAX_VERSION, assert_right_everywhere, auto, explicit, mesh_of, put, types, using
from test_device_derivatives import SMOOTH, device

import batchrules

RNG = np.random.default_rng(1)
XS, YS = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 3))
SS = RNG.normal(size=8)
X, Y, S = XS[0], YS[1], SS[2]
METHODS = ("sequential", "expand_dims", "broadcast_all")
every_method = pytest.mark.parametrize("method", METHODS)


def outer(f):
    return jax.vmap(f, (0, None, None))


PROGRAMS = {
    "vmap": (outer, (XS, Y, S), (0, None, None)),
    "vmap along axis 1": (
        lambda f: jax.vmap(f, (1, 0, None), {"all": 1, "y": -1, "x": 0}),
        (XS.T, YS, S),
        (1, 0, None),
    ),
    "what is not mapped": (lambda f: jax.vmap(f, (None, 0, None)), (X, YS, S), (None, 0, None)),
    "sharded inside": (lambda f: jax.vmap(outer(f), (None, 0, None)), (XS, YS[:3], S), (0, None, None)),
    "sharded outside": (
        lambda f: jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, None)),
        (XS, YS[:3], S),
        (0, None, None),
    ),
    "grad": (lambda f: of_all(jax.grad)(total(outer(f))), (XS, Y, S), (0, None, None)),
    "vmap of grad": (lambda f: jax.vmap(of_all(jax.grad)(total(f)), (0, None, 0)), (XS, Y, SS), (0, None, 0)),
    "grad of vmaps": (lambda f: of_all(jax.grad)(total(nest(f))), (XS, YS[:3], SS[:3]), (0, None, None)),
    "vmap of jacfwd": (lambda f: jax.vmap(of_all(jax.jacfwd)(f), (0, None, 0)), (XS, Y, SS), (0, None, 0)),
    "vmap of jacrev": (lambda f: jax.vmap(of_all(jax.jacrev)(f), (0, None, 0)), (XS, Y, SS), (0, None, 0)),
    "jvp": (lambda f: lambda *a: jax.jvp(outer(f), a, a)[1], (XS, Y, S), (0, None, None)),
}


def spread(args, dims, mesh, axis):
    """The arguments on the mesh, each sharded along the dimension that is given for it."""
    specs = [() if dim is None else (*[None] * dim, axis) for dim in dims]
    return [put(arg, mesh, *spec) for arg, spec in zip(args, specs, strict=True)]


EXPLICIT_WAYS = [
    ("sequential", *EXPLICIT["x"]),
    ("expand_dims", *EXPLICIT["x"]),
    ("expand_dims", *EXPLICIT["a of ab"]),
    ("broadcast_all", *EXPLICIT["ab"]),
]


@functools.cache
def sharded_twin(name, names, axis):
    """What JAX makes of the twin on the same mesh."""
    transform, plain, dims = PROGRAMS[name]
    mesh = explicit(*names)
    with using(mesh):
        return jax.jit(transform(SMOOTH.twin))(*spread(plain, dims, mesh, axis))


@pytest.mark.parametrize(("method", "names", "axis"), EXPLICIT_WAYS, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_explicit(name, method, names, axis):
    """The twin is sharded too, and its types are the right ones."""
    transform, plain, dims = PROGRAMS[name]
    mesh, wanted = explicit(*names), sharded_twin(name, names, axis)
    with using(mesh):
        args = spread(plain, dims, mesh, axis)
        result = jax.jit(transform(device(SMOOTH, method, "body")))(*args)
        assert_right_everywhere(result, wanted)
        # jax 0.7 forgets that the twin's cotangents of what is not mapped are mapped, and sharded, too.
        assert types(result) == types(wanted) or JAX_VERSION < (0, 8)


@every_method
@pytest.mark.parametrize("name", ["vmap", "grad"])
def test_explicit_with_endpoints_and_chunks(name, method):
    transform, plain, dims = PROGRAMS[name]
    mesh = explicit("x")
    with using(mesh):
        args = spread(plain, dims, mesh, "x")
        batch_size = None if method == "sequential" else 1
        result = jax.jit(transform(device(SMOOTH, method, "endpoints", batch_size=batch_size)))(*args)
        assert_right_everywhere(result, transform(SMOOTH.twin)(*plain))


@every_method
def test_explicit_outside_jit(method):
    mesh = explicit("x")
    with using(mesh):
        args = spread((XS, Y, S), (0, None, None), mesh, "x")
        assert_right_everywhere(outer(device(SMOOTH, method, "body"))(*args), outer(SMOOTH.twin)(*args))


@every_method
def test_elements_that_are_sharded_are_gathered(method):
    """Opaque code cannot be told that its element is split over devices."""
    product = Foreign("product", lambda xp, x, y: x * xp.sum(y, axis=-1, keepdims=True), ((8,), (8,)))
    mesh = explicit("a", "b")
    x, y = np.arange(32.0).reshape(4, 8), np.arange(8.0)
    with using(mesh):
        args = put(x, mesh, "a", "b"), put(y, mesh, "b")
        program = lambda f: jax.vmap(f, (0, None))  # noqa: E731
        f = device(product, method, "body")
        result = jax.jit(program(f))(*args)
        assert_right_everywhere(result, program(product.twin)(x, y))
        assert types(result) == ["float64[4@a,8]"]
        gradient = lambda f: jax.grad(lambda *a: jnp.sin(program(f)(*a)).sum(), (0, 1))  # noqa: E731
        derivative = jax.jit(gradient(f))(*args)
        assert_right_everywhere(derivative, gradient(product.twin)(x, y))
        assert types(derivative) == ["float64[4@a,8@b]", "float64[8@b]"]


AUTO_WAYS = [(method, ("x",), "x") for method in METHODS] + [("expand_dims", ("a", "b"), "a")]


@pytest.mark.parametrize(("method", "names", "axis"), AUTO_WAYS, ids=str)
@pytest.mark.parametrize("name", ["sharded inside", "grad"])
def test_auto(name, method, names, axis):
    transform, plain, dims = PROGRAMS[name]
    args = spread(plain, dims, auto(*names), axis)
    result = jax.jit(transform(device(SMOOTH, method, "body")))(*args)
    assert_right_everywhere(result, transform(SMOOTH.twin)(*plain))


# A mesh, the axis that is mapped over, and which axes are manual.
SHARD_MAPS = {
    "1-d": (("x",), "x", None),
    "2-d, one axis in use": (("a", "b"), "a", None),
    "2-d, both": (("a", "b"), ("a", "b"), None),
    "2-d, one manual": (("a", "b"), "a", {"a"}),
}
shard_maps = pytest.mark.parametrize("case", SHARD_MAPS.values(), ids=SHARD_MAPS)


def mapped_over(case, function, out_specs, **options):
    names, axis, manual = case
    if manual:
        options["axis_names"] = manual
    return jax.shard_map(function, mesh=auto(*names), in_specs=(P(axis), P(), P()), out_specs=out_specs, **options)


def over_rows(case):
    return P(case[1])


@shard_maps
@every_method
def test_shard_map(method, case):
    f = outer(device(SMOOTH, method, "body"))
    result = jax.jit(mapped_over(case, f, over_rows(case)))(XS, Y, S)
    assert_right_everywhere(result, outer(SMOOTH.twin)(XS, Y, S))


@shard_maps
@every_method
def test_gradient_inside_shard_map(method, case):
    """The gradients of unvarying arguments are summed over the devices, as the twin's are."""
    derivation = "body" if case[2] else "endpoints"

    def gradient(f):
        return mapped_over(case, of_all(jax.grad)(total(outer(f))), (over_rows(case), P(), P()))

    result = jax.jit(gradient(device(SMOOTH, method, derivation)))(XS, Y, S)
    assert_right_everywhere(result, of_all(jax.grad)(total(outer(SMOOTH.twin)))(XS, Y, S))


@shard_maps
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_gradient_of_shard_map(method, case):
    def gradient(f):
        return of_all(jax.grad)(total(mapped_over(case, outer(f), over_rows(case))))

    result = jax.jit(gradient(device(SMOOTH, method, "body")))(XS, Y, S)
    assert_right_everywhere(result, of_all(jax.grad)(total(outer(SMOOTH.twin)))(XS, Y, S))


JACOBIANS = [
    jax.jacfwd,
    pytest.param(
        jax.jacrev,
        marks=pytest.mark.skipif(
            JAX_VERSION == (0, 8), reason="jax 0.8 cannot map a sum over devices: its twin raises a TypeError there"
        ),
    ),
]


@every_method
@pytest.mark.parametrize("transform", JACOBIANS)
def test_jacobians_inside_shard_map(method, transform):
    """`jacrev` sums over the devices there: the arguments that do not vary stand for all of them.

    Not of the output that JAX knows to be the same on every device: of a device call, every output varies.
    """

    def program(f):
        varying = lambda *args: {key: f(*args)[key] for key in ("all", "x")}  # noqa: E731
        jacobian = jax.vmap(transform(varying, (1, 2)), (0, None, None))
        return jax.jit(mapped_over(SHARD_MAPS["1-d"], jacobian, P("x")))

    result = program(device(SMOOTH, method, "body"))(XS, Y, S)
    assert_right_everywhere(result, program(SMOOTH.twin)(XS, Y, S))


@every_method
def test_a_varying_result_is_not_taken_for_a_replicated_one(method):
    """The built-in rule of `pure_callback` lets this pass, and gives wrong data."""
    case = SHARD_MAPS["1-d"]
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(mapped_over(case, outer(device(SMOOTH, method, "body")), P()))(XS, Y, S)


@every_method
def test_an_unvarying_call_inside_shard_map_gives_an_unvarying_result(method):
    f = device(SMOOTH, method, "body")
    case = SHARD_MAPS["1-d"]
    program = mapped_over(case, lambda _, y, s: f(y, y, s)["all"], P())
    np.testing.assert_allclose(jax.jit(program)(XS, Y, S), SMOOTH.twin(Y, Y, S)["all"])


def test_collectives_around_a_call_inside_shard_map():
    f = device(SMOOTH, "expand_dims", "body")

    def mean(f):
        return lambda xs, y, s: jax.lax.pmean(outer(f)(xs, y, s)["all"].mean(0), "x")

    case = SHARD_MAPS["1-d"]
    result = jax.jit(mapped_over(case, mean(f), P()))(XS, Y, S)
    np.testing.assert_allclose(result, outer(SMOOTH.twin)(XS, Y, S)["all"].mean(0))


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_spmd_axis_name(method):
    mesh = auto("x")
    f = batchrules.device_call(lambda x, y: x * y, method=method)
    with using(mesh):
        program = jax.jit(jax.vmap(f, (0, None), spmd_axis_name="x"))
        assert_right_everywhere(program(put(XS, mesh, "x"), put(Y, mesh)), XS * Y)


@every_method
def test_shard_map_over_a_mesh_with_explicit_axes(method):
    mesh = mesh_of((2, 2), ("a", "b"), AxisType.Explicit)
    f = outer(device(SMOOTH, method, "body"))
    with using(mesh):
        program = jax.shard_map(f, in_specs=(P("a"), P(), P()), out_specs=P("a"), axis_names={"a"})
        result = jax.jit(program)(put(XS, mesh, "a"), put(Y, mesh), put(S, mesh))
    assert_right_everywhere(result, outer(SMOOTH.twin)(XS, Y, S))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    yield
    jax.clear_caches()
