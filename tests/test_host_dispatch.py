"""`host_call` with an executor: threads, spawned processes, loky, and a Dask cluster over TCP.

Whatever makes the calls, the results are those of calls made in order.
"""

import contextlib
import itertools
import multiprocessing
import os
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import dispatched_calls as calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import FORWARD, REVERSE, SS, XS, YS, assert_close
from foreign import assert_same
from host_derivatives import WAVES
from host_endpoints import EITHER, GIVEN, VECTORISED, Endpoints

import batchrules
from batchrules import DispatchError, FailedElementsWarning

WAIT = 60  # seconds after which a test that waits has failed
IN_PROCESS = ("an int", "threads")
ELSEWHERE = ("processes", "loky", "dask")
KINDS = (*IN_PROCESS, *ELSEWHERE)
every_kind = pytest.mark.parametrize("kind", KINDS)
elsewhere = pytest.mark.parametrize("kind", ELSEWHERE)


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def processes():
    # Not forked: JAX has threads, which a fork does not have.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@contextlib.contextmanager
def loky_pool(workers):
    loky = pytest.importorskip("loky", reason="loky is an optional extra")
    pool = loky.ProcessPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


@pytest.fixture(scope="module")
def loky():
    with loky_pool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def dask():
    distributed = pytest.importorskip("distributed", reason="Dask is an optional extra")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "protocol": "tcp"}
    with (
        distributed.LocalCluster(**options, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture
def executor(kind, request):
    """The executor of that kind; started once."""
    return 3 if kind == "an int" else request.getfixturevalue(kind)


class Watched(Executor):
    """Another executor, with the elements that it was given and the most tasks that were unfinished at a time."""

    def __init__(self, executor):
        self.executor = executor
        self.elements = 0
        self.unfinished = 0
        self.most = 0
        self._lock = threading.Lock()

    def submit(self, fn, /, *args, **kwargs):
        with self._lock:
            self.elements += len(args[0].payloads)
            self.unfinished += 1
            self.most = max(self.most, self.unfinished)
        future = self.executor.submit(fn, *args, **kwargs)
        future.add_done_callback(self._count_down)
        return future

    def _count_down(self, _):
        with self._lock:
            self.unfinished -= 1


def watched(executor):
    return Watched(ThreadPoolExecutor(3) if isinstance(executor, int) else executor)


def like(x):
    return x


# --- results ------------------------------------------------------------------------------------------------------


COMPOSITIONS = {
    "vmap": lambda f: jax.vmap(f)(XS, YS, SS),
    "nested vmaps": lambda f: jax.vmap(jax.vmap(f, (None, 0, None)), (1, None, 0), 1)(XS.T, YS, SS),
    **{name: FORWARD[name] for name in ("jvp of vmap", "vmap of jacfwd", "jacfwd of nested vmaps")},
    **{name: REVERSE[name] for name in ("grad of vmap", "vmap of grad of scan", "jacrev of nested vmaps")},
}


@pytest.fixture(scope="module")
def in_order():
    """The results of calls made in order, worked out once for each set of options."""
    known = {}

    def result(name, method, given, batch_size):
        key = name, method, given, batch_size
        if key not in known:
            f = Endpoints(WAVES, method).host_call(GIVEN[given], batch_size=batch_size)
            known[key] = jax.jit(lambda: COMPOSITIONS[name](f))()
        return known[key]

    return result


def cases():
    """Each composition with every second of the other options on an int's threads, and with fewer elsewhere."""
    ways = [("sequential", None), *itertools.product(VECTORISED, (None, 2))]
    every = list(itertools.product(COMPOSITIONS, ways))
    for kind, start, step in [("an int", 0, 2), ("threads", 1, 5), *zip(ELSEWHERE, range(3), (6, 6, 6), strict=True)]:
        yield from ((kind, name, *way) for name, way in every[start::step])


@pytest.mark.parametrize(("kind", "name", "method", "batch_size"), list(cases()))
def test_results_are_those_of_calls_in_order(executor, in_order, name, method, batch_size):
    given = "jacobian" if len(name) % 2 else "jvp, vjp"
    f = Endpoints(WAVES, method).host_call(EITHER[given], executor=executor, batch_size=batch_size)
    result = jax.jit(lambda: COMPOSITIONS[name](f))()
    # Not to the last bit: the cotangents of an unmapped argument are added as they come.
    assert_close(result, in_order(name, method, given, batch_size), rtol=1e-13, atol=1e-13)


PARAMS = {"scale": np.float64(1.5), "shift": np.array([1.0, 2.0, 3.0])}
MANY = {"scale": np.array([1.5, -2.0, 0.5]), "shift": np.arange(9.0).reshape(3, 3)}


def polynomial(**options):
    return batchrules.host_call(
        calls.polynomial,
        calls.promise,
        jvp=calls.polynomial_jvp,
        vjp=calls.polynomial_vjp,
        static_argnames=("power", "folder"),
        verify=False,
        **options,
    )


def in_two_axes(f):
    """The polynomial over parameters and points: six elements, the parameters mapped along one of the two axes."""
    return jax.vmap(jax.vmap(f, (None, 0)), (0, None))


@pytest.mark.parametrize(
    ("method", "batch_size", "made"), [("sequential", None, 12), ("expand_dims", 5, 3), ("broadcast_all", None, 1)]
)
@every_kind
def test_trees_static_arguments_and_derivatives(executor, tmp_path, method, batch_size, made):
    f = polynomial(method=method, batch_size=batch_size, executor=executor)
    foreign = in_two_axes(lambda params, x: f(params, x, 3, str(tmp_path)))
    wanted = in_two_axes(lambda params, x: calls.twin(params, x, 3))

    def program(f):
        def total(params, xs):
            outputs = f(params, xs)
            return (outputs["y"] ** 2).sum() + outputs["sum"].sum()

        moved = jax.jvp(f, (MANY, XS), (jax.tree.map(jnp.ones_like, MANY), YS))
        return moved, jax.grad(total, (0, 1))(MANY, XS)

    assert_close(jax.jit(lambda: program(foreign))(), program(wanted))
    # The call itself twice in the program, but for the same arguments.
    assert calls.counts(tmp_path) == {"call": made, "jvp": made, "vjp": made}


@every_kind
def test_only_elements_whose_mask_is_true_go_out(executor, tmp_path):
    f = polynomial(method="sequential", executor=executor)
    mask = np.array([True, False, False, True])
    masked = jax.vmap(lambda m, x: f.where(m, PARAMS, x, 2, str(tmp_path), otherwise=-1.0))(mask, XS)
    wanted = jax.vmap(lambda x: calls.twin(PARAMS, x, 2))(XS)
    assert_close(masked["sum"], jnp.where(mask, wanted["sum"], -1.0))
    assert calls.counts(tmp_path) == {"call": 2}


@elsewhere
def test_the_calls_are_made_there(executor):
    f = batchrules.host_call(calls.place, jax.ShapeDtypeStruct((2,), "int64"), executor=executor)
    places = np.asarray(jax.vmap(f)(np.arange(20.0)))
    assert os.getpid() not in places[:, 0]


def test_a_dask_cluster_has_several_processes(dask):
    f = batchrules.host_call(calls.place, jax.ShapeDtypeStruct((2,), "int64"), executor=dask)
    assert len(set(np.asarray(jax.vmap(f)(np.arange(100.0)))[:, 0])) == 2


@elsewhere
def test_functions_that_a_decorator_hides(executor, monkeypatch):
    monkeypatch.setattr(calls.CURRENT, "chosen", executor)
    xs = jnp.arange(12.0, dtype="float32").reshape(4, 3)
    squares = (xs * xs).sum(axis=1)
    assert_same(jax.vmap(calls.decorated)(xs), squares)
    assert_same(jax.jit(jax.vmap(calls.differentiable))(xs), squares)
    assert_same(jax.vmap(jax.grad(calls.differentiable))(xs), 2 * xs)
    assert_same(jax.jvp(jax.vmap(calls.differentiable), (xs,), (xs,))[1], 2 * squares)
    assert_same(jax.vmap(calls.Solver(3).solve)(xs), 3 * xs)


# --- concurrency --------------------------------------------------------------------------------------------------


def meeting(parties):
    """A function that waits until so many calls of it run at a time."""
    together = threading.Barrier(parties, timeout=WAIT)

    def meet(x):
        together.wait()
        return 2 * x

    return meet


@pytest.fixture(params=["an int", "a pool"])
def six_threads(request):
    if request.param == "an int":
        yield 6
        return
    with ThreadPoolExecutor(6) as pool:
        yield pool


X6 = np.arange(6.0).reshape(2, 3)


def test_nested_vmaps_share_one_fan_out(six_threads):
    f = batchrules.host_call(meeting(6), like, executor=six_threads)
    assert_same(jax.jit(jax.vmap(jax.vmap(f)))(X6), 2 * X6)


def test_chunks_go_out_together(six_threads):
    f = batchrules.host_call(meeting(6), like, method="expand_dims", batch_size=2, verify=False, executor=six_threads)
    xs = np.arange(12.0)
    assert_same(jax.vmap(jax.vmap(f))(xs.reshape(3, 4)), 2 * xs.reshape(3, 4))


def test_so_do_derivatives(six_threads):
    meet = meeting(6)
    f = batchrules.host_call(like, like, vjp=lambda _args, ct, _needed: (meet(ct),), executor=six_threads)
    assert_same(jax.vmap(jax.vmap(jax.grad(f)))(X6), np.full((2, 3), 2.0))
    assert_same(jax.grad(lambda x: jax.vmap(jax.vmap(f))(x).sum())(X6), np.full((2, 3), 2.0))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_a_host_function_that_makes_calls_on_its_own_executor(workers, own):
    with ThreadPoolExecutor(workers) as pool:
        executor = workers if own else pool
        inner = batchrules.host_call(lambda x: x + 1, like, executor=executor)
        outer = batchrules.host_call(lambda x: np.asarray(2 * inner(x)), like, executor=executor)
        assert_same(jax.jit(jax.vmap(jax.vmap(outer)))(X6), 2 * (X6 + 1))
        assert_same(jax.vmap(lambda x: inner(outer(x)))(X6), 2 * (X6 + 1) + 1)


def test_several_programs_at_a_time_on_one_worker():
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(4) as callers:
        f = jax.jit(jax.vmap(batchrules.host_call(lambda x: 2 * x, like, executor=pool)))
        xs = [np.arange(50.0) + i for i in range(8)]
        for x, result in zip(xs, callers.map(f, xs, timeout=WAIT), strict=True):
            assert_same(result, 2 * x)


@pytest.mark.parametrize("most", [1, 2])
@every_kind
def test_max_in_flight_bounds_the_tasks(executor, most):
    pool = watched(executor)
    f = batchrules.host_call(calls.twice, like, executor=pool, max_in_flight=most)
    xs = np.arange(40.0)
    assert_same(jax.vmap(f)(xs), 2 * xs)
    assert pool.elements == 40
    assert 1 <= pool.most <= most


@pytest.mark.parametrize("most", [1, 2])
def test_max_in_flight_bounds_the_calls_on_threads(most):
    inside, seen, lock = set(), set(), threading.Lock()

    def call(x):
        with lock:
            inside.add(float(x))
            seen.add(len(inside))
        threading.Event().wait(0.002)
        with lock:
            inside.discard(float(x))
        return x

    f = batchrules.host_call(call, like, executor=8, max_in_flight=most)
    jax.block_until_ready(jax.vmap(f)(np.arange(20.0)))
    assert max(seen) == most


def test_one_call_and_no_call_need_no_executor():
    with ThreadPoolExecutor(1) as pool:
        counted = Watched(pool)
        f = batchrules.host_call(calls.twice, like, executor=counted)
        assert f(3.0) == 6
        assert jax.vmap(f)(np.zeros((0,))).shape == (0,)
        assert counted.elements == 0


# --- failures -----------------------------------------------------------------------------------------------------


@every_kind
def test_a_failure_names_its_element(executor):
    f = batchrules.host_call(calls.fails_at_7, like, executor=executor)
    xs = np.arange(12.0).reshape(3, 4)
    with pytest.raises(calls.SolverError, match="no convergence at 7") as caught:
        jax.vmap(jax.vmap(f))(xs)
    assert any("'fails_at_7' failed at element (1, 3), with arguments x ()" in text for text in caught.value.__notes__)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"failed at element \(1, 3\).*SolverError: no convergence"):
        jax.block_until_ready(jax.jit(jax.vmap(jax.vmap(f)))(xs))
    assert type(batchrules.last_error()) is calls.SolverError
    # The executor is as good as before.
    assert_same(jax.vmap(f)(xs[0]), 2 * xs[0])


@every_kind
def test_failed_elements_become_nan(executor):
    f = batchrules.host_call(calls.odd_fails, like, executor=executor, on_error="nan")
    xs = np.arange(30.0)
    with pytest.warns(FailedElementsWarning, match=r"15 of 30 elements failed: \(1,\), \(3,\).*is odd"):
        result = jax.vmap(f)(xs)
    assert_same(result, jnp.where(xs % 2 == 1, jnp.nan, 2 * xs))


def test_dask_recovers_from_a_killed_worker(dask, tmp_path):
    f = batchrules.host_call(calls.dies_once_at_5, like_first, static_argnames="folder", executor=dask)
    xs = np.arange(60.0)
    assert_same(jax.jit(jax.vmap(lambda x: f(x, str(tmp_path))))(xs), 2 * xs)
    assert (tmp_path / "died").exists()


def like_first(x, folder):
    del folder
    return x


@pytest.mark.parametrize(("way", "on_error"), [("eager", "raise"), ("jit", "nan")])
def test_a_killed_loky_worker_is_a_clear_error(way, on_error):
    xs = np.arange(20.0)
    with loky_pool(1) as pool:
        f = jax.vmap(batchrules.host_call(calls.dies_at_5, like, executor=pool, on_error=on_error))
        kind = DispatchError if way == "eager" else jax.errors.JaxRuntimeError
        text = r"(?s)host_call 'dies_at_5': The executor .*TerminatedWorkerError.*A worker died.*Make a new executor"
        with pytest.raises(kind, match=text):
            jax.block_until_ready((jax.jit(f) if way == "jit" else f)(xs))
        assert type(batchrules.last_error()) is DispatchError
    # With another executor the same function goes on.
    assert_same(jax.vmap(batchrules.host_call(calls.dies_at_5, like, executor=2))(xs[:4]), 2 * xs[:4])


@pytest.mark.parametrize("way", ["eager", "jit"])
def test_an_executor_shut_down_too_early(way):
    pool = ThreadPoolExecutor(1)
    f = jax.vmap(batchrules.host_call(calls.twice, like, executor=pool))
    program = jax.jit(f) if way == "jit" else f
    program(np.arange(3.0))
    pool.shutdown()
    text = r"host_call 'twice': The executor .*0 of 3.*shut down too early"
    with pytest.raises(DispatchError, match=text), batchrules.original_errors():
        jax.block_until_ready(program(np.arange(3.0)))


def test_a_function_that_cannot_be_pickled(processes):
    f = batchrules.host_call(lambda x: 2 * x, like, executor=processes)
    with pytest.raises(DispatchError, match=r"must be picklable: define the function at the top level"):
        jax.vmap(f)(np.arange(3.0))


@pytest.mark.parametrize("kind", ["loky", "dask"])
def test_one_that_is_pickled_by_value(executor):
    f = batchrules.host_call(lambda x: 2 * x, like, executor=executor)
    assert_same(jax.vmap(f)(np.arange(3.0)), 2 * np.arange(3.0))


@pytest.mark.parametrize("executor", [2, Executor()], ids=["an int", "a pool"])
def test_allow_jax_excludes_an_executor(executor):
    with pytest.raises(ValueError, match=r"allow_jax=True and executor=.* exclude each other"):
        batchrules.host_call(calls.twice, like, allow_jax=True, executor=executor)


def test_jax_in_a_worker_thread_is_found():
    f = batchrules.host_call(lambda x: np.asarray(jnp.sin(x)), like, executor=2)
    with pytest.raises(batchrules.JaxInsideHostFunctionError, match="uses JAX inside"):
        jax.vmap(f)(np.arange(3.0))
