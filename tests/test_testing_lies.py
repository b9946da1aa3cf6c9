"""Every planted lie is found, and its text says what is wrong."""

import itertools

import jax
import jax.numpy as jnp
import lies
import numpy as np
import pytest

import batchrules
from batchrules.testing import BatchDisagreement, check_batching

X = np.array([1.0, -2.0, 3.0])
Y = np.array([0.5, 1.5, -1.0])
S = np.array(2.0)
F64 = jax.ShapeDtypeStruct((), "float64")
V64 = jax.ShapeDtypeStruct((3,), "float64")
OTHERS = "the result of an element depends on the other elements of the batch"


def disagreement(function, *args, **options):
    with pytest.raises(BatchDisagreement) as caught:
        check_batching(function, *args, **options)
    return caught.value


def causes(error):
    return [found.cause for found in error.disagreements]


def host(function, result=V64, method="expand_dims", **options):
    return batchrules.host_call(function, result, method=method, **{"verify": False, **options})


def last_axis(s, like):
    return s[..., None] if s.ndim == like.ndim - 1 else s


LIES = {
    "x / norm over the batch": (lambda x: x / np.sqrt((x * x).sum()), V64, (X,), f"{OTHERS} (through x)"),
    "mean over the batch": (lambda x: x - x.mean(axis=0) if x.ndim > 1 else x * 0, V64, (X,), OTHERS),
    "cumsum along the batch": (lambda x: np.cumsum(x) if x.ndim else x, F64, (S,), OTHERS),
    "y's batch dimension ignored": (
        lambda x, y: x * (y[0] if y.ndim == 2 else y), V64, (X, Y), "the batch dimension of y is ignored",
    ),
    "the last of y for all": (
        lambda x, y: x * (y[-1] if y.ndim == 2 else y), V64, (X, Y), "the batch dimension of y is ignored",
    ),
    "a misaligned scalar": (lambda x, s: x * s, V64, (X, S), "s lines up with the wrong axis"),
    "a misaligned scalar, added": (lambda s, x: s + 2 * x, V64, (S, X), "s lines up with the wrong axis"),
    "the first result for all": (
        lambda x: np.broadcast_to(2 * x[:1], x.shape) if x.ndim == 2 else 2 * x, V64, (X,),
        "the batch dimension of x is ignored",
    ),
    "another order": (
        lambda x: x[::-1] if x.ndim == 2 else x, V64, (X,), "the elements come out in another order",
    ),
    "only a batch of one": (
        lambda x: x + 1 if x.ndim == 2 and len(x) == 1 else x, V64, (X,), "only a batch of one element is wrong",
    ),
    "only the last element": (
        lambda x: x + (np.arange(len(x)) == len(x) - 1)[:, None] if x.ndim == 2 and len(x) > 1 else x, V64, (X,),
        "only the last element of a batch is wrong",
    ),
    "only elements that are equal": (
        lambda x: x + 1 if x.ndim == 2 and len(np.unique(x, axis=0)) < len(x) else x, V64, (X,),
        "only a batch of equal elements is wrong",
    ),
    "only as many elements as an array has numbers": (
        lambda x: x + 1 if x.ndim == 2 and len(x) == 5 else x, jax.ShapeDtypeStruct((5,), "float64"),
        (np.arange(5.0),), "the elements of a batch come out differently than on their own",
    ),
    "twice the batch": (lambda x: 2 * x if x.ndim == 2 else x, V64, (X,), "2 times what one-element calls give"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "result", "args", "cause"), LIES.values(), ids=LIES)
def test_lie_about_a_batch(function, result, args, cause):
    error = disagreement(host(function, result), *args)
    assert len(error.disagreements) == 1, str(error)
    assert cause in causes(error)[0]
    assert cause in str(error)


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_a_function_that_takes_memory_to_be_contiguous(method):
    """As C code does that is given a pointer alone."""

    def function(x):
        pointer = (__import__("ctypes").c_double * x.size).from_address(x.ctypes.data)
        return 2 * np.ctypeslib.as_array(pointer).reshape(x.shape)

    error = disagreement(host(function, method=method), X)
    assert causes(error) == ["only arrays that are not contiguous in memory are wrong"]


@pytest.mark.parametrize("name", ["mean over the batch", "y's batch dimension ignored", "a misaligned scalar"])
def test_the_check_of_batches_hides_no_lie(name):
    function, result, args, cause = LIES[name]
    error = disagreement(host(function, result, verify=True), *args)
    assert any(cause in found for found in causes(error)), str(error)


@pytest.mark.parametrize(("name", "method"), list(zip(lies.LIES, itertools.cycle(lies.VECTORISED), strict=False)))
def test_lies_of_the_check_of_batches(name, method):
    """With it they are errors, and its text is shown."""
    lie = lies.LIES[name]
    error = disagreement(lie.call(method), *(arg[0] for arg in lie.args))
    assert "BatchContractError: host_call 'simulate'" in str(error)


def test_the_warning_of_auto_is_a_disagreement():
    """What comes back is right, since `auto` calls it one by one from then on."""
    lie = lies.LIES["x / norm over the batch"]
    error = disagreement(lie.call("auto"), lie.args[0][0])
    assert OTHERS in str(error)
    assert "BatchContractWarning" in str(error)


def test_the_smallest_case_is_shown():
    def product(x, y, s):
        scaled = x * y * s.reshape((*s.shape, 1))
        return scaled / np.abs(scaled).max()

    (found,) = disagreement(host(product), X, Y, S).disagreements
    assert found.cause == f"{OTHERS} (through x, y, s)"
    assert "vmap(in_axes=(0, None, None))" in found.program
    assert "x float64[2, 3], y float64[3], s float64[]" in found.program
    assert "element 0, the result: got" in found.evidence


def test_methods_are_told_apart():
    function = host(lambda x: x / np.sqrt((x * x).sum()))
    error = disagreement(function, X, methods=["sequential", "expand_dims", "broadcast_all"])
    assert causes(error) == [f"method {m!r}: {OTHERS} (through x)" for m in ("expand_dims", "broadcast_all")]


def test_a_failing_batch():
    def one_only(x):
        if x.ndim > 1:
            raise ValueError("one at a time")
        return 2 * x

    (found,) = disagreement(host(one_only), X).disagreements
    assert found.cause == "a batch fails, where each of its elements on its own does not"
    assert "one at a time" in found.evidence


def test_two_lies_are_two_disagreements():
    def function(x, y):
        return x * (y[0] if y.ndim == 2 else y) / np.abs(x).max()

    found = causes(disagreement(host(function), X, Y))
    assert any("the batch dimension of y is ignored" in cause for cause in found)
    assert any("depends on the other elements" in cause and "through x" in cause for cause in found)


# --- functions that are not pure ----------------------------------------------------------------------------


def counting():
    numbers = itertools.count()
    return lambda x: x + next(numbers)


def rarely():
    """Changes its mind in the end."""
    calls = itertools.count()
    return lambda x: x + (next(calls) > 40)


@pytest.mark.parametrize("function", [counting(), rarely()], ids=["a counter", "later"])
def test_impure(function):
    error = disagreement(host(function, method="sequential"), X)
    assert any("the result differs between two equal calls" in cause for cause in causes(error)), str(error)


def test_random():
    error = disagreement(host(lambda x: x + np.random.default_rng().normal(size=x.shape)), X)
    assert causes(error) == ["the result differs between two equal calls: the function is not pure"]


def overwrite(x):
    x *= 2
    return x


def test_writes_into_its_argument():
    error = disagreement(host(overwrite), X)
    assert causes(error) == ["the function writes into its argument"]
    assert "ReadOnlyArgumentError" in str(error)


def test_writes_into_the_memory_of_its_argument():
    """As C code does, which knows nothing of read-only arrays."""

    def function(x):
        result = 2 * x
        pointer = np.ctypeslib.as_array((__import__("ctypes").c_double * x.size).from_address(x.ctypes.data))
        pointer[:] = 0
        return result

    error = disagreement(host(function, method="sequential"), X)
    assert causes(error) == ["the function writes into its argument"]
    assert "x is not what it was before the call" in str(error)


def test_writes_into_a_container():
    def function(state):
        state["x"] = state["x"] + 1
        return state["x"]

    error = disagreement(function, {"x": X})
    assert causes(error) == ["the function writes into its argument"]


# --- derivatives ---------------------------------------------------------------------------------------------


def scale(x, s):
    return np.sin(x) * last_axis(s, x)


def scale_jvp(args, tangents, weight=1.0, *, terms=(0, 1)):
    (x, s), (tx, ts) = args, tangents
    moved = 0 * x * last_axis(s, x)
    if tx is not None and 0 in terms:
        moved = moved + weight * np.cos(x) * tx * last_axis(s, x)
    if ts is not None and 1 in terms:
        moved = moved + np.sin(x) * last_axis(ts, x)
    return moved


def scale_vjp(args, cotangents, needed, weight=1.0, sum_weight=1.0):
    x, s = args
    return weight * np.cos(x) * cotangents * last_axis(s, x), sum_weight * (np.sin(x) * cotangents).sum(-1)


def scaled(**endpoints):
    return host(scale, **endpoints)


def test_an_honest_function_with_derivatives():
    report = check_batching(scaled(jvp=scale_jvp, vjp=scale_vjp), X, S, endpoints=("jvp", "vjp"))
    assert report.left_out == []
    assert {"jvp of vmap", "vmap of jvp", "grad of vmap", "jacrev of vmap", "jacfwd of vmap"} <= set(report.counts)


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("factor", [2.0, -1.0, 0.5, 1.1])
def test_a_vjp_with_a_wrong_factor(factor, method):
    lie = lambda *args: scale_vjp(*args, weight=factor)  # noqa: E731
    error = disagreement(host(scale, method=method, vjp=lie), X, S)
    assert causes(error) == [f"the vjp of x is {factor:.4g} times the numerical derivative"]


@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128"])
def test_a_wrong_factor_in_other_dtypes(dtype):
    function = host(lambda x: x * x, jax.ShapeDtypeStruct((3,), dtype), vjp=lambda args, c, _: (4 * args[0] * c,))
    assert causes(disagreement(function, X.astype(dtype))) == ["the vjp of x is 2 times the numerical derivative"]


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
def test_a_derivative_that_is_right_at_the_example_only(mode):
    given = {"jvp": lambda _, tangents: 2 * X * tangents[0], "vjp": lambda _, ct, _needed: (2 * X * ct,)}
    function = host(lambda x: x * x, **{mode: given[mode]})
    assert causes(disagreement(function, X)) == [
        f"the {mode} of x is not the numerical derivative: a term is missing or wrong"
    ]


def test_a_vjp_without_a_term():
    lie = lambda *args: scale_vjp(*args, sum_weight=0.0)  # noqa: E731
    assert causes(disagreement(scaled(vjp=lie), X, S)) == [
        "the vjp of s is zero, yet the result depends on s: a term is missing"
    ]


def test_a_jvp_with_a_wrong_factor():
    lie = lambda *args: scale_jvp(*args, weight=3.0)  # noqa: E731
    assert causes(disagreement(scaled(jvp=lie), X, S)) == ["the jvp of x is 3 times the numerical derivative"]


@pytest.mark.parametrize(("terms", "name"), [((0,), "s"), ((1,), "x")])
def test_a_jvp_with_a_missing_term(terms, name):
    lie = lambda *args: scale_jvp(*args, terms=terms)  # noqa: E731
    (cause,) = causes(disagreement(scaled(jvp=lie), X, S))
    assert cause == f"the jvp leaves out the tangent of {name}: a term is missing, and the result does not move"


def test_a_jvp_with_half_a_term_missing():
    def jvp(args, tangents):
        return 2 * args[0] * tangents[0]

    function = host(lambda x: x**2 + x.sum(-1, keepdims=True), jvp=jvp)
    assert causes(disagreement(function, X)) == [
        "the jvp of x is not the numerical derivative: a term is missing or wrong"
    ]


def test_a_jvp_that_is_right_for_each_argument_alone():
    def jvp(args, tangents):
        moved = scale_jvp(args, tangents)
        both = all(tangent is not None and np.any(tangent) for tangent in tangents)
        return moved + 1 if both else moved

    assert "the jvp is not linear in the tangents" in causes(disagreement(scaled(jvp=jvp), X, S))


def test_jvp_and_vjp_that_differ_by_little():
    """Too little for differences of calls."""
    lie = lambda *args: scale_vjp(*args, weight=1 + 3e-6)  # noqa: E731
    found = causes(disagreement(scaled(jvp=scale_jvp, vjp=lie), X, S))
    assert found == ["jvp and vjp disagree: they are not each other's transpose"]


def test_a_vjp_that_normalises_over_the_batch():
    def vjp(args, cotangents, needed):
        weight = np.abs(cotangents).max() / np.abs(cotangents).max(axis=-1, keepdims=True)
        return scale_vjp(args, cotangents * weight, needed)

    (cause, *_) = causes(disagreement(scaled(vjp=vjp), X, S))
    assert cause.startswith("the vjp of scale: the result of an element depends on the other elements of the batch")


def test_a_jvp_that_ignores_the_batch_of_a_tangent():
    def jvp(args, tangents):
        tx = tangents[0]
        return scale_jvp(args, (tx[:1] + 0 * tx if tx is not None and tx.ndim == 2 else tx, tangents[1]))

    found = causes(disagreement(scaled(jvp=jvp), X, S))
    ignored = "the jvp of scale: the batch dimension of the tangent of x is ignored"
    assert any(cause.startswith(ignored) for cause in found), found


def test_a_jacobian_that_is_transposed():
    matrix = np.arange(9.0).reshape(3, 3)
    function = host(
        lambda x: (matrix @ x[..., None])[..., 0],
        jacobian=lambda args, _: (np.broadcast_to(matrix.T, (*args[0].shape, 3)),),
    )
    found = causes(disagreement(function, X))
    assert "the jvp of x is not the numerical derivative: a term is missing or wrong" in found
    assert "the vjp of x is not the numerical derivative: a term is missing or wrong" in found


def test_an_endpoint_that_fails():
    def vjp(args, cotangents, needed):
        raise RuntimeError("no adjoint solver")

    error = disagreement(scaled(vjp=vjp), X, S)
    assert causes(error) == ["the vjp of x fails", "the vjp of s fails"]
    assert "no adjoint solver" in str(error)


def test_an_endpoint_that_must_be_there():
    error = disagreement(scaled(vjp=scale_vjp), X, S, endpoints=("jvp", "vjp"))
    assert causes(error) == ["the jvp of x is not there", "the jvp of s is not there"]


# --- functions whose rules are written in JAX ----------------------------------------------------------------


@jax.custom_vjp
def twice_summed(x, w):
    """A rule for a batch whose vjp sums the cotangent of an unmapped argument twice."""
    return _product(x, w)


@jax.custom_batching.custom_vmap
def _product(x, w):
    return x * w


@_product.def_vmap
def _product_rule(size, in_batched, x, w):
    return (x if in_batched[0] else x[None]) * (w if in_batched[1] else w[None]), True


@jax.custom_batching.custom_vmap
def _pull_w(x, w, ct):
    return x * ct


@_pull_w.def_vmap
def _pull_w_rule(size, in_batched, x, w, ct):
    # Where w is not mapped, JAX sums over the batch, and this has done so already.
    full = [array if batched else array[None] for array, batched in zip((x, ct), in_batched[::2], strict=True)]
    per_element = full[0] * full[1]
    if in_batched[1] or not in_batched[0]:
        return per_element, True
    return jnp.broadcast_to(per_element.sum(0), per_element.shape), True


twice_summed.defvjp(lambda x, w: (_product(x, w), (x, w)), lambda res, ct: (res[1] * ct, _pull_w(*res, ct)))


def test_a_cotangent_that_is_summed_twice():
    error = disagreement(twice_summed, X, Y, in_axes=(0, None))
    found = causes(error)
    assert any(
        "the cotangent of w, which is not mapped, is not the sum over the elements" in cause
        and "summed too often" in cause
        for cause in found
    ), str(error)


def test_a_custom_jvp_without_a_term():
    @jax.custom_jvp
    def product(x, y):
        return x * y

    product.defjvp(lambda primals, tangents: (primals[0] * primals[1], tangents[0] * primals[1]))
    found = causes(disagreement(product, X, Y, in_axes=(0, None)))
    assert any("leaves out the tangent of y" in cause for cause in found)
    assert any("the vjp of y is zero" in cause for cause in found)


def test_a_custom_vmap_that_ignores_an_argument():
    @jax.custom_batching.custom_vmap
    def product(x, y):
        return x * y

    @product.def_vmap
    def _(size, in_batched, x, y):
        first = y[0] if in_batched[1] else y
        return jnp.broadcast_to(x, (size, 3)) * first[None], True

    (cause, *_) = causes(disagreement(product, X, Y, endpoints=()))
    assert cause.startswith("the batch dimension of y is ignored")


# What a rule for a batch gives, where each element gives its double.
WRONG_RULES = {
    "no elements": (lambda size, x: 2 * x.reshape(size, -1).reshape(x.shape), "only an empty batch is wrong"),
    "another dtype": (
        lambda _, x: (2 * x).astype("float32"), "an output of a batch has another dtype than that of one element",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "cause"), WRONG_RULES.values(), ids=WRONG_RULES)
def test_a_custom_vmap_with_a_wrong_rule(rule, cause):
    @jax.custom_batching.custom_vmap
    def double(x):
        return 2 * x

    double.def_vmap(lambda size, _, x: (rule(size, x), True))
    assert causes(disagreement(double, X, endpoints=())) == [cause]


def test_a_custom_vmap_that_fails_where_only_one_argument_is_mapped_and_has_no_elements():
    @jax.custom_batching.custom_vmap
    def product(x, y):
        return x * y

    @product.def_vmap
    def _(size, in_batched, x, y):
        full = [array if batched else array[None] for array, batched in zip((x, y), in_batched, strict=True)]
        if not all(in_batched):
            # Of nothing, the size of the rows is not known.
            full = [array.reshape(len(array), -1) for array in full]
        return full[0] * full[1], True

    assert causes(disagreement(product, X, Y, endpoints=())) == ["only an empty batch is wrong"]
