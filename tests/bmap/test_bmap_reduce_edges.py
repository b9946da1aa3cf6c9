"""reduce= at its edges: dtypes, special numbers, equal extrema, order, prefixes, devices, and what is wrong."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from batchrules._bmap import bmap

NAMES = ["sum", "mean", "max", "min"]
INF, NAN = float("inf"), float("nan")
REDUCTIONS = {name: name for name in NAMES} | {"own": (0, lambda a, b: a + b)}


def same(x):
    return x


def reduced(name, batch_size=3, f=same, **options):
    return bmap(f, batch_size=batch_size, reduce=name, **options)


def numbers(x):
    return np.asarray(x.astype("complex128"))


def set_mesh(mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


# --- dtypes ----------------------------------------------------------------------------------------------------------

INTEGERS = ["int8", "uint8", "int16", "uint32", "int64"]
EIGHT_BITS = ["float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("end", ["min", "max"])
def test_integers_overflow_as_in_jax(name, dtype, end):
    a = jnp.full(9, getattr(jnp.iinfo(dtype), end), dtype)
    ours, twin = reduced(name)(a), getattr(jnp, name)(a)
    assert ours.dtype == twin.dtype
    np.testing.assert_array_equal(numbers(ours), numbers(twin))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("values", [[3, -2, 1, 0, 2], [-2, -1, -3]], ids=str)
def test_extrema_of_floats_that_may_have_no_infinity(name, dtype, values):
    a = jnp.asarray(values, "float32").astype(dtype)
    ours = reduced(name, 2)(a)
    assert ours.dtype == dtype
    assert numbers(ours) == getattr(np, name)(values)


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_sums_of_8_bit_floats(name, dtype):
    a = jnp.ones(8, dtype)
    assert reduced(name, 2)(a).dtype == dtype
    assert numbers(reduced(name, 2)(a)) == (8 if name == "sum" else 1)


COMPLEX = {
    "equal real parts": [1 + 2j, 1 + 3j, 0.5 + 9j, 1 - 1j],
    "equal numbers": [1 + 1j, 1 + 1j, 1 + 1j],
    "infinities": [complex(-INF, -1), complex(-INF, -2)],
    "the least of all": [complex(-INF, -INF)] * 3,
    "the greatest of all": [complex(INF, INF)] * 3,
}


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("case", COMPLEX)
def test_extrema_of_complex_numbers(name, case, batch_size):
    a = jnp.asarray(COMPLEX[case])
    assert complex(reduced(name, batch_size)(a)) == complex(getattr(jnp, name)(a))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_derivatives_of_complex_numbers(name, checkpoint):
    a = jax.lax.complex(random(8), random(8, 1))

    def loss(reduction):
        return lambda a: jnp.abs(reduction(jnp.sin(a))) ** 2

    ours = loss(reduced(name, checkpoint=checkpoint))
    assert_close(jax.grad(ours)(a), jax.grad(loss(getattr(jnp, name)))(a))


RETURNED = {"int": 2, "float": 2.0, "bool": True, "complex": 1j, "float32": np.float32(2), "int8": np.int8(3)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", RETURNED)
def test_numbers_that_every_element_shares_have_the_type_of_jax(name, kind):
    def f(_):
        return RETURNED[kind]

    ours, twin = reduced(name, f=f)(random(7)), getattr(jnp, name)(jax.vmap(f)(random(7)), axis=0)
    assert (ours.dtype, ours.weak_type) == (twin.dtype, twin.weak_type)
    np.testing.assert_allclose(numbers(ours), numbers(twin), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weak_types(name):
    weak = jax.vmap(lambda _: 2.0)(random(7))
    ours, twin = reduced(name)(weak), getattr(jnp, name)(weak)
    assert (ours.dtype, ours.weak_type) == (twin.dtype, twin.weak_type)


# --- numbers that are not finite, and equal extrema -------------------------------------------------------------------

SPECIAL = [[INF, INF, 1.0], [-INF, -INF, -INF], [0.0, -0.0, 0.0], [1.0, -INF, 2.0, 2.0]]


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("values", SPECIAL, ids=str)
def test_derivatives_at_special_numbers(name, values, batch_size):
    a = jnp.asarray(values)
    ours, twin = reduced(name, batch_size), getattr(jnp, name)
    assert_close(jax.jit(jax.value_and_grad(ours))(a), jax.value_and_grad(twin)(a))
    assert_close(jax.jit(jax.jacfwd(ours))(a), jax.jacfwd(twin)(a))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("values", [[INF, INF, 1.0], [-INF], [2.0, 1.0, 2.0]], ids=str)
def test_second_derivatives_at_special_numbers(name, values):
    a = jnp.asarray(values)
    ours = jax.hessian(lambda a: reduced(name, 2)(a**2))(a)
    assert_close(ours, jax.hessian(lambda a: getattr(jnp, name)(a**2))(a))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (5, 2), (9, 4), (12, 12)])
def test_equal_extrema_share_the_derivative(name, size, batch_size):
    """Wherever they are."""
    rows = jnp.asarray(np.random.default_rng(size).integers(0, 3, size=(50, size)), "float64")
    ours, twin = jax.grad(reduced(name, batch_size)), jax.grad(getattr(jnp, name))
    assert_close(jax.jit(jax.vmap(ours))(rows), jax.vmap(twin)(rows))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("axis", [0, 1])
def test_equal_extrema_in_rows_and_columns(name, transform, axis):
    a = jnp.asarray(np.random.default_rng(0).integers(0, 3, size=(9, 7)), "float64")
    ours, twin = reduced(name, 2, in_axes=axis), functools.partial(getattr(jnp, name), axis=axis)
    assert_close(transform(ours)(a), transform(twin)(a))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["max", "min"])
def test_many_equal_extrema_of_few_bits_share_the_derivative(name, dtype):
    """What one element gets is right to the precision of its dtype, however many chunks there are."""
    ones = jnp.ones(1000, dtype)
    ours = jax.grad(lambda a: reduced(name, 1)(a).astype("float32"))(ones)
    np.testing.assert_allclose(ours.astype("float64"), 1 / 1000, rtol=float(2 * jnp.finfo(dtype).eps))


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_one_element(name, batch_size):
    a = random((1, 2))
    assert_close(reduced(REDUCTIONS[name], batch_size)(a), a[0])


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("jit", [False, True])
def test_a_reduction_of_ones_own_over_nothing_is_its_neutral_element(batch_size, jit):
    ours = reduced((1.0, lambda a, b: a * b), batch_size)
    assert_close((jax.jit(ours) if jit else ours)(jnp.zeros((0, 2))), jnp.ones(2))


@pytest.mark.parametrize("dtype", ["int32", "float64"])
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_nothing(name, dtype):
    empty = jnp.zeros((0, 2), dtype)
    assert_close(reduced(name)(empty), getattr(jnp, name)(empty, axis=0))


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 11, 17])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_the_first_and_the_last_element(size, batch_size):
    """What comes first must stay there, in chunks of any size."""

    def both(a, b):
        first = jax.tree.map(functools.partial(jnp.where, a["any"]), a["first"], b["first"])
        last = jax.tree.map(functools.partial(jnp.where, b["any"]), b["last"], a["last"])
        return {"first": first, "last": last, "any": a["any"] | b["any"]}

    init = {"first": 0, "last": 0, "any": False}
    ours = bmap(lambda x: {"first": x, "last": x, "any": True}, batch_size=batch_size, reduce=(init, both))
    found = jax.jit(ours)(jnp.arange(size) + 5)
    assert (int(found["first"]), int(found["last"])) == (5, size + 4)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_derivatives_of_a_matrix_product(transform, checkpoint):
    a = random((7, 2, 2))
    ours = reduced((jnp.eye(2), jnp.matmul), checkpoint=checkpoint)
    assert_close(transform(ours)(a), transform(lambda a: functools.reduce(jnp.matmul, list(a)))(a))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_the_order_on_several_devices(auto_mesh, explicit_mesh, kind, batch_size):
    """Of shards that are no multiple of the chunks."""
    mesh = auto_mesh if kind == "auto" else explicit_mesh
    a = random((28, 2, 2))
    with set_mesh(mesh):
        sharded = jax.device_put(a, NamedSharding(mesh, P("x")))
        product = jax.jit(reduced((jnp.eye(2), jnp.matmul), batch_size))(sharded)
    np.testing.assert_allclose(jax.device_get(product), functools.reduce(np.matmul, np.asarray(a)), rtol=1e-9)


def test_a_combine_that_closes_over_what_is_differentiated():
    slope = jax.grad(lambda s: reduced((1.0, lambda a, b: a * b), f=lambda x: x * s)(jnp.arange(1.0, 5.0)))
    assert_close(slope(2.0), jnp.asarray(4 * 24 * 2.0**3))
    slope = jax.grad(lambda s: reduced((0.0, lambda a, b: a + b + s * 0 + s * a * b), 2)(jnp.ones(2)))
    assert_close(slope(2.0), jnp.asarray(1.0))


def test_keys():
    keys = jax.random.split(jax.random.key(0), 7)
    last = reduced((jax.random.key(9), lambda _, b: b))(keys)
    assert_close(last, keys[-1])


# --- prefixes and out_axes -------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    total: jax.Array
    rest: list


def statistics(x):
    return Statistics(x, [{"a": x, "b": -x}, None, (x, ())])


def add_a_keep_the_last_b(x, y):
    return {"a": x["a"] + y["a"], "b": y["b"]}


def over(name):
    return functools.partial(getattr(jnp, name), axis=0)


# What to reduce, and what becomes of the stacked `a`, `-a`: the total, then "a", "b" and the tuple of the rest.
PREFIXES = {
    "one for all": ("sum", [over("sum"), over("sum"), over("sum"), over("sum")]),
    "None for all": (None, [same, same, same, same]),
    "one for each field": (Statistics("max", "sum"), [over("max"), over("sum"), over("sum"), over("sum")]),
    "None for a field": (Statistics(None, "mean"), [same, over("mean"), over("mean"), over("mean")]),
    "one for each leaf": (
        Statistics("mean", [{"a": "max", "b": "min"}, None, (None, ())]),
        [over("mean"), over("max"), over("min"), same],
    ),
    "a pair for a subtree": (
        Statistics("min", [({"a": 0, "b": 0}, add_a_keep_the_last_b), None, "sum"]),
        [over("min"), over("sum"), lambda y: y[-1], over("sum")],
    ),
}


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes(case, batch_size):
    prefix, (total, a, b, rest) = PREFIXES[case]
    x = random((7, 2))
    twin = Statistics(total(x), [{"a": a(x), "b": b(-x)}, None, (rest(x), ())])
    assert_close(bmap(statistics, batch_size=batch_size, reduce=prefix)(x), twin)


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("out_axes", [None, 5, -1])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_out_axes_play_no_role(name, out_axes, batch_size):
    a = random((7, 2))
    reduction = REDUCTIONS[name]
    assert_close(reduced(reduction, batch_size, out_axes=out_axes)(a), reduced(reduction, batch_size)(a))


@pytest.mark.parametrize("out_axes", [(None, 0), (7, 1)])
def test_out_axes_play_no_role_for_a_part(out_axes):
    a = random((7, 2))
    ours = bmap(lambda x: (x, x), out_axes=out_axes, batch_size=3, reduce=("sum", None))(a)
    assert_close(ours, (jnp.sum(a, axis=0), jnp.moveaxis(a, 0, out_axes[1])))


@pytest.mark.parametrize("out_axes", [0, -1, None])
@pytest.mark.parametrize("name", NAMES)
def test_what_every_element_shares(name, out_axes):
    def ours(w):
        return bmap(lambda _: w, out_axes=out_axes, batch_size=3, reduce=name)(random(7))

    def twin(w):
        return getattr(jnp, name)(jnp.broadcast_to(w, (7, 2)), axis=0)

    w = random(2)
    assert_close((ours(w), jax.jacrev(ours)(w)), (twin(w), jax.jacrev(twin)(w)))


@pytest.mark.parametrize("result", [None, (), [None, ()]], ids=str)
def test_nothing_to_reduce(result):
    assert reduced("sum", f=lambda _: result)(random(7)) == result


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduce",
    [
        (0.0, 3),
        [0.0, jnp.add],
        (0.0,),
        (0.0, jnp.add, 1),
        jnp.add,
        True,
        1.5,
        b"sum",
        {"a": {"b": 3}},
        [None, "sum", object],
    ],
    ids=str,
)
def test_what_is_no_reduction_is_an_error_at_once(reduce):
    with pytest.raises(TypeError, match=r"reduce must be a name \('sum', .*\), a pair \(init, combine\)"):
        bmap(same, batch_size=3, reduce=reduce)


@pytest.mark.parametrize("name", ["SUM", "prod", "", "average", "any"])
def test_a_name_that_there_is_not(name):
    with pytest.raises(ValueError, match=f"reduce must be one of 'sum', 'mean', 'max', 'min' or .*; got {name!r}"):
        bmap(batch_size=3, reduce={"a": [name]})


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize(
    ("f", "reduce"),
    [
        (same, ()),
        (same, ["sum"]),
        (same, {"a": "sum"}),
        (same, ("sum", "max")),
        (lambda x: [x, x], ("sum", None)),
        (lambda x: (x, x, x), ("sum", "max")),
        (lambda x: {"a": x}, {"b": "sum"}),
    ],
    ids=["()", "a list", "a dict", "a pair", "a tuple for a list", "too short", "another key"],
)
def test_no_prefix_of_the_output(f, reduce, batch_size):
    with pytest.raises(ValueError, match="reduce must be a pytree prefix of the function's output"):
        bmap(f, batch_size=batch_size, reduce=reduce)(random(7))


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("init", [0.5, NAN, -INF, 1j, 10**30, 2**40, -1], ids=repr)
def test_an_init_that_the_results_dtype_does_not_have(init, batch_size):
    """Rounded or wrapped, it would not be neutral any more."""
    with pytest.raises((TypeError, ValueError), match="init"):
        reduced((init, jnp.add), batch_size)(jnp.arange(7, dtype="uint32"))


@pytest.mark.parametrize("init", [None, (), [0.0]], ids=repr)
def test_an_init_of_another_structure(init):
    with pytest.raises(TypeError, match=r"`init` must have the structure of the output it reduces: expected .*, got"):
        reduced((init, jnp.add))(random(7))


@pytest.mark.parametrize("init", ["0", object(), np.array(["a"])], ids=["string", "object", "strings"])
def test_an_init_that_is_no_array(init):
    with pytest.raises(TypeError, match="init"):
        reduced((init, jnp.add))(random(7))


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 4)])
def test_an_init_of_another_shape(shape):
    with pytest.raises(TypeError, match="init"):
        reduced((jnp.zeros(shape), jnp.add))(random((7, 4)))


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: None,  # noqa: ARG005
        lambda a, b: (a, b),
        lambda a, _: a[None],
        lambda a, _: a.astype("float32"),
        lambda a, _: jnp.sum(a),
        lambda a, b: a > b,
    ],
    ids=["nothing", "a pair", "an axis more", "another dtype", "an axis less", "bools"],
)
@pytest.mark.parametrize("batch_size", [3, 100])
def test_a_combine_that_returns_something_else(combine, batch_size):
    with pytest.raises(TypeError, match=r"reduce=\(init, combine\)"):
        reduced((0.0, combine), batch_size)(random((7, 4)))


@pytest.mark.parametrize("name", ["sum", "max"])
def test_keys_cannot_be_added(name):
    with pytest.raises((TypeError, ValueError), match="key<fry>"):  # JAX's own
        reduced(name)(jax.random.split(jax.random.key(0), 7))
