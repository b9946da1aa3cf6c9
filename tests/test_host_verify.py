"""The value gate: a vectorised call that does not treat its elements one by one is found, whatever it gets wrong."""

import concurrent.futures
import re
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lies import F64, LIES, VECTORISED, Counted, by_element, cumulate, normalise, random, repeat
from programs import run

from batchrules import (
    ArraySpec,
    BatchContractError,
    BatchContractWarning,
    _host_verify,
    host_call,
    last_error,
    original_errors,
)
from batchrules._methods import Lead

WAYS = {"eager": lambda function: function, "jit": jax.jit}
XS = np.arange(1.0, 7.0)
# From its second run on, a program that fails raises the latter on jax 0.10 and 0.12.
JAX_ERRORS = jax.errors.JaxRuntimeError, ValueError

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_method = pytest.mark.parametrize("method", VECTORISED)
each_lie = pytest.mark.parametrize("lie", LIES.values(), ids=LIES)


def double(x):
    return 2 * x


def error_of(way, function, *args):
    """The text of the error that these arguments are; under jit JAX's own, of which ours is a part."""
    if way is not jax.jit:
        with pytest.raises(BatchContractError) as caught:
            function(*args)
        return str(caught.value)
    with pytest.raises(JAX_ERRORS) as jitted:
        jax.block_until_ready(way(function)(*args))
    ours = last_error()
    assert isinstance(ours, BatchContractError)
    assert str(jitted.value).rstrip().endswith(str(ours))
    return str(ours)


def result_of(way, function, *args):
    return jax.block_until_ready(way(function)(*args))


def quiet(way, function, *args):
    """The result, of a call that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return result_of(way, function, *args)


# --- lies -------------------------------------------------------------------------------------------------


@each_way
@each_method
class TestLies:
    @each_lie
    def test_an_explicit_method_is_an_error_that_says_all(self, lie, method, way):
        text = error_of(way, jax.vmap(lie.call(method)), *lie.args)
        size = len(lie.args[0])
        assert text.startswith("host_call 'simulate' does not treat the elements of a batch one by one")
        assert f"{size} elements at once (method {method!r}, arguments" in text
        for argument in lie.args:
            assert f" {argument.shape}" in text
        assert "method='sequential'" in text
        assert "verify=False" in text
        row, told = re.search(r"element (\d+) differs by up to (\S+) from", text).groups()
        worst = np.abs(lie.lied[int(row)] - lie.right[int(row)]).max()
        assert worst > 0
        assert told == f"{worst:.3g}"

    @each_lie
    def test_it_is_the_gate_that_finds_it(self, lie, method, way):
        got = result_of(way, jax.vmap(lie.call(method, verify=False)), *lie.args)
        np.testing.assert_array_equal(got, lie.lied)
        assert np.abs(lie.lied - lie.right).max() > 0.01

    def test_under_nested_vmaps(self, method, way):
        function = jax.vmap(jax.vmap(LIES["x / norm over the batch"].call(method)))
        assert "given 6 elements at once" in error_of(way, function, random(2, 3, 3))

    def test_every_call_is_told_and_not_the_first_alone(self, method, way):
        lie = LIES["cumsum along the batch"]
        function = jax.vmap(lie.call(method))
        first, second = (error_of(way, function, *lie.args) for _ in range(2))
        assert first == second

    def test_in_one_output_of_several(self, method, way):
        call = host_call(lambda x: {"good": 2 * x, "bad": cumulate(x)}, {"bad": F64, "good": F64}, method=method)
        assert "output 'bad' of element 5 differs" in error_of(way, jax.vmap(call), XS)

    @pytest.mark.parametrize("wrong", [(7,), (2, 6), ()], ids=str)
    def test_the_shape_gate_comes_first(self, method, way, wrong):
        counted = Counted(lambda x: np.zeros(wrong) if x.ndim else x)
        text = error_of(way, jax.vmap(host_call(counted, F64, method=method, name="simulate")), XS)
        assert f"the result has shape {wrong}: expected (6,)" in text
        assert counted.shapes == {(6,): 1}

    def test_the_shape_gate_has_no_switch(self, method, way):
        call = host_call(lambda x: x[:2] if x.ndim else x, F64, method=method, verify=False)
        assert "the result has shape (2,): expected (6,)" in error_of(way, jax.vmap(call), XS)

    def test_an_element_that_fails_on_its_own(self, method, way):
        text = error_of(way, jax.vmap(host_call(lambda x: x * len(x), F64, method=method, name="simulate")), XS)
        assert text.startswith(
            "host_call 'simulate' failed when element 0 of a batch of 6 was called on its own to check the batch: "
            "TypeError: len() of unsized object."
        )
        assert "verify=False" in text


def test_the_original_error_is_had_back_from_a_compiled_program():
    lie = LIES["x / norm over the batch"]
    function = jax.jit(jax.vmap(lie.call("expand_dims")))
    with pytest.raises(BatchContractError, match="one by one"), original_errors():
        jax.block_until_ready(function(*lie.args))


@each_method
def test_an_element_of_another_shape_says_how_to_go_without(method):
    function = jax.vmap(host_call(lambda x: x if x.ndim else x[None], F64, method=method))
    with pytest.raises(ValueError, match=r"verify=False.*shape \(1,\)"):
        function(XS)


# --- auto -------------------------------------------------------------------------------------------------


@each_way
class TestAuto:
    @each_lie
    def test_one_warning_and_right_results_from_that_batch_on(self, lie, way):
        counted = Counted(lie.function)
        call = lie.call("auto", counted)
        with pytest.warns(BatchContractWarning, match="one element at a time from now on") as told:
            got = result_of(way, jax.vmap(call), *lie.args)
        assert len(told) == 1
        np.testing.assert_allclose(got, lie.right, rtol=1e-13)
        counted.shapes.clear()
        later = [2 * argument for argument in lie.args]
        np.testing.assert_allclose(quiet(way, jax.vmap(call), *later), by_element(lie.function, *later), rtol=1e-13)
        assert counted.shapes.total() == len(later[0])

    def test_the_batch_is_called_once_then_its_elements(self, way):
        counted = Counted(normalise)
        with pytest.warns(BatchContractWarning):
            result_of(way, jax.vmap(LIES["x / norm over the batch"].call("auto", counted)), random(5, 3))
        # The gate stops at the first element that is wrong, or after two.
        assert counted.shapes[5, 3] == 1
        assert 5 < counted.shapes[3,] <= 7

    def test_a_wrong_shape_is_told_in_the_same_way(self, way):
        call = host_call(lambda x: x[:2] * 2 if x.ndim > 1 else 2 * x, lambda x: x, signature="(n)->(n)")
        xs = random(3, 2)
        with pytest.warns(BatchContractWarning, match=r"has shape \(2, 2\): expected \(3, 2\)") as told:
            got = result_of(way, jax.vmap(call), xs)
        assert len(told) == 1
        np.testing.assert_array_equal(got, 2 * xs)

    def test_an_element_that_fails_on_its_own_fails_for_itself(self, way):
        """There is no right result then: the function does not take what it was said to take."""
        call = host_call(lambda x: x * len(x), F64, signature="()->()", name="simulate")
        expected = TypeError if way is not jax.jit else jax.errors.JaxRuntimeError
        with pytest.warns(BatchContractWarning, match="len"), pytest.raises(expected, match="len"):
            result_of(way, jax.vmap(call), XS)

    def test_summed_and_chunked(self, way):
        """The results that a batch left behind are dropped: nothing is added to them."""
        call = LIES["cumsum along the batch"].call("auto", batch_size=4, executor=2)
        with pytest.warns(BatchContractWarning):
            got = result_of(way, jax.vmap(jax.vmap(call)), XS.reshape(2, 3))
        np.testing.assert_array_equal(got, XS.reshape(2, 3))

    def test_what_schema_proves_is_checked_too(self, way):
        call = host_call(normalise, lambda x: x, schema={"x": ArraySpec((..., 3))})
        xs = random(4, 3)
        with pytest.warns(BatchContractWarning):
            got = result_of(way, jax.vmap(call), xs)
        np.testing.assert_allclose(got, by_element(normalise, xs), rtol=1e-13)

    def test_the_functions_own_buffer_is_left_alone(self, way):
        given = []

        def keep(x):
            given.append(cumulate(x))
            return given[-1]

        with pytest.warns(BatchContractWarning):
            result_of(way, jax.vmap(host_call(keep, F64, signature="()->()")), XS)
        np.testing.assert_array_equal(given[0], np.cumsum(XS))


def test_distrust_is_shared_by_compiled_programs():
    call = LIES["cumsum along the batch"].call("auto")
    compiled = jax.jit(jax.vmap(call))
    np.testing.assert_array_equal(quiet(jax.jit, compiled, np.ones(1)), [1])
    with pytest.warns(BatchContractWarning):
        jax.vmap(call)(XS)
    np.testing.assert_array_equal(quiet(jax.jit, compiled, XS), XS)


def test_threads_that_find_it_together_warn_once():
    call, start = jax.vmap(LIES["cumsum along the batch"].call("auto")), threading.Barrier(4)

    def work(offset):
        start.wait()
        return call(XS + offset)

    with pytest.warns(BatchContractWarning) as told, concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert len(told) == 1
    for offset, got in enumerate(results):
        np.testing.assert_array_equal(got, XS + offset)


# --- what proves nothing -----------------------------------------------------------------------------------


@each_way
@each_method
class TestOpen:
    @pytest.mark.parametrize(
        "proves_nothing", [XS[:1], np.full(4, 3.0), np.full(3, np.nan)], ids=["one", "equal", "nan"]
    )
    def test_a_later_batch_is_checked(self, method, way, proves_nothing):
        counted = Counted(repeat)
        function = jax.vmap(host_call(counted, F64, method=method, name="simulate"))
        for _ in range(2):
            np.testing.assert_array_equal(quiet(way, function, proves_nothing), 2 * proves_nothing)
        assert counted.shapes == {proves_nothing.shape: 2}
        assert "of element 5 differs" in error_of(way, function, XS)

    def test_rows_that_differ_in_the_middle_alone(self, method, way):
        function = jax.vmap(host_call(repeat, F64, method=method))
        assert "of element 2 differs" in error_of(way, function, np.array([1.0, 1.0, 5.0, 1.0]))

    def test_equal_rows_of_one_argument_do_not_hide_those_of_another(self, method, way):
        function = jax.vmap(host_call(lambda x, w: x + (w[0] if w.ndim else w), F64, method=method))
        assert "of element 3 differs" in error_of(way, function, np.ones(4), XS[:4])

    def test_each_mapped_argument_that_varies_is_put_to_the_test(self, method, way):
        """A grid that ends where it began: the first and the last element differ, but not in w."""
        lie = LIES["a batch dimension ignored"]
        assert "differs" in error_of(way, jax.vmap(lie.call(method)), XS[:4], np.array([1.0, 2.0, 3.0, 1.0]))

    def test_arguments_that_vary_in_elements_of_their_own(self, method, way):
        function = jax.vmap(host_call(lambda x, w: w + (x[0] if x.ndim else x), F64, method=method))
        text = error_of(way, function, np.array([1.0, 5.0, 1.0, 1.0]), np.array([1.0, 1.0, 5.0, 1.0]))
        assert "of element 1 differs" in text

    def test_trust_in_one_argument_mapped_is_not_trust_in_both(self, method, way):
        lie = LIES["a batch dimension ignored"]
        call = lie.call(method)
        np.testing.assert_array_equal(result_of(way, jax.vmap(call, (0, None)), XS, 2.0), 2 * XS)
        assert "differs" in error_of(way, jax.vmap(call), XS, 1 + XS)

    def test_trust_while_an_argument_did_not_vary_is_not_trust_in_it(self, method, way):
        lie = LIES["a batch dimension ignored"]
        function = jax.vmap(lie.call(method))
        np.testing.assert_array_equal(result_of(way, function, XS, np.full(6, 2.0)), 2 * XS)
        assert "differs" in error_of(way, function, XS, 1 + XS)

    def test_a_later_chunk_is_checked_where_the_first_proves_nothing(self, method, way):
        function = jax.vmap(host_call(repeat, F64, method=method, batch_size=3))
        assert "differs" in error_of(way, function, np.array([1.0, 1.0, 1.0, 2.0, 3.0, 4.0]))

    def test_a_failure_alone_is_no_proof_where_failures_become_nan(self, method, way):
        fails = [False, True]

        def simulate(x):
            if fails and fails.pop(0):
                raise TimeoutError
            return repeat(x)

        function = jax.vmap(host_call(simulate, F64, method=method, on_error="nan"))
        quiet(way, function, XS)
        assert "of element 5 differs" in error_of(way, function, XS)


# --- what it costs ------------------------------------------------------------------------------------------


@each_way
@each_method
class TestCost:
    def test_two_elements_for_each_element_shape_and_dtype(self, method, way):
        counted = Counted(double)
        function = jax.vmap(host_call(counted, lambda x: x, method=method))
        for batch in (random(4, 3), random(4, 3, seed=1), random(5, 3), random(7, 3)):
            np.testing.assert_array_equal(result_of(way, function, batch), 2 * batch)
        assert counted.shapes == {(4, 3): 2, (5, 3): 1, (7, 3): 1, (3,): 2}
        result_of(way, function, random(4, 2))
        assert counted.shapes[2,] == 2
        result_of(way, function, random(4, 3).astype("float32"))
        result_of(way, function, random(5, 3).astype("float32"))
        assert counted.shapes[3,] == 4

    def test_nested_vmaps_pay_once(self, method, way):
        counted = Counted(double)
        function = jax.vmap(jax.vmap(host_call(counted, lambda x: x, method=method)))
        for batch in (random(2, 3), random(3, 2)):
            np.testing.assert_array_equal(result_of(way, function, batch), 2 * batch)
        assert counted.shapes == {(6,): 2, (): 2}

    def test_unmapped_arguments_are_given_as_to_one_call(self, method, way):
        counted = Counted(lambda x, w: (x * w).sum(-1))
        function = jax.vmap(host_call(counted, F64, method=method), in_axes=(0, None))
        np.testing.assert_allclose(
            result_of(way, function, random(4, 3), np.arange(3.0)), random(4, 3) @ np.arange(3.0)
        )
        assert counted.shapes.total() == 3
        assert counted.shapes[(3,), (3,)] == 2

    def test_arguments_that_vary_in_turn_are_checked_once_each(self, method, way):
        counted = Counted(np.add)
        function = jax.vmap(host_call(counted, F64, method=method))
        for x, w in ((XS, np.ones(6)), (np.ones(6), XS)) * 3:
            np.testing.assert_array_equal(result_of(way, function, x, w), x + w)
        assert counted.shapes == {((6,), (6,)): 6, ((), ()): 4}

    def test_without_there_are_no_calls_more(self, method, way):
        counted = Counted(double)
        result_of(way, jax.vmap(host_call(counted, lambda x: x, method=method, verify=False)), XS)
        assert counted.shapes == {(6,): 1}

    def test_a_static_argument_is_checked_for_each_value(self, method, way):
        lies = {"good": double, "bad": repeat}
        call = host_call(lambda x, kind: lies[kind](x), F64, method=method, static_argnames="kind")
        result_of(way, jax.vmap(lambda x: call(x, "good")), XS)
        assert "differs" in error_of(way, jax.vmap(lambda x: call(x, "bad")), XS)

    @pytest.mark.parametrize("batch_size", [2, 4, 5, 6, 100])
    def test_chunks_pay_once(self, method, way, batch_size):
        counted = Counted(double)
        function = jax.vmap(host_call(counted, F64, method=method, batch_size=batch_size))
        for _ in range(2):
            np.testing.assert_array_equal(result_of(way, function, XS), 2 * XS)
        assert counted.shapes.pop(()) == 2
        assert sum(size * calls for (size,), calls in counted.shapes.items()) == 12

    def test_chunks_of_one_have_nothing_to_check(self, method, way):
        counted = Counted(normalise)
        function = jax.vmap(host_call(counted, lambda x: x, method=method, batch_size=1))
        np.testing.assert_allclose(result_of(way, function, random(4, 3)), by_element(normalise, random(4, 3)))
        assert counted.shapes == {(1, 3): 4}


@each_way
def test_calls_that_are_not_vectorised_are_not_checked(way):
    counted = Counted(double)
    call = host_call(counted, F64, method="expand_dims")
    result_of(way, call, 1.0)
    result_of(way, jax.vmap(lambda x: call(1.0) + x), XS)
    assert counted.shapes == {(): 2}
    counted.shapes.clear()
    result_of(way, jax.vmap(host_call(counted, F64, method="sequential")), XS)
    assert counted.shapes == {(): 6}
    assert jax.vmap(call)(np.zeros(0)).shape == (0,)
    assert counted.shapes == {(): 6}


def test_the_hundredth_and_the_thousandth_call_are_checked_again():
    counted = Counted(double)
    function = jax.vmap(host_call(counted, F64, method="expand_dims"))
    alone = {}
    for calls in range(1, 1012):
        function(XS)
        alone[calls] = counted.shapes[()]
    assert (alone[1], alone[99], alone[101], alone[999], alone[1001], alone[1011]) == (2, 2, 4, 4, 6, 6)
    assert counted.shapes[6,] == 1011


@each_way
@pytest.mark.parametrize("method", [*VECTORISED, "auto"])
def test_a_recheck_finds_what_came_later(method, way):
    honest = [True]
    call = host_call(
        lambda x: double(x) if honest[0] else repeat(x), F64, method=method, signature="()->()", name="simulate"
    )
    function = way(jax.vmap(call))
    jax.block_until_ready(function(XS))
    honest[0] = False
    for _ in range(98):
        jax.block_until_ready(function(XS))
    if method == "auto":
        with pytest.warns(BatchContractWarning) as told:
            last = [jax.block_until_ready(function(XS)) for _ in range(3)][-1]
        assert len(told) == 1
        np.testing.assert_array_equal(last, 2 * XS)
        return
    with pytest.raises(JAX_ERRORS, match=r"of element [1-5] differs"):
        [jax.block_until_ready(function(XS)) for _ in range(3)]


@pytest.mark.parametrize("method", [*VECTORISED, "auto"])
def test_a_recheck_finds_what_is_wrong_between_the_ends(method):
    """The first check looks at the first and the last element, a recheck at one between them."""

    def simulate(x):
        doubled = double(x)
        if x.ndim:
            doubled[1:-1] = 0
        return doubled

    function = jax.vmap(host_call(simulate, F64, method=method, signature="()->()"))
    for _ in range(100):
        function(XS)
    if method == "auto":
        with pytest.warns(BatchContractWarning):
            np.testing.assert_array_equal(function(XS), 2 * XS)
        return
    with pytest.raises(BatchContractError, match=r"of element [1-4] differs"):
        function(XS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10, 1000])
def test_rechecks_start_from_rows_between_the_ends(size):
    rows = [_host_verify.first_row(size, 10**power) for power in range(2, 12)]
    assert _host_verify.first_row(size, 0) == 0
    if size < 3:
        assert set(rows) == {0}
        return
    assert all(0 < row < size - 1 for row in rows)
    assert len(set(rows)) >= min(size - 2, 5)


def test_a_recheck_takes_rows_that_differ():
    """Where the row in the middle is like the last one, another stands in for that one."""
    batch = _host_verify.Batch("expand_dims", 6, [np.array([0.0, 7, 7, 7, 7, 7])], [Lead.BATCH], {})
    assert _host_verify.differing_rows(batch, 3) == (3, 0)
    equal = _host_verify.Batch("expand_dims", 6, [np.zeros(6)], [Lead.BATCH], {})
    assert _host_verify.differing_rows(equal, 3) is None


# --- how close is close --------------------------------------------------------------------------------------


def off_by(relative, dtype="float64"):
    """Honest but for its last digits."""
    return host_options(lambda x: (2 * x if x.ndim == 0 else 2 * x * (1 + relative)).astype(dtype), dtype)


def host_options(function, dtype):
    return lambda **options: jax.vmap(host_call(function, jax.ShapeDtypeStruct((), dtype), **options))


class TestTolerance:
    @pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-7), ("float32", 3e-4), ("float16", 5e-3)])
    @each_method
    def test_last_digits_are_no_lie(self, method, dtype, relative):
        off_by(relative, dtype)(method=method)(XS.astype(dtype))

    @pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-5), ("float32", 1e-2), ("float16", 0.1)])
    @each_method
    def test_more_than_that_is(self, method, dtype, relative):
        with pytest.raises(BatchContractError, match="verify=1e-2 makes it wider"):
            off_by(relative, dtype)(method=method)(XS.astype(dtype))

    @pytest.mark.parametrize("method", ["expand_dims", "legacy_vectorized"])
    def test_a_large_unmapped_argument_excuses_nothing(self, method):
        function = host_call(lambda x, _: 2 * x if x.ndim == 0 else 2 * x * (1 + 1e-5), F64, method=method)
        with pytest.raises(BatchContractError):
            jax.vmap(function, (0, None))(XS, 1e9)

    def test_a_number_is_the_relative_tolerance(self):
        make = off_by(5e-3)
        make(method="expand_dims", verify=1e-2)(XS)
        with pytest.raises(BatchContractError):
            make(method="expand_dims", verify=1e-3)(XS)
        with pytest.raises(BatchContractError):
            off_by(1e-8)(method="expand_dims", verify=1e-10)(XS)

    def test_a_number_keeps_the_gate(self):
        with pytest.raises(BatchContractError):
            jax.vmap(host_call(repeat, F64, method="expand_dims", verify=1e-2))(XS)

    def test_small_numbers_beside_large_ones(self):
        """They are often differences of large ones, and known as well as these."""
        noise = np.array([0.0, 1e-9, -1e-9])
        call = host_call(lambda x: x + noise if x.ndim == 2 else x + 0.0, lambda x: x, method="expand_dims")
        jax.vmap(call)(np.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))

    @each_method
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_rounding_noise_is_no_lie(self, method, dtype):
        """Sums that cancel, by BLAS in another order for a batch than for one row."""
        xs = random(64, 1000)
        xs = (xs - xs.mean(axis=1, keepdims=True)).astype(dtype)
        ones = np.ones(1000, dtype)
        got = host_options(lambda x: np.asarray(x @ ones), dtype)(method=method)(xs)
        assert np.abs(got).max() < 1e-3

    @each_method
    def test_zero_against_rounding_noise(self, method):
        got = host_options(lambda x: x - x if x.ndim == 0 else x * 1e-17, "float64")(method=method)(XS)
        assert np.abs(got).max() < 1e-15

    @each_method
    def test_a_residual_beside_a_solution(self, method):
        def solve(x):
            root = np.sqrt(x)
            return root, root * root - x if x.ndim else np.float64(root) ** 2.0 - x + 1e-16

        root, _ = jax.vmap(host_call(solve, (F64, F64), method=method))(XS)
        np.testing.assert_allclose(root, np.sqrt(XS))

    @pytest.mark.parametrize(
        "verify", [0, -1, -0.5, 1, 2.0, float("nan"), float("inf"), "yes", None, 1j, [1e-2]], ids=str
    )
    def test_what_verify_may_not_be(self, verify):
        with pytest.raises(
            (TypeError, ValueError), match=r"host_call 'double': verify .* True.* False.* relative tolerance"
        ):
            host_call(double, F64, verify=verify)

    @pytest.mark.parametrize("verify", [True, np.True_, 1e-2, np.float64(1e-2), np.float32(1e-2)], ids=str)
    def test_what_keeps_it_on(self, verify):
        with pytest.raises(BatchContractError):
            jax.vmap(host_call(repeat, F64, method="expand_dims", verify=verify))(XS)

    @pytest.mark.parametrize("verify", [False, np.False_], ids=str)
    def test_what_turns_it_off(self, verify):
        got = jax.vmap(host_call(repeat, F64, method="expand_dims", verify=verify))(XS)
        np.testing.assert_array_equal(got, np.full(6, 2.0))


@each_way
@each_method
def test_random_results(method, way):
    rng = np.random.default_rng(0)
    function = jax.vmap(host_call(lambda x: x + rng.normal(size=x.shape), F64, method=method))
    assert "verify=False turns the check off, which a function with random results needs" in error_of(way, function, XS)
    drawn = result_of(
        way, jax.vmap(host_call(lambda x: x + rng.normal(size=x.shape), F64, method=method, verify=False)), XS
    )
    assert len(set(np.asarray(drawn - XS).tolist())) == 6


# --- values and dtypes ------------------------------------------------------------------------------------------


@each_way
class TestValues:
    @pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf], ids=str)
    def test_special_results_agree_with_themselves(self, way, special):
        function = jax.vmap(host_call(lambda x: np.where(x > 3, special, x), F64, method="expand_dims"))
        np.testing.assert_array_equal(quiet(way, function, XS), np.where(XS > 3, special, XS))

    @pytest.mark.parametrize(("batched", "single"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, -np.inf), (1e300, np.inf)])
    def test_and_with_nothing_else(self, way, batched, single):
        function = jax.vmap(
            host_call(lambda x: np.full(x.shape, batched if x.ndim else single), F64, method="expand_dims")
        )
        assert "of element 0 differs" in error_of(way, function, XS)

    @pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64", "uint64", "bool"])
    def test_whole_numbers_agree_exactly(self, way, dtype):
        xs = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
        honest = jax.vmap(host_call(lambda x: x ^ x[..., ::-1], lambda x: x, method="expand_dims"))
        np.testing.assert_array_equal(result_of(way, honest, xs), xs ^ xs[:, ::-1])
        lie = jax.vmap(host_call(lambda x: x ^ x[:1] if x.ndim == 2 else x ^ x, lambda x: x, method="expand_dims"))
        # 1 and 0 against 0 and 0: two of three numbers, in the element that is not the first.
        assert "of element 1 differs in 2 places" in error_of(way, lie, xs)

    def test_large_integers_are_no_floats(self, way):
        big = np.array([2**62, 2**62 + 2])
        lie = jax.vmap(host_call(lambda x: x + 1 if x.ndim else x, lambda x: x, method="expand_dims"))
        assert "differs in 1 places" in error_of(way, lie, big)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "complex128"])
    def test_inexact_dtypes(self, way, dtype):
        xs = np.arange(3).astype(jnp.dtype(dtype))
        honest = jax.vmap(host_call(lambda x: x + x, lambda x: x, method="expand_dims"))
        assert (result_of(way, honest, xs) == xs + xs).all()
        lie = jax.vmap(host_call(lambda x: x + x[:1] if x.ndim else x + x, lambda x: x, method="expand_dims"))
        assert "of element 2 differs by up to 2 " in error_of(way, lie, xs)

    def test_the_imaginary_part_counts(self, way):
        xs = np.array([1 + 1j, 1 + 2j])
        lie = jax.vmap(
            host_call(lambda x: x.real + 1j * x.imag[::-1] if x.ndim else x, lambda x: x, method="expand_dims")
        )
        assert "of element 0 differs by up to 1 " in error_of(way, lie, xs)

    @pytest.mark.parametrize("shape", [(3, 0), (3, 2, 0)], ids=str)
    def test_elements_without_numbers(self, way, shape):
        function = jax.vmap(host_call(double, lambda x: x, method="expand_dims"))
        assert result_of(way, function, np.zeros(shape)).shape == shape

    def test_axes_that_are_not_in_front(self, way):
        xs = random(3, 4)
        function = jax.vmap(host_call(normalise, lambda x: x, method="expand_dims"), in_axes=1, out_axes=1)
        assert "arguments x (4, 3)" in error_of(way, function, xs)
        honest = jax.vmap(host_call(lambda x: x / x.max(-1, keepdims=True), lambda x: x, method="expand_dims"), 1, 1)
        np.testing.assert_allclose(result_of(way, honest, xs), xs / xs.max(axis=0))


@each_way
@each_method
def test_a_function_that_reuses_its_buffer_keeps_the_batch(method, way):
    buffer = np.zeros(1000)

    def simulate(x):
        if x.ndim == 0:
            buffer[0] = 2 * x
            return buffer[:1].reshape(())
        np.multiply(x, 2, out=buffer[: len(x)])
        return buffer[: len(x)]

    function = jax.vmap(host_call(simulate, F64, method=method))
    for offset in range(2):
        np.testing.assert_array_equal(result_of(way, function, XS + offset), 2 * XS + 2 * offset)


# --- how the calls are issued ---------------------------------------------------------------------------------


@each_way
@each_method
class TestDispatch:
    @pytest.mark.parametrize("options", [{"executor": 3}, {"executor": 3, "batch_size": 3}, {"batch_size": 3}], ids=str)
    @each_lie
    def test_lies_are_found(self, lie, method, way, options):
        assert "one by one" in error_of(way, jax.vmap(lie.call(method, **options)), *lie.args)

    def test_the_elements_go_where_the_batch_goes(self, method, way):
        """A function may work only there: in a worker with the licence, or one at a time."""
        places = set()

        def simulate(x):
            places.add(threading.current_thread().name.rpartition("_")[0])
            return 2 * x

        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="licensed") as pool:
            function = jax.vmap(host_call(simulate, F64, method=method, batch_size=3, executor=pool))
            np.testing.assert_array_equal(result_of(way, function, XS), 2 * XS)
        assert places == {"licensed"}

    def test_with_jax_allowed(self, method, way):
        counted = Counted(repeat)
        function = jax.vmap(host_call(counted, F64, method=method, allow_jax=True))
        assert "of element 5 differs" in error_of(way, function, XS)
        assert counted.shapes == {(6,): 1, (): 2}

    def test_where_checks_what_is_chosen(self, method, way):
        counted = Counted(double)
        call = host_call(counted, F64, method=method)
        function = jax.vmap(lambda x: call.where(x > 3, x, otherwise=x))
        np.testing.assert_array_equal(result_of(way, function, XS), np.where(XS > 3, 2 * XS, XS))
        assert counted.shapes == {(3,): 1, (): 2}

    def test_where_finds_lies_among_them(self, method, way):
        call = host_call(repeat, F64, method=method, name="simulate")
        function = jax.vmap(lambda x, least: call.where(x > least, x), in_axes=(0, None))
        np.testing.assert_array_equal(result_of(way, function, XS, 5.0), [0, 0, 0, 0, 0, 12])
        assert "given 3 elements at once" in error_of(way, function, XS, 3.0)


# --- derivative endpoints ---------------------------------------------------------------------------------------


def cube(x):
    return (x * x * x).sum(-1)


def honest_jvp(args, tangents):
    return (3 * args[0] ** 2 * tangents[0]).sum(-1)


def honest_vjp(args, cotangent, needed):
    del needed
    return (3 * args[0] ** 2 * np.asarray(cotangent)[..., None],)


def honest_jacobian(args, needed):
    del needed
    return (3 * args[0] ** 2,)


def over_the_batch(endpoint):
    """The same, but that every element gets the sum over the batch."""

    def lying(args, *more):
        result = endpoint(args, *more)
        (x,) = result if isinstance(result, tuple) else (result,)
        alone = args[0].ndim == 1
        x = x if alone else np.broadcast_to(x.sum(axis=0), x.shape)
        return (x,) if isinstance(result, tuple) else x

    return lying


ENDPOINTS = {"jvp": honest_jvp, "vjp": honest_vjp, "jacobian": honest_jacobian}


def derivative(endpoint, call):
    if endpoint == "jvp":
        return jax.vmap(lambda x: jax.jvp(call, (x,), (x,))[1])
    return jax.vmap(jax.grad(call))


def wanted_derivative(endpoint, xs):
    return 3 * (xs**3).sum(axis=1) if endpoint == "jvp" else 3 * xs**2


@each_way
@pytest.mark.parametrize("endpoint", ENDPOINTS)
class TestDerivatives:
    @each_method
    def test_a_lying_endpoint_is_an_error(self, method, endpoint, way):
        lying = {endpoint: over_the_batch(ENDPOINTS[endpoint])}
        call = host_call(cube, F64, method=method, name="simulate", **lying)
        text = error_of(way, derivative(endpoint, call), random(4, 3))
        assert endpoint in text
        assert "simulate" in text
        assert "does not treat the elements of a batch one by one" in text

    def test_under_auto_it_is_called_one_by_one_and_the_function_is_not(self, endpoint, way):
        function = Counted(cube)
        lying = over_the_batch(ENDPOINTS[endpoint])
        calls = []

        def counted(args, *more):
            calls.append(args[0].shape)
            return lying(args, *more)

        call = host_call(function, F64, signature="(n)->()", **{endpoint: counted})
        program, xs = derivative(endpoint, call), random(4, 3)
        with pytest.warns(BatchContractWarning) as told:
            got = result_of(way, program, xs)
        assert len(told) == 1
        np.testing.assert_allclose(got, wanted_derivative(endpoint, xs), rtol=1e-13)
        calls.clear()
        np.testing.assert_allclose(quiet(way, program, 2 * xs), wanted_derivative(endpoint, 2 * xs), rtol=1e-13)
        assert calls == [(3,)] * 4
        function.shapes.clear()
        np.testing.assert_allclose(quiet(way, jax.vmap(call), 3 * xs), cube(3 * xs))
        assert function.shapes[4, 3] == 1

    @each_method
    def test_an_honest_one_pays_for_two_elements(self, method, endpoint, way):
        calls = []

        def counted(args, *more):
            calls.append(args[0].shape)
            return ENDPOINTS[endpoint](args, *more)

        call = host_call(cube, F64, method=method, **{endpoint: counted})
        for seed in range(3):
            xs = random(4, 3, seed=seed)
            got = result_of(way, derivative(endpoint, call), xs)
            np.testing.assert_allclose(got, wanted_derivative(endpoint, xs), rtol=1e-13)
        assert sorted(calls) == [(3,)] * 2 + [(4, 3)] * 3

    @each_method
    def test_verify_false_goes_for_all(self, method, endpoint, way):
        lying = over_the_batch(ENDPOINTS[endpoint])
        call = host_call(cube, F64, method=method, verify=False, **{endpoint: lying})
        xs = random(4, 3)
        total = np.broadcast_to(wanted_derivative(endpoint, xs).sum(axis=0), xs.shape[: 1 + (endpoint != "jvp")])
        np.testing.assert_allclose(result_of(way, derivative(endpoint, call), xs), total, rtol=1e-13)


@each_way
@each_method
class TestCotangents:
    def scale(self, method, vjp):
        return host_call(lambda x, w: x * w, F64, method=method, vjp=vjp, name="scale")

    def test_of_unmapped_arguments_are_checked_before_they_are_summed(self, method, way):
        honest = self.scale(method, lambda args, ct, needed: (ct * args[1], ct * args[0]))  # noqa: ARG005
        gradient = lambda call: jax.grad(lambda w: jax.vmap(call, (0, None))(XS, w).sum())  # noqa: E731
        np.testing.assert_allclose(result_of(way, gradient(honest), 2.0), XS.sum())

        def summed(args, ct, needed):
            del needed
            return ct * args[1], np.broadcast_to((ct * args[0]).sum(), np.shape(args[0]))

        assert "scale" in error_of(way, gradient(self.scale(method, summed)), 2.0)

    def test_rows_of_a_jacobian_are_a_batch(self, method, way):
        lying = lambda args, ct, needed: (ct[::-1] if ct.ndim == 2 else ct * 1.0,)  # noqa: E731, ARG005
        call = host_call(lambda x: x * 1.0, lambda x: x, method=method, vjp=lying)
        assert "one by one" in error_of(way, jax.jacrev(call), XS[:3])

    def test_none_is_zero_for_both(self, method, way):
        call = self.scale(method, lambda args, ct, needed: (ct * args[1], None))  # noqa: ARG005
        got = result_of(way, jax.vmap(jax.grad(call, argnums=(0, 1))), XS, XS + 1)
        np.testing.assert_array_equal(got[0], XS + 1)
        np.testing.assert_array_equal(got[1], 0 * XS)

    def test_none_for_a_batch_alone_is_a_lie(self, method, way):
        none_for_a_batch = lambda args, ct, needed: (None if np.ndim(args[0]) else ct * args[1], ct * args[0])  # noqa: E731, ARG005
        gradient = jax.vmap(jax.grad(self.scale(method, none_for_a_batch)))
        assert "one by one" in error_of(way, gradient, XS, XS + 1)


# --- several devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*VECTORISED, "auto"])
class TestSeveralDevices:
    def test_an_auto_axis_is_one_call_and_two_elements(self, auto_mesh, method):
        counted = Counted(double)
        function = jax.jit(jax.vmap(host_call(counted, F64, method=method, signature="()->()")))
        for offset in range(2):
            xs = np.arange(8.0) + offset
            got = function(jax.device_put(xs, NamedSharding(auto_mesh, P("x"))))
            np.testing.assert_array_equal(got, 2 * xs)
        assert counted.shapes == {(8,): 2, (): 2}

    def test_an_explicit_axis_is_checked_by_the_devices_that_come_first(self, explicit_mesh, method):
        """They run at once: none waits for the check of another."""
        counted = Counted(double)
        function = jax.jit(jax.vmap(host_call(counted, F64, method=method, signature="()->()")))
        for offset in range(2):
            xs = np.arange(8.0) + offset
            got = function(jax.device_put(xs, NamedSharding(explicit_mesh, P("x"))))
            np.testing.assert_array_equal(got, 2 * xs)
        assert counted.shapes[2,] == 8
        assert 2 <= counted.shapes[()] <= 8

    def test_shard_map_is_checked_by_the_devices_that_come_first(self, auto_mesh, method):
        counted = Counted(double)
        call = jax.vmap(host_call(counted, F64, method=method, signature="()->()"))
        function = jax.jit(jax.shard_map(call, mesh=auto_mesh, in_specs=P("x"), out_specs=P("x")))
        for _ in range(2):
            np.testing.assert_array_equal(function(np.arange(8.0)), 2 * np.arange(8.0))
        assert counted.shapes[2,] == 8
        assert 2 <= counted.shapes[()] <= 8


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_lies_on_several_devices_fail_everywhere_or_are_mended(kind):
    out = run(f"""
        def repeat(x):
            return np.broadcast_to(2 * x[:1], x.shape) if x.ndim else 2 * x
        xs = np.arange(8.0)
        for method in ("expand_dims", "broadcast_all", "legacy_vectorized"):
            print(outcome(jax.jit(jax.vmap(batchrules.host_call(repeat, F64, method=method))), on(xs, {kind!r})))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            function = jax.jit(jax.vmap(batchrules.host_call(repeat, F64, signature="()->()")))
            for offset in range(2):
                got = function(on(xs + offset, {kind!r}))
                print(all(np.array_equal(s.data, 2 * (xs + offset)[s.index]) for s in got.addressable_shards))
            print([w.category.__name__ for w in told])
    """)
    size = 8 if kind == "Auto" else 2
    for method, line in zip(VECTORISED, out[:3], strict=True):
        assert line.startswith("JaxRuntimeError: BatchContractError: host_call 'repeat' does not treat the elements")
        assert f"given {size} elements at once (method {method!r}, arguments x ({size},))" in line
    assert out[3:] == ["True", "True", "['BatchContractWarning']"]


def test_lies_in_a_shard_map_are_mended():
    out = run("""
        def repeat(x):
            return np.broadcast_to(2 * x[:1], x.shape) if x.ndim else 2 * x
        mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call = jax.vmap(batchrules.host_call(repeat, F64, signature="()->()"))
            got = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(np.arange(8.0))
            print(np.asarray(got).tolist(), [w.category.__name__ for w in told])
        for jit in (jax.jit, lambda f: f):
            call = jax.vmap(batchrules.host_call(repeat, F64, method="expand_dims"))
            print(outcome(jit(jax.shard_map(call, mesh=mesh, in_specs=P("x"), out_specs=P("x"))), np.arange(8.0)))
    """)
    assert out[0] == "[0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0] ['BatchContractWarning']"
    assert len(out) == 3
    for line in out[1:]:
        assert "host_call 'repeat' does not treat the elements of a batch one by one" in line
