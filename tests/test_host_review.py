"""What a review of the host derivatives found: each of these once gave a wrong answer, or none."""

import collections
import concurrent.futures
import dataclasses
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules

F64 = jax.ShapeDtypeStruct((), "float64")
XS = jnp.array([1.0, 2.0, 3.0])


def weighed(p):
    return p["a"] * 2 + p["b"] * 3


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("given", [dict, collections.OrderedDict])
def test_an_answer_in_another_kind_of_dict_is_taken_by_its_keys(kind, given):
    def vjp(args, cotangents, needed):
        del args, needed
        return (kind([("b", 3 * cotangents), ("a", 2 * cotangents)]),)

    f = batchrules.host_call(weighed, F64, vjp=vjp)
    result = jax.grad(f)(given([("b", 1.0), ("a", 1.0)]))
    assert (float(result["a"]), float(result["b"])) == (2.0, 3.0)


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_differences_of_a_function_that_reuses_its_buffer(scheme):
    buffer = np.zeros(100)

    def square(x):
        if x.ndim == 0:
            return x**2
        np.multiply(x, x, out=buffer[: len(x)])
        return buffer[: len(x)]

    f = batchrules.host_call(
        square, F64, method="expand_dims", verify=False, **batchrules.finite_difference(square, scheme)
    )
    np.testing.assert_allclose(jax.jvp(jax.vmap(f), (XS,), (jnp.ones(3),))[1], 2 * XS, 1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(XS), 2 * XS, 1e-6)


@pytest.mark.parametrize("counter", [jnp.int32(100_000), jnp.float32(1e9)], ids=["a step counter", "no bound"])
def test_an_unmapped_argument_does_not_widen_the_value_gate(counter):
    def lie(x, t):
        del t
        return (x / np.linalg.norm(x)).astype("float32")

    f = batchrules.host_call(lie, jax.ShapeDtypeStruct((3,), "float32"), method="expand_dims")
    xs = jnp.array([[1, 2, 3], [4, 5, 7]], "float32")
    with pytest.raises(batchrules.BatchContractError, match="does not treat the elements of a batch one by one"):
        jax.vmap(f, (0, None))(xs, counter)


def test_complex_step_minds_only_the_outputs_in_use():
    def several(x):
        return x**2, np.int32(3), 1.0

    shape = (F64, jax.ShapeDtypeStruct((), "int32"), batchrules.ArraySpec((), "float64", differentiable=False))
    f = batchrules.host_call(several, shape, **batchrules.finite_difference(several, "complex_step"))
    assert float(jax.grad(lambda x: f(x)[0])(2.0)) == 4.0
    assert float(jax.jvp(lambda x: f(x)[0], (2.0,), (1.0,))[1]) == 4.0
    assert jax.vmap(jax.grad(lambda x: f(x)[0]))(XS).tolist() == [2.0, 4.0, 6.0]


def test_differences_of_a_callable_without_a_hash():
    @dataclasses.dataclass
    class Simulator:
        rate: float = 2.0

        def __call__(self, x):
            return self.rate * x**2

    simulator = Simulator()
    f = batchrules.host_call(simulator, F64, method="expand_dims", **batchrules.finite_difference(simulator))
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(XS), 4 * XS, 1e-6)


@pytest.mark.parametrize("options", [{"method": "sequential"}, {"method": "expand_dims", "batch_size": 2}], ids=str)
def test_a_function_that_reuses_the_buffer_of_its_thread(options):
    local = threading.local()

    def double(x):
        if not hasattr(local, "buffers"):
            local.buffers = {}
        buffer = local.buffers.setdefault(x.shape, np.zeros(x.shape))
        np.multiply(x, 2, out=buffer)
        return buffer

    xs = jnp.arange(300.0).reshape(100, 3)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        f = batchrules.host_call(double, jax.ShapeDtypeStruct((3,), "float64"), executor=pool, verify=False, **options)
        np.testing.assert_array_equal(jax.vmap(f)(xs), 2 * xs)


def test_plain_differences_of_a_function_that_reuses_its_buffer():
    buffer = np.zeros(3)

    def square(x):
        return np.multiply(x, x, out=buffer)

    differences = batchrules.finite_difference(square)
    np.testing.assert_allclose(differences.jvp((np.arange(3.0),), (np.ones(3),)), [0, 2, 4], atol=1e-9)


def test_an_exception_that_takes_no_note_stays_what_it_is():
    @dataclasses.dataclass(frozen=True)
    class Stiff(Exception):  # noqa: N818  # a name is all that it needs
        rate: float

    def fails(x):
        raise Stiff(float(x))

    with pytest.raises(Stiff) as info:
        batchrules.host_call(fails, F64)(2.0)
    assert info.value.rate == 2.0


def test_the_sum_of_cotangents_is_no_copy_of_them_all():
    """A check of a batch keeps the rows that it needs, and not the batch."""
    peaks = {}
    y = np.ones(100_000)
    for verify in (True, False):

        def vjp(args, cotangents, needed):
            del needed
            x, _ = args
            given = np.broadcast_to(cotangents, x.shape)
            return None, np.broadcast_to(given[..., None], (*x.shape, len(y))).copy()

        f = batchrules.host_call(lambda x, y: x * y[..., 0], F64, method="expand_dims", vjp=vjp, verify=verify)
        tracemalloc.start()
        jax.grad(lambda y, f=f: jax.vmap(f, (0, None))(jnp.arange(50.0), y).sum())(y)
        peaks[verify] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[True] < 1.2 * peaks[False]


def test_blocks_of_a_device_call_are_checked():
    def jacobian(args, needed):
        del args, needed
        return (jnp.array([[1.0, 2.0, 3.0]]),)

    f = batchrules.device_call(lambda x: x[:2] * 2, method="sequential", jacobian=jacobian)
    with pytest.raises(batchrules.ResultError, match=r"float64\[1, 3\], expected float64\[2, 3\]"):
        jax.jacrev(f)(jnp.ones(3))


def test_a_mask_beside_an_argument_of_that_name():
    f = batchrules.host_call(lambda x, mask: x * mask, F64)
    assert float(f.where(True, 2.0, mask=3.0)) == 6.0


def test_a_keyword_without_arrays_beside_endpoints():
    def scaled(x, *, option=None):
        del option
        return x * 2

    def vjp(args, cotangents, needed, option=None):
        del args, needed, option
        return (2 * cotangents,)

    f = batchrules.host_call(scaled, F64, vjp=vjp)
    assert float(jax.grad(lambda x: f(x, option=None))(1.0)) == 2.0


def test_elements_that_fail_have_no_derivative_by_complex_step():
    def fails_at_two(x):
        if x.real == 2:
            raise ValueError("two")
        return x**2

    differences = batchrules.finite_difference(fails_at_two, "complex_step")
    f = batchrules.host_call(fails_at_two, F64, on_error="nan", **differences)
    with pytest.warns(batchrules.FailedElementsWarning):
        result = jax.vmap(jax.grad(f))(XS)
    np.testing.assert_array_equal(result, [2.0, np.nan, 6.0])
