"""Issuing the calls of a batch: in order, on threads, in other processes; failures of the calls and of the executor."""

import concurrent.futures
import copyreg
import functools
import itertools
import multiprocessing
import os
import pickle
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import dispatched
import numpy as np
import pytest

from batchrules._dispatch import Dispatch, check_dispatch
from batchrules._dispatch_pool import Job, Pace
from batchrules._dispatch_tasks import Link, RemoteError, RemoteTraceback, Task, perform
from batchrules._dispatch_threads import Threads
from batchrules._errors import DispatchError
from batchrules._portable import portable

WAIT = 60  # seconds after which a test that waits has failed


@dataclass
class Batch:
    """The results and failures of a job, and the thread that each was handed over in."""

    results: dict = field(default_factory=dict)
    failures: dict = field(default_factory=dict)
    threads: set = field(default_factory=set)

    def settle(self, index, value):
        assert index not in self.results
        self.results[index] = value
        self.threads.add(threading.current_thread())

    def failed(self, index, error):
        assert index not in self.failures
        self.failures[index] = error
        self.threads.add(threading.current_thread())

    def run(self, dispatch, call, count=20, *, keep_going=True):
        dispatch.run(Job(call, range(count), count, self.settle, self.failed, keep_going))
        return self


def stop(_, error):
    raise error


def run(dispatch, call, count=20):
    return Batch().run(dispatch, call, count).results


def unpickled(data):
    return pickle.loads(data)  # noqa: S301  # dumped by the test


def travelled(value):
    return unpickled(pickle.dumps(value))


class Counting(ThreadPoolExecutor):
    """Threads, with the tasks that were submitted and the most that were unfinished at a time."""

    def __init__(self, workers):
        super().__init__(workers)
        self.tasks = []
        self.unfinished = 0
        self.most = 0
        self._lock = threading.Lock()

    def submit(self, fn, /, *args, **kwargs):
        with self._lock:
            self.unfinished += 1
            self.most = max(self.most, self.unfinished)
        self.tasks.append(len(args[0].payloads))
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._count_down)
        return future

    def _count_down(self, _):
        with self._lock:
            self.unfinished -= 1


@pytest.fixture(autouse=True)
def no_thread_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def threads():
    with Counting(4) as pool:
        yield pool


@pytest.fixture
def processes():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def loky_processes():
    loky = pytest.importorskip("loky", reason="loky is an optional extra")
    before = set(threading.enumerate())
    pool = loky.ProcessPoolExecutor(1)
    yield pool
    pool.shutdown(kill_workers=True)
    # It does not wait for all of its own threads.
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT)


class TestOptions:
    @pytest.mark.parametrize("executor", [None, 1, 8, np.int64(3)])
    @pytest.mark.parametrize("max_in_flight", [None, 1, np.int32(5)])
    def test_are_kept(self, executor, max_in_flight):
        dispatch = check_dispatch(executor, max_in_flight, "f")
        assert (dispatch.executor, dispatch.max_in_flight) == (executor, max_in_flight)
        assert type(dispatch.executor) in {int, type(None)}

    @pytest.mark.parametrize("option", ["executor", "max_in_flight"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_below_one(self, option, value):
        with pytest.raises(ValueError, match=rf"f: {option} must be at least 1, or None.*got {value}"):
            check_dispatch(**{"executor": None, "max_in_flight": None, option: value}, where="f")

    @pytest.mark.parametrize("option", ["executor", "max_in_flight"])
    @pytest.mark.parametrize("value", [True, 2.0, "4"])
    def test_of_the_wrong_type(self, option, value):
        with pytest.raises(TypeError, match=rf"f: {option} must be .*of type {type(value).__name__}"):
            check_dispatch(**{"executor": None, "max_in_flight": None, option: value}, where="f")

    def test_a_class_of_executors_is_none(self):
        with pytest.raises(TypeError, match="Make an instance"):
            check_dispatch(ThreadPoolExecutor, None, "f")

    def test_a_dask_client_has_one(self):
        with pytest.raises(TypeError, match=r"client\.get_executor\(\)"):
            check_dispatch(SimpleNamespace(get_executor=None), None, "f")

    def test_compare_by_value_and_executors_by_identity(self):
        with ThreadPoolExecutor() as one, ThreadPoolExecutor() as other:
            assert Dispatch(one, 2) == Dispatch(one, 2)
            assert hash(Dispatch(one, 2)) == hash(Dispatch(one, 2))
            assert (
                len({Dispatch(), Dispatch(1), Dispatch(None, 1), Dispatch(one), Dispatch(other), Dispatch(2, 2)}) == 6
            )

    def test_executors_that_compare_equal_differ(self):
        class Same(Executor):
            def __eq__(self, other):
                return True

            __hash__ = None

        one = Same()
        assert Dispatch(one) == Dispatch(one) != Dispatch(Same())
        assert hash(Dispatch(one)) == hash(Dispatch(one))


class TestResults:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
    @pytest.mark.parametrize("executor", [None, 1, 3, "pool"])
    @pytest.mark.parametrize("max_in_flight", [None, 1, 2])
    def test_of_every_element_in_the_calling_thread(self, threads, executor, max_in_flight, count):
        dispatch = Dispatch(threads if executor == "pool" else executor, max_in_flight)
        batch = Batch().run(dispatch, dispatched.square, count)
        assert batch.results == {i: i * i for i in range(count)}
        assert batch.threads <= {threading.current_thread()}

    @pytest.mark.parametrize("executor", [None, 3, "pool"])
    def test_and_failures(self, threads, executor):
        batch = Batch().run(Dispatch(threads if executor == "pool" else executor), dispatched.odd_fails, 301)
        assert batch.results == {i: i for i in range(0, 301, 2)}
        assert {i: error.args for i, error in batch.failures.items()} == {i: (i,) for i in range(1, 301, 2)}
        assert {type(error) for error in batch.failures.values()} == {dispatched.OddError}

    def test_in_order_without_an_executor(self):
        seen = []
        run(Dispatch(), seen.append)
        assert seen == list(range(20))

    def test_of_a_value_that_is_an_exception(self):
        error = ValueError("a value")
        assert run(Dispatch(2), lambda _: error, 2) == {0: error, 1: error}

    def test_see_the_callers_context(self):
        def divide(i):
            return np.float64(i) / np.float64(0)

        with np.errstate(all="ignore"):
            assert len(run(Dispatch(2), divide)) == 20

    def test_calls_run_at_the_same_time(self):
        together = threading.Barrier(4, timeout=WAIT)
        assert len(run(Dispatch(4), lambda _: together.wait(), 8)) == 8

    def test_payloads_are_taken_only_when_there_is_room(self):
        taken, gates = [], [threading.Event() for _ in range(50)]

        def payloads():
            for gate in gates:
                taken.append(gate)
                yield gate

        def settle(_index, _value):
            most.append(len(taken) - len(most))

        def call(gate):
            gate.set()

        most = []
        Dispatch(2, 2).run(Job(call, payloads(), 50, settle, stop, keep_going=False))
        assert len(taken) == 50
        # Groups of 50 / (4 * 2) elements: two in flight, and one that is settled.
        assert max(most) <= 3 * 6


class TestMaxInFlight:
    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_bounds_the_tasks(self, threads, most):
        run(Dispatch(threads, most), dispatched.square, 500)
        assert 1 <= threads.most <= most

    def test_bounds_the_calls_on_threads(self):
        lock, running, seen = threading.Lock(), itertools.count(), []
        inside = []

        def call(i):
            with lock:
                inside.append(i)
                seen.append(len(inside))
            threading.Event().wait(0.001)
            with lock:
                inside.remove(i)
            return next(running)

        run(Dispatch(8, 2), call, 40)
        assert max(seen) <= 2

    def test_does_not_hold_back_what_it_allows(self, threads):
        together = threading.Barrier(3, timeout=WAIT)
        run(Dispatch(threads, 3), lambda _: together.wait(), 6)
        assert threads.most == 3


class TestGroups:
    def test_short_elements_share_tasks(self, threads):
        assert len(run(Dispatch(threads), dispatched.square, 5000)) == 5000
        assert sum(threads.tasks) == 5000
        assert len(threads.tasks) < 2500

    def test_start_alone(self, threads):
        run(Dispatch(threads), dispatched.square, 5000)
        assert threads.tasks[0] == 1

    def test_long_elements_are_tasks_of_their_own(self, threads):
        run(Dispatch(threads), lambda _: threading.Event().wait(0.003), 40)
        assert threads.tasks == [1] * 40

    def test_no_bound_while_elements_are_long(self, threads):
        # 100 tasks are more than the window of short elements; all are submitted before the first can finish.
        go = threading.Event()

        def submit(fn, /, *args, **kwargs):
            if len(threads.tasks) == 99:
                go.set()
            return Counting.submit(threads, fn, *args, **kwargs)

        threads.submit = submit
        run(Dispatch(threads), lambda _: go.wait(WAIT), 100)
        assert threads.most == 100


class TestPace:
    """The rule for the size of a group, with given times."""

    def pace(self, element, submit=1e-5, *, workers=8, limit=None, weight=0):
        pace = Pace(workers, limit, weight)
        pace.submitted(submit)
        pace.finished(1, element)
        return pace

    def test_alone_until_a_result_comes(self):
        assert Pace(8, None).size(10_000) == 1

    @pytest.mark.parametrize(
        ("element", "submit", "size"),
        [(1e-5, 1e-5, 200), (1e-5, 1e-3, 1000), (1e-3, 1e-5, 2), (2e-3, 1e-5, 1), (5e-3, 1.0, 1)],
    )
    def test_long_enough_to_be_worth_a_task(self, element, submit, size):
        assert self.pace(element, submit).size(1_000_000) == size

    @pytest.mark.parametrize(("workers", "remaining", "size"), [(8, 320, 10), (8, 10, 1), (None, 6400, 100)])
    def test_never_so_long_that_workers_are_idle(self, workers, remaining, size):
        assert self.pace(1e-6, workers=workers).size(remaining) == size

    @pytest.mark.parametrize(("element", "last"), [(1e-5, 50), (1e-4, 5), (1e-9, 312)])
    def test_no_smaller_at_the_end_than_is_worth_a_task_and_no_larger_than_at_first(self, element, last):
        pace = self.pace(element)
        assert pace.size(10_000) >= last
        assert pace.size(30) == last

    def test_of_few_tasks_in_flight(self):
        assert self.pace(1e-6, limit=2).size(80) == 10

    def test_no_time_at_all(self):
        assert self.pace(0.0).size(3200) == 100

    def test_the_cheapest_submission_counts(self):
        pace = self.pace(1e-5, submit=1.0)
        pace.submitted(1e-5)
        assert pace.size(1_000_000) == 200

    def test_later_elements_count_more(self):
        pace = self.pace(1.0)
        for _ in range(30):
            pace.finished(1, 1e-5)
        assert pace.size(1_000_000) == pytest.approx(200, abs=2)

    @pytest.mark.parametrize(("workers", "room"), [(8, 32), (None, float("inf"))])
    def test_room_for_long_elements(self, workers, room):
        assert self.pace(1.0, workers=workers).room() == room

    def test_more_room_while_nothing_comes_back(self):
        pace = Pace(None, 100)
        assert (pace.room(), pace.patience()) == (64, 2e-3)
        pace.waited()
        assert (pace.room(), pace.patience()) == (100, None)

    def test_more_patience_while_nothing_comes_back(self):
        pace = Pace(None, None)
        for room, patience in ((64, 2e-3), (128, 8e-3), (256, 32e-3)):
            assert (pace.room(), pace.patience()) == (room, patience)
            pace.waited()

    def test_an_element_that_lasts_longer_is_believed_by_and_by(self):
        pace = self.pace(1e-5)
        pace.finished(1, 1.0)
        assert pace.size(1_000_000) == round(200 / 1.1)

    @pytest.mark.parametrize(("weight", "size"), [(0, 200), (8, 200), (1 << 16, 8), (1 << 19, 1), (1 << 30, 1)])
    def test_results_of_a_task_are_no_larger_than_half_a_megabyte(self, weight, size):
        assert self.pace(1e-5, weight=weight).size(1_000_000) == size

    @pytest.mark.parametrize(
        ("workers", "limit", "weight", "room"),
        [(8, None, 1 << 18, 32), (8, None, 1 << 19, 9), (8, 4, 1 << 19, 4), (None, None, 1 << 19, 64)],
    )
    def test_large_results_do_not_pile_up(self, workers, limit, weight, room):
        assert Pace(workers, limit, weight).room() == room


class TestThreads:
    def test_an_idle_thread_is_used_before_another_is_started(self):
        before, pool = threading.active_count(), Threads(8)
        for _ in range(8):
            pool.submit(int).result()
            time.sleep(0.05)
        started = threading.active_count() - before
        pool.shutdown()
        assert 1 <= started < 8

    def test_busy_threads_are_joined_by_others_up_to_the_limit(self):
        pool, barrier = Threads(3), threading.Barrier(3)
        futures = [pool.submit(barrier.wait, 30) for _ in range(3)]
        assert sorted(future.result() for future in futures) == [0, 1, 2]
        pool.shutdown()


class TestNested:
    def test_in_one_pool_of_one_thread(self):
        with ThreadPoolExecutor(1) as pool:
            dispatch = Dispatch(pool)
            results = run(dispatch, lambda i: sum(run(dispatch, lambda j: i * j, 5).values()), 4)
        assert results == {i: 10 * i for i in range(4)}

    def test_the_inner_one_runs_in_the_outer_ones_thread(self):
        def outer(_):
            return {threading.current_thread()} == set(run(inner, lambda _: threading.current_thread(), 5).values())

        for executor in (2, 3):
            inner = Dispatch(executor)
            assert all(run(Dispatch(2), outer, 4).values())

    def test_two_pools_each_in_the_other(self):
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

            def innermost(_):
                return sum(run(Dispatch(one), dispatched.square, 3).values())

            def inner(_):
                return sum(run(Dispatch(other), innermost, 2).values())

            assert run(Dispatch(one), inner, 2) == {0: 10, 1: 10}

    def test_an_executor_inside_threads_is_used(self, threads):
        def outer(i):
            return sum(run(Dispatch(threads), lambda j: i * j, 5).values())

        assert run(Dispatch(2), outer, 4) == {i: 10 * i for i in range(4)}
        assert sum(threads.tasks) == 20

    def test_a_thread_is_free_again_after_its_task(self):
        def own_threads():
            return set(run(Dispatch(2), lambda _: threading.current_thread()).values())

        with ThreadPoolExecutor(1) as pool:
            run(Dispatch(pool), dispatched.square)
            thread = pool.submit(threading.current_thread).result()
            assert thread not in pool.submit(own_threads).result()

    def test_threads_inside_another_process(self):
        task = travelled(Task(dispatched.threads_inside, [8], Link(()), keep_going=False))
        outcomes, _ = perform(task)
        assert outcomes == [({threading.current_thread().name}, None)]


class TestFailures:
    @pytest.mark.parametrize("executor", [None, 3, "pool"])
    def test_stop_submissions(self, threads, executor):
        called = []

        def call(i):
            called.append(i)
            raise dispatched.OddError(i)

        dispatch = Dispatch(threads if executor == "pool" else executor, 2)
        with pytest.raises(dispatched.OddError):
            dispatch.run(Job(call, range(1000), 1000, Batch().settle, stop, keep_going=False))
        assert len(called) < 20

    @pytest.mark.parametrize("executor", [None, 3])
    def test_are_raised_if_nobody_else_does(self, executor):
        with pytest.raises(dispatched.OddError):
            Batch().run(Dispatch(executor), dispatched.odd_fails, 10, keep_going=False)

    @pytest.mark.parametrize("executor", [2, "pool"])
    @pytest.mark.parametrize("raised_in", ["settle", "failed"])
    def test_wait_for_what_runs(self, threads, executor, raised_in):
        running, release, finished = threading.Event(), threading.Event(), []

        def call(i):
            if i == 0:
                running.set()
                assert release.wait(WAIT)
                finished.append(i)
                return i
            assert running.wait(WAIT)
            return dispatched.fails(i) if raised_in == "failed" else i

        def end(index, _):
            # From here on, nothing but waiting for the call that runs can make it finish before `run` does.
            threading.Timer(0.05, release.set).start()
            raise ZeroDivisionError(index)

        job = Job(call, range(2), 2, end, end, keep_going=True)
        with pytest.raises(ZeroDivisionError):
            Dispatch(threads if executor == "pool" else executor).run(job)
        assert finished == [0]
        settle_timers()

    def test_drop_the_results_that_come_after(self, threads):
        settled = []

        def settle(index, _):
            settled.append(index)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            Dispatch(threads).run(Job(dispatched.square, range(500), 500, settle, stop, keep_going=False))
        assert len(settled) == 1

    @pytest.mark.parametrize("executor", [2, "pool"])
    def test_cancel_what_is_queued_and_leave_the_pool_open(self, threads, executor):
        called, gate = [], threading.Event()

        def call(i):
            called.append(i)
            if i == 0:
                raise ZeroDivisionError
            gate.wait(0.05)

        dispatch = Dispatch(threads if executor == "pool" else executor)
        with pytest.raises(ZeroDivisionError):
            dispatch.run(Job(call, range(200), 200, Batch().settle, stop, keep_going=False))
        assert len(called) < 100
        assert len(run(dispatch, dispatched.square)) == 20

    def test_stop_the_group_they_are_in(self):
        task = Task(dispatched.odd_fails, [0, 2, 3, 4], Link(()), keep_going=False)
        outcomes, _ = perform(task)
        assert [value for value, _ in outcomes] == [0, 2, None]

    def test_of_a_group_that_goes_on(self):
        task = Task(dispatched.odd_fails, [0, 2, 3, 4], Link(()), keep_going=True)
        outcomes, _ = perform(task)
        assert [value for value, _ in outcomes] == [0, 2, None, 4]

    def test_elsewhere_stop_the_group_of_a_running_task(self):
        link = Link(())

        def call(i):
            link.stopped = i == 1
            return i

        outcomes, _ = perform(Task(call, range(9), link, keep_going=True))
        assert [value for value, _ in outcomes] == [0, 1]

    def test_stop_all_groups(self):
        links = []

        class Here(Executor):
            def submit(self, fn, task, /):
                links.append(task.link)
                future = Future()
                future.set_result(fn(task))
                return future

        with pytest.raises(dispatched.OddError):
            Dispatch(Here()).run(Job(dispatched.odd_fails, range(9), 9, Batch().settle, stop, keep_going=False))
        assert links
        assert all(link.stopped for link in links)

    def test_cancel_the_newest_first(self):
        """Or the workers would start the next while the one before is cancelled."""
        cancelled = []

        class Queued(Future):
            def __init__(self, number):
                super().__init__()
                self.number = number

            def cancel(self):
                cancelled.append(self.number)
                return super().cancel()

        class LastFirst(Executor):
            def submit(self, fn, task, /):
                (number,) = task.payloads
                future = Queued(number)
                if number == 5:
                    future.set_result(fn(task))
                return future

        job = Job(dispatched.odd_fails, [0, 2, 4, 5], 4, Batch().settle, stop, keep_going=False)
        with pytest.raises(dispatched.OddError):
            Dispatch(LastFirst()).run(job)
        assert cancelled == [4, 2, 0]

    def test_wait_for_what_runs_elsewhere(self):
        failed, ended = threading.Event(), []

        def elsewhere(future):
            failed.wait(WAIT)
            time.sleep(0.1)
            ended.append(future)
            future.set_result(([(0, None)], 0.0))

        class OneElsewhere(Executor):
            def submit(self, fn, task, /):
                future = Future()
                future.set_running_or_notify_cancel()
                if task.payloads == [1]:
                    future.set_result(fn(task))
                else:
                    threading.Thread(target=elsewhere, args=[future]).start()
                return future

        def stops(_, error):
            failed.set()
            raise error

        with pytest.raises(dispatched.OddError):
            Dispatch(OneElsewhere()).run(Job(dispatched.odd_fails, [0, 1], 2, Batch().settle, stops, keep_going=False))
        assert len(ended) == 1

    @pytest.mark.parametrize("executor", [None, 2, "pool"])
    def test_of_the_payloads(self, threads, executor):
        def payloads():
            yield from range(3)
            raise ZeroDivisionError

        dispatch = Dispatch(threads if executor == "pool" else executor)
        with pytest.raises(ZeroDivisionError):
            dispatch.run(Job(dispatched.square, payloads(), 9, Batch().settle, stop, keep_going=False))

    def test_a_future_that_cannot_be_cancelled_is_waited_for(self):
        class Lasting(Future):
            def cancel(self):
                raise NotImplementedError

        class OnThreads(Executor):
            def submit(self, fn, /, *args, **kwargs):
                future = Lasting()
                threading.Thread(target=lambda: future.set_result(fn(*args, **kwargs))).start()
                return future

        with pytest.raises(dispatched.OddError):
            Dispatch(OnThreads()).run(Job(dispatched.odd_fails, range(9), 9, Batch().settle, stop, keep_going=False))


class TestInterrupts:
    @pytest.mark.parametrize("executor", [None, 2, "pool"])
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_from_settle(self, threads, executor, kind):
        def settle(*_):
            raise kind

        dispatch = Dispatch(threads if executor == "pool" else executor)
        with pytest.raises(kind):
            dispatch.run(Job(dispatched.square, range(100), 100, settle, stop, keep_going=True))

    @pytest.mark.parametrize("executor", [None, 2, "pool"])
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_from_a_call_are_no_result_of_an_element(self, threads, executor, kind):
        def call(_):
            raise kind

        batch = Batch()
        with pytest.raises(kind):
            batch.run(Dispatch(threads if executor == "pool" else executor), call)
        assert not batch.failures

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send itself SIGINT without a console")
    @pytest.mark.parametrize("executor", [2, "pool"])
    def test_from_the_waiting(self, threads, executor):
        import signal

        together = threading.Barrier(4, timeout=WAIT)
        release, called, inside = threading.Event(), [], []
        # All threads of the pool have started: it forgets one that is just starting when the interrupt comes.
        run(Dispatch(threads), lambda _: together.wait(), 4)

        def call(i):
            called.append(i)
            if i == 0:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            inside.append(i)
            release.wait(0.2)
            inside.remove(i)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run(Dispatch(threads if executor == "pool" else executor), call, 1000)
        finally:
            signal.signal(signal.SIGINT, before)
        assert len(called) < 20
        assert inside == []
        assert len(run(Dispatch(threads), dispatched.square)) == 20

    @pytest.mark.parametrize("executor", [2, "pool"])
    def test_inside_submit(self, threads, monkeypatch, executor):
        """The task may be running, and nobody has its future."""
        running, inside = threading.Event(), []

        def call(i):
            inside.append(i)
            running.set()
            threading.Event().wait(0.05)
            inside.remove(i)

        def submit(self, fn, /, *args, **kwargs):
            original(self, fn, *args, **kwargs)
            assert running.wait(WAIT)
            raise KeyboardInterrupt

        kind = Counting if executor == "pool" else Threads
        original = kind.submit
        monkeypatch.setattr(kind, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            run(Dispatch(threads if executor == "pool" else executor), call)
        assert inside == []


class FailsAfter(Executor):
    """Runs the first tasks at once; what comes then is up to the test."""

    def __init__(self, good, then):
        self.good = good
        self.then = then

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        if self.good > 0:
            self.good -= 1
            future.set_result(fn(*args, **kwargs))
        else:
            self.then(future)
        return future


def refuse(_):
    raise RuntimeError("cannot schedule new futures after shutdown")


def lose(future):
    future.cancel()


def break_down(future):
    future.set_exception(concurrent.futures.BrokenExecutor("a worker is gone"))


class KilledWorker(Exception):  # noqa: N818  # Dask's name
    pass


def give_up(future):
    future.set_exception(KilledWorker("4 different workers died"))


class TestExecutorFailures:
    @pytest.mark.parametrize(
        ("then", "text"),
        [
            (refuse, r"RuntimeError: cannot schedule new futures after shutdown. It was shut down too early"),
            (lose, r"CancelledError: .*cancelled by someone else"),
            (break_down, r"BrokenExecutor: a worker is gone. A worker died.*Make a new executor"),
            (give_up, r"KilledWorker: 4 different workers died. A worker died.*as good as before"),
        ],
    )
    @pytest.mark.parametrize("good", [0, 3])
    def test_are_told_from_those_of_calls(self, then, text, good):
        batch = Batch()
        with pytest.raises(DispatchError, match=text) as caught:
            batch.run(Dispatch(FailsAfter(good, then), 1), dispatched.square, 5)
        assert not batch.failures
        assert f"(FailsAfter) failed when {len(batch.results)} of 5 elements were done" in str(caught.value)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("error", [concurrent.futures.CancelledError(), concurrent.futures.BrokenExecutor()])
    def test_the_same_exceptions_raised_by_a_call_are_its_own(self, error):
        def call(_):
            raise error

        assert Batch().run(Dispatch(2), call, 2).failures == {0: error, 1: error}

    def test_a_shut_down_pool(self):
        pool = ThreadPoolExecutor(1)
        pool.shutdown()
        with pytest.raises(DispatchError, match=r"ThreadPoolExecutor.*0 of 20.*shut down too early"):
            run(Dispatch(pool), dispatched.square)

    @pytest.mark.parametrize("cancel", [False, True])
    def test_a_pool_shut_down_in_mid_batch(self, cancel):
        pool = ThreadPoolExecutor(1)
        closing = threading.Event()

        def close(_):
            if not closing.is_set():
                closing.set()
                pool.shutdown(wait=False, cancel_futures=cancel)

        with pytest.raises(DispatchError, match=r"ThreadPoolExecutor.*(shut down too early|cancelled by someone else)"):
            run(Dispatch(pool, 2), close, 5000)
        pool.shutdown()

    def test_a_pool_whose_threads_cannot_start_work(self, caplog):
        pool = ThreadPoolExecutor(1, initializer=dispatched.fails, initargs=(0,))
        with pool, pytest.raises(DispatchError, match=r"BrokenThreadPool.*A worker died"):
            run(Dispatch(pool), dispatched.square)
        assert "Exception in initializer" in caplog.text


class TestPortable:
    def test_calls_the_function(self):
        assert portable(dispatched.square)(3) == 9
        assert "square" in repr(portable(dispatched.square))

    @pytest.mark.parametrize(
        "function",
        [
            dispatched.square,
            dispatched.decorated.__wrapped__,
            dispatched.twice_decorated.__wrapped__.__wrapped__,
            dispatched.Solver.cube.__wrapped__,
            functools.partial(dispatched.power, exponent=2),
            np.sqrt,
        ],
    )
    def test_goes_through_pickle(self, function):
        arrived = travelled(portable(function))
        if isinstance(function, functools.partial):
            assert arrived(3) == function(3)
        else:
            assert arrived.function is function

    def test_is_needed(self):
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pickle.dumps(dispatched.decorated.__wrapped__)

    def test_of_a_portable(self):
        once = portable(dispatched.square)
        assert portable(once) is once

    def test_what_cannot_be_pickled_says_so_as_always(self):
        def local():
            pass

        with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
            pickle.dumps(portable(local))

    def test_a_function_that_is_hidden_by_something_else(self, monkeypatch):
        function = dispatched.square
        monkeypatch.setattr(dispatched, "square", dispatched.fails)
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pickle.dumps(portable(function))

    def test_another_function_at_the_same_place(self, monkeypatch):
        data = pickle.dumps(portable(dispatched.decorated.__wrapped__))
        monkeypatch.setattr(dispatched, "decorated", dispatched.fails)
        with pytest.raises(pickle.UnpicklingError, match="another function in this process"):
            unpickled(data)

    def test_of_a_main_program_goes_by_value_where_that_can_be_done(self, monkeypatch):
        pytest.importorskip("cloudpickle", reason="cloudpickle comes with loky and Dask only")
        namespace = {"__name__": "__main__"}
        exec("def shown(x):\n    return x + 1\n", namespace)  # noqa: S102  # what a notebook does
        hidden = namespace["shown"]
        monkeypatch.setattr(sys.modules["__main__"], "shown", functools.wraps(hidden)(lambda _: None), raising=False)
        data = pickle.dumps(portable(hidden))
        monkeypatch.delattr(sys.modules["__main__"], "shown")
        assert unpickled(data)(1) == 2


class TestExceptionsOnTheWay:
    """Between processes, without one: a pickled task knows that it is elsewhere."""

    def arrived(self, call):
        task = travelled(Task(call, [3], Link(()), keep_going=True))
        outcomes, _ = travelled(perform(task))
        batch = Batch()
        Job(call, [3], 1, batch.settle, batch.failed, keep_going=True).refuse(0, outcomes[0][1])
        return batch.failures[0]

    def test_that_can_be_pickled(self):
        error = self.arrived(dispatched.odd_fails)
        assert (type(error), error.args) == (dispatched.OddError, (3,))
        assert isinstance(error.__cause__, RemoteTraceback)
        assert "in odd_fails" in str(error.__cause__)

    @pytest.mark.parametrize("call", [dispatched.holds_a_lock, dispatched.wants_two_arguments, dispatched.local_class])
    def test_that_cannot(self, monkeypatch, call):
        monkeypatch.delitem(sys.modules, "cloudpickle", raising=False)
        # Where Dask is imported, tblib teaches pickle to send exceptions of any constructor.
        monkeypatch.delitem(copyreg.dispatch_table, dispatched.TwoArgumentsError, raising=False)
        error = self.arrived(call)
        assert type(error) is RemoteError
        assert "Error: number 3" in str(error)
        assert f"in {call.__name__}" in str(error.__cause__)

    def test_keep_their_notes(self):
        assert self.arrived(dispatched.fails_with_a_note).__notes__ == ["a note"]

    def test_of_the_system_are_raised(self):
        with pytest.raises(SystemExit, match="3"):
            self.arrived(sys.exit)


def test_equal_tasks_differ_for_dask():
    one, other = (Task(dispatched.square, [1], Link(()), keep_going=True) for _ in range(2))
    assert one.__dask_tokenize__() != other.__dask_tokenize__()


class TestProcesses:
    """Each test starts one process, which imports JAX."""

    def check(self, pool):
        decorated = portable(dispatched.decorated.__wrapped__)
        assert run(Dispatch(pool), decorated, 200) == {i: i + 1 for i in range(200)}
        batch = Batch().run(Dispatch(pool), dispatched.odd_fails, 20)
        assert batch.results == {i: i for i in range(0, 20, 2)}
        assert {i: type(error) for i, error in batch.failures.items()} == dict.fromkeys(
            range(1, 20, 2), dispatched.OddError
        )
        assert type(Batch().run(Dispatch(pool), dispatched.holds_a_lock, 1).failures[0]) is RemoteError
        process, thread = run(Dispatch(pool), dispatched.place, 1)[0]
        assert process != os.getpid()
        assert run(Dispatch(pool), dispatched.threads_inside, 1) == {0: {thread}}

    def test_that_are_spawned(self, processes):
        self.check(processes)
        with pytest.raises(DispatchError, match=r"ProcessPoolExecutor.*must be picklable"):
            run(Dispatch(processes), lambda i: i, 3)
        with pytest.raises(DispatchError, match=r"must be picklable"):
            run(Dispatch(processes), dispatched.returns_a_lock, 3)
        # None of this has broken the pool; this does, and it stays broken.
        for call in (dispatched.dies, dispatched.square):
            with pytest.raises(DispatchError, match=r"BrokenProcessPool.*A worker died"):
                run(Dispatch(processes), call, 3)

    def test_of_loky(self, loky_processes):
        self.check(loky_processes)
        assert run(Dispatch(loky_processes), lambda i: i, 3) == {0: 0, 1: 1, 2: 2}

        class LocalError(Exception):
            pass

        def fails(i):
            raise LocalError(i)

        # A class that only this function knows comes back as itself.
        assert type(Batch().run(Dispatch(loky_processes), fails, 1).failures[0]) is LocalError
        with pytest.raises(DispatchError, match=r"(?s)TerminatedWorkerError.*A worker died"):
            run(Dispatch(loky_processes), dispatched.dies, 3)


def settle_timers():
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(WAIT)
