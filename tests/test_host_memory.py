"""What a host call keeps alive, and whom its arrays belong to."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules

XS = np.arange(6.0)


def counted_closure(offset):
    """A fresh function over its own data, and a weak reference to that data."""
    data = np.full(XS.shape, offset)

    def add(x):
        return x + data[0]

    return add, weakref.ref(data)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_eager_calls_do_not_keep_their_closures(method, mapped):
    references = []
    for offset in range(10):
        add, reference = counted_closure(float(offset))
        call = batchrules.host_call(add, lambda x: x, method=method)
        result = (jax.vmap(call) if mapped else call)(jnp.asarray(XS))
        np.testing.assert_array_equal(result, XS + offset)
        references.append(reference)
        del add, call, reference
    gc.collect()
    assert [reference() is None for reference in references] == [True] * 10


def test_eager_calls_do_not_keep_their_arguments_or_results():
    given = []

    def function(x):
        result = x * 2
        given.extend([weakref.ref(x), weakref.ref(result)])
        return result

    call = batchrules.host_call(function, lambda x: x)
    for _ in range(5):
        jax.block_until_ready(call(XS))
    gc.collect()
    assert [reference() for reference in given] == [None] * 10


def test_eager_failures_do_not_keep_the_function_but_for_the_last():
    references = []
    for offset in range(5):
        add, reference = counted_closure(float(offset))
        call = batchrules.host_call(add, jax.ShapeDtypeStruct((1,), "float64"))
        with pytest.raises(batchrules.ResultError):
            call(XS)
        references.append(reference)
        del add, call, reference
    gc.collect()
    # `last_error()` has the last exception, whose traceback holds the function.
    assert [reference() is None for reference in references] == [True] * 4 + [False]
    assert isinstance(batchrules.last_error(), batchrules.ResultError)


def test_many_eager_calls_of_fresh_functions_compile_and_keep_nothing():
    """The number of live objects settles; a cache of programs would grow with every function."""

    def fresh(offset):
        call = batchrules.host_call(lambda x: x + offset, lambda x: x)
        return float(jax.vmap(call)(jnp.asarray(XS))[0])

    for offset in range(5):
        fresh(offset)
    gc.collect()
    before = len(gc.get_objects())
    assert [fresh(offset) for offset in range(100)] == list(range(100))
    gc.collect()
    # One object kept for each call would be 100 more.
    assert len(gc.get_objects()) - before < 100


def test_jitted_programs_of_one_function_are_compiled_once():
    traces = []

    def shape(x):
        traces.append(x.shape)
        return x

    call = jax.jit(batchrules.host_call(lambda x: x + 1, shape))
    for _ in range(20):
        jax.block_until_ready(call(XS))
    assert len(traces) == 1


class Reusing:
    """A function that returns the same buffer every time."""

    def __init__(self, method):
        self.buffer = None
        self.call = batchrules.host_call(self._function, lambda x: x, method=method)

    def _function(self, x):
        if self.buffer is None or self.buffer.shape != x.shape:
            self.buffer = np.empty_like(x)
        np.multiply(x, 2, out=self.buffer)
        return self.buffer


def ways(reusing):
    yield "eager", reusing.call
    yield "jit", jax.jit(reusing.call)
    yield "vmap", jax.vmap(reusing.call)
    yield "jit vmap", jax.jit(jax.vmap(reusing.call))
    yield "one program", jax.jit(lambda x: (reusing.call(x), reusing.call(-x))[0])


@pytest.mark.parametrize("way", range(5), ids=["eager", "jit", "vmap", "jit-vmap", "one-program"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_buffer_that_the_function_reuses_does_not_change_earlier_results(method, way):
    reusing = Reusing(method)
    function = list(ways(reusing))[way][1]
    first = function(XS)
    second = function(XS + 1)
    np.testing.assert_array_equal(first, 2 * XS)
    np.testing.assert_array_equal(second, 2 * XS + 2)
    # Large enough that JAX would rather share the buffer than copy it.
    large = np.arange(400_000.0)
    first, second = function(large), function(large + 1)
    np.testing.assert_array_equal(first, 2 * large)


def test_buffer_that_the_function_reuses_inside_another_host_function():
    """The inner calls run without JAX, yet the first result must not become the second."""
    reusing = Reusing("sequential")

    def outer(x):
        first = reusing.call(x)
        second = reusing.call(10 * x)
        return first + second

    np.testing.assert_array_equal(batchrules.host_call(outer, lambda x: x)(XS), 22 * XS)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_function_may_return_its_argument(mapped, jit):
    call = batchrules.host_call(lambda x: x, lambda x: x, method="expand_dims")
    function = jax.vmap(call) if mapped else call
    argument = XS.copy()
    result = (jax.jit(function) if jit else function)(argument)
    argument += 100
    np.testing.assert_array_equal(result, XS)


@pytest.mark.parametrize("jit", [True, False])
def test_function_may_keep_its_argument(jit):
    """Even if the program goes on to reuse the argument's memory."""
    kept = []

    def keep(x):
        kept.append(x)
        return x + 1

    call = batchrules.host_call(keep, lambda x: x)
    argument = jnp.arange(100_000.0)
    jax.block_until_ready((jax.jit(call) if jit else call)(argument))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    jax.block_until_ready(overwrite(argument))
    np.testing.assert_array_equal(kept[0], np.arange(100_000.0))
