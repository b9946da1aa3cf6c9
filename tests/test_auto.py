"""`method="auto"`: vectorised only where a schema or a signature proves it safe; each entry point gives one reason."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import COMBINE, ENTRIES, RANKS, SCALARS, Foreign, arguments, assert_same, made, whole_numbers

import batchrules
from batchrules import ArraySpec, Schema

ANY = ArraySpec()
NO_PROOF = "auto is sequential: without a schema or a signature nothing proves that a call takes a leading dimension"
PROVEN = "auto is expand_dims: the schema lets every argument take a leading dimension, and the element ranks agree"


def choice_for(entry, foreign, args, in_axes):
    """What `method_for` says, by each entry point's own."""
    if entry == "register":
        return batchrules.registered(foreign.primitive).method_for(*args, in_axes=in_axes)
    return foreign.call.method_for(*args, in_axes=in_axes)


def element_args(shapes, in_axes, size=4):
    return arguments(Foreign("shapes", None, shapes), in_axes, size)


# Element shapes, in_axes, schema, the reason.
GATES = {
    "no schema": (((3,), (3,)), (0, 0), None, NO_PROOF),
    "proven": (((3,), (3,)), (0, 0), [ANY, ANY], PROVEN),
    "proven, one unmapped": (((3,), (3,)), (0, None), [ANY, ArraySpec((..., 3))], PROVEN),
    "proven, an unmapped scalar of fixed rank": (((3,), ()), (0, None), [ANY, ArraySpec(())], PROVEN),
    "proven, scalars": (((), ()), (0, 0), [ANY, ArraySpec((...,), "float64")], PROVEN),
    "mapped, fixed rank": (
        ((3,), (3,)),
        (0, None),
        [ArraySpec((None,)), ANY],
        (
            "auto is sequential: the mapped argument 'args.0' has shape (3,) and takes (*,), so the schema does not "
            "let it take a leading dimension"
        ),
    ),
    "unmapped, fixed rank": (
        ((3,), (3,)),
        (0, None),
        [ANY, ArraySpec((3,))],
        (
            "auto is sequential: the unmapped argument 'args.1' has shape (3,) and takes (3,), so the schema does not "
            "let it take a leading dimension"
        ),
    ),
    "not described": (
        ((3,), (3,)),
        (0, None),
        {"args.0": ANY},
        "auto is sequential: the schema does not describe the unmapped argument 'args.1'",
    ),
    "mapped scalar beside a row": (
        ((), (3,)),
        (0, 0),
        [ANY, ANY],
        (
            "auto is sequential: the element ranks differ ('args.0' has 0, 'args.1' has 1), so a leading dimension "
            "would not line up under broadcasting"
        ),
    ),
    "mapped scalar beside an unmapped row": (
        ((), (3,)),
        (0, None),
        [ANY, ANY],
        (
            "auto is sequential: the element ranks differ ('args.0' has 0, 'args.1' has 1), so a leading dimension "
            "would not line up under broadcasting"
        ),
    ),
    "matrix beside a vector": (
        ((2, 3), (3,), ()),
        (0, None, None),
        [ANY, ANY, ANY],
        (
            "auto is sequential: the element ranks differ ('args.0' has 2, 'args.1' has 1), so a leading dimension "
            "would not line up under broadcasting"
        ),
    ),
}


def general(shapes):
    return Foreign("general", lambda xp, *args: args[0] * 2, tuple(shapes))  # noqa: ARG005


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_gates_and_their_reasons(entry, gate):
    shapes, in_axes, schema, reason = gate
    args = element_args(shapes, in_axes)
    with made(entry, general(shapes), "auto", schema=schema) as foreign:
        choice = choice_for(entry, foreign, args, in_axes)
        assert choice.reason == reason
        assert choice.method == reason.split()[2].rstrip(":")
        assert foreign.log.count == 0
        result = foreign.run(jax.vmap(foreign.call, in_axes), *args)
    assert_same(result, jax.vmap(general(shapes).twin, in_axes)(*args))
    assert foreign.log.count == (1 if choice.method == "expand_dims" else 4)


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all", "legacy_vectorized"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_explicit_method_gives_itself_as_its_reason(entry, method):
    with made(entry, COMBINE, method) as foreign:
        choice = choice_for(entry, foreign, arguments(COMBINE, (0, None), 4), (0, None))
    assert (choice.method, choice.reason) == (method, f"method={method!r} was asked for")


@pytest.mark.parametrize("entry", ENTRIES)
def test_calls_that_auto_vectorises(entry):
    """Mapped arguments lead with N, unmapped ones with 1, and unmapped scalars with nothing."""
    shapes = ((3,), (3,), ())
    function = Foreign("scaled", lambda xp, x, y, s: (x - 2 * y) * s[..., None], shapes)  # noqa: ARG005
    in_axes = (0, None, None)
    args = element_args(shapes, in_axes)
    with made(entry, function, "auto", schema=[ANY, ANY, ArraySpec(())]) as foreign:
        result = foreign.run(jax.jit(jax.vmap(foreign.call, in_axes)), *args)
    assert_same(result, jax.vmap(function.twin, in_axes)(*args))
    assert foreign.log.given == [((4, 3), (1, 3), ())]


@pytest.mark.parametrize("entry", ["host", "device"])
def test_gates_see_all_axes_of_nested_vmaps(entry):
    """An argument that only the outer vmap maps is a mapped one."""
    s, x = whole_numbers((2,), 0), whole_numbers((4, 3), 1)
    function = Foreign("scaled", lambda xp, s, x: x * s[..., None], ((), (3,)))  # noqa: ARG005
    nest = lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None))  # noqa: E731
    with made(entry, function, "auto", schema=[ArraySpec(()), ANY]) as foreign:
        assert_same(
            foreign.run(jax.jit(jax.vmap(foreign.call, (None, 0))), s[0], x),
            jax.vmap(function.twin, (None, 0))(s[0], x),
        )
        assert foreign.log.count == 1
        assert_same(foreign.run(jax.jit(nest(foreign.call)), s, x), nest(function.twin)(s, x))
        assert foreign.log.count == 8


# Defects 1 and 2 of tesseract-jax 0.5.1: code that broadcasts as NumPy does, and a schema that lets it.


def broadcasting(xp, x, s):
    """`s * x`: right for one element, wrong for a batch of scalars beside one of rows of the same length."""
    del xp
    return s * x


def foreign_multiplication(entry):
    schema = {"x": ANY, "s": ANY}
    if entry == "device":
        return batchrules.device_call(numpy_multiply, method="auto", schema=schema)
    shape_of_x = lambda x, _: x  # noqa: E731
    return batchrules.host_call(lambda x, s: np.multiply(s, x), shape_of_x, method="auto", schema=schema)


def numpy_multiply(x, s):
    """Multiplication that lines ranks up as NumPy does, which the suite's settings forbid to JAX."""
    with jax.numpy_rank_promotion("allow"):
        return s * x


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None)], ids=str)
@pytest.mark.parametrize("entry", ["host", "device"])
def test_mapped_scalars_beside_rows_are_never_lined_up_wrongly(entry, in_axes):
    """Three scalars and rows of three: `(3,) * (3, 3)` has the right shape and the wrong numbers."""
    x = whole_numbers((3, 3) if in_axes[0] == 0 else (3,), 0)
    s = np.array([1.0, 2.0, 3.0]) if in_axes[1] == 0 else np.float64(2.0)
    call = foreign_multiplication(entry)
    wanted = np.asarray(s).reshape(-1, 1) * x
    for program in (jax.vmap(call, in_axes), jax.jit(jax.vmap(call, in_axes))):
        np.testing.assert_array_equal(program(x, s), wanted)
    chosen = call.method_for(x, s, in_axes=in_axes).method
    assert chosen == ("expand_dims" if in_axes == (0, None) else "sequential")


@pytest.mark.parametrize("entry", ["host", "device"])
def test_nested_maps_over_rows_and_scalars_are_never_lined_up_wrongly(entry):
    x, s = whole_numbers((3, 3), 0), np.array([1.0, 2.0, 3.0])
    call = foreign_multiplication(entry)
    nest = jax.jit(jax.vmap(jax.vmap(call, (0, None)), (None, 0)))
    np.testing.assert_array_equal(nest(x, s), s[:, None, None] * x)


def test_a_registered_multiplication_is_never_lined_up_wrongly():
    function = Foreign("multiply", broadcasting, ((3,), ()))

    def by_numpy(xp, x, s):
        return xp.multiply(s, x)

    careless = Careless("multiply", by_numpy, function.shapes)
    x, s = whole_numbers((3, 3), 0), np.array([1.0, 2.0, 3.0])
    with made("register", careless, "auto", schema=[ANY, ANY]) as foreign:
        np.testing.assert_array_equal(foreign.run(jax.vmap(foreign.call), x, s), s[:, None] * x)
        np.testing.assert_array_equal(foreign.run(jax.vmap(foreign.call, (None, 0)), x[0], s), s[:, None] * x[0])
        nest = jax.vmap(jax.vmap(foreign.call, (0, None)), (None, 0))
        np.testing.assert_array_equal(foreign.run(nest, x, s), s[:, None, None] * x)


class Careless(Foreign):
    """A foreign function that lines its arguments up as NumPy does, whatever they lead with."""

    def __call__(self, xp, *args):
        with jax.numpy_rank_promotion("allow"):
            return self.function(xp, *args)


SIGNATURE = "(i,j),(j),()->(i)"


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("entry", ["host", "device"])
def test_a_signature_lifts_the_gate_of_ranks(entry, in_axes):
    args = arguments(RANKS, in_axes, 4)
    with made(entry, RANKS, "auto", signature=SIGNATURE) as foreign:
        choice = foreign.call.method_for(*args, in_axes=in_axes)
        result = foreign.run(jax.jit(jax.vmap(foreign.call, in_axes)), *args)
    assert choice.method == "expand_dims"
    assert choice.reason == (
        f"auto is expand_dims: the signature {SIGNATURE!r} says that the function handles leading dimensions itself"
    )
    assert_same(result, jax.vmap(RANKS.twin, in_axes)(*args))
    assert foreign.log.count == 1


@pytest.mark.parametrize("entry", ["host", "device"])
def test_ranks_left_over_by_a_signature_must_agree(entry):
    """A signature of scalars, for a function of a scalar and a row: their loops would not line up."""
    with made(entry, general(((), (3,))), "auto", signature="(),()->()") as foreign:
        choice = foreign.call.method_for(np.zeros(4), np.zeros((4, 3)))
    assert choice.method == "sequential"
    assert choice.reason == (
        "auto is sequential: the ranks left over by the signature differ ('args.0' has 0, 'args.1' has 1), so a "
        "leading dimension would not line up under broadcasting"
    )


@pytest.mark.parametrize("entry", ["host", "device"])
def test_a_schema_beside_a_signature_must_agree_to_both(entry):
    for schema, method in (([ANY, ANY, ANY], "expand_dims"), ([ArraySpec((2, 3)), ANY, ANY], "sequential")):
        with made(entry, RANKS, "auto", signature=SIGNATURE, schema=schema) as foreign:
            args = arguments(RANKS, (0, None, None), 4)
            assert foreign.call.method_for(*args, in_axes=(0, None, None)).method == method


@pytest.mark.parametrize("entry", ["host", "device"])
def test_a_signature_that_does_not_describe_the_call(entry):
    with (
        made(entry, COMBINE, "auto", signature="(i)->(i)") as foreign,
        pytest.raises(
            ValueError, match=r"the signature '\(i\)->\(i\)' describes 1 array arguments, but the call has 2"
        ),
    ):
        jax.vmap(foreign.call)(np.zeros((2, 3)), np.zeros((2, 3)))
    with (
        made(entry, SCALARS, "auto", signature="(i),()->()") as foreign,
        pytest.raises(ValueError, match=r"gives 'args.0' 1 core dimensions, but it has shape \(\)"),
    ):
        jax.vmap(foreign.call)(np.zeros(2), np.zeros(2))


@pytest.mark.parametrize("entry", ["host", "device"])
def test_method_for_takes_what_vmap_takes(entry):
    def function(model, rest, *, flag):
        return model["x"] * rest[0] + flag

    entry_point = batchrules.device_call
    if entry == "host":
        entry_point = functools.partial(batchrules.host_call, result_shape=lambda model, *_, **__: model["x"])
    call = entry_point(function, method="auto", schema={"model.x": ANY})
    model, rest = {"x": jnp.zeros((2, 5))}, [np.float64(3)]
    choice = call.method_for(model, rest, in_axes=({"x": 1}, None), flag=jnp.zeros(5))
    assert choice.reason == "auto is sequential: the schema does not describe the mapped argument 'flag'"
    assert call.method_for(model, rest, in_axes=({"x": 1}, [None]), flag=jnp.zeros(5)) == choice


def test_registered_method_for_names_paths_by_position():
    schema = Schema({"args.0": ANY, "args.1": ArraySpec((3,))})
    with made("register", COMBINE, "auto", schema=schema) as foreign:
        registration = batchrules.registered(foreign.primitive)
        assert registration.schema == schema
        assert "'args.1'" in registration.method_for(np.zeros((3, 4)), np.zeros(3), in_axes=(1, None)).reason
        assert registration.method_for(np.zeros((3, 4)), np.zeros(3), in_axes=(-1, None)).method == "sequential"


@pytest.mark.parametrize(
    ("shape", "axis", "reason"),
    [
        ((4, 3), 0, PROVEN),
        ((3, 4), 1, PROVEN),
        ((3, 4), -1, PROVEN),
        ((4, 3), -2, PROVEN),
        (
            (4, 2),
            0,
            (
                "auto is sequential: the mapped argument 'args.0' has shape (2,) and takes (..., 3), so the schema "
                "does not let it take a leading dimension"
            ),
        ),
    ],
    ids=["axis 0", "axis 1", "axis -1", "axis -2", "another size than it takes"],
)
def test_registered_method_for_sees_one_element(shape, axis, reason):
    """A bind may break its schema, which no one checks before."""
    with made("register", COMBINE, "auto", schema=[ArraySpec((..., 3)), ANY]) as foreign:
        registration = batchrules.registered(foreign.primitive)
        assert registration.method_for(np.zeros(shape), np.zeros(3), in_axes=(axis, None)).reason == reason


@pytest.mark.parametrize(
    ("in_axes", "text"),
    [
        ((2, None), r"there is no axis 2 in an operand of shape \(4, 3\)"),
        ((-3, None), r"there is no axis -3 in an operand of shape \(4, 3\)"),
        ((0,), r"in_axes needs an axis or None for each of the 2 operands; got \(0,\)"),
        (0, "in_axes needs an axis or None for each of the 2 operands; got 0"),
        ((0, 0), r"the mapped axes must have one size; got \[3, 4\]"),
        ((None, None), "the mapped axes must have one size; got none mapped"),
    ],
    ids=str,
)
def test_registered_method_for_refuses(in_axes, text):
    with made("register", COMBINE, "auto") as foreign, pytest.raises(ValueError, match=text):
        batchrules.registered(foreign.primitive).method_for(np.zeros((4, 3)), np.zeros(3), in_axes=in_axes)
