"""Derivatives by finite differences: how many calls they take, of what shapes, and how near they come."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close

import batchrules
from batchrules import finite_difference

SCHEMES = ("central", "forward", "complex_step")
VECTORISED = ("expand_dims", "broadcast_all", "legacy_vectorized")
METHODS = ("sequential", *VECTORISED)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_method = pytest.mark.parametrize("method", METHODS)
every_vectorised = pytest.mark.parametrize("method", VECTORISED)

X = jnp.array([0.3, -1.2, 2.0])
XS = jnp.stack([X, 2 * X, X - 1, X * X])
S = jnp.asarray(1.5)
SS = jnp.array([1.5, -0.5, 2.0, 1.0])
DIRECTIONS = 4  # three entries of x, and s
N = len(XS)
RESULT = jax.ShapeDtypeStruct((3,), "float64")


def smooth(x, s):
    """Analytic, of arrays with or without a leading dimension."""
    return np.sin(x) * s[..., None] * np.cos(x.sum(axis=-1, keepdims=True))


def twin(x, s):
    return jnp.sin(x) * s * jnp.cos(x.sum())


def logged(function):
    """The function, and the shapes of the first argument of each call."""
    shapes = []

    @functools.wraps(function)
    def noted(*args):
        shapes.append(args[0].shape)
        return function(*args)

    return noted, shapes


def by_differences(function, result=RESULT, scheme="central", step=None, **options):
    return batchrules.host_call(function, result, **finite_difference(function, scheme, step), **options)


def total(f):
    return lambda x, s: f(x, s).sum()


# A program, and for how many directions of how many elements it asks.
PROGRAMS = {
    "jvp": (lambda f: jax.jvp(f, (X, S), (X, S))[1], 1, 1),
    "vmap of jvp": (lambda f: jax.vmap(lambda t: jax.jvp(lambda x: f(x, S), (X,), (t,))[1])(XS), 3, 1),
    "jacfwd": (lambda f: jax.jacfwd(f, (0, 1))(X, S), DIRECTIONS, 1),
    "jacfwd in one": (lambda f: jax.jacfwd(f, 0)(X, S), 3, 1),
    "jacrev": (lambda f: jax.jacrev(f, (0, 1))(X, S), DIRECTIONS, 1),
    "grad": (lambda f: jax.grad(total(f), (0, 1))(X, S), DIRECTIONS, 1),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(total(f), (0, 1)), (0, None))(XS, S), DIRECTIONS, N),
    "grad of vmap": (lambda f: jax.grad(total(jax.vmap(f, (0, None))), (0, 1))(XS, S), DIRECTIONS, N),
    "vmap of jacfwd": (lambda f: jax.vmap(jax.jacfwd(f))(XS, SS), 3, N),
    "vmap of jacrev": (lambda f: jax.vmap(jax.jacrev(f, (0, 1)))(XS, SS), DIRECTIONS, N),
    "jvp of vmap": (lambda f: jax.jvp(jax.vmap(f, (0, None)), (XS, S), (XS, S))[1], 1, N),
    "grad of nested vmaps": (
        lambda f: jax.grad(lambda xs, ss: jax.vmap(jax.vmap(f, (0, None)), (None, 0))(xs, ss).sum(), (0, 1))(XS, SS),
        DIRECTIONS,
        N * N,
    ),
    "vmap of vmap of jacfwd": (
        lambda f: jax.vmap(jax.vmap(jax.jacfwd(f, (0, 1)), (0, None)), (None, 0))(XS, SS),
        DIRECTIONS,
        N * N,
    ),
}
every_program = pytest.mark.parametrize("name", PROGRAMS)
TOLERANCES = {"central": 2e-8, "forward": 2e-6, "complex_step": 1e-13}


def under_jit(program, f):
    return jax.block_until_ready(jax.jit(lambda: program(f))())


@functools.cache
def wanted(name):
    return under_jit(PROGRAMS[name][0], twin)


@every_method
@every_scheme
@every_program
def test_against_the_twin(name, scheme, method):
    f = by_differences(smooth, scheme=scheme, method=method)
    assert_close(under_jit(PROGRAMS[name][0], f), wanted(name), TOLERANCES[scheme], TOLERANCES[scheme])


# --- calls ----------------------------------------------------------------------------------------------------------


def calls(name, scheme, method, **options):
    function, shapes = logged(smooth)
    under_jit(PROGRAMS[name][0], by_differences(function, scheme=scheme, method=method, verify=False, **options))
    return shapes


@every_vectorised
@every_program
def test_central_is_one_vectorised_call(name, method):
    _, directions, elements = PROGRAMS[name]
    rows = 2 * directions * elements
    assert calls(name, "central", method) == [(rows, 3)]


@every_vectorised
@every_program
def test_complex_step_is_one_vectorised_call(name, method):
    _, directions, elements = PROGRAMS[name]
    assert calls(name, "complex_step", method) == [(directions * elements, 3)]


@every_vectorised
@every_program
def test_forward_calls_each_element_once_more(name, method):
    """The elements themselves, which no direction moves, are a batch of their own."""
    _, directions, elements = PROGRAMS[name]
    here = (3,) if elements == 1 else (elements, 3)
    assert sorted(calls(name, "forward", method)) == sorted([(directions * elements, 3), here])


@every_program
def test_how_many_elements_a_sequential_function_is_called_for(name):
    _, directions, elements = PROGRAMS[name]
    counts = {scheme: len(calls(name, scheme, "sequential")) for scheme in SCHEMES}
    assert counts == {
        "central": 2 * directions * elements,
        "forward": (directions + 1) * elements,
        "complex_step": directions * elements,
    }


def test_batch_size_bounds_the_directions_of_all_elements_together():
    assert calls("vmap of grad", "central", "expand_dims", batch_size=10) == [(10, 3)] * 3 + [(2, 3)]


@every_scheme
def test_threads_take_all_directions_of_all_elements(scheme):
    f = by_differences(smooth, scheme=scheme, executor=3)
    program = PROGRAMS["vmap of jacrev"][0]
    assert_close(under_jit(program, f), wanted("vmap of jacrev"), TOLERANCES[scheme], TOLERANCES[scheme])
    in_order = by_differences(smooth, scheme=scheme)
    assert_close(under_jit(program, f), under_jit(program, in_order), 0, 0)


def test_the_value_is_not_computed_for_a_gradient():
    """Of the call itself nothing is used."""
    function, shapes = logged(smooth)
    under_jit(PROGRAMS["grad"][0], by_differences(function))
    assert len(shapes) == 2 * DIRECTIONS
    shapes.clear()
    under_jit(lambda f: jax.value_and_grad(total(f))(X, S), by_differences(function))
    assert len(shapes) == 1 + 2 * 3


# --- how near they come ---------------------------------------------------------------------------------------------


def errors(scheme, steps):
    x = np.array(0.7)
    slopes = [finite_difference(np.exp, scheme, step).jvp((x,), (np.array(1.0),)) for step in steps]
    return [abs(float(slope) - np.exp(0.7)) for slope in slopes]


@pytest.mark.parametrize(("scheme", "order"), [("central", 2), ("forward", 1), ("complex_step", 2)])
def test_the_order_of_a_scheme(scheme, order):
    """A tenth of the step: a tenth of the error for a scheme of first order, a hundredth for one of second."""
    found = errors(scheme, (1e-1, 1e-2, 1e-3))
    for coarse, fine in itertools.pairwise(found):
        assert coarse / fine == pytest.approx(10**order, rel=0.1)


def test_a_complex_step_has_no_rounding_error():
    small, smaller = errors("complex_step", (1e-12, 1e-150))
    assert max(small, smaller) < 1e-15
    assert errors("central", (1e-12,))[0] > 1e-7


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_default_step_suits_the_dtype_and_the_size(dtype, scale, scheme):
    """The error that the docstring names, times the size of x. Numbers of 16 bits cannot hold the larger size."""
    if scale > 1 and dtype == "float16":
        scale = 1e3
    power = 2 / 3 if scheme == "central" else 1 / 2
    allowed = 4 * float(jnp.finfo(dtype).eps) ** power

    def parabola(x):
        return (x / scale) ** 2 * scale

    f = by_differences(lambda x: parabola(x).astype(x.dtype), jax.ShapeDtypeStruct((3,), dtype), scheme)
    x = jnp.asarray([1.0, 1.5, -0.75], dtype) * jnp.asarray(scale, dtype)
    slope = jax.jacfwd(f)(x)
    assert slope.dtype == x.dtype
    assert_close(jnp.diagonal(slope).astype("float64"), 2 * x.astype("float64") / scale, allowed, allowed)


@every_method
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_the_step_is_of_what_moves_beside_a_large_argument(scheme, method):
    def product(x, y):
        return np.sin(x) * y

    f = by_differences(product, scheme=scheme, method=method)
    y = jnp.full(3, 1e8)
    for transform, (x_bar, y_bar) in itertools.product((jax.jacfwd, jax.jacrev), [(0, 1)]):
        by_x, by_y = transform(f, (x_bar, y_bar))(X, y)
        assert_close(jnp.diagonal(by_x), jnp.cos(X) * y, 1e-6, 1e-6)
        assert_close(jnp.diagonal(by_y), jnp.sin(X), 1e-6, 1e-6)


@every_method
def test_the_step_is_of_what_moves_beside_a_large_entry(method):
    f = by_differences(np.sin, method=method)
    x = jnp.array([0.5, 1e8, -1.0])
    assert_close(jax.jacfwd(f)(x)[0, 0], jnp.cos(x)[0], 1e-8)
    assert_close(jax.jvp(f, (x,), (jnp.array([0.0, 0.0, 2.0]),))[1][2], 2 * jnp.cos(x)[2], 1e-8)


@every_method
def test_the_step_is_of_what_moves_beside_a_coarser_dtype(method):
    def mixed(x, y):
        return np.sin(x).astype("float64") * np.exp(y)

    f = by_differences(mixed, method=method)
    x = X.astype("float32")
    by_y = jax.vmap(lambda t: jax.jvp(f, (x, X), (jnp.zeros_like(x), t))[1])(jnp.eye(3))
    assert_close(jnp.diagonal(by_y), jnp.sin(x).astype("float64") * jnp.exp(X), 1e-8, 1e-8)


@every_method
@every_scheme
def test_the_step_beside_zero(scheme, method):
    """It is relative to 1 where an argument is smaller."""
    f = by_differences(np.exp, scheme=scheme, method=method)
    for size in (0.0, 1e-12, 1e-3):
        x = size * jnp.array([1.0, -2.0, 0.0])
        assert_close(jnp.diagonal(jax.jacfwd(f)(x)), jnp.exp(x), 1e-7)


def test_each_element_has_a_step_of_its_own():
    f = by_differences(lambda x: np.sin(x / 1e6) + x * 0, jax.ShapeDtypeStruct((), "float64"))
    x = jnp.array([1e6, 1.0, -3e6])
    assert_close(jax.vmap(jax.grad(f))(x), jnp.cos(x / 1e6) / 1e6, 1e-4)


@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9])
def test_a_tangent_of_any_length(length):
    f = by_differences(smooth)
    tangents = X * length, S * length
    assert_close(jax.jvp(f, (X, S), tangents), jax.jvp(twin, (X, S), tangents), 1e-7, 1e-8 * length)


@every_scheme
def test_a_tangent_of_zeros(scheme):
    f = by_differences(smooth, scheme=scheme)
    assert_close(jax.jvp(f, (X, S), (jnp.zeros(3), jnp.zeros(())))[1], jnp.zeros(3), 0, 0)


def test_a_step_of_ones_own():
    f = by_differences(lambda x: x**2, jax.ShapeDtypeStruct((), "float64"), "forward", 0.5)
    assert_close(jax.grad(f)(3.0), jnp.asarray(3.0 + 3.0 + 0.5 * 3.0), 1e-12)


# --- what functions they take ---------------------------------------------------------------------------------------


@every_scheme
@every_method
def test_a_scalar_of_a_scalar(method, scheme):
    f = by_differences(lambda x: x**3, jax.ShapeDtypeStruct((), "float64"), scheme, method=method)
    for derivative in (jax.grad, jax.jacfwd, jax.jacrev):
        assert_close(derivative(f)(2.0), jnp.asarray(12.0), 1e-6)
    assert_close(jax.vmap(jax.grad(f))(SS), 3 * SS**2, 1e-6)


def test_trees():
    def nested(xp, params, x):
        return {"sum": params["a"] * x + params["b"][0], "product": xp.sum(x * params["b"][1], axis=-1)}

    result = {"sum": RESULT, "product": jax.ShapeDtypeStruct((), "float64")}
    args = {"a": X + 1, "b": [X, 2 * X]}, X
    stacked = jax.tree.map(lambda x: jnp.stack([x, x + 1]), args)
    f = by_differences(functools.partial(nested, np), result, method="expand_dims")
    for transform in (jax.jacfwd, jax.jacrev):
        for many, given in ((lambda f: f, args), (jax.vmap, stacked)):
            ours, theirs = (many(transform(g, (0, 1))) for g in (f, functools.partial(nested, jnp)))
            assert_close(jax.jit(ours)(*given), jax.jit(theirs)(*given), 1e-8, 1e-8)


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_integers_are_not_moved(method):
    def scaled(n, x):
        assert n.dtype == np.dtype("int64")
        return {"x": np.cos(x) * n[..., None], "n": n + 1}

    result = {"x": RESULT, "n": jax.ShapeDtypeStruct((), "int64")}
    f = by_differences(scaled, result, method=method)
    n = jnp.asarray(3)
    tangent = np.zeros((), jax.dtypes.float0)
    out, out_tangent = jax.jvp(f, (n, X), (tangent, X))
    assert_close(out["n"], n + 1)
    assert out_tangent["n"].dtype == jax.dtypes.float0
    assert_close(out_tangent["x"], -3 * jnp.sin(X) * X, 1e-8, 1e-8)
    by_n, by_x = jax.grad(lambda n, x: f(n, x)["x"].sum(), (0, 1), allow_int=True)(n, X)
    assert by_n.dtype == jax.dtypes.float0
    assert_close(by_x, -3 * jnp.sin(X), 1e-8, 1e-8)


def test_static_arguments():
    f = batchrules.host_call(
        lambda x, power: x**power, RESULT, static_argnames="power", **finite_difference(lambda x, power: x**power)
    )
    assert_close(jnp.diagonal(jax.jacfwd(lambda x: f(x, 3))(X)), 3 * X**2, 1e-8, 1e-8)
    assert_close(jnp.diagonal(jax.jacrev(lambda x: f(x, power=2))(X)), 2 * X, 1e-8, 1e-8)


@every_method
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_masks_of_where(scheme, method):
    """A perturbed point is called where its element is, and nowhere else."""
    seen = []

    def inverse(x):
        seen.extend(np.ravel(x))
        return 1 / x

    f = by_differences(inverse, jax.ShapeDtypeStruct((), "float64"), scheme, method=method, verify=False)
    x = jnp.array([1.0, -2.0, 4.0, -8.0])
    masked = lambda x: f.where(x > 0, x, otherwise=x * x)  # noqa: E731
    wanted = jnp.where(x > 0, -1 / x**2, 2 * x)
    for program in (
        jax.vmap(jax.grad(masked)),
        jax.vmap(jax.jacfwd(masked)),
        jax.grad(lambda x: jax.vmap(masked)(x).sum()),
    ):
        seen.clear()
        assert_close(jax.jit(program)(x), wanted, 1e-6)
        assert seen
        assert min(seen) > 0
    assert_close(jax.jit(jax.jacrev(jax.vmap(masked)))(x), jnp.diag(wanted), 1e-6)
    for place in (1.0, -2.0):
        assert_close(jax.grad(masked)(place), jnp.asarray(-1.0 if place > 0 else -4.0), 1e-6)


@every_method
@every_scheme
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_masked_element_is_zero_whatever_its_argument(scheme, method, bad):
    f = by_differences(np.sin, jax.ShapeDtypeStruct((), "float64"), scheme, method=method, verify=False)
    x = jnp.array([1.0, bad, 2.0])
    slopes = jax.vmap(lambda m, x: jax.jvp(lambda x: f.where(m, x), (x,), (1.0,))[1])(jnp.isfinite(x), x)
    assert_close(slopes, jnp.array([jnp.cos(1.0), 0.0, jnp.cos(2.0)]), 1e-7)


class Exponential:
    """Writes each result where the one before was."""

    def __init__(self):
        self.buffers = {}

    def __call__(self, x):
        return np.exp(x, out=self.buffers.setdefault((x.shape, x.dtype), np.empty_like(x)))


@every_method
@every_scheme
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_function_that_uses_its_buffer_again(scheme, method, jit):
    f = by_differences(Exponential(), scheme=scheme, method=method, verify=False)
    program = lambda xs: jax.jvp(jax.vmap(f), (xs,), (jnp.ones_like(xs),))[1]  # noqa: E731
    xs = jnp.stack([X, 2 * X])
    assert_close((jax.jit(program) if jit else program)(xs), jnp.exp(xs), 1e-7)


@every_method
@every_scheme
def test_a_function_that_writes_into_its_argument(scheme, method):
    def writes(x):
        x += 1
        return x

    f = by_differences(writes, scheme=scheme, method=method)
    with pytest.raises(batchrules.ReadOnlyArgumentError, match="writes into one of its arguments"):
        jax.jvp(f, (X,), (X,))


def test_an_empty_batch_makes_no_call():
    function, shapes = logged(smooth)
    slopes = jax.vmap(jax.jacfwd(by_differences(function)), (0, None))(jnp.zeros((0, 3)), S)
    assert slopes.shape == (0, 3, 3)
    assert shapes == []


def test_an_argument_without_entries():
    f = by_differences(lambda x, _: np.sin(x))
    by_x, by_nothing = jax.jacfwd(f, (0, 1))(X, jnp.zeros(0))
    assert_close(jnp.diagonal(by_x), jnp.cos(X), 1e-8, 1e-8)
    assert by_nothing.shape == (3, 0)


def test_beside_endpoints_of_ones_own():
    """Only the jvp is made of differences, and the vjp is the user's."""
    asked = []

    def vjp(args, cotangents, _):
        asked.append("vjp")
        return (np.cos(args[0]) * cotangents,)

    f = batchrules.host_call(np.sin, RESULT, jvp=finite_difference(np.sin).jvp, vjp=vjp)
    assert_close(jnp.diagonal(jax.jacfwd(f)(X)), jnp.cos(X), 1e-8, 1e-8)
    assert asked == []
    assert_close(jax.grad(lambda x: f(x).sum())(X), jnp.cos(X), 1e-12)
    assert asked == ["vjp"]


def test_of_a_host_call():
    """The function may be the decorated one."""

    @batchrules.host_call(result_shape=RESULT)
    def cosine(x):
        return np.cos(x)

    f = batchrules.host_call(cosine.host_function, RESULT, **finite_difference(cosine))
    assert_close(jnp.diagonal(jax.jacrev(f)(X)), -jnp.sin(X), 1e-8, 1e-8)


def test_of_another_function():
    """A coarse model may stand in for the slopes of a fine one."""
    f = batchrules.host_call(np.sin, RESULT, **finite_difference(lambda x: 7 * x))
    value, slope = jax.jvp(f, (X,), (jnp.ones(3),))
    assert_close(value, jnp.sin(X))
    assert_close(slope, jnp.full(3, 7.0), 1e-9)


def test_pass_outputs_changes_nothing():
    f = by_differences(smooth, pass_outputs=True)
    for name in ("jacfwd", "vmap of jacrev", "grad of vmap"):
        assert_close(under_jit(PROGRAMS[name][0], f), wanted(name), 2e-8, 2e-8)


# --- complex numbers ------------------------------------------------------------------------------------------------

Z = jnp.asarray(np.asarray(X) + 1j * np.array([1.0, 0.5, -2.0]))
COMPLEX = jax.ShapeDtypeStruct((3,), "complex128")


@pytest.mark.parametrize("scheme", ["central", "forward"])
@every_method
def test_complex_arguments_in_forward_mode(method, scheme):
    f = by_differences(lambda z: z**3 + z.conj(), COMPLEX, scheme, method=method)
    for t in (Z, 1j * Z):
        assert_close(jax.jvp(f, (Z,), (t,)), jax.jvp(lambda z: z**3 + z.conj(), (Z,), (t,)), 2e-6, 2e-6)


@pytest.mark.parametrize("function", [lambda z: z**3, lambda z: (z * z.conj()).real], ids=["holomorphic", "real"])
def test_complex_arguments_in_reverse_mode_are_an_error(function):
    """One block for each argument and output cannot hold the derivative of every such function."""
    result = jax.eval_shape(function, Z)
    f = by_differences(function, result)
    with pytest.raises(batchrules.NotDifferentiableError, match="complex"):
        jax.vjp(f, Z)[1](jnp.ones(3, result.dtype))


def test_complex_results_of_real_arguments():
    f = by_differences(lambda x: np.asarray(x) ** 2 * (1 + 2j), COMPLEX)
    slope = jax.jvp(f, (X,), (X,))[1]
    assert_close(slope, jax.lax.complex(2 * X * X, 4 * X * X), 1e-8, 1e-8)


@pytest.mark.parametrize(
    ("function", "x", "result"),
    [(lambda z: z**2, Z, COMPLEX), (lambda x: x * (1 + 2j), X, COMPLEX)],
    ids=["argument", "result"],
)
@every_method
def test_complex_step_is_for_real_numbers(method, function, x, result):
    f = by_differences(function, result, "complex_step", method=method)
    with pytest.raises(batchrules.NotDifferentiableError, match=r"complex.*central"):
        jax.jvp(f, (x,), (x,))


@every_method
def test_complex_step_of_a_function_that_drops_the_imaginary_part(method):
    f = by_differences(np.abs, RESULT, "complex_step", method=method)
    with pytest.raises(batchrules.ResultError, match="complex"):
        jax.jacfwd(f)(X)
    with pytest.raises(batchrules.NotDifferentiableError, match="central"):
        finite_difference(np.abs, "complex_step").jvp((np.asarray(X),), (np.ones(3),))


# --- as plain functions ---------------------------------------------------------------------------------------------


@every_scheme
def test_plain_jvp(scheme):
    x, s = np.asarray(X), np.asarray(S)
    jvp = finite_difference(smooth, scheme).jvp
    tolerance = TOLERANCES[scheme]
    assert_close(jvp((x, s), (x, s)), jax.jvp(twin, (X, S), (X, S))[1], tolerance, tolerance)
    assert_close(jvp((x, s), (None, s)), jax.jvp(lambda s: twin(X, s), (S,), (S,))[1], tolerance, tolerance)
    assert_close(jvp((x, s), (None, None)), np.zeros(3), 0, 0)
    assert_close(finite_difference(lambda x, y: x * y, scheme).jvp((2.0, 3.0), (1.0, None)), np.asarray(3.0), 1e-7)


@every_scheme
def test_plain_jvp_of_a_function_that_uses_its_buffer_again(scheme):
    slopes = finite_difference(Exponential(), scheme).jvp((np.asarray(X),), (np.ones(3),))
    assert_close(slopes, np.exp(X), 1e-7)


@every_scheme
def test_plain_jacobian(scheme):
    args = np.asarray(X), np.asarray(S)
    jacobian = finite_difference(smooth, scheme).jacobian
    blocks = jacobian(args, (True, True))
    by_x, by_s = jax.jacfwd(twin, (0, 1))(X, S)
    assert_close(tuple(blocks), (by_x, by_s), TOLERANCES[scheme], TOLERANCES[scheme])
    only_s = jacobian(args, (False, True))
    assert only_s[0] is None
    assert_close(only_s[1], by_s, TOLERANCES[scheme], TOLERANCES[scheme])


def test_plain_jacobian_of_trees_and_integers():
    def f(n, params):
        return {"y": n * params["a"], "n": np.int64(n)}

    blocks = finite_difference(f).jacobian((2, {"a": np.ones(2)}), (False, {"a": True}))
    assert blocks["y"][0] is None
    assert_close(blocks["y"][1]["a"], 2 * np.eye(2), 1e-9, 1e-9)


def test_plain_jacobian_of_which_nothing_is_needed():
    assert jax.tree.leaves(finite_difference(np.sin).jacobian((np.ones(3),), (False,))) == []


def test_both_are_options_of_host_call():
    made = finite_difference(np.sin)
    assert dict(**made) == {"jvp": made.jvp, "jacobian": made.jacobian}
    assert finite_difference(np.sin) == made
    assert finite_difference(np.sin, "forward") != made


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "fn must be a function; got 3 of type int"),
        ((np.sin, "backward"), ValueError, "'central', 'forward', 'complex_step'; got 'backward'"),
        ((np.sin, "central", 0), ValueError, "step must be positive and finite; got 0"),
        ((np.sin, "central", -1e-3), ValueError, "step must be positive and finite"),
        ((np.sin, "central", float("nan")), ValueError, "step must be positive and finite"),
        ((np.sin, "central", float("inf")), ValueError, "step must be positive and finite"),
        ((np.sin, "central", "small"), TypeError, "step must be a number or None; got 'small'"),
        ((np.sin, "central", True), TypeError, "step must be a number or None; got True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        finite_difference(*arguments)


def test_a_step_of_a_numpy_type():
    assert finite_difference(np.sin, step=np.float32(0.5)) == finite_difference(np.sin, step=0.5)


def test_second_derivatives_are_an_error():
    f = by_differences(np.sin)
    for second in (jax.hessian(lambda x: f(x).sum()), jax.jacfwd(jax.jacfwd(f)), jax.jacrev(jax.jacrev(f))):
        with pytest.raises(batchrules.DerivativeError, match="made by finite differences, for first derivatives only"):
            second(X)


def no_negative(x):
    if (x.real < 0).any():
        raise ValueError("x must not be negative")
    return np.sqrt(x)


@pytest.mark.parametrize("executor", [None, 2], ids=["in order", "threads"])
def test_a_failure_names_the_element(executor):
    """At 0 the function is defined, and one of the points beside it is not."""
    f = by_differences(no_negative, jax.ShapeDtypeStruct((), "float64"), executor=executor)
    with pytest.raises(ValueError, match="must not be negative") as failure:
        jax.vmap(lambda x: jax.jvp(f, (x,), (1.0,))[1])(jnp.array([1.0, 0.0, 4.0]))
    assert any("no_negative' (finite difference) failed at element (1,)" in note for note in failure.value.__notes__)


@pytest.mark.parametrize("scheme", ["central", "complex_step"])
@pytest.mark.parametrize(("derivative", "place"), [(jax.grad, r"\(1,\)"), (jax.jacfwd, r"\(1, 0\)")])
def test_a_failure_can_be_a_nan(derivative, place, scheme):
    f = by_differences(no_negative, jax.ShapeDtypeStruct((), "float64"), scheme, on_error="nan")
    with pytest.warns(batchrules.FailedElementsWarning, match=rf"1 of 3 elements failed: {place}"):
        slopes = jax.jit(jax.vmap(derivative(f)))(jnp.array([1.0, -1.0, 4.0]))
    assert_close(slopes, jnp.array([0.5, jnp.nan, 0.25]), 1e-8)


def test_a_function_that_mixes_elements_is_found_out():
    f = by_differences(lambda x: x / np.linalg.norm(x), method="expand_dims")
    with pytest.raises(batchrules.BatchContractError, match="does not treat the elements of a batch one by one"):
        jax.jacfwd(f)(X)


# --- skip_zero ------------------------------------------------------------------------------------------------

GRID = jnp.arange(12.0).reshape(6, 2) + 1
# For each of 12 directions but one of 6 elements moves; then the elements themselves.
CALLS = {"central": 2 * 12 + 6, "forward": 12 + 6 + 6, "complex_step": 12 + 6}


def powers(x, y):
    return x**2 * y


def skipping(scheme, **options):
    noted, shapes = logged(powers)
    result = jax.ShapeDtypeStruct((2,), "float64")
    return by_differences(noted, result, scheme, **{"method": "sequential", "skip_zero": True, **options}), shapes


@pytest.mark.parametrize("way", [jax.jit, lambda f: f], ids=["jit", "eager"])
@every_scheme
def test_elements_that_do_not_move_are_not_called(scheme, way):
    f, shapes = skipping(scheme)

    def jacobian_and_value(f):
        return jax.jacfwd(lambda xs: (jax.vmap(f, (0, None))(xs, GRID[0]),) * 2, has_aux=True)(GRID)

    result, wanted = way(lambda: jacobian_and_value(f))(), jacobian_and_value(powers)
    assert_close(result, wanted, 1e-6, 1e-6)
    assert len(shapes) == CALLS[scheme]


@every_scheme
def test_nothing_moves(scheme):
    f, shapes = skipping(scheme)
    tangents = jax.jvp(jax.vmap(f, (0, None)), (GRID, GRID[0]), (0 * GRID, 0 * GRID[0]))[1]
    np.testing.assert_array_equal(tangents, 0 * GRID)
    assert len(shapes) == len(GRID)


def test_a_vectorised_function_is_called_for_all():
    f, shapes = skipping("central", method="expand_dims", verify=False)
    assert_close(
        jax.jacfwd(jax.vmap(f, (0, None)))(GRID, GRID[0]), jax.jacfwd(jax.vmap(powers, (0, None)))(GRID, GRID[0]), 1e-6
    )
    assert shapes == [(6, 2), (2 * 12 * 6, 2)]


@every_scheme
def test_elements_that_do_not_move_beside_a_mask(scheme):
    """Of the elements that `where` lets through, those that move."""
    f, shapes = skipping(scheme)
    mask = np.arange(6) % 2 == 0

    def masked(f):
        return lambda xs, y: jax.vmap(lambda flag, x: f(flag, x, y))(mask, xs)

    ours = masked(lambda flag, x, y: f.where(flag, x, y, otherwise=7.0))
    twin = masked(lambda flag, x, y: jnp.where(flag, powers(x, y), 7.0))
    assert_close(jax.jacfwd(ours)(GRID, GRID[0]), jax.jacfwd(twin)(GRID, GRID[0]), 1e-6, 1e-6)
    assert len(shapes) == CALLS[scheme] / 2


@every_scheme
@pytest.mark.parametrize("options", [{}, {"executor": 2}], ids=str)
def test_a_record_has_the_calls_that_were_made(scheme, options):
    f, shapes = skipping(scheme, **options)
    with batchrules.record() as log:
        jax.jacfwd(jax.vmap(f, (0, None)))(GRID, GRID[0])
    assert len(log.calls) == len(shapes) == CALLS[scheme]
    moved = [call.first for call in log.calls[6:]]
    # Each moves along two directions of 12; places count elements, and in front of them directions.
    assert {place[-1] for place in moved} == set(range(6))


def test_failed_elements_among_those_that_move():
    def root(x):
        if (x < 0).any():
            raise ValueError("a root of a negative number")
        return np.sqrt(x)

    f = by_differences(
        root, jax.ShapeDtypeStruct((), "float64"), method="sequential", skip_zero=True, on_error="nan", step=1e-6
    )
    xs = jnp.array([1.0, -4.0, 9.0])
    with pytest.warns(batchrules.FailedElementsWarning) as told:
        jacobian = jax.jacfwd(jax.vmap(f))(xs)
    np.testing.assert_allclose(jacobian, np.diag([0.5, np.nan, 1 / 6]), 1e-6)
    assert ["1 of 3 elements failed" in str(warning.message) for warning in told] == [True, True]
