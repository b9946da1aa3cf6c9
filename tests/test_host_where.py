"""`f.where(mask, ...)`: no call where the mask is False, and everything else as `jnp.where` of the twin has it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close
from failing import always
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import run
from sharded import assert_right_everywhere, auto, explicit, put, using

from batchrules import ArraySpec, Schema, finite_difference, host_call

F64 = jax.ShapeDtypeStruct((), "float64")
METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")
WAYS = ("eager", "jit")
# Where the mask is False stands what the function refuses, or makes NaN of.
XS = np.array([2.0, -1.0, 0.0, 3.0, np.nan, 1.5])
MASKS = XS > 0
YS = np.random.default_rng(0).normal(size=(6, 3))
Y = YS[0]
OTHER = {"a": np.array([5.0, 6.0, 7.0]), "b": np.float64(8.0)}
RESULT = {"a": jax.ShapeDtypeStruct((3,), "float64"), "b": F64}


class Logarithm:
    """`log(x) y` and `x sum(y)`, which counts its calls and refuses what is not positive."""

    def __init__(self, method="sequential", endpoints=("jvp", "vjp"), **options):
        self.sizes = []
        derivatives = {name: getattr(self, name) for name in endpoints}
        self.call = host_call(self.function, RESULT, method=method, name="log", verify=False, **derivatives, **options)

    def seen(self, x):
        assert (x > 0).all(), f"called for {x}"
        self.sizes.append(x.shape[0] if x.ndim else None)

    def function(self, x, y):
        self.seen(x)
        return self.values(np, x, y)

    @staticmethod
    def values(xp, x, y):
        return {"a": xp.log(x)[..., None] * y, "b": x * xp.sum(y, axis=-1)}

    def jvp(self, args, tangents):
        (x, y), (tx, ty) = args, (0 if t is None else t for t in tangents)
        self.seen(x)
        ty = ty + np.zeros_like(y)
        tx = tx + np.zeros_like(x)
        return {"a": (tx / x)[..., None] * y + np.log(x)[..., None] * ty, "b": tx * y.sum(-1) + x * ty.sum(-1)}

    def vjp(self, args, cotangents, needed):
        x, y = args
        self.seen(x)
        of_a = np.zeros(3) if cotangents["a"] is None else cotangents["a"]
        of_b = np.zeros(()) if cotangents["b"] is None else cotangents["b"]
        to_x = (of_a * y).sum(-1) / x + of_b * y.sum(-1)
        to_y = np.log(x)[..., None] * of_a + (of_b * x)[..., None] * np.ones(3)
        return to_x if needed[0] else None, to_y if needed[1] else None

    def jacobian(self, args, needed):
        del needed
        x, y = args
        self.seen(x)
        lead = np.broadcast_shapes(x.shape, y.shape[:-1])
        diagonal = np.broadcast_to(np.log(x)[..., None, None] * np.eye(3), (*lead, 3, 3))
        of_y = np.broadcast_to(x[..., None], (*lead, 3))
        return {"a": (y / x[..., None], diagonal), "b": (np.broadcast_to(y.sum(-1), lead), of_y)}


def twin(mask, x, y, otherwise=None):
    """The same in JAX. Twice `where`, or the gradient would be NaN at the elements that are left out."""
    other = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), RESULT) if otherwise is None else otherwise
    values = Logarithm.values(jnp, jnp.where(mask, x, 1.0), y)
    return jax.tree.map(lambda value, instead: jnp.where(mask, value, instead), values, other)


def through(way, function):
    return jax.jit(function) if way == "jit" else function


def calls(method, remaining, batch_size=None):
    """The sizes of the calls that so many elements take."""
    if method == "sequential":
        return [None] * remaining
    size = batch_size or max(remaining, 1)
    return [min(size, remaining - start) for start in range(0, remaining, size)]


# --- values and calls -------------------------------------------------------------------------------------

DISPATCH = {"in order": {}, "threads": {"executor": 3}, "few in flight": {"executor": 2, "max_in_flight": 1}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("dispatch", DISPATCH)
def test_only_the_elements_that_remain_are_called(way, method, batch_size, dispatch):
    log = Logarithm(method, batch_size=batch_size if method != "sequential" else None, **DISPATCH[dispatch])
    result = through(way, jax.vmap(log.call.where, (0, 0, 0)))(MASKS, XS, YS)
    assert_close(result, jax.vmap(twin)(MASKS, XS, YS))
    assert log.sizes == calls(method, 3, batch_size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
class TestMasks:
    def test_all_true_is_the_call_itself(self, way, method):
        log, plain = Logarithm(method), Logarithm(method)
        xs = np.abs(XS[:4]) + 1
        result = through(way, jax.vmap(log.call.where, (None, 0, None)))(True, xs, Y)
        assert_close(result, jax.vmap(plain.call, (0, None))(xs, Y))
        assert log.sizes == plain.sizes

    @pytest.mark.parametrize("mapped", [True, False])
    def test_all_false_makes_no_call(self, way, method, mapped):
        log = Logarithm(method)
        masks = np.zeros(6, bool) if mapped else False
        call = functools.partial(log.call.where, otherwise=OTHER)
        result = through(way, jax.vmap(call, (0 if mapped else None, 0, None)))(masks, XS, Y)
        assert_close(result, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (6, *leaf.shape)), OTHER))
        assert log.sizes == []

    @pytest.mark.parametrize("mask", [True, False, np.True_, np.array(False), jnp.array(True)], ids=repr)
    def test_of_a_single_call(self, way, method, mask):
        log = Logarithm(method)
        x = 2.0 if mask else np.nan
        assert_close(through(way, log.call.where)(mask, x, Y), twin(mask, x, Y))
        assert log.sizes == [None] * int(mask)

    def test_mapped_over_unmapped_arguments(self, way, method):
        log = Logarithm(method)
        result = through(way, jax.vmap(log.call.where, (0, None, None)))(MASKS, 2.0, Y)
        assert_close(result, jax.vmap(twin, (0, None, None))(MASKS, 2.0, Y))
        assert 0 < len(log.sizes) <= 3

    def test_of_an_outer_axis(self, way, method):
        log = Logarithm(method)
        function = lambda f: jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, 0))  # noqa: E731
        xs, masks = XS[MASKS], np.array([True, False, False, True])
        result = through(way, function(log.call.where))(masks, xs, YS[:4])
        assert_close(result, function(twin)(masks, xs, YS[:4]))
        assert log.sizes == calls(method, 6)

    def test_of_an_inner_axis(self, way, method):
        log = Logarithm(method)
        function = lambda f: jax.vmap(jax.vmap(f), (None, 0, None))  # noqa: E731
        xs = np.stack([XS, XS + 1, 2 * XS])
        result = through(way, function(log.call.where))(MASKS, xs, YS)
        assert_close(result, function(twin)(MASKS, xs, YS))
        assert log.sizes == calls(method, 9)

    def test_mapped_along_another_axis(self, way, method):
        log = Logarithm(method)
        function = lambda f: jax.vmap(jax.vmap(f, (0, 0, None)), (1, 1, None), {"a": 2, "b": -1})  # noqa: E731
        xs = np.stack([XS, XS + 1, 2 * XS])
        result = through(way, function(log.call.where))(xs > 0, xs, Y)
        assert_close(result, function(twin)(xs > 0, xs, Y))
        assert log.sizes == calls(method, int((xs > 0).sum()))


@settings(max_examples=15)
@given(data=st.data())
def test_any_masks_and_axes(data):
    method, batch_size = data.draw(st.sampled_from(METHODS)), data.draw(st.sampled_from([None, 2]))
    sizes = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 3)))
    # For the mask, x and y: whether the outer axis maps it, and whether the inner one does.
    maps = data.draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3))
    assume(all(any(along) for along in zip(*maps, strict=True)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    grids = [[size if is_mapped else 1 for size, is_mapped in zip(sizes, along, strict=True)] for along in maps]
    masks, x, y = rng.random(grids[0]) < 0.5, rng.uniform(0.5, 2, grids[1]), rng.normal(size=(*grids[2], 3))
    in_axes = [tuple(0 if is_mapped else None for is_mapped in along) for along in zip(*maps, strict=True)]
    given_of = [
        array.reshape([n for n, m in zip(grid, along, strict=True) if m] + list(array.shape[2:]))
        for array, grid, along in zip((masks, x, y), grids, maps, strict=True)
    ]
    log = Logarithm(method, batch_size=batch_size)
    result = jax.vmap(jax.vmap(log.call.where, in_axes[1]), in_axes[0])(*given_of)
    wanted = Logarithm.values(np, *np.broadcast_arrays(x, y[..., 0])[:1], np.broadcast_to(y, (*sizes, 3)))
    np.testing.assert_allclose(result["a"], np.where(masks[..., None], np.broadcast_to(wanted["a"], (*sizes, 3)), 0))
    np.testing.assert_allclose(result["b"], np.where(masks, np.broadcast_to(wanted["b"], sizes), 0))
    assert sum(size or 1 for size in log.sizes) <= np.broadcast_to(masks, sizes).sum()


def test_under_auto_with_a_schema():
    log = Logarithm("auto", schema=Schema({"x": ArraySpec((...,)), "y": ArraySpec((...,))}))
    assert_close(jax.vmap(log.call.where)(MASKS, XS, YS), jax.vmap(twin)(MASKS, XS, YS))
    assert log.sizes == [None] * 3  # ranks differ


def test_the_value_gate_sees_no_element_that_is_left_out():
    seen = []

    def function(x):
        seen.append(x.copy())
        return np.log(x)

    call = host_call(function, F64, method="expand_dims", name="log")
    result = jax.vmap(call.where)(MASKS, XS)
    np.testing.assert_allclose(result, np.where(MASKS, np.log(np.where(MASKS, XS, 1)), 0))
    assert [x.shape for x in seen] == [(3,), (), ()]
    assert all((x > 0).all() for x in seen)


def test_a_mask_of_one_element_that_remains():
    log = Logarithm("expand_dims")
    jax.vmap(log.call.where)(np.arange(6) == 3, XS, YS)
    assert log.sizes == [1]


def test_containers_keywords_and_static_arguments():
    seen = []

    def function(tree, *, power, scale):
        seen.append(float(tree["x"]))
        return scale * tree["x"] ** power

    call = host_call(function, F64, static_argnames="power")
    mapped = jax.jit(jax.vmap(lambda m, x, s: call.where(m, {"x": x}, power=2, scale=s), (0, 0, None)))
    np.testing.assert_array_equal(mapped(MASKS, XS, 3.0), np.where(MASKS, 3 * XS**2, 0))
    assert sorted(seen) == [1.5, 2.0, 3.0]


# --- otherwise --------------------------------------------------------------------------------------------

BOTH = {"i": jax.ShapeDtypeStruct((2,), "int32"), "f": jax.ShapeDtypeStruct((), "float32")}


def pair(x):
    return {"i": np.full(2, x, "int32"), "f": np.float32(x)}


def chosen(otherwise):
    """What `where` gives for False, in JAX and inside a host function."""
    call = host_call(pair, BOTH, name="pair")
    outer = host_call(lambda x: call.where(x > 9, x, otherwise=otherwise), BOTH)
    return call.where(False, 1.0, otherwise=otherwise), outer(1.0)


@pytest.mark.parametrize(
    ("otherwise", "wanted"),
    [
        (None, (0, 0)),
        (7, (7, 7)),
        (True, (1, 1)),
        ({"i": np.array([1, 2], "int32"), "f": np.float32(0.5)}, ([1, 2], 0.5)),
        ({"i": 3, "f": 0.5}, (3, 0.5)),
        ({"i": -1, "f": np.float32(np.nan)}, (-1, np.nan)),
        ({"i": jnp.array([1, 2], "int32"), "f": 2}, ([1, 2], 2)),
    ],
    ids=str,
)
def test_otherwise(otherwise, wanted):
    for result in chosen(otherwise):
        assert (result["i"].dtype, result["f"].dtype) == ("int32", "float32")
        np.testing.assert_array_equal(result["i"], np.broadcast_to(np.array(wanted[0], "int32"), (2,)))
        np.testing.assert_array_equal(result["f"], np.float32(wanted[1]))


WRONG = {
    "a float for integers": (1.5, "'i'"),
    "a NaN for integers": (np.nan, "'i'"),
    "a complex number": (1j, "otherwise"),
    "out of range": (2**40, "'i'"),
    "a NumPy float for integers": (np.float64(1.5), "'i'"),
    "a float leaf for integers": ({"i": 1.5, "f": 0.0}, "'i'"),
    "another shape": ({"i": np.zeros(3, "int32"), "f": 0.0}, "'i' is int32[2], and otherwise has int32[3]"),
    "another dtype": ({"i": np.zeros(2, "int64"), "f": 0.0}, "'i' is int32[2], and otherwise has int64[2]"),
    "a batch": ({"i": np.zeros((6, 2), "int32"), "f": 0.0}, "'i'"),
    "another tree": ([1, 2], "a tree like the result"),
    "a leaf missing": ({"i": 1}, "a tree like the result"),
    "a leaf too many": ({"i": 1, "f": 2, "g": 3}, "a tree like the result"),
    "an array for a tree": (np.float32(1), "otherwise"),
    "text": ("nothing", "otherwise"),
    "text in a tree": ({"i": 1, "f": "x"}, "otherwise"),
}


def refused(text):
    return pytest.raises(
        (TypeError, ValueError), match=f"(?s)'pair'.where: otherwise.*{re.escape(text)}|{re.escape(text)}"
    )


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "inside a host function"])
@pytest.mark.parametrize("which", WRONG)
def test_wrong_otherwise(which, way, mask):
    """It is found whatever the mask is, and named."""
    otherwise, text = WRONG[which]
    call = host_call(pair, BOTH, name="pair")
    function = lambda x: call.where(mask, x, otherwise=otherwise)  # noqa: E731
    if way == "inside a host function":
        function = host_call(function, BOTH)
    program = {"jit": jax.jit, "vmap": jax.vmap}.get(way, lambda f: f)(function)
    with refused(text) as info:
        program(np.ones(2) if way == "vmap" else 1.0)
    assert "'pair'.where" in str(info.value)
    assert "otherwise" in str(info.value)


def test_otherwise_that_is_mapped():
    log = Logarithm()
    others = {"a": YS, "b": XS}
    result = jax.vmap(lambda m, x, o: log.call.where(m, x, Y, otherwise=o))(MASKS, XS, others)
    assert_close(result, jax.vmap(lambda m, x, o: twin(m, x, Y, o))(MASKS, XS, others))


# --- wrong masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (1, "int64[]"),
        (0.0, "float64[]"),
        (np.array([True]), "bool[1]"),
        (np.ones((2, 3), bool), "bool[2, 3]"),
        (np.int32(1), "int32[]"),
        ([True], "bool[1]"),
        (None, "object[]"),
        ({"a": True}, "object[]"),
        ("yes", "<U3[]"),
        ("bool", "<U4[]"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("way", ["eager", "jit", "inside a host function"])
def test_wrong_mask(mask, text, way):
    call = host_call(lambda x: x, F64, name="same")
    function = lambda x: call.where(mask, x)  # noqa: E731
    if way == "inside a host function":
        function = host_call(function, F64)
    with pytest.raises(TypeError, match=f"'same'.where: mask must be a boolean scalar; got {re.escape(text)}"):
        through(way, function)(1.0)


def test_wrong_mask_that_is_traced():
    call = host_call(lambda x: x, F64, name="same")
    with pytest.raises(TypeError, match=r"mask must be a boolean scalar; got float64\[\]"):
        jax.jit(call.where)(1.0, 1.0)
    with pytest.raises(TypeError, match=r"mask must be a boolean scalar; got bool\[2\].*jax.vmap maps over it"):
        jax.vmap(call.where)(np.ones((3, 2), bool), np.ones(3))


def test_the_mask_is_no_argument_of_the_function():
    """Errors of arguments are counted as without it."""
    call = host_call(lambda x: x, F64, name="same")
    with pytest.raises(TypeError, match="argument"):
        call.where(True, 1.0, 2.0)
    with pytest.raises(TypeError, match="argument"):
        call.where(True)


# --- derivatives ------------------------------------------------------------------------------------------

GIVEN = {"jvp, vjp": ("jvp", "vjp"), "jacobian": ("jacobian",)}


def weighed(f):
    """A number in which every output of every element matters."""

    def function(*args, **keywords):
        outputs = f(*args, **keywords)
        return jnp.sum(jnp.sin(outputs["a"])) + jnp.sum(outputs["b"] ** 2)

    return function


def mapped(f):
    return jax.vmap(f, (0, 0, None))


T = np.linspace(1, 2, 6)
COMPOSITIONS = {
    "jvp of vmap": lambda f: jax.jvp(lambda x, y: mapped(f)(MASKS, x, y), (XS, Y), (T, YS[1])),
    "vmap of jvp": lambda f: jax.vmap(lambda m, x: jax.jvp(lambda x: f(m, x, Y), (x,), (2.0,)))(MASKS, XS),
    "linearize": lambda f: jax.linearize(lambda x: mapped(f)(MASKS, x, Y), XS)[1](T),
    "jacfwd of vmap": lambda f: jax.jacfwd(lambda x, y: mapped(f)(MASKS, x, y), (0, 1))(XS, Y),
    "vmap of jacfwd": lambda f: jax.vmap(jax.jacfwd(f, (1, 2)))(MASKS, XS, YS),
    "vmap of jacfwd, mask only": lambda f: jax.vmap(jax.jacfwd(f, (1, 2)), (0, None, None))(MASKS, 2.0, Y),
    "grad of vmap": lambda f: jax.grad(weighed(mapped(f)), (1, 2))(MASKS, XS, Y),
    "vmap of grad": lambda f: jax.vmap(jax.grad(weighed(f), (1, 2)))(MASKS, XS, YS),
    "vmap of grad, mask only": lambda f: jax.vmap(jax.grad(weighed(f), (1, 2)), (0, None, None))(MASKS, 2.0, Y),
    "grad of vmap, mask only": lambda f: jax.grad(
        lambda x, y: weighed(jax.vmap(f, (0, None, None)))(MASKS, x, y), (0, 1)
    )(2.0, Y),
    "value_and_grad": lambda f: jax.value_and_grad(weighed(mapped(f)), 2)(MASKS, XS, Y),
    "jacrev of vmap": lambda f: jax.jacrev(lambda x, y: mapped(f)(MASKS, x, y), (0, 1))(XS, Y),
    "vmap of jacrev": lambda f: jax.vmap(jax.jacrev(f, (1, 2)), (0, 0, None))(MASKS, XS, Y),
    "grad, True": lambda f: jax.grad(weighed(f), (1, 2))(True, 2.0, Y),
    "grad, False": lambda f: jax.grad(weighed(f), (1, 2))(False, np.nan, Y),
    "grad in otherwise": lambda f: jax.grad(
        lambda o: weighed(jax.vmap(lambda m, x: f(m, x, Y, otherwise=o)))(MASKS, XS)
    )(jax.tree.map(jnp.asarray, OTHER)),
    "jvp in otherwise": lambda f: jax.jvp(
        lambda o: jax.vmap(lambda m, x: f(m, x, Y, otherwise=o))(MASKS, XS),
        (jax.tree.map(jnp.asarray, OTHER),),
        (jax.tree.map(jnp.ones_like, OTHER),),
    ),
    "grad of scan": lambda f: jax.grad(
        lambda y: jax.lax.scan(lambda c, mx: (c + weighed(f)(*mx, y), None), 0.0, (MASKS, XS))[0]
    )(Y),
    "vmap of grad of remat": lambda f: jax.vmap(jax.grad(jax.checkpoint(weighed(f)), (1, 2)))(MASKS, XS, YS),
    "grad of nested vmaps": lambda f: jax.grad(weighed(jax.vmap(mapped(f), (None, None, 0))), (1, 2))(MASKS, XS, YS),
}


@functools.cache
def of_twin(which):
    return COMPOSITIONS[which](twin)


# Each method, and each kind of endpoint.
@pytest.mark.parametrize(
    ("method", "endpoints"), [*((method, "jvp, vjp") for method in METHODS), *((m, "jacobian") for m in METHODS[:2])]
)
@pytest.mark.parametrize("which", COMPOSITIONS)
def test_derivatives_are_those_of_the_twin(which, endpoints, method):
    log = Logarithm(method, GIVEN[endpoints])
    assert_close(COMPOSITIONS[which](log.call.where), of_twin(which))


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("options", [{"executor": 2}, {"batch_size": 2}, {"skip_zero": True}], ids=str)
@pytest.mark.parametrize("which", ["jvp of vmap", "grad of vmap", "vmap of grad", "jacrev of vmap"])
def test_derivatives_jitted_with_options(which, options, method):
    log = Logarithm(method, **options)
    result = jax.jit(lambda: COMPOSITIONS[which](log.call.where))()
    assert_close(result, of_twin(which))


@pytest.mark.parametrize("which", ["jvp of vmap", "grad of vmap", "vmap of grad", "vmap of jacrev", "jacfwd of vmap"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_finite_differences(which, method):
    log = Logarithm()
    call = host_call(log.function, RESULT, method=method, verify=False, name="log", **finite_difference(log.function))
    assert_close(COMPOSITIONS[which](call.where), of_twin(which), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_counts_of_derivative_calls(method):
    log = Logarithm(method)
    jax.grad(weighed(mapped(log.call.where)), (1, 2))(MASKS, XS, Y)
    assert log.sizes == 2 * calls(method, 3)
    log.sizes.clear()
    jax.jvp(lambda x: mapped(log.call.where)(np.zeros(6, bool), x, Y), (XS,), (T,))
    assert log.sizes == []


@pytest.mark.parametrize("method", ["expand_dims", "legacy_vectorized"])
@pytest.mark.parametrize("endpoint", ["vjp", "jacobian"])
def test_an_unmapped_argument_whose_cotangent_is_needed_leads_with_the_elements_that_remain(method, endpoint):
    given = []

    def vjp(args, cotangent, needed):
        return tuple(cotangent * block for block in jacobian(args, needed))

    def jacobian(args, needed):
        del needed
        given.append([x.shape for x in args])
        return args[::-1]

    endpoints = {"vjp": vjp} if endpoint == "vjp" else {"jacobian": jacobian}
    call = host_call(lambda w, x: w * x, F64, method=method, verify=False, **endpoints)
    mask, xs = np.array([True, False, True, True]), jnp.arange(1.0, 5.0)
    gradient = jax.grad(lambda w, xs: jax.vmap(call.where, (0, None, 0))(mask, w, xs).sum(), (0, 1))(2.0, xs)
    assert_close(gradient, (jnp.asarray(8.0), jnp.where(mask, 2.0, 0.0)))
    assert given == [[(3,), (3,)]]


def test_outputs_that_are_passed_are_those_of_the_elements_that_remain():
    seen = []

    def vjp(args, cotangent, needed, outputs):
        del needed
        seen.append((args[0].copy(), outputs.copy()))
        return (cotangent * outputs,)

    call = host_call(np.exp, F64, method="expand_dims", vjp=vjp, pass_outputs=True, verify=False)
    result = jax.vmap(jax.grad(lambda x, m: call.where(m, x, otherwise=9.0)))(XS, MASKS)
    np.testing.assert_allclose(result, np.where(MASKS, np.exp(XS), 0))
    ((x, outputs),) = seen
    np.testing.assert_allclose(outputs, np.exp(x))
    np.testing.assert_array_equal(x, XS[MASKS])


# --- loops and branches -----------------------------------------------------------------------------------


def halving(f):
    """Halves x until it is below 1; how often that takes differs from element to element."""

    def body(state):
        x, steps = state
        return f(x >= 1, x), steps + 1

    return lambda x: jax.lax.while_loop(lambda state: state[0] >= 1, body, (x, 0))


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("way", WAYS)
def test_while_loop_makes_no_call_for_what_has_finished(way, method):
    sizes = []

    def half(x):
        assert (x >= 1).all()
        sizes.append(x.size)
        return x / 2

    call = host_call(half, F64, method=method, verify=False)
    xs = np.array([0.5, 1.0, 9.0, 3.0, 0.0, 100.0])
    result = through(way, jax.vmap(halving(lambda m, x: call.where(m, x, otherwise=x))))(xs)
    assert_close(result, jax.vmap(halving(lambda m, x: jnp.where(m, x / 2, x)))(xs))
    steps = np.asarray(result[1])
    assert sum(sizes) == steps.sum()
    if method == "expand_dims":
        assert sizes == [int((steps > turn).sum()) for turn in range(steps.max())]


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_cond_makes_no_call_for_the_branch_that_is_not_taken(method):
    log = Logarithm(method)

    def branched(f):
        positive = lambda x: f(x > 0, x, Y)["b"]  # noqa: E731
        return lambda x: jax.lax.cond(x > 0, positive, lambda x: x - 1, x)

    assert_close(jax.vmap(branched(log.call.where))(XS), jax.vmap(branched(twin))(XS))
    assert log.sizes == calls(method, 3)
    log.sizes.clear()
    result = jax.jit(jax.vmap(jax.grad(branched(log.call.where))))(XS)
    assert_close(result, jax.vmap(jax.grad(branched(twin)))(XS))
    assert sum(size or 1 for size in log.sizes) <= 6


@pytest.mark.parametrize("way", WAYS)
def test_scan(way):
    log = Logarithm()
    function = lambda f: lambda ms, xs: jax.lax.scan(lambda c, mx: (c + 1, f(*mx, Y)), 0, (ms, xs))  # noqa: E731
    assert_close(through(way, function(log.call.where))(MASKS, XS), function(twin)(MASKS, XS))
    assert log.sizes == calls("sequential", 3)
    log.sizes.clear()
    both = np.stack([MASKS, MASKS & (XS > 2)]), np.stack([XS, XS])
    assert_close(through(way, jax.vmap(function(log.call.where)))(*both), jax.vmap(function(twin))(*both))
    assert log.sizes == calls("sequential", 4)


# --- devices ----------------------------------------------------------------------------------------------

EIGHT = np.array([2.0, -1.0, 0.0, 3.0, np.nan, 1.5, -2.0, 4.0])


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("kind", [auto, explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("what", ["value", "grad"])
def test_on_several_devices(what, kind, method):
    log, mesh = Logarithm(method), kind("x")
    f = {
        "value": lambda f: jax.vmap(f, (0, 0, None)),
        "grad": lambda f: jax.vmap(jax.grad(weighed(f), 1), (0, 0, None)),
    }[what]
    wanted = f(twin)(EIGHT > 0, EIGHT, Y)
    with using(mesh if kind is explicit else None):
        result = jax.jit(f(log.call.where))(put(EIGHT > 0, mesh, "x"), put(EIGHT, mesh, "x"), put(Y, mesh))
        assert_right_everywhere(result, wanted)
    # The elements that remain, and each once; one call for each shard that has any.
    assert sum(size or 1 for size in log.sizes) == 4 * (2 if what == "grad" else 1) or what == "grad"
    if method == "expand_dims" and what == "value":
        assert sorted(log.sizes) == ([4] if kind is auto else [1, 1, 1, 1])


def test_inside_shard_map():
    log, mesh = Logarithm("expand_dims"), auto("x")
    mapped_over = jax.shard_map(
        jax.vmap(log.call.where, (0, 0, None)),
        mesh=mesh, in_specs=(jax.P("x"), jax.P("x"), jax.P()), out_specs=jax.P("x"),
    )  # fmt: skip
    result = jax.jit(mapped_over)(EIGHT > 0, EIGHT, Y)
    assert_close(
        jax.tree.map(np.asarray, result), jax.tree.map(np.asarray, jax.vmap(twin, (0, 0, None))(EIGHT > 0, EIGHT, Y))
    )
    assert sorted(log.sizes) == [1, 1, 1, 1]


def test_failures_count_the_elements_as_they_are():
    fail = always(LookupError("no"))
    call = host_call(fail, F64, name="solve")
    with pytest.raises(LookupError, match=r"'solve' failed at element \(3,\), with arguments x \(\): "):
        jax.vmap(call.where)(np.arange(6) >= 3, XS)
    vectorised = host_call(fail, F64, name="solve", method="expand_dims", batch_size=2)
    with pytest.raises(
        LookupError, match=r"the elements from \(0,\) to \(3,\), given at once, with arguments x \(2,\)"
    ):
        jax.vmap(vectorised.where)(MASKS, XS)


def test_failures_on_several_devices():
    out = run("""
        def solve(x):
            assert x > 0, "called"
            if x == 3:
                raise ValueError("three")
            return x

        call = batchrules.host_call(solve, lambda x: x)
        xs = np.array([2.0, -1.0, 0.0, 3.0, np.nan, 1.5, -2.0, 4.0])
        for kind in ("Auto", "Explicit"):
            program = jax.jit(jax.vmap(call.where))
            print(outcome(program, on(xs > 0, kind), on(xs, kind)).rpartition(": ")[2])
            print(float(program(on((xs > 0) & (xs != 3), kind), on(xs, kind)).sum()))
    """)
    assert out == ["three", "7.5"] * 2
