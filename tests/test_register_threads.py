"""`register` and `unregister` from several threads at once, while others map the primitive."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
from foreign import COMBINE, Log, bound, opaque
from jax.interpreters import batching

import batchrules

THREADS, ROUNDS = 8, 40
METHODS = ("sequential", "expand_dims", "broadcast_all")


def in_threads(work):
    """Runs `work(number)` in that many threads, all started together; the first exception is raised here."""
    gate = threading.Barrier(THREADS)

    def started(number):
        gate.wait()
        return work(number)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(started, range(THREADS)))


def test_each_thread_a_primitive_of_its_own():
    primitives = [opaque(COMBINE, Log()) for _ in range(THREADS)]

    def work(number):
        primitive = primitives[number]
        for turn in range(ROUNDS):
            method = METHODS[(number + turn) % 3]
            batchrules.register(primitive, method, batch_size=number + 1)
            registration = batchrules.registered(primitive)
            assert (registration.method, registration.batch_size) == (method, number + 1)
            batchrules.unregister(primitive)
            assert batchrules.registered(primitive) is None

    in_threads(work)
    assert not any(primitive in batching.fancy_primitive_batchers for primitive in primitives)


def test_one_primitive_registered_by_all():
    """Whichever comes last stands, and what stood there before all of them comes back."""
    primitive = opaque(COMBINE, Log())

    def before(*_):
        raise AssertionError

    batching.fancy_primitive_batchers[primitive] = before

    def work(number):
        for turn in range(ROUNDS):
            batchrules.register(primitive, METHODS[(number + turn) % 3], batch_size=number + 1)
            registration = batchrules.registered(primitive)
            assert registration.method in METHODS
            assert 1 <= registration.batch_size <= THREADS

    in_threads(work)
    batchrules.unregister(primitive)
    assert batchrules.registered(primitive) is None
    assert batching.fancy_primitive_batchers.pop(primitive) is before


def test_only_one_of_many_unregisters():
    primitive = opaque(COMBINE, Log())
    for _ in range(ROUNDS):
        batchrules.register(primitive, "sequential")

        def work(_):
            try:
                batchrules.unregister(primitive)
            except ValueError as error:
                return str(error)
            return None

        outcomes = in_threads(work)
        assert outcomes.count(None) == 1
        assert all("nothing is registered" in text for text in outcomes if text)
        assert primitive not in batching.fancy_primitive_batchers


def test_registering_and_unregistering_at_once_leaves_nothing_behind():
    primitive = opaque(COMBINE, Log())

    def work(number):
        for _ in range(ROUNDS):
            if number % 2:
                batchrules.register(primitive, "expand_dims")
                continue
            try:
                batchrules.unregister(primitive)
            except ValueError as error:
                assert "nothing is registered" in str(error)  # noqa: PT017

    in_threads(work)
    if batchrules.registered(primitive):
        batchrules.unregister(primitive)
    assert primitive not in batching.fancy_primitive_batchers


def test_mapping_while_the_rule_is_replaced():
    """Whatever stands at the moment, the result is right."""
    primitive = opaque(COMBINE, Log())
    batchrules.register(primitive, "sequential")
    call = bound(COMBINE, primitive)
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.arange(3.0)
    wanted = jax.vmap(COMBINE.twin, (0, None))(x, y)

    def work(number):
        if number < 2:
            for turn in range(ROUNDS):
                batchrules.register(primitive, METHODS[turn % 3])
            return None
        return [jax.vmap(call, (0, None))(x, y) for _ in range(3)]

    for results in filter(None, in_threads(work)):
        for result in results:
            np.testing.assert_array_equal(result, wanted)
    batchrules.unregister(primitive)


def test_mapping_from_many_threads():
    """One jitted program, traced and run by all of them."""
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.arange(3.0)
    wanted = jax.vmap(COMBINE.twin, (0, None))(x, y)
    for method in METHODS:
        primitive = opaque(COMBINE, Log())
        batchrules.register(primitive, method)
        program = jax.jit(jax.vmap(bound(COMBINE, primitive), (0, None)))
        for result in in_threads(lambda number, program=program: program(x + 0 * number, y)):
            np.testing.assert_array_equal(result, wanted)
        batchrules.unregister(primitive)
