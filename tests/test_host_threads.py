"""Host calls from several threads, in programs that wait in a queue, and inside one another."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules

THREADS, ROUNDS = 6, 15
XS = np.arange(8.0)


def in_threads(work):
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_threads_that_call_in_every_way_at_once(method):
    call = batchrules.host_call(lambda x: x * 2, lambda x: x, method=method)
    ways = (call, jax.jit(call), jax.vmap(call), jax.jit(jax.vmap(call)))

    def work(number):
        for turn in range(ROUNDS):
            xs = XS + number * 100 + turn
            for way in ways:
                np.testing.assert_array_equal(way(xs), 2 * xs)
        return number

    assert in_threads(work) == list(range(THREADS))


def test_threads_that_trace_the_same_call_at_once():
    call = batchrules.host_call(lambda x: x * 2, lambda x: x, method="expand_dims")
    barrier = threading.Barrier(THREADS)

    def work(number):
        barrier.wait(timeout=60)
        xs = np.arange(float(number + 1))
        np.testing.assert_array_equal(jax.jit(jax.vmap(call))(xs), 2 * xs)
        return number

    assert in_threads(work) == list(range(THREADS))


def test_failures_in_threads_keep_their_own_texts():
    def fail(x):
        raise LookupError(f"failure of {float(x)}")

    call = batchrules.host_call(fail, lambda x: x)

    def work(number):
        with pytest.raises(LookupError) as eager:
            call(float(number))
        with pytest.raises(jax.errors.JaxRuntimeError) as jitted:
            jax.block_until_ready(jax.jit(call)(float(number)))
        return str(eager.value), str(jitted.value).splitlines()[-1]

    texts = [f"failure of {float(number)}" for number in range(THREADS)]
    place = "ForeignCallError: host_call 'fail' failed, with arguments x (): LookupError: "
    assert in_threads(work) == [(text, place + text) for text in texts]


def test_jax_in_the_first_call_of_one_thread_does_not_trouble_the_others():
    """The guard of the first call is the thread's own: JAX goes on working beside it."""
    inside, leave = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        assert leave.wait(timeout=60)
        return x

    call = batchrules.host_call(slow, lambda x: x)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, XS)
        assert inside.wait(timeout=60)
        try:
            np.testing.assert_array_equal(jnp.sin(jnp.asarray(XS)), np.sin(XS))
        finally:
            leave.set()
        np.testing.assert_array_equal(running.result(timeout=60), XS)


# --- a host call inside a host function -------------------------------------------------------------------


class Nest:
    """An outer host function that calls an inner one, which notes the thread and the type of what it got."""

    def __init__(self, outer_method="sequential"):
        self.inside = []
        self.inner = batchrules.host_call(self._inner, lambda x: x, name="inner")
        self.outer = batchrules.host_call(self._outer, lambda x: x, method=outer_method, name="outer")
        self.results = []

    def _inner(self, x):
        self.inside.append((threading.get_ident(), type(x)))
        return x + 1

    def _outer(self, x):
        before = threading.get_ident()
        result = self.inner(x * 2)
        self.results.append((before, type(result)))
        return result


@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "jit vmap"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_host_call_inside_a_host_function_runs_directly(way, method):
    nest = Nest(method)
    function = {
        "eager": nest.outer,
        "jit": jax.jit(nest.outer),
        "vmap": jax.vmap(nest.outer),
        "jit vmap": jax.jit(jax.vmap(nest.outer)),
    }[way]
    np.testing.assert_array_equal(function(XS), 2 * XS + 1)
    # In the same thread, with NumPy arrays on the way in and out: JAX took no part.
    assert nest.inside
    assert [thread for thread, _ in nest.inside] == [thread for thread, _ in nest.results]
    assert {kind for _, kind in (*nest.inside, *nest.results)} == {np.ndarray}


def test_inner_call_checks_its_result_and_names_itself():
    inner = batchrules.host_call(lambda x: x[:1], lambda x: x, name="inner")
    outer = batchrules.host_call(lambda x: inner(x), lambda x: x, name="outer")  # noqa: PLW0108
    with pytest.raises(batchrules.ResultError, match=r"host_call 'inner': the result has shape \(1,\)"):
        outer(XS)


def test_inner_call_with_containers_and_static_arguments():
    inner = batchrules.host_call(
        lambda tree, n: {"out": tree["a"] * n},
        lambda tree, n: {"out": tree["a"]},  # noqa: ARG005
        static_argnames="n",
    )
    outer = batchrules.host_call(lambda x: inner({"a": x}, n=3)["out"], lambda x: x)
    np.testing.assert_array_equal(jax.jit(outer)(XS), 3 * XS)


def test_inner_call_takes_lists_of_numbers_as_jax_would_hold_them():
    kinds = []

    def inner(values):
        kinds.extend(value.dtype for value in values)
        return np.float64(sum(values))

    call = batchrules.host_call(inner, jax.ShapeDtypeStruct((), "float64"))
    outer = batchrules.host_call(lambda x: x + call([1, 2.5, True]), lambda x: x)
    np.testing.assert_array_equal(outer(XS), XS + 4.5)
    assert kinds == [np.dtype("int64"), np.dtype("float64"), np.dtype("bool")]


def test_a_host_function_that_failed_leaves_the_thread_as_it_was():
    """After it, a host call of the same thread goes through JAX again."""

    def fail(_):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        batchrules.host_call(fail, lambda x: x)(XS)
    assert isinstance(batchrules.host_call(lambda x: x, lambda x: x)(XS), jax.Array)


# --- programs that could wait for one another -------------------------------------------------------------

SECONDS = 50
PREAMBLE = """
import concurrent.futures

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import batchrules

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
mesh = lambda kind: jax.make_mesh((4,), ("x",), axis_types=(kind,))
LARGE = np.arange(400_000.0).reshape(4, -1)
assert LARGE.nbytes > 1 << 20
call = batchrules.host_call(lambda x: x * 2, lambda x: x, method="expand_dims")

def queued(program, xs, length):
    for _ in range(length):
        xs = program(xs) * 0.5
    return np.asarray(xs)
"""


def run(body):
    """A process of its own, because a hang cannot be ended otherwise."""
    root = str(pathlib.Path(batchrules.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)],
        env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"


@pytest.mark.parametrize("mapped", [True, False])
def test_queued_programs_with_large_arrays_do_not_hang(mapped):
    run(f"""
        program = jax.jit(jax.vmap(call) if {mapped} else call)
        assert np.array_equal(queued(program, LARGE, 60), LARGE)
        print("done")
    """)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_queued_programs_on_several_devices_do_not_hang(kind):
    """JAX's own collectives hang from about 30 queued programs on two cores, with no host call in them."""
    run(f"""
        xs = jax.device_put(LARGE, NamedSharding(mesh(AxisType.{kind}), P("x")))
        assert np.array_equal(queued(jax.jit(jax.vmap(call)), xs, 8), LARGE)
        print("done")
    """)


def test_queued_programs_in_several_threads_do_not_hang():
    run("""
        programs = jax.jit(call), jax.vmap(call), jax.jit(jax.vmap(call)), call
        def work(number):
            xs = LARGE + number
            return all(np.array_equal(queued(program, xs, 10), xs) for program in programs)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
        print("done")
    """)


def test_nested_host_calls_in_queued_programs_do_not_hang():
    run("""
        outer = batchrules.host_call(lambda x: call(x) / 2 + call(x) / 2, lambda x: x, method="expand_dims")
        assert np.array_equal(queued(jax.jit(jax.vmap(outer)), LARGE, 40), LARGE)
        print("done")
    """)
