"""What is wrong is said at once, and jax.vmap's own errors are jax.vmap's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random

from batchrules._bmap import bmap


@pytest.mark.parametrize("batch_size", [True, False, 2.0, "3", "large", (3,), jnp.asarray(3)])
def test_batch_size_of_the_wrong_type(batch_size):
    with pytest.raises(TypeError, match=r'batch_size must be an int of at least 1, "auto" or None; got'):
        bmap(jnp.sin, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_that_is_too_small(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
        bmap(jnp.sin, batch_size=batch_size)


def test_batch_size_of_a_numpy_integer():
    assert_close(bmap(jnp.sin, batch_size=np.int64(3))(random(7)), jnp.sin(random(7)))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an int or None; got 1.5"),
        ({"max_bytes": True}, TypeError, "max_bytes must be an int or None; got True"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1; got 0"),
        ({"max_bytes": 10**9}, ValueError, 'max_bytes only says what batch_size="auto" may use; got batch_size=3'),
        ({"checkpoint": 1}, TypeError, "checkpoint must be True or False; got 1"),
        ({"progress": 1.0}, TypeError, "progress must be True, False or a description"),
        ({"reduce": "product"}, ValueError, "reduce must be one of 'sum', 'mean', 'max', 'min' or"),
        ({"reduce": sum}, TypeError, "reduce must be a name"),
        ({"reduce": {"a": 3}}, TypeError, "reduce must be a name"),
    ],
)
def test_other_options(options, error, text):
    with pytest.raises(error, match=text.replace("(", r"\(")):
        bmap(jnp.sin, batch_size=3, **options)
    with pytest.raises(error, match=text.replace("(", r"\(")):
        bmap(batch_size=3, **options)


def test_no_function():
    with pytest.raises(TypeError, match="fun must be callable; got 3"):
        bmap(3, batch_size=3)


def test_batch_size_is_not_optional():
    with pytest.raises(TypeError, match="batch_size"):
        bmap(jnp.sin)


WRONG = {
    "in_axes of a wrong type": (lambda by: by(jnp.sin, in_axes="x"), (random(7),)),
    "in_axes too short": (lambda by: by(jnp.add, in_axes=(0,)), (random(7), random(7))),
    "in_axes of another structure": (lambda by: by(lambda t: t, in_axes=((0, 0, 0),)), ((random(7), random(7)),)),
    "in_axes all None": (lambda by: by(jnp.sin, in_axes=None), (random(7),)),
    "sizes that differ": (lambda by: by(jnp.add), (random(7), random(6))),
    "an axis that is not there": (lambda by: by(jnp.sin, in_axes=1), (random(7),)),
    "a negative axis that is not there": (lambda by: by(jnp.sin, in_axes=-2), (random(7),)),
    "a scalar": (lambda by: by(jnp.sin), (1.0,)),
    "a string": (lambda by: by(lambda s: s), ("abc",)),
    "no arguments": (lambda by: by(lambda: 1), ()),
    "out_axes None for what depends on the axis": (lambda by: by(jnp.sin, out_axes=None), (random(7),)),
    "out_axes of another structure": (lambda by: by(lambda a: (a, a), out_axes=(0, 0, 0)), (random(7),)),
    "out_axes that are not there": (lambda by: by(jnp.sin, out_axes=2), (random(7),)),
    "axis_size that has no hash": (lambda by: by(jnp.sin, axis_size=[7]), (random(7),)),
    "axis_size that is no number": (lambda by: by(jnp.sin, axis_size="7"), (random(7),)),
    "an array of strings": (lambda by: by(lambda s: s), (np.array(["a", "b"]),)),
    "an array of objects": (lambda by: by(lambda s: s), (np.array([None, 1]),)),
    "an array of dates": (lambda by: by(lambda s: s), (np.array(["2020", "2021"], "datetime64[Y]"),)),
    "a result that is no array": (lambda by: by(lambda a: "abc"), (random(7),)),  # noqa: ARG005
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_vmap(case):
    mapped, args = WRONG[case]
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever it is
        mapped(jax.vmap)(*args)
    with pytest.raises(type(theirs.value)) as ours:
        mapped(lambda f, **axes: bmap(f, batch_size=3, **axes))(*args)
    if case != "a result that is no array":
        assert str(ours.value) == str(theirs.value)


def test_reduce_of_another_structure():
    with pytest.raises(ValueError, match="reduce must be a pytree prefix of the function's output"):
        bmap(lambda a: {"a": a}, batch_size=3, reduce={"b": "sum"})(random(7))


def test_init_of_another_structure():
    with pytest.raises(TypeError, match="`init` must have the structure of the output it reduces"):
        bmap(lambda a: (a, a), batch_size=3, reduce=(0.0, lambda a, b: a))(random(7))  # noqa: ARG005


def test_combine_that_changes_the_type():
    with pytest.raises(TypeError, match=r"must return what it is given.*float64.*float32"):
        bmap(lambda a: a, batch_size=3, reduce=(0.0, lambda a, b: (a + b).astype("float32")))(random(7))


def test_an_error_of_the_function_passes_through():
    def f(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bmap(f, batch_size=3)(random(7))


def test_an_error_of_jax_names_the_function():
    def clipped(a):
        return a if a > 0 else -a

    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"tracing the function clipped at .*errors\.py"):
        bmap(clipped, batch_size=3)(random(7))


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no public references")
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": None, "reduce": "sum"}, {"batch_size": "auto"}])
@pytest.mark.parametrize("jit", [False, True])
def test_a_reference_that_is_mapped(options, jit):
    a, ref = random(7), jax.new_ref(random(7, 1))
    text = r"argument\[1\]\['ref'\] is a reference, Ref\{float64\[7\]\}, which can't be mapped in chunks"

    def run(by):
        ours = by(lambda a, kept: a + kept["ref"][...])
        return (jax.jit(lambda a: ours(a, {"ref": ref})) if jit else lambda a: ours(a, {"ref": ref}))(a)

    with pytest.raises(TypeError, match=text):
        run(lambda f: bmap(f, **options))
    assert_close(run(lambda f: bmap(f, batch_size=None)), a + random(7, 1))


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no public references")
@pytest.mark.parametrize("jit", [False, True])
def test_a_reference_that_the_function_makes(jit):
    """docs/bmap.md says so. JAX has no public way to give an operation a rule for it."""

    def f(a):
        ref = jax.new_ref(a)
        ref[...] = 2 * ref[...]
        return ref[...]

    ours = bmap(f, batch_size=3)
    with pytest.raises(NotImplementedError, match="No state discharge rule implemented for primitive: bmap_loop"):
        (jax.jit(ours) if jit else ours)(random(7))


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_a_reduction_of_keys(name):
    text = rf'reduce="{name}" needs numbers; the function\'s result is key<fry>\[2\]. Stack it \(reduce=None for this'
    with pytest.raises(TypeError, match=text):
        bmap(jax.random.split, batch_size=3, reduce=name)(jax.random.split(jax.random.key(0), 7))
