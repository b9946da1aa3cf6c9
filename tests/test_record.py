"""`record()`: the calls that it logs are those that were made, whatever made them."""

import collections
import multiprocessing
import os
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import dispatched_calls as calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules
from batchrules import BatchContractWarning, FailedElementsWarning, host_call, record
from batchrules._measured import Arrivals, Far, Measure

F64 = jax.ShapeDtypeStruct((), "float64")
ROWS = jax.ShapeDtypeStruct((3,), "float64")
XS = np.arange(12.0).reshape(4, 3) + 1
WEIGHTS = np.array([1.0, 2.0, 3.0])
METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")
VECTORISED = METHODS[1:]
every_method = pytest.mark.parametrize("method", METHODS)
every_vectorised = pytest.mark.parametrize("method", VECTORISED)
WAYS = {"eager": lambda f: f, "jit": jax.jit}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def dot(x, w):
    return (x * w).sum(-1)


def dot_jvp(args, tangents):
    (x, w), (tx, tw) = args, tangents
    parts = [
        part.sum(-1)
        for part, t in ((0 if tx is None else tx * w, tx), (0 if tw is None else x * tw, tw))
        if t is not None
    ]
    return sum(parts)


def dot_vjp(args, cotangents, needed):
    x, w = args
    ct = cotangents[..., None]
    return ct * w if needed[0] else None, ct * x if needed[1] else None


def dot_jacobian(args, needed):
    x, w = args
    lead = np.broadcast_shapes(x.shape, w.shape)
    return np.broadcast_to(w, lead) if needed[0] else None, np.broadcast_to(x, lead) if needed[1] else None


def made(method, **options):
    return host_call(dot, F64, name="dot", method=method, **{"verify": False, **options})


def logged(function, *args):
    with record() as log:
        result = jax.block_until_ready(function(*args))
    return log.calls, result


def facts(found, *names):
    """These attributes of each call, sorted: the order of calls on threads is nobody's promise."""
    return sorted(tuple(getattr(call, name) for name in names) for call in found)


def over_rows(f):
    return jax.vmap(f, (0, None))


# What one row of XS, the weights, and a result take.
ROW, NUMBER = 24, 8
BYTES_IN = {
    "expand_dims": 4 * ROW + ROW,
    "broadcast_all": 4 * ROW + 4 * ROW,
    "legacy_vectorized": 4 * ROW + ROW,
}


# --- what a call is -----------------------------------------------------------------------------------------------


@every_way
def test_a_single_call(way):
    found, _ = logged(way(made("sequential")), XS[0], WEIGHTS)
    (call,) = found
    assert (call.name, call.endpoint, call.method, call.purpose) == ("dot", "call", "sequential", "batch")
    assert (call.elements, call.first, call.last) == (1, (), ())
    assert (call.bytes_in, call.bytes_out, call.failure) == (2 * ROW, NUMBER, None)
    assert call.start >= 0
    assert call.duration > 0


@every_way
def test_sequential(way):
    found, _ = logged(way(over_rows(made("sequential"))), XS, WEIGHTS)
    assert [call.first for call in found] == [(0,), (1,), (2,), (3,)]
    assert {(c.elements, c.bytes_in, c.bytes_out, c.method) for c in found} == {(1, 2 * ROW, NUMBER, "sequential")}
    assert all(call.last == call.first for call in found)


@every_way
@every_vectorised
def test_vectorised(way, method):
    found, _ = logged(way(over_rows(made(method))), XS, WEIGHTS)
    assert facts(found, "method", "elements", "first", "last", "bytes_in", "bytes_out") == [
        (method, 4, (0,), (3,), BYTES_IN[method], 4 * NUMBER)
    ]


@every_vectorised
def test_chunks(method):
    found, _ = logged(over_rows(made(method, batch_size=3)), XS, WEIGHTS)
    assert facts(found, "first", "last", "elements", "bytes_out") == [
        ((0,), (2,), 3, 3 * NUMBER),
        ((3,), (3,), 1, NUMBER),
    ]


def test_an_index_has_a_number_for_each_mapped_axis():
    f = jax.vmap(jax.vmap(made("expand_dims", batch_size=4), (None, 0)), (0, None))
    found, _ = logged(f, XS, np.stack([WEIGHTS] * 3))
    assert facts(found, "first", "last") == [((0, 0), (1, 0)), ((1, 1), (2, 1)), ((2, 2), (3, 2))]


@every_method
def test_only_elements_of_a_mask_are_called(method):
    f = made(method)
    found, _ = logged(jax.vmap(lambda m, x: f.where(m, x, WEIGHTS)), np.array([False, True, False, True]), XS)
    assert sum(call.elements for call in found) == 2
    assert (found[0].first, found[-1].last) == ((1,), (3,))


@every_method
def test_an_empty_batch_makes_no_calls(method):
    found, _ = logged(jax.jit(over_rows(made(method))), XS[:0], WEIGHTS)
    assert found == ()


@every_vectorised
def test_checks_are_told_from_the_batch(method):
    found, _ = logged(over_rows(made(method, verify=True)), XS, WEIGHTS)
    assert facts(found, "purpose", "first", "last", "elements") == [
        ("batch", (0,), (3,), 4),
        ("check", (0,), (0,), 1),
        ("check", (3,), (3,), 1),
    ]


def test_a_check_of_the_elements_of_a_mask_has_their_indices():
    f = made("expand_dims", verify=True)
    found, _ = logged(jax.vmap(lambda m, x: f.where(m, x, WEIGHTS)), np.array([False, True, True, False]), XS)
    assert facts(found, "purpose", "first", "last") == [
        ("batch", (1,), (2,)), ("check", (1,), (1,)), ("check", (2,), (2,)),
    ]  # fmt: skip


def test_a_check_of_a_later_chunk_has_its_indices():
    """The elements of the first one are equal, so it proves nothing."""
    xs = np.stack([XS[0], XS[0], XS[1], XS[2]])
    found, _ = logged(over_rows(made("expand_dims", verify=True, batch_size=2)), xs, WEIGHTS)
    assert facts(found, "purpose", "first", "last") == [
        ("batch", (0,), (1,)), ("batch", (2,), (3,)), ("check", (2,), (2,)), ("check", (3,), (3,)),
    ]  # fmt: skip


def test_python_numbers_and_none_have_the_bytes_that_they_stand_for():
    def parts(x):
        return 1.5, np.float32(x[0])

    promise = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((), "float32")
    found, _ = logged(host_call(parts, promise), XS[0])
    assert facts(found, "bytes_out") == [(8,)]


def test_a_name_may_have_any_letters():
    found, _ = logged(host_call(dot, F64, name="f'ü \"→ 火"), XS[0], WEIGHTS)
    assert [call.name for call in found] == ["f'ü \"→ 火"]


def test_a_name_is_that_of_the_function_by_default():
    found, _ = logged(host_call(dot, F64), XS[0], WEIGHTS)
    assert [call.name for call in found] == ["dot"]


# --- derivatives --------------------------------------------------------------------------------------------------


def derived(f, name):
    x, w = jnp.asarray(XS), jnp.asarray(WEIGHTS)
    if name == "vmap of grad":
        return lambda: over_rows(jax.grad(f))(x, w)
    if name == "jvp of vmap":
        return lambda: jax.jvp(lambda x: over_rows(f)(x, w), (x,), (x,))
    if name == "jacrev of vmap":
        return lambda: jax.jacrev(lambda x: over_rows(f)(x, w))(x)
    return lambda: jax.jacfwd(lambda w: f(x[0], w))(w)


@every_way
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vmap of grad", {"vjp": 4}),
        ("jvp of vmap", {"call": 4, "jvp": 4}),
        ("jacrev of vmap", {"vjp": 16}),
        ("jacfwd", {"jvp": 3}),
    ],
)
def test_derivatives(way, method, name, expected):
    f = made(method, jvp=dot_jvp, vjp=dot_vjp)
    found, _ = logged(way(derived(f, name)))
    elements = collections.Counter()
    for call in found:
        elements[call.endpoint] += call.elements
        assert call.name == "dot"
    if way is not jax.jit:
        # Eagerly, values that nothing uses are worked out too.
        expected = {"call": elements["call"], **expected}
    assert elements == expected


@every_way
def test_one_jacobian_serves_all_rows(way):
    f = made("sequential", jacobian=dot_jacobian)
    found, _ = logged(way(jax.jacrev(f)), XS[0], WEIGHTS)
    (jacobian,) = (call for call in found if call.endpoint == "jacobian")
    assert (jacobian.elements, jacobian.bytes_in, jacobian.bytes_out) == (1, 2 * ROW, ROW)


def test_a_vjp_gets_arguments_and_cotangents():
    f = made("sequential", vjp=dot_vjp)
    found, _ = logged(jax.jit(jax.grad(f, argnums=(0, 1))), XS[0], WEIGHTS)
    assert facts(found, "endpoint", "bytes_in", "bytes_out") == [("vjp", 2 * ROW + NUMBER, 2 * ROW)]


def test_the_derivative_of_an_endpoint_says_of_which():
    def tangent(args, tangents):
        ((x, w), ct, _), ((tx, tw), tct, _) = args, tangents
        zero = np.zeros(3)
        return (
            ct * (zero if tw is None else tw) + (zero if tct is None else tct * w),
            ct * (zero if tx is None else tx) + (zero if tct is None else tct * x),
        )

    def pulled(args, ct, needed):
        return ct * args[1], ct * args[0]

    vjp = host_call(pulled, (ROWS, ROWS), jvp=tangent, static_argnames="needed")
    f = made("sequential", vjp=vjp)
    found, _ = logged(jax.jit(jax.jacfwd(jax.grad(f))), XS[0], WEIGHTS)
    assert {call.endpoint for call in found} <= {"vjp", "vjp.jvp"}
    assert any(call.endpoint == "vjp.jvp" for call in found)


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_finite_differences_call_the_function(scheme):
    f = made("sequential", **batchrules.finite_difference(dot, scheme=scheme))
    found, _ = logged(jax.jit(jax.vmap(jax.jacfwd(f), (0, None))), XS, WEIGHTS)
    assert {(call.name, call.endpoint, call.purpose) for call in found} == {("dot", "call", "batch")}
    # Three directions for each of four elements: two points each, or one and the element itself.
    points = {(i, direction) for i in range(4) for direction in range(3)}
    expected = dict.fromkeys(points, 2) if scheme == "central" else dict.fromkeys(points | {(i,) for i in range(4)}, 1)
    assert collections.Counter(call.first for call in found) == expected


# --- who makes the calls ------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("executor", ["int", "pool"])
def test_threads(method, executor):
    expected, result = logged(over_rows(made(method, batch_size=2)), XS, WEIGHTS)
    with ThreadPoolExecutor(2, thread_name_prefix="mine") as pool:
        f = made(method, batch_size=2, executor=pool if executor == "pool" else 2)
        found, on_threads = logged(jax.jit(over_rows(f)), XS, WEIGHTS)
    what = ("first", "last", "elements", "bytes_in", "bytes_out", "method", "endpoint", "purpose")
    assert facts(found, *what) == facts(expected, *what)
    assert all(call.worker.startswith("mine" if executor == "pool" else "batchrules_") for call in found)
    np.testing.assert_array_equal(on_threads, result)


def polynomial(folder, **options):
    f = host_call(
        calls.polynomial, calls.promise, static_argnames=("power", "folder"), verify=False, name="polynomial", **options
    )
    params = {"scale": np.float64(1.5), "shift": np.array([1.0, 2.0, 3.0])}
    return jax.vmap(lambda x: f(params, x, 3, str(folder)))


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_processes(processes, tmp_path, method):
    f = polynomial(tmp_path, method=method, batch_size=2, executor=processes)
    with record() as log:
        jax.block_until_ready(f(XS))
    here = polynomial(tmp_path, method=method, batch_size=2)
    what = ("first", "last", "elements", "bytes_in", "bytes_out", "method", "purpose")
    assert facts(log.calls, *what) == facts(logged(here, XS)[0], *what)
    assert all(call.worker.startswith("process ") for call in log.calls)
    assert not any(str(os.getpid()) in call.worker for call in log.calls)
    assert all(0 <= call.start <= call.start + call.duration <= log.duration for call in log.calls)


def test_processes_tell_of_failures(processes, tmp_path):
    f = host_call(calls.fails_at_7, calls.SCALAR, executor=processes, name="solve", on_error="nan")
    with record() as log, pytest.warns(FailedElementsWarning, match="SolverError"):
        result = jax.block_until_ready(jax.vmap(f)(np.arange(5.0, 9.0, dtype="float32")))
    assert np.isnan(result).tolist() == [False, False, True, False]
    failed = [(call.first, call.failure) for call in log.calls if call.failure]
    assert failed == [((2,), "SolverError: no convergence at 7")]
    assert len(log.calls) == 4


def test_a_failure_from_another_process_is_the_original_one(processes):
    f = host_call(calls.fails_at_7, calls.SCALAR, executor=processes, name="solve")
    with record(), pytest.raises(calls.SolverError, match="no convergence at 7"):
        jax.vmap(f)(np.arange(5.0, 9.0, dtype="float32"))


def test_calls_of_a_program_on_several_devices(auto_mesh):
    rows = jax.device_put(jnp.asarray(XS), jax.sharding.NamedSharding(auto_mesh, jax.P("x")))
    found, _ = logged(jax.jit(over_rows(made("expand_dims"))), rows, WEIGHTS)
    assert facts(found, "elements", "first", "last") == [(4, (0,), (3,))]


def test_each_shard_has_its_own_call(explicit_mesh):
    rows = jax.device_put(jnp.asarray(XS), jax.sharding.NamedSharding(explicit_mesh, jax.P("x")))
    found, _ = logged(jax.jit(jax.vmap(lambda x: made("expand_dims")(x, WEIGHTS))), rows)
    assert facts(found, "elements", "first") == [(1, (0,))] * 4


def test_a_host_function_that_calls_another():
    inner = made("sequential")

    def outer(x):
        return np.asarray(inner(x, WEIGHTS)) * 2

    found, _ = logged(jax.jit(host_call(outer, F64)), XS[0])
    first, second = found
    assert (first.name, second.name) == ("outer", "dot")
    assert first.start <= second.start
    assert second.start + second.duration <= first.start + first.duration


def test_a_function_that_may_use_jax():
    f = host_call(lambda x: np.asarray(jnp.sum(jnp.asarray(x))), F64, allow_jax=True, name="sum")
    found, result = logged(jax.vmap(f), XS)
    assert len(found) == 4
    np.testing.assert_array_equal(result, XS.sum(1))


# --- failures -----------------------------------------------------------------------------------------------------


def fails_at_seven(x):
    """Fails for the row of XS that starts with 7."""
    if np.any(x[..., 0] == 7):
        raise ValueError("no convergence")
    return x.sum(-1)


@every_way
@every_method
def test_a_failing_call(way, method):
    f = host_call(fails_at_seven, F64, method=method)
    with record() as log, pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="no convergence"):
        jax.block_until_ready(way(jax.vmap(f))(XS))
    assert log.calls[-1].failure == "ValueError: no convergence"
    assert log.calls[-1].bytes_out == 0
    assert all(call.failure is None for call in log.calls[:-1])


@pytest.mark.parametrize("executor", [None, 2])
def test_elements_that_fail_are_tried_one_by_one(executor):
    f = host_call(
        fails_at_seven, F64, method="expand_dims", batch_size=2, on_error="nan", verify=False, executor=executor
    )
    with pytest.warns(FailedElementsWarning, match="1 of 4"):
        found, result = logged(jax.vmap(f), XS)
    failure = "ValueError: no convergence"
    assert sorted(facts(found, "first", "elements", "purpose"), key=str) == sorted(
        [((0,), 2, "batch"), ((2,), 2, "batch"), ((2,), 1, "retry"), ((3,), 1, "retry")], key=str
    )
    assert {(c.first, c.elements) for c in found if c.failure == failure} == {((2,), 2), ((2,), 1)}
    np.testing.assert_array_equal(result, [6, 15, np.nan, 33])


def test_a_distrusted_function_is_called_one_by_one():
    def normalised(x):
        return (x / np.sqrt((x * x).sum())).sum(-1)

    spec = batchrules.Schema({"x": batchrules.ArraySpec((..., 3), "float64")})
    f = host_call(normalised, F64, schema=spec)
    with pytest.warns(BatchContractWarning, match="one by one"):
        first, _ = logged(jax.vmap(f), XS)
    assert collections.Counter(call.purpose for call in first) == {"batch": 1, "check": 2, "retry": 4}
    second, _ = logged(jax.vmap(f), XS)
    assert facts(second, "purpose", "first") == [("batch", (i,)) for i in range(4)]


def test_a_failure_whose_text_fails():
    class OddError(Exception):
        def __str__(self):
            raise RuntimeError

    def fails(x):
        raise OddError

    with record() as log, pytest.raises(OddError):
        host_call(fails, F64)(1.0)
    assert [call.failure for call in log.calls] == ["OddError: (its __str__ failed)"]


def test_an_interrupt_is_recorded_and_passes():
    def interrupted(x):
        raise KeyboardInterrupt

    with record() as log, pytest.raises(KeyboardInterrupt):
        host_call(interrupted, F64)(1.0)
    assert [call.failure for call in log.calls] == ["KeyboardInterrupt: "]


# --- which calls --------------------------------------------------------------------------------------------------


@every_way
def test_a_call_that_is_bare_by_now(way):
    f = way(made("sequential"))
    x, w = jnp.asarray(XS[0]), jnp.asarray(WEIGHTS)
    for _ in range(3):
        jax.block_until_ready(f(x, w))
    with record() as log:
        for _ in range(3):
            jax.block_until_ready(f(x, w))
    jax.block_until_ready(f(x, w))
    assert len(log.calls) == 3


@pytest.mark.parametrize("mode", ["vmap", "jvp", "grad"])
def test_loops_and_endpoints_that_are_bare_by_now(mode):
    f = made("sequential", jvp=dot_jvp, vjp=dot_vjp)
    programs = {
        "vmap": over_rows(f),
        "jvp": lambda x, w: jax.jvp(lambda x: f(x, w), (x[0],), (x[1],))[1],
        "grad": lambda x, w: jax.grad(f)(x[0], w),
    }
    program = jax.jit(programs[mode])
    x, w = jnp.asarray(XS), jnp.asarray(WEIGHTS)
    expected, _ = logged(program, x, w)
    for _ in range(3):
        jax.block_until_ready(program(x, w))
    found, _ = logged(program, x, w)
    what = ("endpoint", "first", "elements", "bytes_in", "bytes_out")
    assert facts(found, *what) == facts(expected, *what)
    assert len(found) == {"vmap": 4, "jvp": 1, "grad": 1}[mode]


def test_each_turn_of_a_scan_calls():
    f = made("sequential")
    found, _ = logged(jax.jit(lambda x, w: jax.lax.scan(lambda c, row: (c, f(row, w)), 0, x)), XS, WEIGHTS)
    assert facts(found, "elements", "first") == [(1, ())] * 4


def test_equal_calls_of_a_program_are_one():
    f = made("sequential")
    found, _ = logged(jax.jit(lambda x, w: f(x, w) + f(x, w)), XS[0], WEIGHTS)
    assert len(found) == 1


def test_nothing_is_heard_outside():
    f = made("sequential")
    f(XS[0], WEIGHTS)
    with record() as log:
        pass
    f(XS[0], WEIGHTS)
    assert log.calls == ()


def test_nested_records_both_get_everything():
    f = made("sequential")
    with record() as outer:
        f(XS[0], WEIGHTS)
        with record() as inner:
            f(XS[1], WEIGHTS)
        f(XS[2], WEIGHTS)
    assert (len(outer.calls), len(inner.calls)) == (3, 1)


def test_a_record_ends_with_an_error():
    f = made("sequential")
    with pytest.raises(LookupError), record() as log:
        raise LookupError
    f(XS[0], WEIGHTS)
    assert log.calls == ()


def test_a_call_that_outlives_the_block_is_not_in_the_log():
    entered, may_go = threading.Event(), threading.Event()

    def waits(x):
        entered.set()
        assert may_go.wait(60)
        return x

    f = host_call(waits, F64)
    thread = threading.Thread(target=lambda: f(1.0))
    with record() as log:
        thread.start()
        assert entered.wait(60)
    may_go.set()
    thread.join()
    assert log.calls == ()


def test_calls_from_several_threads():
    f = jax.jit(over_rows(made("sequential")))
    x, w = jnp.asarray(XS), jnp.asarray(WEIGHTS)
    jax.block_until_ready(f(x, w))
    with record() as log, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: jax.block_until_ready(f(x, w)), range(20)))
    assert collections.Counter(call.first for call in log.calls) == {(i,): 20 for i in range(4)}


def test_calls_are_in_the_order_in_which_they_started():
    found, _ = logged(jax.vmap(made("sequential", executor=3)), XS, XS)
    starts = [call.start for call in found]
    assert starts == sorted(starts)


# --- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [-1000.0, 0.0, 1000.0])
def test_calls_by_the_clock_of_another_machine_lie_between_sending_and_arrival(ahead):
    arrivals, sent = Arrivals(), time.perf_counter()
    began = time.time()
    time.sleep(0.03)
    measures = [Measure(ahead + began + 0.01 * i, 0.01, Far("host", 1, "MainThread"), 0, 0) for i in range(3)]
    starts = [arrivals.placed(measure, sent) for measure in measures]
    assert sent <= starts[0]
    assert starts[-1] + 0.01 <= time.perf_counter()
    assert starts == sorted(starts)


def test_a_worker_elsewhere_is_named_as_shortly_as_can_be():
    here = socket.gethostname()
    assert str(Far(here, 12, "MainThread")) == "process 12"
    assert str(Far("node7", 12, "MainThread")) == "node7, process 12"
    assert str(Far(here, 12, "Worker-3")) == "process 12, Worker-3"
