"""Everything that one may say to bmap, said as to jax.vmap: values, containers, errors, bars, threads, devices."""

import functools
import gc
import inspect
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from batchrules._bmap import bmap

SIZE = 7
by_threes = functools.partial(bmap, batch_size=3)


def vector(seed=0):
    return random(SIZE, seed)


def matrix(seed=0):
    return random((SIZE, 4), seed)


def set_mesh(mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


# --- the same values as vmap -----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Any
    y: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["p", "q"], meta_fields=["n"])
@dataclass
class Record:
    p: Any
    q: Any
    n: int


class Unhashable:
    factor = 3.0
    __hash__ = None


class Scaled:
    """An object that is called, and one that has a method."""

    factor = 3.0

    def __call__(self, x):
        return x * self.factor

    def method(self, x):
        return x * self.factor


def first_two(t, u):
    return t[0] + t[1] + u


RIGHT = {
    "in_axes a list": (jnp.add, {"in_axes": [0, None]}, (vector(), random(()))),
    "in_axes a list in a list": (first_two, {"in_axes": ([0, None], 0)}, ([vector(), random(())], vector(1))),
    "in_axes a tuple in a tuple": (first_two, {"in_axes": ((None, 0), None)}, ((random(()), vector()), random((), 1))),
    "in_axes a dict": (
        lambda d: d["a"] * d["b"],
        {"in_axes": ({"a": 0, "b": None},)},
        ({"a": vector(), "b": random(())},),
    ),
    "in_axes a named tuple": (lambda t: t.x * t.y, {"in_axes": (Pair(-1, None),)}, (Pair(vector(), random(())),)),
    "in_axes a dataclass": (
        lambda r: Record(r.p * r.n, r.q, r.n),
        {"in_axes": (Record(1, None, 3),), "out_axes": Record(-1, None, 3)},
        (Record(random((4, SIZE)), random(()), 3),),
    ),
    "out_axes a list": (lambda x: [x, x], {"out_axes": [0, 1]}, (matrix(),)),
    "out_axes a dict with int keys": (lambda d: d, {"out_axes": {1: 0, 2: 1}}, ({1: matrix(), 2: matrix(1)},)),
    "out_axes negative for what every element shares": (lambda _: jnp.ones((2, 3)), {"out_axes": -2}, (matrix(),)),
    "out_axes None for an array that every element shares": (
        lambda _, y: y,
        {"in_axes": (0, None), "out_axes": None},
        (matrix(), vector()),
    ),
    "out_axes None for a key that every element shares": (
        lambda k, x: (k, x),
        {"in_axes": (None, 0), "out_axes": (None, 0)},
        (jax.random.key(0), vector()),
    ),
    "a shared key for each element": (lambda k, x: (k, x), {"in_axes": (None, 0)}, (jax.random.key(0), vector())),
    "keys along axis 1": (
        lambda k: (jax.random.normal(k[0]), k),
        {"in_axes": 1, "out_axes": (0, 1)},
        (jax.random.split(jax.random.key(0), (2, SIZE)),),
    ),
    "raw keys": (jax.random.normal, {}, (jax.random.split(jax.random.PRNGKey(0), SIZE),)),
    "an ordered dict": (lambda d: d, {}, (OrderedDict(b=vector(), a=vector(1)),)),
    "a default dict": (lambda d: d["b"], {}, (defaultdict(int, b=vector(), a=vector(1)),)),
    "lists of arrays": (lambda t: t[0] + t[1], {}, ([vector(), vector(1)],)),
    "None among the arguments": (lambda x, n: x if n is None else 0, {}, (vector(), None)),
    "nothing returned": (lambda _: None, {}, (vector(),)),
    "an empty tuple returned": (lambda _: (), {}, (vector(),)),
    "None among the results": (lambda x: (x, None), {"out_axes": (0, None)}, (vector(),)),
    "Python numbers returned": (lambda _: (3, 2.0, True, 1j), {}, (vector(),)),
    "NumPy numbers returned": (lambda _: (np.float32(3), np.arange(3)), {}, (vector(),)),
    "axis_size that agrees": (jnp.sin, {"axis_size": SIZE}, (vector(),)),
    "axis_size a NumPy int": (jnp.sin, {"axis_size": np.int64(SIZE)}, (vector(),)),
    "axis_size alone": (lambda x: x, {"in_axes": None, "axis_size": SIZE}, (vector(),)),
    "axis_size alone, in_axes a tuple": (lambda x: x, {"in_axes": (None,), "axis_size": SIZE}, (vector(),)),
    "axis_size 0": (lambda: jnp.ones(3), {"axis_size": 0}, ()),
    "a callable object": (Scaled(), {}, (vector(),)),
    "a bound method": (Scaled().method, {}, (vector(),)),
    "a partial": (functools.partial(jnp.add, random(())), {}, (vector(),)),
    "a compiled function": (jax.jit(jnp.sin), {}, (vector(),)),
    "a compiled function with a static argument": (
        jax.jit(lambda x, n: x * n, static_argnums=1),
        {"in_axes": (0, None)},
        (vector(), 3),
    ),
    "a function among the arguments": (lambda f, x: f(x), {"in_axes": (None, 0)}, (jnp.sin, vector())),
    "a module among the arguments": (lambda m, x: m.sin(x), {"in_axes": (None, 0)}, (jnp, vector())),
    "a jax.tree_util.Partial among the arguments": (
        lambda f, x: f(x),
        {"in_axes": (None, 0)},
        (jax.tree_util.Partial(jnp.add, random(())), vector()),
    ),
    "an argument without hash": (lambda x, u: x * u.factor, {"in_axes": (0, None)}, (vector(), Unhashable())),
    "a string in a tuple": (lambda t: t[0] * len(t[1]), {"in_axes": ((0, None),)}, ((vector(), "abc"),)),
    "4-bit integers": (lambda x: x, {}, (jnp.arange(SIZE, dtype="int4"),)),
    "8-bit floats": (lambda x: x, {}, (jnp.arange(SIZE).astype("float8_e4m3fn"),)),
    "a NumPy array in Fortran's order": (jnp.sin, {"in_axes": 1}, (np.asfortranarray(random((4, SIZE))),)),
    "a NumPy array backwards": (jnp.sin, {}, (np.asarray(vector())[::-1],)),
    "an empty axis in the middle": (lambda x: x * 2, {"in_axes": 1, "out_axes": 1}, (jnp.zeros((3, 0)),)),
    "elements of size 0": (lambda x: x * 2, {"in_axes": 1, "out_axes": 1}, (jnp.zeros((0, 3)),)),
    "one element": (lambda x: x * 2, {}, (jnp.ones(1),)),
}


def kind_and_values(x):
    """The type, with whether it is weak, and the numbers of an array or a number."""
    x = jnp.asarray(x)
    numbers = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return (x.shape, x.dtype, getattr(jax.typeof(x), "weak_type", False)), np.asarray(numbers).astype("complex128")


def assert_same(ours, twin):
    """The same containers, types and values."""
    assert jax.tree.structure(ours) == jax.tree.structure(twin)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(twin), strict=True):
        (kind, values), (wanted_kind, wanted) = kind_and_values(a), kind_and_values(b)
        assert kind == wanted_kind
        np.testing.assert_allclose(values, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("case", RIGHT)
def test_equals_vmap(case, batch_size):
    f, axes, args = RIGHT[case]
    assert_same(bmap(f, **axes, batch_size=batch_size)(*args), jax.vmap(f, **axes)(*args))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("f", [lambda x: x, lambda x: x * 2, lambda x: (x, 1.0)], ids=["same", "twice", "pair"])
def test_weak_types_stay_weak(f, jit):
    """Else what is computed with the result has another dtype."""
    weak = jax.vmap(lambda _: 2.0)(vector())
    wrap = jax.jit if jit else lambda g: g
    assert_same(wrap(by_threes(f))(weak), wrap(jax.vmap(f))(weak))


KEYWORDS = {
    "mapped alone": {"x": vector()},
    "called as our own arguments": {"args": vector(), "kwargs": vector(1), "fun": vector(2), "call": vector(3)},
    "called self": {"self": vector()},
    "None": {"x": vector(), "n": None},
    "a container": {"x": {"a": [vector(), vector(1)]}},
}


@pytest.mark.parametrize("case", KEYWORDS)
def test_keyword_arguments(case):
    kwargs = KEYWORDS[case]
    assert_same(by_threes(lambda **kwargs: kwargs)(**kwargs), jax.vmap(lambda **kwargs: kwargs)(**kwargs))


@pytest.mark.parametrize("in_axes", [None, 0, ()])
def test_keyword_arguments_are_mapped_whatever_in_axes_is(in_axes):
    assert_same(by_threes(lambda *, x: x * 2, in_axes=in_axes)(x=vector()), vector() * 2)


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (3, 2), (16, 6), (17, 16)])
def test_one_compiled_function_for_many_shapes(size, batch_size):
    ours = jax.jit(bmap(lambda x: (jnp.sin(x), jnp.sum(x)), 1, (-1, 0), batch_size=batch_size))
    for shape in [(2, size), (0, size), (3, size, 2)]:
        twin = jax.vmap(lambda x: (jnp.sin(x), jnp.sum(x)), 1, (-1, 0))
        assert_same(ours(random(shape)), twin(random(shape)))


# --- the same errors as vmap -----------------------------------------------------------------------------------------

WRONG = {
    "in_axes a dict": (jnp.sin, {"in_axes": {"a": 0}}, (vector(),)),
    "in_axes a bool": (jnp.sin, {"in_axes": True}, (matrix(),)),
    "in_axes a float": (jnp.sin, {"in_axes": 0.0}, (vector(),)),
    "in_axes a NumPy int": (jnp.sin, {"in_axes": np.int64(0)}, (vector(),)),
    "in_axes a tuple of NumPy ints": (jnp.sin, {"in_axes": (np.int64(0),)}, (vector(),)),
    "in_axes a tuple of strings": (jnp.sin, {"in_axes": ("a",)}, (vector(),)),
    "in_axes an array": (jnp.sin, {"in_axes": jnp.asarray(0)}, (vector(),)),
    "in_axes too long": (jnp.sin, {"in_axes": (0, 0)}, (vector(),)),
    "in_axes of another dataclass": (lambda r: r.p, {"in_axes": (Record(0, None, 4),)}, (Record(vector(), 1.0, 3),)),
    "out_axes a bool": (jnp.sin, {"out_axes": True}, (matrix(),)),
    "out_axes a float": (jnp.sin, {"out_axes": 1.0}, (matrix(),)),
    "out_axes a string": (jnp.sin, {"out_axes": "x"}, (matrix(),)),
    "out_axes a NumPy int": (jnp.sin, {"out_axes": np.int64(1)}, (matrix(),)),
    "out_axes a list for a tuple": (lambda x: (x, x), {"out_axes": [0, 1]}, (matrix(),)),
    "out_axes a tuple for an array": (jnp.sin, {"out_axes": (0,)}, (matrix(),)),
    "out_axes None in part": (lambda x: (x, 1.0), {"out_axes": (None, None)}, (matrix(),)),
    "out_axes too large for what is shared": (lambda _: jnp.ones((2, 3)), {"out_axes": 3}, (matrix(),)),
    "out_axes too small for what is shared": (lambda _: jnp.ones((2, 3)), {"out_axes": -4}, (matrix(),)),
    "a list of numbers": (lambda t: t[0], {}, ([1.0, 2.0],)),
    "a range": (lambda t: t[0], {}, (range(3),)),
    "a number among arrays": (lambda t: t[0], {}, ([vector(), 2.0],)),
    "an array without axes": (jnp.sin, {}, (np.array(2.0),)),
    "an axis that one of two lacks": (jnp.add, {"in_axes": 1}, (matrix(), vector())),
    "sizes that differ in a dict": (lambda d: d["a"], {}, ({"a": matrix(), "b": matrix().T},)),
    "axis_size that disagrees": (jnp.sin, {"axis_size": 6}, (vector(),)),
    "axis_size a string": (jnp.sin, {"axis_size": "7"}, (vector(),)),
    "axis_size negative": (lambda: jnp.ones(3), {"axis_size": -1}, ()),
    "too many arguments": (lambda x: x, {}, (vector(), vector())),
    "too few arguments": (lambda x, y: x + y, {}, (vector(),)),
    "axis_name without hash": (jnp.sin, {"axis_name": ["i"]}, (vector(),)),
    "an ordered effect": (lambda x: jax.debug.print("{}", x, ordered=True), {}, (vector(),)),
    "a branch on a value": (lambda x: x if x > 0 else -x, {}, (vector(),)),
}


def outcome(mapped, *args):
    """What became of a call: the result, or the type of the exception."""
    try:
        return mapped()(*args), None
    except Exception as error:  # noqa: BLE001  # whatever it is
        return None, error


@pytest.mark.parametrize("case", WRONG)
def test_what_vmap_rejects_is_rejected_in_its_words(case):
    f, axes, args = WRONG[case]
    twin, theirs = outcome(lambda: jax.vmap(f, **axes), *args)
    result, ours = outcome(lambda: by_threes(f, **axes), *args)
    assert type(ours) is type(theirs)
    if theirs is None:  # some versions of JAX take it
        assert_same(result, twin)
    elif case != "a branch on a value":  # says where the function was traced
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("kwargs", [{"y": vector()[:3]}, {"y": 1.0}, {"y": "abc"}], ids=["size", "number", "string"])
def test_wrong_keyword_arguments(kwargs, batch_size):
    _, theirs = outcome(lambda: lambda: jax.vmap(lambda x, y: x)(vector(), **kwargs))  # noqa: ARG005
    _, ours = outcome(lambda: lambda: bmap(lambda x, y: x, batch_size=batch_size)(vector(), **kwargs))  # noqa: ARG005
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@pytest.mark.parametrize("decorator", [False, True])
@pytest.mark.parametrize("in_axes", ["x", 0.0, {"a": 0}, (0.0,)], ids=str)
def test_wrong_in_axes_are_an_error_before_there_are_arguments(in_axes, decorator):
    with pytest.raises(TypeError, match="in_axes must be an int, None, or"):
        by_threes(None if decorator else jnp.sin, in_axes)


# --- batch_size and the other options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size",
    [
        np.array([1, 2]),
        np.array(3),
        np.bool_(True),
        np.float64(3),
        float("inf"),
        float("nan"),
        3 + 0j,
        "AUTO",
        b"auto",
        [3],
        np.array("auto"),
    ],
    ids=repr,
)
def test_batch_size_that_is_no_int(batch_size):
    with pytest.raises(TypeError, match='batch_size must be an int of at least 1, "auto" or None; got'):
        bmap(jnp.sin, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [10**40, 2**63, np.uint64(2**64 - 1), sys.maxsize, np.int8(100)], ids=repr)
def test_batch_size_that_is_huge(batch_size):
    assert_same(bmap(jnp.sin, batch_size=batch_size)(vector()), jnp.sin(vector()))
    assert bmap(jnp.sin, batch_size=batch_size).batch_size_for(vector()) == SIZE


@pytest.mark.parametrize("batch_size", [-(10**40), np.int64(0), np.int8(-1)], ids=repr)
def test_batch_size_that_is_far_too_small(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
        bmap(jnp.sin, batch_size=batch_size)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_bytes": np.float32(3)}, "max_bytes must be an int or None"),
        ({"max_bytes": "1GB"}, "max_bytes must be an int or None"),
        ({"max_bytes": np.bool_(True)}, "max_bytes must be an int or None"),
        ({"checkpoint": None}, "checkpoint must be True or False"),
        ({"checkpoint": np.bool_(True)}, "checkpoint must be True or False"),
        ({"progress": None}, "progress must be True, False or a description"),
        ({"progress": b"x"}, "progress must be True, False or a description"),
    ],
    ids=repr,
)
def test_other_options_of_a_wrong_type(options, text):
    with pytest.raises(TypeError, match=text):
        bmap(jnp.sin, batch_size="auto", **options)


# --- what comes back is a function ------------------------------------------------------------------------------------


def test_it_has_the_functions_name_text_and_signature():
    def shifted(x, *, by=3):
        """Move x."""
        return x + by

    ours = by_threes(shifted)
    assert (ours.__name__, ours.__doc__, ours.__module__) == ("shifted", "Move x.", __name__)
    assert ours.__wrapped__ is shifted
    assert inspect.signature(ours) == inspect.signature(shifted)


class Model:
    """bmap on every kind of method."""

    factor = 3.0

    @staticmethod
    @by_threes
    def static(x):
        return x * 3.0

    @classmethod
    @functools.partial(by_threes, in_axes=(None, 0))
    def of_class(cls, x):
        return x * cls.factor

    @functools.partial(by_threes, in_axes=(None, 0))
    def method(self, x):
        return x * self.factor


@pytest.mark.parametrize("name", ["static", "of_class", "method"])
def test_methods(name):
    assert_same(getattr(Model(), name)(vector()), vector() * 3.0)


def test_nested_decorators_tell_their_own_batch_size():
    ours = bmap(bmap(jnp.sin, batch_size=2), batch_size=3)
    assert ours.batch_size_for(matrix()) == 3
    assert ours.__wrapped__.batch_size_for(matrix()[0]) == 2


# --- "auto" ----------------------------------------------------------------------------------------------------------

WIDTH, LENGTH = 32, 64
WHOLE = 2 * LENGTH * WIDTH * 8  # argument and result


def layers(a):
    return jnp.tanh(jnp.sort(jnp.tile(a, 4))[:WIDTH])


def many(seed=0):
    return random((LENGTH, WIDTH), seed)


def automatic(share):
    return bmap(layers, batch_size="auto", max_bytes=int(share * WHOLE))


def map_over_two(f):
    return lambda a: jax.vmap(lambda s: f(a * s))(jnp.ones(2))[0]


AROUND = {
    "vmap": map_over_two,
    "jvp": lambda f: lambda a: jax.jvp(f, (a,), (a,))[0],
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda a: lax.scan(lambda c, _: (f(c * 0 + a), None), a, None, length=2)[0],
}


@pytest.mark.parametrize("name", AROUND)
def test_auto_under(name):
    assert_close(AROUND[name](automatic(1.3))(many()), jax.vmap(layers)(many()))


def test_auto_for_keys():
    ours = bmap(lambda key: jax.random.bits(key, (64,))[0], batch_size="auto", max_bytes=20_000)
    keys = jax.random.split(jax.random.key(0), LENGTH)
    assert 1 <= ours.batch_size_for(keys) < LENGTH
    assert_close(ours(keys), jax.vmap(lambda key: jax.random.bits(key, (64,))[0])(keys))


def test_auto_tells_arguments_apart_that_are_equal():
    def f(flag, x):
        return jnp.sum(jnp.sort(jnp.tile(x, 40))) if flag is True else jnp.sum(x)

    ours = bmap(f, (None, 0), batch_size="auto", max_bytes=WHOLE)
    assert [ours.batch_size_for(flag, many()) == LENGTH for flag in (1, True, 1.0)] == [True, False, True]


def test_auto_does_not_keep_what_it_was_called_with():
    class Big:
        @functools.partial(bmap, in_axes=(None, 0), batch_size="auto", max_bytes=10**9)
        def apply(self, x):
            return x * 2

    big = Big()
    big.apply(vector())
    alive = weakref.ref(big)
    del big
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_auto_tells_apart_arrays_on_one_device_and_on_several(auto_mesh, order):
    """Each device holds a quarter of the second."""
    arrays = [many(), jax.device_put(many(), NamedSharding(auto_mesh, P("x")))]
    ours = automatic(1.1)
    chosen = {i: ours.batch_size_for(arrays[i]) for i in order}
    assert chosen == {i: automatic(1.1).batch_size_for(arrays[i]) for i in order}


@pytest.mark.parametrize("share", [0.4, 1.2])
@pytest.mark.parametrize("jit", [False, True])
def test_auto_on_an_explicit_mesh(explicit_mesh, jit, share):
    if jit and jax.__version_info__ < (0, 8):
        pytest.skip("JAX 0.7 compiles nothing under jit on an Explicit mesh: it does not know the devices there")
    with set_mesh(explicit_mesh):
        a = jax.device_put(many(), NamedSharding(explicit_mesh, P("x")))
        ours = automatic(share)
        result = (jax.jit(ours) if jit else ours)(a)
    assert_close(jax.device_get(result), jax.vmap(layers)(many()))
    assert result.sharding.is_equivalent_to(a.sharding, 2)


def test_auto_in_shard_map(auto_mesh):
    a = jax.device_put(many(), NamedSharding(auto_mesh, P("x")))
    mapped = jax.shard_map(automatic(0.4), mesh=auto_mesh, in_specs=P("x"), out_specs=P("x"))
    assert_close(jax.device_get(jax.jit(mapped)(a)), jax.vmap(layers)(many()))


# --- threads ---------------------------------------------------------------------------------------------------------


def in_threads(work, count=8):
    """The results of `work(0)`, `work(1)`, ... at the same time."""
    results, errors = {}, []

    def one(i):
        try:
            results[i] = work(i)
        except Exception as error:  # noqa: BLE001  # reported below
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return [results[i] for i in range(count)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": "auto", "max_bytes": int(1.2 * WHOLE)}], ids=str)
def test_one_function_called_by_many_threads(options, jit):
    mapped = bmap(layers, **options)
    mapped = jax.jit(mapped) if jit else mapped
    for seed, result in enumerate(in_threads(lambda i: mapped(many(i)))):
        assert_close(result, jax.vmap(layers)(many(seed)))


def test_threads_with_gradients_and_shapes_of_their_own():
    def gradient(by):
        return jax.grad(lambda a: jnp.sum(by(jnp.sin)(a)))

    results = in_threads(lambda i: gradient(functools.partial(by_threes, checkpoint=i % 2 == 0))(random((5 + i, 2))))
    for i, result in enumerate(results):
        assert_close(result, jnp.cos(random((5 + i, 2))))


# --- the bar ---------------------------------------------------------------------------------------------------------

CHUNKS = 3  # of 13 elements, at most 5 at a time
LONG = 13


def seen(counting_bars, result=None):
    jax.block_until_ready(result)
    jax.effects_barrier()
    return [(bar.n, bar.total, bar.closed) for bar in counting_bars]


FULL = (CHUNKS, CHUNKS, True)
ONCE = {
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "jvp": lambda f: lambda a: jax.jvp(f, (a,), (a,)),
    "linearize": lambda f: lambda a: jax.linearize(f, a)[1](a),
    "hessian": lambda f: jax.hessian(lambda a: jnp.sum(f(a))),
    "vmap": lambda f: lambda a: jax.vmap(f)(jnp.stack([a, a])),
    "vmap of grad": lambda f: lambda a: jax.vmap(jax.grad(lambda a: jnp.sum(f(a))))(jnp.stack([a, a])),
    "cond": lambda f: lambda a: lax.cond(jnp.sum(a) > 1e9, jnp.cos, f, a),
    "grad of scan": lambda f: jax.grad(lambda a: jnp.sum(lax.scan(lambda c, _: (f(c), None), a, None, length=1)[0])),
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ONCE)
def test_a_bar_under(counting_bars, name, checkpoint):
    ours = bmap(jnp.sin, batch_size=5, progress=True, checkpoint=checkpoint)
    assert seen(counting_bars, jax.jit(ONCE[name](ours))(random(LONG))) == [FULL]


def test_a_bar_for_each_time_round_a_loop(counting_bars):
    ours = bmap(jnp.sin, batch_size=5, progress=True)
    result = jax.jit(lambda a: lax.fori_loop(0, 4, lambda _, c: ours(c), a))(random(LONG))
    assert seen(counting_bars, result) == [FULL] * 4


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("long", [13, 15])
def test_a_bar_for_each_time_an_outer_bmap_runs_an_inner_one(counting_bars, long, jit):
    ours = bmap(bmap(jnp.sin, batch_size=5, progress=True), batch_size=2)
    assert seen(counting_bars, (jax.jit(ours) if jit else ours)(random((6, long)))) == [FULL] * 3


def test_a_bar_over_an_inner_bmap(counting_bars):
    assert seen(counting_bars, bmap(bmap(jnp.sin, batch_size=2), batch_size=5, progress=True)(random((LONG, 6)))) == [
        FULL
    ]


def test_a_bar_after_a_run_that_failed(counting_bars):
    """It counts from the start, and is full when the run is done."""
    fails = [True]

    def on_host(x):
        if fails[0] and x > 4:
            raise RuntimeError("mine")
        return np.sin(x)

    def f(x):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), x.dtype), x, vmap_method="sequential")

    ours = jax.jit(bmap(f, batch_size=5, progress=True))
    with pytest.raises(Exception, match="mine"):  # the type is JAX's, and differs from version to version
        jax.block_until_ready(ours(jnp.arange(15.0)))
    failed = len(seen(counting_bars))
    fails[0] = False
    for runs in (1, 2):
        assert seen(counting_bars, ours(jnp.arange(15.0)))[failed:] == [FULL] * runs


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_bar_over_several_devices_counts_each_chunk_once(counting_bars, auto_mesh, explicit_mesh, axis_type):
    mesh = auto_mesh if axis_type == AxisType.Auto else explicit_mesh
    ours = bmap(jnp.sin, batch_size=4, progress=True)
    chunks = 8 if axis_type == AxisType.Auto else 2
    with set_mesh(mesh):
        a = jax.device_put(random(32), NamedSharding(mesh, P("x")))
        assert seen(counting_bars, jax.jit(ours)(a)) == [(chunks, chunks, True)]


def test_bars_of_many_threads(counting_bars):
    ours = jax.jit(bmap(jnp.sin, batch_size=5, progress=True))
    in_threads(lambda i: jax.block_until_ready(ours(random(LONG, i))))
    assert seen(counting_bars) == [FULL] * 8


@pytest.mark.parametrize(("f", "options"), [(lambda _: 1.0, {"out_axes": None}), (lambda _: (), {})], ids=["1", "()"])
def test_a_bar_where_nothing_depends_on_the_axis(counting_bars, f, options):
    ours = bmap(f, batch_size=5, progress=True, **options)
    assert seen(counting_bars, ours(random(LONG))) == [FULL]


def test_a_bar_with_an_empty_description(counting_bars):
    assert seen(counting_bars, bmap(jnp.sin, batch_size=5, progress="")(random(LONG))) == [FULL]
    assert counting_bars[0].desc == ""


def test_no_bar_over_nothing(counting_bars):
    assert seen(counting_bars, bmap(jnp.sin, batch_size=5, progress=True)(jnp.zeros(0))) == []


# --- other settings of JAX, and other devices -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disable_jit", "check_tracer_leaks", "debug_nans", "enable_checks"])
def test_with(name):
    def loss(by):
        return lambda a: jnp.sum(by(lambda x: jnp.sin(x) * 2)(a) ** 2)

    with getattr(jax, name)(True):
        ours = jax.value_and_grad(loss(functools.partial(by_threes, checkpoint=True)))(matrix())
        largest = by_threes(jnp.sin, reduce="max")(matrix())
    assert_close(ours, jax.value_and_grad(loss(jax.vmap))(matrix()))
    assert_close(largest, jnp.max(jnp.sin(matrix()), axis=0))


def test_no_hidden_transfers():
    ours = jax.jit(jax.value_and_grad(lambda a: jnp.sum(by_threes(jnp.sin)(a))))
    a = matrix()
    with jax.transfer_guard("disallow"):
        value, gradient = ours(a)
    assert_close((value, gradient), (jnp.sum(jnp.sin(a)), jnp.cos(a)))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("reduce", [None, "sum"])
def test_results_lie_on_the_device_of_the_arguments(reduce, jit):
    device = jax.devices()[1]
    ours = by_threes(jnp.sin, reduce=reduce)
    assert (jax.jit(ours) if jit else ours)(jax.device_put(matrix(), device)).devices() == {device}


SPECS = [P(("x", "y")), P("x", "y"), P(None, "y")]
LAYOUTS = {
    "axis 0 to 0": {},
    "axis 0 to 1": {"out_axes": 1},
    "axis 1 to 0": {"in_axes": 1},
}


@pytest.fixture(scope="module")
def square():
    """Two by two devices, both axes explicit."""
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:4])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_on_a_mesh_with_two_axes(square, name, spec):
    with set_mesh(square):
        a = jax.device_put(random((32, 8)), NamedSharding(square, spec))
        ours, twin = (jax.jit(by(jnp.sin, **LAYOUTS[name])) for by in (functools.partial(bmap, batch_size=3), jax.vmap))
        result, wanted = ours(a), twin(a)
    assert_close(jax.device_get(result), jax.device_get(wanted))
    assert result.sharding.is_equivalent_to(wanted.sharding, 2)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", [{}, {"out_axes": 1}, {"reduce": "sum"}], ids=str)
def test_gradients_on_a_mesh_with_an_explicit_and_an_auto_axis(options, jit):
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds, devices=jax.devices("cpu")[:4])
    gradient = jax.grad(lambda a: jnp.sum(bmap(jnp.sin, batch_size=4, **options)(a)))
    with set_mesh(mesh):
        a = jax.device_put(random((32, 8)), NamedSharding(mesh, P("x")))
        result = (jax.jit(gradient) if jit else gradient)(a)
    assert_close(jax.device_get(result), jnp.cos(random((32, 8))))
