"""`on_error="nan"`: the elements that fail are NaN, the others right, and one warning tells which."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from failing import (
    F64,
    MESSAGE,
    METHODS,
    VECTOR,
    VECTORISED,
    WAYS,
    XS,
    ReactorError,
    fails_at,
    near_two,
    nested,
    on_every_dispatch,
    solver,
    through,
    with_endpoint,
)
from programs import run

import batchrules
from batchrules import FailedElementsWarning, finite_difference, host_call


@contextlib.contextmanager
def one_warning(*texts):
    """Exactly one warning, with these texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [warning.category for warning in caught] == [FailedElementsWarning], [str(w.message) for w in caught]
    text = str(caught[0].message)
    assert all(part in text for part in texts), text


@pytest.mark.parametrize("way", WAYS)
class TestNan:
    @on_every_dispatch
    def test_elements(self, way, dispatch):
        call = solver(1, 4, on_error="nan", **dispatch)
        with one_warning("host_call 'solve'", "2 of 6 elements failed: (1,), (4,).", f"ReactorError: {MESSAGE}"):
            result = through(way, jax.vmap(call, (0, None)))(XS, VECTOR)
        np.testing.assert_array_equal(result, np.where(np.isin(XS, [1, 4]), np.nan, 6 * XS))

    @on_every_dispatch
    def test_one_call(self, way, dispatch):
        with one_warning("host_call 'solve': the call failed.", f"ReactorError: {MESSAGE}"):
            assert np.isnan(through(way, solver(1, on_error="nan", **dispatch))(1.0, VECTOR))

    @on_every_dispatch
    def test_elements_of_nested_vmaps(self, way, dispatch):
        call = solver(1, on_error="nan", **dispatch)
        with one_warning("4 of 24 elements failed: (1, 0), (1, 1), (1, 2), (1, 3)."):
            result = through(way, nested(call))(XS, np.ones((4, 3)))
        wanted = np.where(XS == 1, np.nan, 6 * XS)[:, None] * np.ones(4)
        np.testing.assert_array_equal(result, wanted)

    def test_many_elements_are_counted_and_some_shown(self, way):
        call = solver(*range(1, 30), on_error="nan")
        with one_warning("29 of 40 elements failed: (1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), ..."):
            result = through(way, jax.vmap(call, (0, None)))(np.arange(40.0), VECTOR)
        assert np.isnan(result).sum() == 29

    @on_every_dispatch
    def test_all_elements(self, way, dispatch):
        call = solver(*XS, on_error="nan", **dispatch)
        with one_warning("6 of 6 elements failed"):
            assert np.isnan(through(way, jax.vmap(call, (0, None)))(XS, VECTOR)).all()

    @pytest.mark.parametrize("method", VECTORISED)
    @pytest.mark.parametrize("batch_size", [None, 1, 2, 4])
    @on_every_dispatch
    def test_chunks(self, way, method, batch_size, dispatch):
        """The elements of a vectorised call that failed are tried one by one, and those that do not fail are kept."""
        call = solver(3, on_error="nan", method=method, batch_size=batch_size, **dispatch)
        with one_warning("1 of 6 elements failed: (3,)."):
            result = through(way, jax.vmap(call, (0, None)))(XS, VECTOR)
        np.testing.assert_array_equal(result, np.where(np.arange(6) == 3, np.nan, 6 * XS))

    def test_the_other_outputs_of_the_element_too(self, way):
        def solve(x):
            if x == 2:
                raise ReactorError
            return {"a": x, "b": np.full(2, x, "float32"), "c": x * (1 + 1j)}

        shape = {"a": F64, "b": jax.ShapeDtypeStruct((2,), "float32"), "c": jax.ShapeDtypeStruct((), "complex128")}
        with one_warning("1 of 6 elements"):
            result = through(way, jax.vmap(host_call(solve, shape, on_error="nan")))(XS)
        for leaf in jax.tree.leaves(result):
            assert np.isnan(np.asarray(leaf)).any(axis=tuple(range(1, leaf.ndim))).tolist() == (XS == 2).tolist()
        np.testing.assert_array_equal(result["c"][3], 3 + 3j)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
    def test_dtypes(self, way, dtype):
        dtype = jnp.dtype(dtype)

        def solve(x):
            if x == 2:
                raise ReactorError
            return x

        with one_warning("1 of 6 elements"):
            result = through(way, jax.vmap(host_call(solve, lambda x: x, on_error="nan")))(jnp.asarray(XS, dtype))
        assert result.dtype == dtype
        assert np.isnan(np.asarray(result).astype("complex64")).tolist() == (XS == 2).tolist()

    @on_every_dispatch
    def test_nothing_failed_nothing_said(self, way, dispatch):
        call = solver(on_error="nan", **dispatch)
        np.testing.assert_array_equal(through(way, jax.vmap(call, (0, None)))(XS, VECTOR), 6 * XS)

    def test_each_batch_warns(self, way):
        program = through(way, jax.vmap(solver(2, on_error="nan"), (0, None)))
        for _ in range(3):
            with one_warning("1 of 6 elements failed: (2,)."):
                program(XS, VECTOR)

    def test_in_a_scan_each_step_warns(self, way):
        call = jax.vmap(solver(2, on_error="nan"), (0, None))
        program = through(way, lambda xs: jax.lax.scan(lambda _, x: (None, call(x, VECTOR)), None, xs)[1])
        with pytest.warns(FailedElementsWarning) as caught:
            result = program(np.stack([XS, XS + 1, XS + 3]))
        assert np.isnan(result).tolist() == (np.stack([XS, XS + 1, XS + 3]) == 2).tolist()
        assert {str(warning.message).split(":")[-1].strip() for warning in caught} == {MESSAGE}

    @pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
    def test_a_dtype_without_nan_is_refused_before_anything_runs(self, way, dtype):
        called = []
        shape = {"good": F64, "bad": jax.ShapeDtypeStruct((), dtype)}
        call = host_call(called.append, shape, on_error="nan", name="solve")
        with pytest.raises(ValueError, match=rf"'solve': on_error='nan', but output 'bad' has dtype {dtype}.*no NaN"):
            through(way, call)(1.0)
        with pytest.raises(ValueError, match="no NaN"):
            jax.make_jaxpr(call)(1.0)
        assert not called

    def test_an_exception_that_cannot_be_shown(self, way):
        class OddError(Exception):
            def __str__(self):
                raise RuntimeError("of __str__")

        def solve(x):
            if x == 2:
                raise OddError
            return x

        with one_warning("1 of 6 elements failed: (2,).", "OddError"):
            result = through(way, jax.vmap(host_call(solve, F64, on_error="nan")))(XS)
        assert np.isnan(result).sum() == 1

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("executor", [None, 2])
    @pytest.mark.parametrize(
        "result",
        [lambda x: x.astype("float32"), lambda x: (x, x), lambda x: np.zeros((*x.shape, 7))],
        ids=["dtype", "tree", "shape"],
    )
    def test_broken_promises_are_not_swallowed(self, way, method, executor, result):
        call = jax.vmap(host_call(result, F64, method=method, executor=executor, on_error="nan"))
        kinds = batchrules.ResultError, batchrules.BatchContractError
        with pytest.raises(jax.errors.JaxRuntimeError if way == "jit" else kinds, match="host_call"):
            through(way, call)(XS)

    def test_broken_contracts_are_not_swallowed(self, way):
        call = host_call(lambda x: x / x.sum(), F64, method="expand_dims", on_error="nan")
        kind = jax.errors.JaxRuntimeError if way == "jit" else batchrules.BatchContractError
        with pytest.raises(kind, match="one by one"):
            through(way, jax.vmap(call))(XS + 1)

    def test_jax_inside_is_not_swallowed(self, way):
        call = host_call(lambda x: np.asarray(jnp.sin(x)), F64, on_error="nan")
        kind = jax.errors.JaxRuntimeError if way == "jit" else batchrules.JaxInsideHostFunctionError
        with pytest.raises(kind, match="uses JAX inside"):
            through(way, jax.vmap(call))(XS)

    @on_every_dispatch
    def test_writing_into_an_argument_is_not_swallowed(self, way, dispatch):
        """No matter of one element: all would fail, and NaN would hide it."""

        def solve(x, y):
            y += 1
            return x * y.sum()

        call = host_call(solve, F64, on_error="nan", **dispatch)
        kind = jax.errors.JaxRuntimeError if way == "jit" else batchrules.ReadOnlyArgumentError
        with pytest.raises(kind, match="writes into one of its arguments"):
            through(way, jax.vmap(call, (0, None)))(XS, VECTOR)

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("method", ["sequential", "expand_dims"])
    @on_every_dispatch
    def test_keyboard_interrupt_is_not_swallowed(self, way, kind, method, dispatch):
        def solve(x):
            if np.any(x == 2):
                raise kind("stop")
            return x

        call = jax.vmap(host_call(solve, F64, on_error="nan", method=method, verify=False, **dispatch))
        expected = jax.errors.JaxRuntimeError if way == "jit" else kind
        with pytest.raises(expected, match="stop"):
            through(way, call)(XS)

    def test_derivatives(self, way):
        call = with_endpoint("vjp", on_error="nan")
        with one_warning("host_call 'solve' (vjp)", "1 of 6 elements failed: (2,)."):
            result = through(way, jax.vmap(jax.grad(call), (0, None)))(XS, VECTOR)
        np.testing.assert_array_equal(result, np.where(XS == 2, np.nan, 6.0))

    @on_every_dispatch
    def test_sums_of_derivatives(self, way, dispatch):
        """What a failed element would have added is not known, so neither is the sum."""
        call = with_endpoint("vjp", on_error="nan", **dispatch)
        total = lambda xs, y: jax.vmap(call, (0, None))(xs, y).sum()  # noqa: E731
        with one_warning("1 of 6 elements failed: (2,)."):
            to_xs, to_y = through(way, jax.grad(total, (0, 1)))(XS, VECTOR)
        np.testing.assert_array_equal(to_xs, np.where(XS == 2, np.nan, 6.0))
        assert np.isnan(to_y).all()

    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_sums_of_vectorised_derivatives(self, way, batch_size):
        call = with_endpoint("vjp", on_error="nan", method="broadcast_all", batch_size=batch_size)
        total = lambda xs, y: jax.vmap(call, (0, None))(xs, y).sum()  # noqa: E731
        with one_warning("1 of 6 elements failed: (2,)."):
            to_xs, to_y = through(way, jax.grad(total, (0, 1)))(XS, VECTOR)
        np.testing.assert_array_equal(to_xs, np.where(XS == 2, np.nan, 6.0))
        assert np.isnan(to_y).all()

    def test_jacobians(self, way):
        call = with_endpoint("jacobian", on_error="nan")
        with one_warning("host_call 'solve' (jacobian)", "1 of 6 elements failed: (2,)."):
            result = through(way, jax.vmap(jax.jacrev(call, 1), (0, None)))(XS, VECTOR)
        np.testing.assert_array_equal(result, np.where(XS == 2, np.nan, 2 * XS)[:, None] * VECTOR)

    @pytest.mark.parametrize("options", [{}, {"method": "expand_dims", "batch_size": 1}], ids=str)
    def test_finite_differences(self, way, options):
        """Counted and named by element, not by the points around it."""
        differences = finite_difference(near_two)
        call = host_call(near_two, F64, name="solve", on_error="nan", verify=False, **options, **differences)
        with one_warning("host_call 'solve' (finite difference)", "1 of 6 elements failed: (2,)."):
            result = through(way, jax.vmap(jax.grad(call), (0, None)))(XS, VECTOR)
        np.testing.assert_allclose(result, np.where(XS == 2, np.nan, 3), rtol=1e-6)

    @on_every_dispatch
    def test_masked_elements_cannot_fail(self, way, dispatch):
        call = solver(2, 4, on_error="nan", **dispatch)
        masked = jax.vmap(lambda x: call.where(x != 2, x, VECTOR, otherwise=-1.0))
        with one_warning("1 of 5 elements failed: (4,)."):
            result = through(way, masked)(XS)
        np.testing.assert_array_equal(result, np.where(XS == 2, -1, np.where(XS == 4, np.nan, 6 * XS)))


def test_failed_elements_of_an_inner_call_are_nan_for_the_outer():
    inner = host_call(fails_at(2), F64, on_error="nan")
    outer = host_call(lambda x: np.nan_to_num(inner(x, VECTOR), nan=-1), F64)
    with pytest.warns(FailedElementsWarning, match="the call failed"):
        result = through("jit", jax.vmap(outer))(XS)
    np.testing.assert_array_equal(result, np.where(XS == 2, -1, 6 * XS))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_several_devices_failed_elements_are_nan(kind):
    out = run(f"""
        def solve(x):
            if x == 5:
                raise ValueError("the reactor is empty")
            return 2 * x

        vjp = lambda args, ct, needed: (solve(args[0]) + ct,)
        call = batchrules.host_call(solve, lambda x: x, name="solve", on_error="nan", vjp=vjp)
        xs = on(np.arange(8.0), {kind!r})
        for function, scale in ((jax.vmap(call), 2), (jax.vmap(jax.grad(call)), None)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = np.asarray(jax.jit(function)(xs))
            assert np.isnan(result).tolist() == [i == 5 for i in range(8)], result
            texts = [str(warning.message) for warning in caught]
            print(len(texts), "elements failed" in texts[0])
    """)  # fmt: skip
    assert out == ["1 True"] * 2
