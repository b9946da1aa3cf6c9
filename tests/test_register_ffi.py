"""JAX's own foreign calls, `ffi_call` and `pure_callback`, re-registered with this library's rules: JAX's results.

jaxlib's LAPACK kernels are foreign code that every machine has: QR (one operand, its memory shared with an output) and
the product of Householder reflectors (two operands of different rank, the first one's memory shared).
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import METHODS, SEQUENTIAL, VECTORISED, expected_calls

import batchrules

RNG = np.random.default_rng(0)
A = RNG.normal(size=(5, 4, 3))
COLUMN_MAJOR = (1, 0)  # the slowest dimension first


@pytest.fixture(autouse=True, scope="module")
def _lapack():
    """Jaxlib finds its LAPACK when JAX first asks for it; a kernel called before crashes."""
    jnp.linalg.qr(np.eye(3))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float64")


def factors(method):
    """The QR factorisation of one matrix in LAPACK's form, in column-major layout."""

    def geqrf(a):
        rows, columns = a.shape
        return jax.ffi.ffi_call(
            "lapack_dgeqrf_ffi", (shape(rows, columns), shape(min(rows, columns))), vmap_method=method,
            input_layouts=[COLUMN_MAJOR], output_layouts=[COLUMN_MAJOR, None], input_output_aliases={0: 0},
        )(a)  # fmt: skip

    return geqrf


def orthogonal(method):
    """Q from the factors: `lapack_dorgqr_ffi(factors, taus)`."""

    def orgqr(a, taus):
        return jax.ffi.ffi_call(
            "lapack_dorgqr_ffi", shape(*a.shape), vmap_method=method, input_layouts=[COLUMN_MAJOR, None],
            output_layouts=COLUMN_MAJOR, input_output_aliases={0: 0},
        )(a, taus)  # fmt: skip

    return orgqr


def row_major(method):
    """The same kernel without a word about layouts: what it takes for columns are rows."""
    return jax.ffi.ffi_call("lapack_dgeqrf_ffi", (shape(3, 3), shape(3)), vmap_method=method)


def the_primitive(function, *args):
    """The primitive of a function that is one call of it, or of a jitted function that is."""
    jaxpr = jax.make_jaxpr(function)(*args)
    equation = jaxpr.eqns[0]
    inner = equation.params.get("jaxpr")
    return equation.primitive if inner is None else inner.eqns[0].primitive


def ffi_call_p():
    return the_primitive(factors("sequential"), A[0])


@contextlib.contextmanager
def ours(primitive, method=lambda params: params["vmap_method"], **options):
    """This library's rule for a primitive that JAX has a rule for."""
    batchrules.register(primitive, method, update_params=batchrules.ffi_update_params, **options)
    try:
        yield
    finally:
        batchrules.unregister(primitive)


def looped(function, *arrays):
    """The results of one call for each element, stacked."""
    rows = [function(*row) for row in zip(*arrays, strict=True)]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def assert_equal(result, wanted):
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("in_axes", [0, 1, -1])
@pytest.mark.parametrize("method", METHODS)
def test_qr(method, in_axes):
    batch = np.moveaxis(A, 0, in_axes)
    wanted = jax.jit(jax.vmap(factors(method), in_axes))(batch)
    with ours(ffi_call_p()):
        result = jax.jit(jax.vmap(factors(method), in_axes))(batch)
    assert_equal(result, wanted)
    assert_equal(result, looped(factors(method), A))


@pytest.mark.parametrize("method", METHODS)
def test_qr_outside_jit_and_with_axes_in_other_places(method):
    vmapped = lambda: jax.vmap(factors(method), 1, (2, 1))(np.moveaxis(A, 0, 1))  # noqa: E731
    wanted = vmapped()
    with ours(ffi_call_p()):
        assert_equal(vmapped(), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_nested_qr(method):
    batch = np.stack([A, 2 * A[::-1]], 1)
    nested = lambda: jax.jit(jax.vmap(jax.vmap(factors(method), 0), 1))(batch)  # noqa: E731
    wanted = nested()
    with ours(ffi_call_p()):
        assert_equal(nested(), wanted)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("method", VECTORISED)
def test_qr_in_chunks(method, batch_size):
    with ours(ffi_call_p(), batch_size=batch_size):
        result = jax.jit(jax.vmap(factors(method)))(A)
    assert_equal(result, looped(factors(method), A))


@pytest.mark.parametrize("method", METHODS)
def test_qr_without_layouts(method):
    squares = A[:, :3]
    with ours(ffi_call_p()):
        result = jax.jit(jax.vmap(row_major(method)))(squares)
    assert_equal(result, looped(row_major(method), squares))
    transposed = jax.vmap(factors(method))(np.swapaxes(squares, 1, 2))
    assert_equal(result, (np.swapaxes(transposed[0], 1, 2), transposed[1]))


@pytest.mark.parametrize("method", METHODS)
def test_qr_of_an_empty_batch(method):
    with ours(ffi_call_p()):
        packed, taus = jax.jit(jax.vmap(factors(method)))(A[:0])
    assert (packed.shape, taus.shape) == ((0, 4, 3), (0, 3))


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_two_operands(method, batch_size):
    packed, taus = looped(factors("sequential"), A)
    wanted = looped(orthogonal(method), packed, taus)
    with ours(ffi_call_p(), batch_size=batch_size):
        assert_equal(jax.jit(jax.vmap(orthogonal(method), (0, 1)))(packed, taus.T), wanted)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_an_aliased_operand_that_is_not_mapped(method, batch_size):
    """JAX's own rule fails to compile this under two of the methods."""
    packed, taus = factors("sequential")(A[0])
    scaled = np.linspace(0.5, 1, 5)[:, None] * np.asarray(taus)
    wanted = looped(orthogonal(method), [packed] * 5, scaled)
    with ours(ffi_call_p(), batch_size=batch_size):
        assert_equal(jax.jit(jax.vmap(orthogonal(method), (None, 0)))(packed, scaled), wanted)


@pytest.mark.parametrize("method", [*SEQUENTIAL, "broadcast_all"])
def test_an_aliased_operand_that_alone_is_mapped(method):
    """The kernel wants both operands with the batch, so this is not for every method."""
    packed, taus = looped(factors("sequential"), A)
    wanted = looped(orthogonal(method), packed, [taus[0]] * 5)
    with ours(ffi_call_p()):
        assert_equal(jax.jit(jax.vmap(orthogonal(method), (0, None)))(packed, taus[0]), wanted)


@pytest.mark.parametrize("method", [*SEQUENTIAL, "broadcast_all"])
def test_nested_over_one_operand_each(method):
    packed, taus = looped(factors("sequential"), A[:2])
    taus3 = np.stack([taus[0], taus[1], taus[0] / 2])
    wanted = np.stack([[orthogonal(method)(a, t) for t in taus3] for a in packed])
    with ours(ffi_call_p()):
        nested = jax.vmap(jax.vmap(orthogonal(method), (None, 0)), (0, None))
        assert_equal(jax.jit(nested)(packed, taus3), wanted)


def test_a_whole_qr_by_both_kernels():
    def q(a):
        packed, taus = factors("broadcast_all")(a)
        return orthogonal("broadcast_all")(packed, taus)

    with ours(ffi_call_p()):
        qs = jax.jit(jax.vmap(q))(A)
    assert_equal(jnp.einsum("bij,bik->bjk", qs, qs), np.broadcast_to(np.eye(3), (5, 3, 3)))


def test_unregister_gives_back_the_rule_that_jax_made():
    primitive = ffi_call_p()
    before = jax.jit(jax.vmap(factors("broadcast_all")))(A)
    with ours(primitive, "sequential"):
        assert batchrules.registered(primitive).method == "sequential"
        text = jax.jit(jax.vmap(factors("broadcast_all"))).lower(A).as_text()
        assert "while" in text
    assert batchrules.registered(primitive) is None
    text = jax.jit(jax.vmap(factors("broadcast_all"))).lower(A).as_text()
    assert "while" not in text
    assert_equal(jax.jit(jax.vmap(factors("broadcast_all")))(A), before)


def test_a_call_without_a_method():
    """`vmap_method=None` is JAX's default, and is refused by JAX too."""
    with ours(ffi_call_p()), pytest.raises(ValueError, match=r"no method for jax\.vmap was given \(method=None\)"):
        jax.vmap(factors(None))(A)


def test_a_method_of_our_own_for_calls_without_one():
    with ours(ffi_call_p(), "expand_dims"):
        assert_equal(jax.jit(jax.vmap(factors(None)))(A), looped(factors(None), A))


def test_layouts_and_results_of_the_call_itself_are_left_alone():
    """A call that nothing is mapped of is bound as it is."""
    with ours(ffi_call_p()):
        result = jax.vmap(lambda x: (*factors("expand_dims")(A[0]), x), out_axes=(None, None, 0))(np.zeros(3))
    assert_equal(result[:2], factors("expand_dims")(A[0]))


class Callback:
    """A host function behind `jax.pure_callback`, and the shapes it was given."""

    def __init__(self):
        self.shapes = []

    def __call__(self, method):
        def function(x, y):
            self.shapes.append((x.shape, y.shape))
            x, y = np.asarray(x), np.asarray(y)
            batched = max(x.ndim - 1, y.ndim)
            x = x.reshape((1,) * (batched + 1 - x.ndim) + x.shape)
            y = y.reshape((1,) * (batched - y.ndim) + y.shape)
            return x - 2 * y[..., None], np.broadcast_to(y + 1, np.broadcast_shapes(x.shape[:-1], y.shape))

        return lambda x, y: jax.pure_callback(function, (shape(3), shape()), x, y, vmap_method=method)


XS, YS = RNG.integers(-5, 5, (4, 3)).astype(float), np.arange(4.0)
CALLBACKS = [(method, in_axes) for method in METHODS for in_axes in ((0, 0), (0, None), (1, 0), (None, 0))]


def callback_p():
    return the_primitive(Callback()("sequential"), XS[0], YS[0])


def callback_args(in_axes):
    x = {0: XS, 1: XS.T, None: XS[0]}[in_axes[0]]
    return jnp.asarray(x), jnp.asarray(YS if in_axes[1] == 0 else YS[1])


def callback_twin(in_axes):
    return jax.vmap(lambda x, y: (x - jnp.broadcast_to(2 * y, x.shape), y + 1), in_axes)(*callback_args(in_axes))


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(("method", "in_axes"), CALLBACKS, ids=str)
def test_pure_callback(method, in_axes, jit):
    callback = Callback()
    with ours(callback_p()):
        program = jax.vmap(callback(method), in_axes)
        result = jax.block_until_ready((jax.jit(program) if jit else program)(*callback_args(in_axes)))
    assert_equal(result, callback_twin(in_axes))
    assert len(callback.shapes) == expected_calls(method, 4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", VECTORISED)
def test_pure_callback_in_chunks(method, batch_size):
    callback = Callback()
    with ours(callback_p(), batch_size=batch_size):
        result = jax.block_until_ready(jax.jit(jax.vmap(callback(method), (0, None)))(*callback_args((0, None))))
    assert_equal(result, callback_twin((0, None)))
    assert len(callback.shapes) == expected_calls(method, 4, batch_size)


@pytest.mark.parametrize("method", [*SEQUENTIAL, "expand_dims", "broadcast_all"])
def test_nested_pure_callback(method):
    callback = Callback()
    nest = lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0))  # noqa: E731
    with ours(callback_p()):
        result = jax.block_until_ready(jax.jit(nest(callback(method)))(jnp.asarray(XS), jnp.asarray(YS[:2])))
    assert_equal(result, nest(lambda x, y: (x - jnp.broadcast_to(2 * y, x.shape), y + 1))(XS, YS[:2]))
    assert len(callback.shapes) == expected_calls(method, 8)


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_pure_callback_inside_scan(method):
    callback = Callback()
    with ours(callback_p()):
        f = callback(method)
        step = lambda c, y: (f(c, y)[0], f(c, y)[1])  # noqa: E731
        program = jax.vmap(lambda x, ys: jax.lax.scan(step, x, ys), (0, None))
        carry, stacked = jax.jit(program)(jnp.asarray(XS), jnp.asarray(YS))
    np.testing.assert_array_equal(carry, XS - 2 * YS.sum())
    np.testing.assert_array_equal(stacked, np.broadcast_to(YS + 1, (4, 4)))
