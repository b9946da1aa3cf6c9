"""Foreign functions that a worker process can import."""

import functools
import os
import threading

from batchrules._dispatch import Dispatch
from batchrules._dispatch_pool import Job


class OddError(Exception):
    pass


class LockError(Exception):
    def __init__(self, number):
        super().__init__(f"number {number}")
        self.lock = threading.Lock()


class TwoArgumentsError(Exception):
    def __init__(self, word, number):
        super().__init__(f"{word} {number}")


def square(i):
    return i * i


def power(i, exponent):
    return i**exponent


def fails(i):
    raise OddError(i)


def odd_fails(i):
    if i % 2:
        raise OddError(i)
    return i


def fails_with_a_note(i):
    error = OddError(i)
    error.add_note("a note")
    raise error


def holds_a_lock(i):
    raise LockError(i)


def wants_two_arguments(i):
    raise TwoArgumentsError("number", i)


def local_class(i):
    class LocalError(Exception):
        pass

    raise LocalError(f"number {i}")


def returns_a_lock(_):
    return threading.Lock()


def dies(_):
    os._exit(1)


def place(_):
    return os.getpid(), threading.current_thread().name


def threads_inside(_):
    """The threads that a batch within this call uses."""
    names = set()
    job = Job(
        call=lambda _: threading.current_thread().name,
        payloads=range(8),
        count=8,
        settle=lambda _, name: names.add(name),
        failed=lambda _, error: names.add(repr(error)),
        keep_going=True,
    )
    Dispatch(4).run(job)
    return names


class Decorated:
    """Takes the place of a function in its module, as `host_call` does."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        raise NotImplementedError("a HostCall is no function that a worker could call")


@Decorated
def decorated(i):
    return i + 1


@Decorated
@Decorated
def twice_decorated(i):
    return i + 2


class Solver:
    @Decorated
    def cube(self):
        return self**3
