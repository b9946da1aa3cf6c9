"""`register`, `unregister`, `registered`: what stands there, what a bind is given, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import (
    COMBINE,
    METHODS,
    SEVERAL,
    VECTORISED,
    Foreign,
    Log,
    arguments,
    assert_same,
    bound,
    expected_calls,
    made,
    opaque,
    whole_numbers,
)
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla
from primitives import single

import batchrules
from batchrules import BatchContractError, BatchInfo


@pytest.fixture
def power():
    """`x ** exponent`, a primitive with one result and one parameter."""
    primitive = single("power", lambda x, *, exponent: x**exponent)
    yield primitive
    if batchrules.registered(primitive):
        batchrules.unregister(primitive)


@pytest.fixture
def tile():
    """Rows of a table that a parameter gives the shape of, as `ffi_call` has it."""

    def function(x, table, *, shape, method="broadcast_all"):
        del method
        return jnp.broadcast_to((x + table.sum(-1))[..., None], shape)

    primitive = single("tile", function)
    yield primitive
    if batchrules.registered(primitive):
        batchrules.unregister(primitive)


X = whole_numbers((4, 3), 0)
TABLE = np.arange(2.0)


@pytest.mark.parametrize("method", METHODS)
def test_single_result(power, method):
    batchrules.register(power, method)
    result = jax.jit(jax.vmap(lambda x: power.bind(x, exponent=2), in_axes=1, out_axes=1))(X)
    np.testing.assert_array_equal(result, X**2)


@pytest.mark.parametrize("method", METHODS)
def test_single_result_where_nothing_is_mapped(power, method):
    batchrules.register(power, method)
    result = jax.vmap(lambda x: (power.bind(jnp.ones(3), exponent=2), x), out_axes=(None, 0))(X)
    np.testing.assert_array_equal(result[0], np.ones(3))


def test_a_list_of_results_is_unmapped_as_one():
    with made("register", SEVERAL, "expand_dims") as foreign:
        x, y = jnp.ones(3), jnp.zeros(3)
        result = jax.vmap(lambda _: foreign.call(x, y), out_axes=None)(X)
    assert_same(result, SEVERAL.twin(x, y))


def test_registering_again_replaces():
    log = Log()
    primitive = opaque(COMBINE, log)
    x, y = map(jnp.asarray, arguments(COMBINE, (0, None), 4))
    for method, calls in (("sequential", 4), ("expand_dims", 1), ("broadcast_all", 1)):
        batchrules.register(primitive, method)
        log.clear()
        result = jax.jit(jax.vmap(bound(COMBINE, primitive), (0, None)))(x, y)
        assert_same(result, jax.vmap(COMBINE.twin, (0, None))(x, y))
        assert log.count == calls
        assert batchrules.registered(primitive).method == method
    batchrules.unregister(primitive)
    with pytest.raises(NotImplementedError, match="Batching rule"):
        jax.vmap(bound(COMBINE, primitive), (0, None))(x, y)


def test_registered_tells_what_was_said(power):
    assert batchrules.registered(power) is None
    update = lambda params, batch: params  # noqa: E731, ARG005
    schema = batchrules.Schema([batchrules.ArraySpec()])
    batchrules.register(power, "expand_dims", batch_size=np.int64(5), schema=schema, update_params=update)
    registration = batchrules.registered(power)
    assert isinstance(registration, batchrules.Registration)
    assert (registration.primitive, registration.method, registration.batch_size) == (power, "expand_dims", 5)
    assert (registration.schema, registration.update_params, registration.call) == (schema, update, None)
    batchrules.unregister(power)
    assert batchrules.registered(power) is None


def test_a_rule_that_stood_there_comes_back(power):
    def doubled(axis_data, operands, dims, **params):
        del axis_data
        return 2 * power.bind(*operands, **params), dims[0]

    batching.fancy_primitive_batchers[power] = doubled
    square = lambda x: power.bind(x, exponent=2)  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(square)(X), 2 * X**2)
    batchrules.register(power, "sequential")
    batchrules.register(power, "expand_dims")
    np.testing.assert_array_equal(jax.vmap(square)(X), X**2)
    batchrules.unregister(power)
    np.testing.assert_array_equal(jax.vmap(square)(X), 2 * X**2)
    assert batching.fancy_primitive_batchers[power] is doubled
    del batching.fancy_primitive_batchers[power]


def test_a_plain_rule_that_stood_there_comes_back(power):
    batching.primitive_batchers[power] = lambda operands, dims, **params: (
        2 * power.bind(*operands, **params),
        dims[0],
    )
    square = lambda x: power.bind(x, exponent=2)  # noqa: E731
    batchrules.register(power, "broadcast_all")
    np.testing.assert_array_equal(jax.vmap(square)(X), X**2)
    batchrules.unregister(power)
    np.testing.assert_array_equal(jax.vmap(square)(X), 2 * X**2)


def test_parameters_reach_every_bind_unchanged(power):
    for method in METHODS:
        batchrules.register(power, method)
        np.testing.assert_array_equal(jax.vmap(lambda x: power.bind(x, exponent=3))(X), X**3)


def leading(params, batch):
    return {**params, "shape": (batch.batch_size, *params["shape"])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_axes", [(0, None), (0, 0)], ids=str)
def test_update_params(method, in_axes):
    def function(x, table, *, shape):
        total = table.sum(-1)
        return jnp.broadcast_to((x + total)[..., None], shape)

    primitive = single("rows", function)
    batchrules.register(primitive, method, update_params=leading, batch_size=3)
    table = np.arange(2.0) if in_axes[1] is None else np.arange(8.0).reshape(4, 2)
    bind = lambda x, table: primitive.bind(x, table, shape=(5,))  # noqa: E731
    result = jax.jit(jax.vmap(bind, in_axes))(jnp.asarray(X[:, 0]), jnp.asarray(table))
    wanted = np.broadcast_to((X[:, 0] + table.sum(-1))[:, None], (4, 5))
    np.testing.assert_array_equal(result, wanted)
    batchrules.unregister(primitive)


def test_nested_update_params(tile):
    batchrules.register(tile, "expand_dims", update_params=leading)
    bind = lambda x: tile.bind(x, TABLE, shape=(5,))  # noqa: E731
    result = jax.jit(jax.vmap(jax.vmap(bind)))(jnp.asarray(X))
    np.testing.assert_array_equal(result, np.broadcast_to((X + 1)[..., None], (4, 3, 5)))


# The method; the dims of x and the table; for each bind, what BatchInfo says in the end.
INFOS = [
    ("expand_dims", None, (0, None), [(4, (True, False), "expand_dims", 4, (True, True))]),
    ("broadcast_all", None, (0, None), [(4, (True, False), "broadcast_all", 4, (True, True))]),
    ("legacy_vectorized", None, (0, None), [(4, (True, False), "legacy_vectorized", 4, (True, False))]),
    ("expand_dims", 3, (0, None), [(4, (True, False), "expand_dims", 3, (True, True)),
                                   (4, (True, False), "expand_dims", 1, (True, True))]),
    ("broadcast_all", 2, (0, 0), [(4, (True, True), "broadcast_all", 2, (True, True))]),
    ("auto", None, (0, None), [(4, (True, False), "expand_dims", 4, (True, False))]),
    ("sequential", None, (0, None), []),
]  # fmt: skip


@pytest.mark.parametrize(("method", "batch_size", "in_axes", "wanted"), INFOS, ids=str)
def test_batch_info(method, batch_size, in_axes, wanted):
    """The table is a scalar here, which `auto` leaves alone."""
    primitive = single(
        "shift", lambda x, s, *, shape: jnp.broadcast_to(x + (s if s.ndim == x.ndim else s[None]), shape)
    )
    seen = []

    def update(params, batch):
        seen.append(batch)
        return leading(params, batch)

    schema = [batchrules.ArraySpec(), batchrules.ArraySpec(())]
    batchrules.register(primitive, method, batch_size=batch_size, schema=schema, update_params=update)
    s = jnp.arange(4.0) if in_axes[1] == 0 else jnp.asarray(1.0)
    result = jax.vmap(lambda x, s: primitive.bind(x, s, shape=()), in_axes, axis_name="i")(jnp.arange(4.0), s)
    np.testing.assert_array_equal(result, np.arange(4.0) + np.asarray(s))
    assert all(isinstance(info, BatchInfo) for info in seen)
    told = [(i.axis_size, i.in_batched, i.method, i.batch_size, i.in_led) for i in dict.fromkeys(seen)]
    assert told == wanted
    assert {info.axis_name for info in seen} == ({"i"} if wanted else set())
    batchrules.unregister(primitive)


def test_update_params_may_change_its_dict(tile):
    """It is given one of its own."""

    def update(params, batch):
        params["shape"] = (batch.batch_size, *params["shape"])
        return params

    batchrules.register(tile, "expand_dims", update_params=update, batch_size=2)
    given = {"shape": (5,)}
    result = jax.vmap(lambda x: tile.bind(x, TABLE, **given))(jnp.arange(5.0))
    assert result.shape == (5, 5)
    assert given == {"shape": (5,)}


def test_update_params_must_return_a_dict(tile):
    batchrules.register(tile, "expand_dims", update_params=lambda params, batch: None)  # noqa: ARG005
    with pytest.raises(
        TypeError, match=r"primitive 'tile': update_params must return the dict of parameters; it returned None"
    ):
        jax.vmap(lambda x: tile.bind(x, TABLE, shape=(5,)))(jnp.arange(4.0))


def test_a_vectorised_bind_whose_parameters_hold_shapes_needs_update_params():
    primitive = single("fill", lambda x, *, shape: jnp.zeros(shape, x.dtype))
    batchrules.register(primitive, "broadcast_all")
    with pytest.raises(
        BatchContractError,
        match=r"primitive 'fill' was given a batch of 5 elements.*operands of shape \(5, 2\), and output 0 has "
        r"shape \(5,\).*: expected \(5, 5\).*\. Make it handle.*update_params",
    ):
        jax.vmap(lambda x: primitive.bind(x, shape=(5,)))(jnp.zeros((5, 2)))
    batchrules.unregister(primitive)


@pytest.mark.parametrize(("method", "calls"), [("sequential", 4), ("broadcast_all", 1)])
def test_method_from_parameters(tile, method, calls):
    seen = []

    def update(params, batch):
        seen.append(batch.method)
        return leading(params, batch)

    batchrules.register(tile, lambda params: params["method"], update_params=update)
    bind = lambda x: tile.bind(x, TABLE, shape=(5,), method=method)  # noqa: E731
    result = jax.vmap(bind)(jnp.arange(4.0))
    np.testing.assert_array_equal(result, np.broadcast_to(np.arange(4.0)[:, None] + 1, (4, 5)))
    assert seen == (["broadcast_all"] if calls == 1 else [])
    choice = batchrules.registered(tile).method_for(np.zeros(4), TABLE, in_axes=(0, None), method=method)
    assert choice.method == method


@pytest.mark.parametrize(
    ("chosen", "error", "text"),
    [
        (lambda params: params["vmap_method"], ValueError,
         r"primitive 'tile': method=callable\(params\) looked for the parameter 'vmap_method', which.*\['shape'\]"),
        (lambda params: params.get("vmap_method"), ValueError,
         r"primitive 'tile' \(from method=callable\(params\)\): no method for jax\.vmap was given \(method=None\)"),
        (lambda _: "vectorized", ValueError,
         r"primitive 'tile' \(from method=callable\(params\)\): unknown method 'vectorized'\. Choose one of 'seq"),
        (lambda _: 3, TypeError, r"method must be one of .*; got 3 of type int"),
    ],
    ids=["missing key", "None", "unknown", "number"],
)  # fmt: skip
def test_method_from_parameters_that_is_none(tile, chosen, error, text):
    batchrules.register(tile, chosen)
    with pytest.raises(error, match=text):
        jax.vmap(lambda x: tile.bind(x, TABLE, shape=(5,)))(jnp.arange(4.0))
    # The primitive itself, and a call that nothing is mapped of, need no method.
    assert tile.bind(jnp.asarray(1.0), TABLE, shape=(5,)).shape == (5,)


def aliased(name, function):
    """A primitive whose first operand shares its memory with its first output, as `ffi_call` may have it."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))

    def types(x, y, *, input_output_aliases):
        out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y)))
        if dict(input_output_aliases).get(0) == 0 and out.shape != x.shape:
            raise ValueError(f"operand 0 of shape {x.shape} cannot share the memory of an output of shape {out.shape}")
        return [jax.core.ShapedArray(out.shape, out.dtype)]

    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x, y, **_: [function(x, y)]))
    return primitive


def lined_up_sum(x, y):
    rank = max(x.ndim, y.ndim)
    return sum(a.reshape((1,) * (rank - a.ndim) + a.shape) * weight for a, weight in ((x, 1), (y, 2)))


@pytest.mark.parametrize("aliases", [{0: 0}, ((0, 0),)], ids=["dict", "pairs"])
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_axes", [(None, 0), (0, None), (0, 0)], ids=str)
def test_aliases_with_an_unmapped_operand(method, batch_size, in_axes, aliases):
    """The aliased operand has the size of the output, whichever operands are mapped."""
    primitive = aliased("accumulate", lined_up_sum)
    batchrules.register(primitive, method, batch_size=batch_size)
    x, y = map(jnp.asarray, arguments(COMBINE, in_axes, 4))
    key = tuple(aliases.items()) if isinstance(aliases, dict) else aliases
    bind = lambda x, y: primitive.bind(x, y, input_output_aliases=key)[0]  # noqa: E731
    result = jax.jit(jax.vmap(bind, in_axes))(x, y)
    np.testing.assert_array_equal(result, np.asarray(x) + 2 * np.asarray(y))
    batchrules.unregister(primitive)


def test_method_for_knows_aliases():
    primitive = aliased("accumulate", lined_up_sum)
    batchrules.register(primitive, "expand_dims")
    registration = batchrules.registered(primitive)
    free = registration.method_for(np.zeros(3), np.zeros((4, 3)), in_axes=(None, 0))
    tied = registration.method_for(np.zeros(3), np.zeros((4, 3)), in_axes=(None, 0), input_output_aliases={0: 0})
    assert [lead.name for lead in free.leads] == ["ONE", "BATCH"]
    assert [lead.name for lead in tied.leads] == ["BATCH", "BATCH"]
    batchrules.unregister(primitive)


class Broadcasting(Foreign):
    """A foreign function that lines its arguments up as NumPy does: right for one vmap, whatever the method."""

    def __call__(self, xp, *args):
        with jax.numpy_rank_promotion("allow"):
            return self.function(xp, *args)


BROADCASTING = Broadcasting("broadcasting", lambda xp, x, y: x - 2 * y, ((3,), (3,)))  # noqa: ARG005
LEGACY_NESTS = {
    "one each": [(None, 0), (0, None)],
    "inner one, outer both": [(0, 0), (0, None)],
    "inner both, outer one": [(0, None), (0, 0)],
    "inner other, outer both": [(0, 0), (None, 0)],
    "both twice": [(0, 0), (0, 0)],
    "the same one twice": [(0, None), (0, None)],
}


@pytest.mark.parametrize("sizes", [(2, 4), (3, 3), (1, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("nest", LEGACY_NESTS.values(), ids=LEGACY_NESTS)
@pytest.mark.parametrize("function", [COMBINE, BROADCASTING], ids=lambda f: f.name)
def test_nested_legacy_vectorized_is_right_or_an_error(function, nest, sizes):
    """A primitive is mapped once for each vmap, so what leads with what can be lost; then there must be no result."""
    shapes = list(function.shapes)
    for in_axes, size in reversed(list(zip(nest, sizes, strict=True))):
        shapes = [shape if axis is None else (size, *shape) for shape, axis in zip(shapes, in_axes, strict=True)]
    args = [whole_numbers(shape, i) for i, shape in enumerate(shapes)]

    def nested(f):
        return jax.vmap(jax.vmap(f, nest[1]), nest[0])

    with made("register", function, "legacy_vectorized") as foreign:
        try:
            result = foreign.run(jax.jit(nested(foreign.call)), *args)
        except (BatchContractError, ValueError, TypeError):
            return
    assert_same(result, nested(lambda x, y: function.function(jnp, x, y))(*args))


@pytest.mark.parametrize("sizes", [(2, 4), (3, 3)], ids=str)
def test_nested_legacy_vectorized_over_one_argument_each_is_a_contract_error(sizes):
    x, y = whole_numbers((sizes[1], 3), 0), whole_numbers((sizes[0], 3), 1)
    with made("register", COMBINE, "legacy_vectorized") as foreign:
        nested = jax.vmap(jax.vmap(foreign.call, (0, None)), (None, 0))
        with pytest.raises((BatchContractError, TypeError), match=r"expected|broadcast|legacy"):
            nested(x, y)


@pytest.mark.parametrize("between", ["jit", "scan", "checkpoint"])
def test_nested_legacy_vectorized_with_a_program_between_the_vmaps_is_right_or_an_error(between):
    """JAX traces the inner vmap to a program first, and maps that: neither rule runs inside the other."""
    rows = jnp.zeros(1)
    around = {
        "jit": jax.jit,
        "scan": lambda f: lambda x, y: jax.lax.scan(lambda _, __: (None, f(x, y)), None, rows)[1][0],
        "checkpoint": jax.checkpoint,
    }[between]
    x, y = whole_numbers((3, 3, 3), 0), whole_numbers((3, 3), 1)
    with made("register", BROADCASTING, "legacy_vectorized") as foreign:
        try:
            result = foreign.run(jax.vmap(around(jax.vmap(foreign.call, (0, None)))), x, y)
        except (BatchContractError, ValueError, TypeError):
            return
    np.testing.assert_array_equal(result, x - 2 * y[:, None])


def test_auto_goes_on_in_a_loop_where_a_scalar_was_left_alone():
    """An unmapped scalar gets no lead; whatever an outer vmap maps then, `auto` is right, and never an error."""
    function = Foreign("scaled", lambda xp, x, y, s: (x - 2 * y) * s[..., None], ((3,), (3,), ()))  # noqa: ARG005
    x, y, s = whole_numbers((4, 3), 0), whole_numbers((2, 3), 1), np.arange(2.0) + 1
    any_shape = batchrules.ArraySpec()
    with made("register", function, "auto", schema=[any_shape] * 3) as foreign:
        for outer in ((None, 0, None), (None, None, 0), (None, 0, 0)):
            args = (x, y if outer[1] == 0 else y[0], s if outer[2] == 0 else s[0])
            nested = lambda f, outer=outer: jax.vmap(jax.vmap(f, (0, None, None)), outer)  # noqa: E731
            assert_same(foreign.run(nested(foreign.call), *args), nested(function.twin)(*args))


def test_a_primitive_whose_implementation_maps_another_one():
    """What the outer primitive's operands lead with says nothing about the inner one's."""
    inner = single("inner", lambda a: 2 * a)
    outer = single("outer", lambda x, y: x + y.reshape((1,) * (x.ndim - y.ndim) + y.shape))
    outer.def_impl(lambda x, y: jax.vmap(inner.bind)(x) + y[None])
    batchrules.register(inner, "sequential")
    batchrules.register(outer, "legacy_vectorized")
    try:
        result = jax.vmap(outer.bind, (0, None))(jnp.asarray(X), jnp.ones(3))
    finally:
        batchrules.unregister(inner)
        batchrules.unregister(outer)
    np.testing.assert_array_equal(result, 2 * X + 1)


@pytest.mark.parametrize("method", VECTORISED)
def test_an_output_that_leads_with_something_else(method):
    """It turns its array round, and the batch with it."""
    primitive = single("turned", lambda x: x.T)
    batchrules.register(primitive, method)
    with pytest.raises(
        BatchContractError,
        match=r"primitive 'turned' was given a batch of 4 elements at once \(method '.*'\), with operands of shape "
        r"\(4, 3\), and output 0 has shape \(3, 4\).*: expected \(4, 3\)",
    ):
        jax.vmap(primitive.bind)(jnp.asarray(X))
    batchrules.unregister(primitive)


@pytest.mark.parametrize("method", VECTORISED)
def test_an_output_without_a_lead(method):
    primitive = single("total", lambda x: x.sum())
    batchrules.register(primitive, method)
    with pytest.raises(BatchContractError, match=r"output 0 has shape \(\).*: expected \(4,\)"):
        jax.vmap(primitive.bind)(jnp.asarray(X))
    batchrules.unregister(primitive)


@pytest.mark.parametrize("method", VECTORISED)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_an_output_of_another_dtype(method, batch_size):
    primitive = single("narrow", lambda x: x if x.ndim == 1 else x.astype("float32"))
    batchrules.register(primitive, method, batch_size=batch_size)
    with pytest.raises(BatchContractError, match=r"and dtype float32: expected \([34], 3\).* and float64"):
        jax.vmap(primitive.bind)(jnp.asarray(X))
    batchrules.unregister(primitive)


REFUSED = [
    (("method",), {}, ValueError, r"register\('power'\): unknown method 'method'\. Choose one of 'sequential', 'seq"),
    ((None,), {}, ValueError, r"register\('power'\): no method for jax\.vmap was given \(method=None\)"),
    ((3,), {}, TypeError, r"register\('power'\): method must be one of .*; got 3 of type int"),
    (("sequential",), {"batch_size": 0}, ValueError, r"batch_size must be at least 1, or None.*; got 0"),
    (("sequential",), {"batch_size": -2}, ValueError, r"batch_size must be at least 1, or None.*; got -2"),
    (("sequential",), {"batch_size": True}, TypeError, r"batch_size must be an int.*got True of type bool"),
    (("sequential",), {"batch_size": 2.0}, TypeError, r"batch_size must be an int.*got 2\.0 of type float"),
    (("auto",), {"schema": "x"}, TypeError, r"register\('power'\): schema must be a Schema, a mapping.*got 'x'"),
    (("auto",), {"schema": [3]}, TypeError, r"'args\.0' needs an ArraySpec; got 3 of type int"),
    (("auto",), {"update_params": 3}, TypeError, r"'power'\): update_params must be a function or None; got 3"),
    (("auto",), {"call": len}, TypeError, r"register\('power'\): call= is for HiJAX primitive classes"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "text"), REFUSED)
def test_refused(power, args, options, error, text):
    with pytest.raises(error, match=text):
        batchrules.register(power, *args, **options)
    assert batchrules.registered(power) is None


@pytest.mark.parametrize("thing", [jnp.sin, len, "power", int, None], ids=["sin", "len", "name", "int", "None"])
def test_what_is_not_a_primitive_is_refused(thing):
    with pytest.raises(
        TypeError, match=r"expected a jax\.extend\.core\.Primitive or a HiJAX primitive class; got a .*make_jaxpr"
    ):
        batchrules.register(thing, "sequential")


def test_unregistering_what_is_not_registered(power):
    with pytest.raises(
        ValueError, match=r"unregister: nothing is registered for power; register gives it a rule first"
    ):
        batchrules.unregister(power)


def test_a_failed_register_leaves_what_stood_there(power):
    batchrules.register(power, "sequential")
    with pytest.raises(ValueError, match="unknown method"):
        batchrules.register(power, "nothing")
    assert batchrules.registered(power).method == "sequential"
    np.testing.assert_array_equal(jax.vmap(lambda x: power.bind(x, exponent=2))(X), X**2)


@pytest.mark.parametrize("entry", ["scan", "while_loop", "cond", "checkpoint"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_control_flow_around_a_registered_primitive(entry, method):
    def around(call, x, y):
        if entry == "scan":
            return jax.lax.scan(lambda c, row: (call(c, row), c), x, jnp.stack([y, x, y]))
        if entry == "while_loop":
            return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, call(c[1], y)), (0, x))
        if entry == "cond":
            return jax.lax.cond(x.sum() > 0, lambda: call(x, y), lambda: x + y)
        return jax.checkpoint(call)(x, y)

    args = arguments(COMBINE, (0, None), 4)
    with made("register", COMBINE, method) as foreign:
        result = foreign.run(jax.jit(jax.vmap(functools.partial(around, foreign.call), (0, None))), *args)
    assert_same(result, jax.vmap(functools.partial(around, COMBINE.twin), (0, None))(*args))


def test_a_batch_that_one_method_loops_over_inside_another():
    """A vectorised outer primitive beside a sequential inner one, each by its own rule."""
    with made("register", COMBINE, "expand_dims") as outer, made("register", COMBINE, "sequential") as inner:
        program = jax.jit(jax.vmap(lambda x, y: outer.call(inner.call(x, y), y), (0, None)))
        args = arguments(COMBINE, (0, None), 4)
        outer.log.clear()
        result = inner.run(program, *args)
    assert_same(result, jax.vmap(lambda x, y: COMBINE.twin(COMBINE.twin(x, y), y), (0, None))(*args))
    assert (outer.log.count, inner.log.count) == (expected_calls("expand_dims", 4), 4)
