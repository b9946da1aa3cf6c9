"""bmap(f, ...) equals jax.vmap(f, ...), whatever the axes, the containers and the batch size."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import NETWORK_AXES, NETWORK_OUT_AXES, assert_close, network, network_arguments, random
from hypothesis import given
from hypothesis import strategies as st

from batchrules._bmap import bmap

SIZE = 12


@st.composite
def mappings(draw):
    """Axes of two arguments (not both None), of three results, a length and a batch size."""
    axes = draw(st.tuples(*[st.sampled_from([None, 0, 1, 2, -1, -2, -3])] * 2).filter(lambda a: a != (None, None)))
    out_axes = draw(st.tuples(*[st.sampled_from([0, 1, 2, -1, -3])] * 2, st.sampled_from([None, 0, -1])))
    return axes, out_axes, draw(st.integers(0, 9)), draw(st.none() | st.integers(1, 11))


@pytest.mark.parametrize("jit", [False, True])
def test_any_axes_and_any_batch_size(jit):
    wrap = jax.jit if jit else lambda f: f

    @given(mappings())
    def equals_vmap(mapping):
        (a_axis, b_axis), out_axes, size, batch_size = mapping
        a, b = (
            random((2, 3) if axis is None else _with_axis((2, 3), axis, size), i)
            for i, axis in enumerate([a_axis, b_axis])
        )

        def f(a, b):
            return a * b, (a + b).T, jnp.ones(2)

        ours = wrap(bmap(f, (a_axis, b_axis), out_axes, batch_size=batch_size))(a, b)
        assert_close(ours, jax.vmap(f, (a_axis, b_axis), out_axes)(a, b))

    equals_vmap()


def _with_axis(shape, axis, size):
    axis %= len(shape) + 1
    return (*shape[:axis], size, *shape[axis:])


@pytest.mark.parametrize("size", [7, 8, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 12, 100, None])
def test_results_that_depend_on_some_arguments(size, batch_size):
    args = network_arguments(size)
    ours = jax.jit(bmap(network, NETWORK_AXES, NETWORK_OUT_AXES, batch_size=batch_size))(*args)
    assert_close(ours, jax.vmap(network, NETWORK_AXES, NETWORK_OUT_AXES)(*args))


class Point(NamedTuple):
    x: jax.Array
    y: dict


@jax.tree_util.register_pytree_node_class
class Particle:
    """A container that only JAX knows."""

    def __init__(self, position, mass):
        self.position, self.mass = position, mass

    def tree_flatten(self):
        return (self.position, self.mass), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.mark.parametrize("batch_size", [5, SIZE])
def test_containers_and_axes_that_are_prefixes_of_them(batch_size):
    def f(point, particle, scale):
        moved = Particle(particle.position * scale, particle.mass)
        return Point(point.x + 1, {"a": point.y["a"] * point.x}), moved, [None, ()]

    point = Point(random(SIZE), {"a": random((3, SIZE), 1)})
    particle = Particle(random((SIZE, 2), 2), random((), 3))
    in_axes = (Point(0, {"a": 1}), Particle(0, None), None)
    out_axes = (Point(0, -1), Particle(1, None), 0)
    ours = bmap(f, in_axes, out_axes, batch_size=batch_size)(point, particle, random((), 4))
    assert_close(ours, jax.vmap(f, in_axes, out_axes)(point, particle, random((), 4)))


def test_keyword_arguments_are_mapped_along_axis_0():
    def f(a, *, b, c):
        return a + b["x"] * c

    b, c = {"x": random((SIZE, 3))}, random((SIZE, 3), 1)
    ours = bmap(f, in_axes=(None,), batch_size=5)(random(3, 2), b=b, c=c)
    assert_close(ours, jax.vmap(f, in_axes=(None,))(random(3, 2), b=b, c=c))


def test_arguments_that_are_no_arrays():
    def f(name, options, a, flag):
        return a * len(name) * (options["k"] or 1) if flag else a

    args = ("abc", {"k": None}, random(SIZE), True)
    in_axes = (None, None, 0, None)
    assert_close(bmap(f, in_axes, batch_size=5)(*args), jax.vmap(f, in_axes)(*args))


def test_a_function_without_arguments():
    def f():
        return jnp.arange(3.0)

    assert_close(bmap(f, out_axes=1, axis_size=5, batch_size=2)(), jax.vmap(f, out_axes=1, axis_size=5)())


@pytest.mark.parametrize("batch_size", [5, SIZE])
def test_typed_prng_keys(batch_size):
    def f(key, shared, a):
        return jax.random.split(key, 2), jax.random.normal(key, (2,)) * a, shared

    args = (jax.random.split(jax.random.key(0), SIZE), jax.random.key(1), random(SIZE))
    in_axes, out_axes = (0, None, 0), (1, 0, None)
    assert_close(bmap(f, in_axes, out_axes, batch_size=batch_size)(*args), jax.vmap(f, in_axes, out_axes)(*args))


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint32", "float16", "bfloat16", "float32", "complex64", "complex128"]
)
def test_dtypes(dtype):
    a = jnp.arange(SIZE).astype(dtype)
    assert bmap(lambda a: a, batch_size=5)(a).dtype == dtype
    assert (bmap(lambda a: a, batch_size=5)(a) == a).all()


def test_numpy_arguments():
    import numpy as np

    a = np.arange(12.0).reshape(3, 4)
    assert_close(bmap(jnp.sin, 1, batch_size=3)(a), jax.vmap(jnp.sin, 1)(a))


def test_results_with_weak_types_keep_them():
    a = random(SIZE)
    assert bmap(lambda _: 2.0, batch_size=5)(a).weak_type == jax.vmap(lambda _: 2.0)(a).weak_type


def test_an_empty_axis():
    assert bmap(lambda a: a * 2, batch_size=5)(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("size", [6, 7])
def test_vmap_of_a_state_that_differs_at_the_start_only(size):
    """Every chunk gives a state that is the same for all, and is given one that is not."""

    def last(start):
        return bmap(lambda x: x, batch_size=3, reduce=(start, lambda _, later: later))(random(size))

    assert_close(jax.jit(jax.vmap(last))(random(4, 1)), jnp.full(4, random(size)[-1]))


EMPTY = {
    "jit": jax.jit(lambda c, a: (a, c * 2)),
    "cond": lambda c, a: jax.lax.cond(True, lambda a: (a, c * 2), lambda a: (a, c * 3), a),
    "scan": lambda c, a: jax.lax.scan(lambda s, _: ((s[0] + a, s[1] * 2), None), (a, c), length=1)[0],
}


@pytest.mark.parametrize("f", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("way", ["auto", "sum", "mean", "fold"])
def test_what_does_not_depend_on_an_empty_axis_has_its_value(f, way):
    options = {
        "auto": {"batch_size": "auto", "max_bytes": 10**6},
        "sum": {"batch_size": 2, "reduce": ("sum", None)},
        "mean": {"batch_size": 2, "reduce": ("mean", None)},
        "fold": {"batch_size": 2, "reduce": ((1.0, jnp.multiply), None)},
    }[way]

    def second(by):
        return lambda c: by(c, jnp.zeros(0))[1]

    ours, twin = bmap(f, (None, 0), (0, None), **options), jax.vmap(f, (None, 0), (0, None))
    assert_close(ours(3.0, jnp.zeros(0))[1], twin(3.0, jnp.zeros(0))[1])
    assert jax.grad(second(ours))(3.0) == jax.grad(second(twin))(3.0) == 2.0


CONSTANTS = (2.0, 3, True, 1j, np.float32(2), np.int8(3), np.bool_(1), np.arange(3), None, jnp.bfloat16(1))


@pytest.mark.parametrize("reduce", [None, "sum"])
def test_constants_come_back_as_they_are(reduce):
    """In classes that a user knows: JAX has others for those in its programs."""

    def f(a):
        return a, CONSTANTS

    options = {} if reduce is None else {"reduce": (reduce, None)}
    _, ours = bmap(f, out_axes=(0, None), batch_size=5, **options)(random(SIZE))
    _, twin = jax.vmap(f, out_axes=(0, None))(random(SIZE))
    for x, y in zip(ours, twin, strict=True):
        assert jax.typeof(x) == jax.typeof(y) if y is not None else x is None
        np.testing.assert_array_equal(x, y)
        assert isinstance(x, jax.Array) or type(x) is type(y)


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_control_flow_inside(batch_size):
    def f(a, n):
        looped = jax.lax.while_loop(lambda c: c[1] < n, lambda c: (jnp.sin(c[0]), c[1] + 1), (a, 0))[0]
        scanned = jax.lax.scan(lambda c, x: (c + x, c * x), a, jnp.arange(3.0))
        return looped, scanned, jax.lax.cond(a > 0, jnp.cos, jnp.sin, a)

    args = random(SIZE), jnp.arange(SIZE) % 4
    assert_close(jax.jit(bmap(f, batch_size=batch_size))(*args), jax.vmap(f)(*args))


def test_values_closed_over_are_found_under_every_transformation():
    a, w = random(SIZE), random((), 1)

    def mapped(by):
        return lambda w: jnp.sum(by(lambda x: jnp.sin(w * x))(a))

    ours, twin = mapped(functools.partial(bmap, batch_size=5)), mapped(jax.vmap)
    assert_close(jax.jit(jax.value_and_grad(ours))(w), jax.value_and_grad(twin)(w))
    assert_close(jax.vmap(jax.grad(ours))(a), jax.vmap(jax.grad(twin))(a))


def test_vmap_of_bmap_of_bmap():
    a = random((3, 5, 7))
    ours = jax.vmap(bmap(bmap(jnp.sin, batch_size=2), in_axes=1, out_axes=1, batch_size=3), in_axes=2)
    twin = jax.vmap(jax.vmap(jax.vmap(jnp.sin), in_axes=1, out_axes=1), in_axes=2)
    assert_close(ours(a), twin(a))
    assert_close(jax.jit(ours)(a), twin(a))


@pytest.mark.parametrize("in_axis", [0, 1, None])
def test_vmap_of_bmap_with_an_argument_it_does_not_map(in_axis):
    args = (random((4, 4)), random((4, SIZE), 1), random(SIZE, 2))

    def mapped(by):
        inner = by(network, in_axes=NETWORK_AXES, out_axes=NETWORK_OUT_AXES)
        return jax.vmap(inner, in_axes=(0, None, in_axis))

    weights = jnp.stack([args[0], args[0] + 1])
    shift = args[2] if in_axis is None else jnp.stack([args[2], args[2] + 1], axis=in_axis)
    ours = mapped(functools.partial(bmap, batch_size=5))(weights, args[1], shift)
    assert_close(ours, mapped(jax.vmap)(weights, args[1], shift))


def test_as_a_decorator_it_looks_like_the_function():
    @functools.partial(bmap, in_axes=(0, None), batch_size=5)
    def f(image, settings):
        """What f does."""
        return image * settings

    @bmap(batch_size=5)
    def g(image):
        return image * 2

    assert (f.__name__, f.__doc__) == ("f", "What f does.")
    a = random(SIZE)
    assert_close(f(a, random(())), a * random(()))
    assert_close(g(a), a * 2)


def test_as_a_method():
    class Model:
        scale = 3.0

        @functools.partial(bmap, in_axes=(None, 0), batch_size=5)
        def apply(self, a):
            return a * self.scale

    a = random(SIZE)
    assert_close(Model().apply(a), a * 3.0)


def test_donated_arguments():
    ours = jax.jit(bmap(jnp.sin, batch_size=5), donate_argnums=0)
    assert_close(ours(random(SIZE) + 0), jnp.sin(random(SIZE)))


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=str)
def test_results_of_which_some_are_used(used):
    """One of them is known only within the chunks, where it is the same in each."""

    def some(by):
        def f(w, a):
            return jax.jit(lambda w, a: (w * 2, jnp.sin(w * a), a + 1))(w, a)

        def body(_, w):
            found = by(f, (None, 0), (None, 0, 0))(w, random(SIZE))
            return None, [found[i] for i in used]

        return lambda w: jax.lax.scan(body, None, w)[1]

    ours = some(functools.partial(bmap, batch_size=5))
    assert_close(jax.jit(ours)(random(2)), some(jax.vmap)(random(2)))
    assert_close(jax.jit(jax.jacrev(ours))(random(2)), jax.jacrev(some(jax.vmap))(random(2)))
