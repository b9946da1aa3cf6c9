"""A mapped axis that is spread over four devices: nothing is gathered, and results lie as the inputs do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from batchrules._bmap import bmap

SIZE, WIDTH = 32, 4
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)\(")


def f(w, a):
    return jnp.tanh(w @ a)


def loss(mapped):
    return lambda w, a: jnp.sum(mapped(w, a) ** 2)


def set_mesh(mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def arguments(mesh, axis=0):
    shape, spec = ((SIZE, WIDTH), P("x")) if axis == 0 else ((WIDTH, SIZE), P(None, "x"))
    a = jax.device_put(random(shape, 1), NamedSharding(mesh, spec))
    return jax.device_put(random((WIDTH, WIDTH)), NamedSharding(mesh, P())), a


def collectives(function, *args):
    return COLLECTIVE.findall(jax.jit(function).lower(*args).compile().as_text())


def on_host(*args):
    return [jax.device_get(x) for x in args]


@pytest.fixture(params=["auto", "auto, without a context", "explicit"])
def mesh(request, auto_mesh, explicit_mesh):
    """A mesh with the axis "x"."""
    if request.param == "auto, without a context":
        yield auto_mesh
        return
    chosen = explicit_mesh if request.param == "explicit" else auto_mesh
    with set_mesh(chosen):
        yield chosen


@pytest.fixture
def ours():
    return functools.partial(bmap, f)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("batch_size", [4, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_values(ours, mesh, axis, batch_size, jit):
    args = arguments(mesh, axis)
    mapped = ours((None, axis), axis, batch_size=batch_size)
    result = (jax.jit(mapped) if jit else mapped)(*args)
    assert_close(jax.device_get(result), jax.vmap(f, (None, axis), axis)(*on_host(*args)))
    assert result.sharding.is_equivalent_to(args[1].sharding, 2)
    assert {shard.data.shape[axis] for shard in result.addressable_shards} == {SIZE // 4}
    assert_close(jax.device_get(jax.jit(lambda y: y * 2)(result)), 2 * jax.device_get(result))


@pytest.mark.parametrize("axis", [0, 1])
def test_no_collectives(ours, mesh, axis):
    mapped = ours((None, axis), axis, batch_size=4)
    args = arguments(mesh, axis)
    assert collectives(mapped, *args) == []
    assert collectives(jax.grad(loss(mapped), 1), *args) == []
    assert collectives(lambda w, a: jax.jvp(mapped, (w, a), (w, a)), *args) == []


NARROWER = {
    "fewer": lambda w, a: f(w, a)[:3],
    "one": lambda w, a: f(w, a).sum(),
    "single": lambda w, a: f(w, a).astype("f"),
}


@pytest.mark.parametrize("name", NARROWER)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_no_collectives_where_results_are_of_another_type(mesh, name, checkpoint):
    mapped, args = bmap(NARROWER[name], (None, 0), batch_size=4, checkpoint=checkpoint), arguments(mesh)
    gradient = jax.grad(loss(mapped), 1)
    assert collectives(gradient, *args) == []
    assert jax.jit(gradient)(*args).sharding.is_equivalent_to(args[1].sharding, 2)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients(ours, mesh, checkpoint):
    args = arguments(mesh)
    gradients = jax.grad(loss(ours((None, 0), batch_size=4, checkpoint=checkpoint)), (0, 1))
    d_w, d_a = jax.jit(gradients)(*args)
    assert_close(jax.device_get((d_w, d_a)), jax.grad(loss(jax.vmap(f, (None, 0))), (0, 1))(*on_host(*args)))
    assert d_a.sharding.is_equivalent_to(args[1].sharding, 2)
    assert set(collectives(gradients, *args)) == {"all-reduce"}  # of the unmapped argument's cotangent


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_reductions(ours, mesh, name):
    args = arguments(mesh)
    mapped = ours((None, 0), batch_size=4, reduce=name)

    def twin(w, a):
        return getattr(jnp, name)(jax.vmap(f, (None, 0))(w, a), axis=0)

    assert_close(jax.device_get(jax.jit(mapped)(*args)), twin(*on_host(*args)))
    assert_close(jax.device_get(jax.jit(jax.jacrev(mapped))(*args)), jax.jacrev(twin)(*on_host(*args)))


def test_a_reduction_that_keeps_the_order(mesh):
    a = jax.device_put(random((SIZE, 2, 2)), NamedSharding(mesh, P("x")))
    product = jax.jit(bmap(lambda x: x, batch_size=4, reduce=(jnp.eye(2), jnp.matmul)))(a)
    np.testing.assert_allclose(product, functools.reduce(np.matmul, np.asarray(random((SIZE, 2, 2)))), rtol=1e-10)


def test_values_closed_over(mesh):
    w, a = arguments(mesh)
    result = jax.jit(lambda w, a: bmap(lambda x: w @ x, batch_size=4)(a))(w, a)
    assert_close(jax.device_get(result), jax.vmap(f, (None, 0))(w, a) * 0 + jax.device_get(a) @ jax.device_get(w).T)


def test_every_axis_but_the_mapped_one_sharded(explicit_mesh):
    with set_mesh(explicit_mesh):
        a = jax.device_put(random((8, 12)), NamedSharding(explicit_mesh, P("x")))
        result = jax.jit(bmap(jnp.sin, 1, 1, batch_size=5))(a)
        gradient = jax.jit(jax.grad(lambda a: jnp.sum(bmap(jnp.sin, 1, 1, batch_size=5)(a))))(a)
    assert_close(jax.device_get(result), jnp.sin(random((8, 12))))
    assert_close(jax.device_get(gradient), jnp.cos(random((8, 12))))
    assert result.sharding.is_equivalent_to(a.sharding, 2)


def test_batch_size_counts_on_each_device_of_an_explicit_mesh(explicit_mesh):
    with set_mesh(explicit_mesh):
        w, a = arguments(explicit_mesh)
        assert bmap(f, (None, 0), batch_size=5).batch_size_for(w, a) == 5
        assert bmap(f, (None, 0), batch_size=100).batch_size_for(w, a) == SIZE // 4


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("reduce", [None, "sum", "max"])
def test_inside_shard_map(auto_mesh, checkpoint, reduce):
    """With a smaller chunk, types that vary, and cotangents that are summed over the devices."""
    args = arguments(auto_mesh)

    def over_devices(w, a):
        mapped = jax.shard_map(
            lambda w, a: jnp.atleast_2d(bmap(f, (None, 0), batch_size=3, checkpoint=checkpoint, reduce=reduce)(w, a)),
            mesh=auto_mesh,
            in_specs=(P(), P("x")),
            out_specs=P("x"),
        )
        return mapped(w, a)

    def twin(w, a):
        parts = [jax.vmap(f, (None, 0))(w, part) for part in jnp.split(a, 4)]
        reduced = [part if reduce is None else getattr(jnp, reduce)(part, axis=0)[None] for part in parts]
        return jnp.concatenate(reduced)

    assert_close(jax.device_get(jax.jit(over_devices)(*args)), twin(*on_host(*args)))
    gradients = jax.jit(jax.grad(loss(over_devices), (0, 1)))(*args)
    assert_close(jax.device_get(gradients), jax.grad(loss(twin), (0, 1))(*on_host(*args)))


def test_a_length_that_the_devices_do_not_divide():
    a = random((SIZE + 1, WIDTH))
    assert_close(jax.jit(bmap(jnp.sin, batch_size=8))(a), jnp.sin(a))


# Of one argument each device has its own part, of the other all have the same.
MIXED = {
    "both mapped": (lambda x, w: x * w, (0, 0)),
    "one mapped": (lambda x, w: jnp.tanh(x * w[0]), (0, None)),
    "the other mapped": (lambda x, w: jnp.tanh(x[0] * w), (None, 0)),
    "results of each": (lambda x, w: (x * 2, w), (0, 0)),
}


@pytest.mark.parametrize("name", MIXED)
def test_arguments_that_vary_over_devices_beside_others_that_do_not(auto_mesh, name):
    f, axes = MIXED[name]
    x, w = random((7, 3)), random((4 * 7, 3), 1)

    def over_devices(by):
        def shard(x, w):
            mapped = by(f, axes)
            gradients = jax.grad(lambda x, w: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(mapped(x, w))), (0, 1))
            return mapped(x, w), gradients(x, w)[1]

        return jax.shard_map(shard, mesh=auto_mesh, in_specs=(P(), P("x")), out_specs=P("x"))(x, w)

    assert_close(over_devices(functools.partial(bmap, batch_size=3)), over_devices(jax.vmap))


def test_a_sum_over_devices_inside(auto_mesh):
    """What is the same on all devices stays so: a gradient is no multiple of it."""

    def over_devices(mapped, out_spec):
        def shard(w):
            return mapped(w), jax.grad(lambda w: jnp.sum(jnp.sin(mapped(w))))(w)

        return jax.shard_map(shard, mesh=auto_mesh, in_specs=P("x"), out_specs=(out_spec, P("x")))(random((4 * 7, 3)))

    def psum(a):
        return jax.lax.psum(a, "x")

    ours = over_devices(bmap(psum, batch_size=3, reduce="sum"), P())
    assert_close(ours, over_devices(lambda w: jnp.sum(jax.vmap(psum)(w), axis=0), P()))


def test_vmap_over_a_sharded_axis_of_a_gradient(explicit_mesh):
    def gradient(by):
        mapped = by(lambda w, x: jnp.tanh(x @ w) * w[0], (None, 0))
        return jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.sin(mapped(w, x)))), (0, None))

    w, x = random((4, 3, 3)), random((7, 3), 1)
    with set_mesh(explicit_mesh):
        sharded = jax.device_put(w, NamedSharding(explicit_mesh, P("x")))
        ours = jax.jit(gradient(functools.partial(bmap, batch_size=3)))(sharded, x)
    assert_close(jax.device_get(ours), gradient(jax.vmap)(w, x))


# --- reductions on an Explicit mesh: as if the results of jax.vmap were reduced ---------------------------------------

NAMES = ["sum", "mean", "max", "min"]


@pytest.fixture
def grid():
    """A mesh with the axes "x", over which elements are spread, and "y", over which each of them is."""
    kinds, devices = (jax.sharding.AxisType.Explicit,) * 2, jax.devices("cpu")[:4]
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds, devices=devices)
    with set_mesh(mesh):
        yield mesh


def put(mesh, a, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))


def few_numbers():
    """Of each element some are equal to those of others: to many, on both devices."""
    return jnp.asarray(np.random.default_rng(0).integers(-1, 2, (8, 3, 4)), "float64")


ELEMENTS = {
    "random": random((8, 3, 4)),
    "equal ones": few_numbers(),
    "equal on one device": few_numbers().at[4:].set(-1).at[0].set(-1),
    "infinities": few_numbers().at[:, 0].set(jnp.inf).at[1:6, 1].set(-jnp.inf).at[5, 2].set(jnp.inf),
}


def product(w, a):
    return a * w


def shifted(w, a):
    """Its derivatives are finite everywhere."""
    return a + jnp.tanh(w)


def both(name, f, in_axes=(None, 0), batch_size=3):
    def twin(*args):
        return getattr(jnp, name)(jax.vmap(f, in_axes)(*args), axis=0)

    return bmap(f, in_axes, batch_size=batch_size, reduce=name), twin


def gradient(function):
    return jax.grad(lambda *args: jnp.sum(jnp.tanh(function(*args))), (0, 1))


def along_itself(function):
    return lambda *args: jax.jvp(function, args, jax.tree.map(jnp.tanh, args))


DERIVATIVES = {"gradient": gradient, "product with the hessian": lambda f: along_itself(gradient(f))}
TRANSFORMS = {"value": lambda f: f, "jvp": along_itself} | DERIVATIVES


def specs(tree):
    return [jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree)]


def assert_same(ours, twin):
    assert_close(jax.device_get(ours), jax.device_get(twin))
    assert specs(ours) == specs(twin)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", ELEMENTS)
def test_reductions_keep_the_sharding_of_each_element(grid, values, name, transform):
    args = put(grid, jnp.full((3, 4), 1.5), None, "y"), put(grid, ELEMENTS[values], "x")
    functions = both(name, shifted if values == "infinities" else product)
    ours, twin = (jax.jit(TRANSFORMS[transform](f))(*args) for f in functions)
    assert_close(jax.device_get(ours), jax.device_get(twin))
    # JAX 0.7 gives gradients that are spread over more than the arguments.
    wanted = specs(args) if transform in DERIVATIVES else specs(jax.tree.leaves(twin)[:1])
    assert specs(ours) == wanted * (len(jax.tree.leaves(ours)) // len(wanted))


@pytest.mark.parametrize("spec", [("x",), ("x", None, "y"), ("y", "x"), (("x", "y"),), (None, "x", "y")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_reductions_of_elements_that_are_spread_themselves(grid, name, spec):
    a = put(grid, random((8, 2, 4)), *spec)
    ours, twin = both(name, jnp.sin, 0, 1)
    assert_same(ours(a), twin(a))
    assert_same(jax.jit(ours)(a), jax.jit(twin)(a))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "bfloat16", "float32", "complex128"])
@pytest.mark.parametrize("name", NAMES)
def test_reductions_of_each_dtype(grid, name, dtype):
    a = put(grid, (jnp.arange(32).reshape(8, 4) % 7 - 1).astype(dtype), "x", "y")
    ours, twin = both(name, lambda a: a, 0)
    ours, twin = jax.jit(ours)(a), twin(*on_host(a))  # XLA cannot compute the twin's complex extrema on several devices
    assert ours.dtype == twin.dtype
    assert specs(ours) == [P("y")]
    np.testing.assert_array_equal(*(np.asarray(jax.device_get(x).astype("complex128")) for x in (ours, twin)))


@pytest.mark.parametrize("name", ["max", "min"])
def test_derivatives_of_equal_extrema_of_few_bits(grid, name):
    a = put(grid, few_numbers().astype("bfloat16"), "x", None, "y")
    ours, twin = (jax.jit(jax.grad(lambda a, f=f: jnp.sum(f(a)))) for f in both(name, lambda a: a, 0))
    assert specs(ours(a)) == specs(twin(a))
    shares = [np.asarray(jax.device_get(g(a)).astype("float64")) for g in (ours, twin)]
    np.testing.assert_allclose(*shares, rtol=1e-2)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(a)))))])
def test_a_reduction_of_ones_own_keeps_the_sharding_of_each_element(grid, transform):
    a = random((8, 3, 4))
    ours = transform(bmap(lambda x: x, batch_size=3, reduce=(0.0, lambda a, b: a + b + 0 * a * b)))
    assert_same(ours(put(grid, a, "x", None, "y")), transform(lambda a: jnp.sum(a, 0))(put(grid, a, "x", None, "y")))


def test_the_order_of_elements_that_are_spread_themselves(grid):
    def last(a, b):
        return {"it": a["it"] * (1 - b["any"]) + b["it"], "any": jnp.maximum(a["any"], b["any"])}

    a = put(grid, random((8, 4)), "x", "y")
    init = {"it": 0.0, "any": 0.0}
    found = jax.jit(bmap(lambda x: {"it": x, "any": x * 0 + 1}, batch_size=3, reduce=(init, last)))(a)
    assert_close(jax.device_get(found["it"]), random((8, 4))[-1])
    assert specs(found["it"]) == [P("y")]


def outer(w, a):
    return jax.grad(lambda w: jnp.sum(jnp.tanh(a @ w)))(w)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", ["value", "jvp"])
def test_reductions_gather_nothing(grid, name, transform):
    """The devices add up what each of them has, once, as for jax.vmap."""
    args = put(grid, random((16, 32)), None, "y"), put(grid, random((8, 16), 1), "x")
    ours, twin = (collectives(TRANSFORMS[transform](f), *args) for f in both(name, outer))
    assert ours == twin
    assert set(ours) == {"all-reduce"}


@pytest.mark.parametrize("name", NAMES)
def test_temporaries_of_a_reduced_gradient(auto_mesh, explicit_mesh, name):
    def temporaries(mesh, batch_size):
        with set_mesh(mesh):
            args = put(mesh, random((64, 128))), put(mesh, random((32, 64), 1), "x")
            ours = bmap(outer, (None, 0), batch_size=batch_size, reduce=name)
            return compiled(ours, *args).memory_analysis().temp_size_in_bytes

    # On an Auto mesh batch_size counts the elements on all four devices.
    assert temporaries(explicit_mesh, 2) <= 1.1 * temporaries(auto_mesh, 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [("x",), (("x", "y"),), ("y",)], ids=str)
def test_a_reduction_of_what_does_not_depend_on_the_axis(grid, name, spec):
    w, a = put(grid, random((3, 4), 1), None, "y" if spec == ("x",) else None), put(grid, random(8), *spec)
    ours, twin = both(name, lambda w, _: jnp.sin(w), batch_size=1)
    assert_same(jax.jit(ours)(w, a), jax.jit(twin)(w, a))
    assert_close(jax.jit(gradient(ours))(w, a)[0], jax.jit(gradient(twin))(w, a)[0])
    number, _ = both(name, lambda _: 1.5, 0)
    assert jax.jit(number)(a) == (12.0 if name == "sum" else 1.5)


@pytest.mark.parametrize("size", [4002, 4004])
def test_an_axis_over_some_of_the_devices(size):
    """Two of the four, without a mesh that says so: the axis is divided as finely as it can be."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    a = put(mesh, random((size, 3)), "x")
    ours = bmap(jnp.sin, batch_size=100)
    assert collectives(ours, a) == []
    assert jax.jit(ours)(a).sharding.is_equivalent_to(a.sharding, 2)
    assert_close(jax.device_get(jax.jit(ours)(a)), jnp.sin(random((size, 3))))
