"""An interrupt never falls into an executor's `submit`, where it would leave a lock locked."""

import signal
import threading

import pytest

from batchrules._dispatch import Dispatch
from batchrules._dispatch_pool import Job
from batchrules._dispatch_threads import Threads
from batchrules._interrupts import Interrupts


@pytest.fixture(autouse=True)
def pythons_own_handler():
    """A shell that starts the tests in the background has them ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted():
    signal.raise_signal(signal.SIGINT)
    # Python runs the handler before the next line, at the latest.
    return "done"


def test_an_interrupt_waits_for_the_end_of_the_work():
    done = []

    def work():
        done.append(interrupted())

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.undisturbed(work)
    assert done == ["done"]


def test_a_second_one_does_not_wait():
    done = []

    def work():
        interrupted()
        done.append("first")
        interrupted()
        done.append("second")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.undisturbed(work)
    assert done == ["first"]


def test_outside_of_the_work_it_is_not_held():
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        interrupted()


def test_the_handler_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="work"), Interrupts() as interrupts:
        interrupts.undisturbed(lambda: int("work"))
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        assert interrupts.undisturbed(interrupted) == interrupted() == "done"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_users_own_handler_is_called():
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        with Interrupts() as interrupts:
            assert interrupts.undisturbed(interrupted) == "done"
            assert came == [1]
            with Interrupts() as inner:
                inner.undisturbed(interrupted)
            assert came == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_done():
    found = []

    def elsewhere():
        with Interrupts() as interrupts:
            found.append((interrupts.undisturbed(len, "ab"), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(2, signal.getsignal(signal.SIGINT))]


class InterruptsItsSubmit(Threads):
    """Ctrl-C comes in the middle of the third `submit`."""

    count = 0
    finished = 0

    def submit(self, fn, /, *args, **kwargs):
        self.count += 1
        if self.count == 3:
            signal.raise_signal(signal.SIGINT)
        future = super().submit(fn, *args, **kwargs)
        self.finished += 1
        return future


def test_an_executor_is_given_its_task_whole():
    pool = InterruptsItsSubmit(2)
    job = Job(lambda x: x, range(100), 100, lambda *_: None, lambda *_: None, keep_going=False)
    with pytest.raises(KeyboardInterrupt):
        Dispatch(pool).run(job)
    assert (pool.count, pool.finished) == (3, 3)
    assert pool.submit(len, "abc").result() == 3
    pool.shutdown()
