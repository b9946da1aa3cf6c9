"""batch_size="auto": the largest chunk whose compiled program fits."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random

from batchrules import _bmap_request as bmap_request
from batchrules._bmap import bmap
from batchrules._bmap_memory import available_bytes, largest_batch_size

WIDTH, SIZE = 32, 2000
WHOLE = 2 * SIZE * WIDTH * 8  # argument and result


def layers(a):
    for seed in range(3):
        a = jnp.tanh(random((WIDTH, WIDTH), seed) @ a)
    return a


def program_bytes(batch_size):
    compiled = jax.jit(bmap(layers, batch_size=batch_size)).lower(random((SIZE, WIDTH))).compile()
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


@pytest.mark.parametrize("spare", [0.1, 0.3, 0.7])
def test_the_program_fits_and_a_much_larger_one_does_not(spare):
    limit = int(WHOLE * (1 + spare / 2))
    ours = bmap(layers, batch_size="auto", max_bytes=limit)
    a = random((SIZE, WIDTH))
    chosen = ours.batch_size_for(a)
    assert program_bytes(chosen) <= limit
    assert chosen == SIZE or program_bytes(min(SIZE, 2 * chosen + 8)) > limit
    assert_close(jax.jit(ours)(a), jax.vmap(layers)(a))


def test_all_elements_where_they_fit():
    assert bmap(layers, batch_size="auto", max_bytes=10 * WHOLE).batch_size_for(random((SIZE, WIDTH))) == SIZE


def test_nothing_fits():
    ours = bmap(layers, batch_size="auto", max_bytes=1000)
    with pytest.raises(
        ValueError, match=r"no batch size fits max_bytes=1000: with 1 element\(s\) at a time.*takes \d+ bytes"
    ):
        ours(random((SIZE, WIDTH)))


def test_a_device_that_does_not_tell_its_memory():
    with pytest.raises(ValueError, match=r"needs max_bytes="):
        bmap(layers, batch_size="auto")(random((SIZE, WIDTH)))


def test_the_choice_is_made_once_for_each_shape():
    ours = bmap(layers, batch_size="auto", max_bytes=int(1.2 * WHOLE))
    a = random((SIZE, WIDTH))
    ours.batch_size_for(a)
    lowered = []
    original = jax.jit
    try:
        jax.jit = lambda *args, **kwargs: lowered.append(args) or original(*args, **kwargs)
        ours.batch_size_for(a)
    finally:
        jax.jit = original
    assert lowered == []


def test_the_choice_is_made_for_each_dtype():
    ours = bmap(jnp.sin, batch_size="auto", max_bytes=int(0.6 * WHOLE))
    a = random((SIZE, WIDTH))
    assert ours.batch_size_for(a.astype("float32")) == SIZE
    with pytest.raises(ValueError, match="no batch size fits"):
        ours.batch_size_for(a)


class Times:
    """A factor that is no array. It compares by value, but has no hash."""

    def __init__(self, factor):
        self.factor = factor

    def __eq__(self, other):
        return isinstance(other, Times) and self.factor == other.factor

    __hash__ = None


@pytest.mark.parametrize("argument", [jnp.ones, np.ones, int, Times], ids=["array", "numpy", "number", "no hash"])
def test_the_choice_is_made_for_each_unmapped_argument(argument):
    def widened(w, x):
        return jnp.sort(jnp.tile(x, getattr(w, "factor", w) if isinstance(w, int | Times) else w.size)).sum()

    a = random((SIZE, WIDTH))
    ours = bmap(widened, (None, 0), batch_size="auto", max_bytes=2 * WHOLE)
    chosen = [ours.batch_size_for(argument(n), a) for n in (1, 40, 1)]
    alone = [
        bmap(widened, (None, 0), batch_size="auto", max_bytes=2 * WHOLE).batch_size_for(argument(n), a) for n in (1, 40)
    ]
    assert chosen == [*alone, alone[0]]
    assert chosen[1] < chosen[0]


def test_inside_jit_and_with_values_closed_over():
    w = random((WIDTH, WIDTH))

    def f(w, a):
        return bmap(lambda x: jnp.tanh(w @ x), batch_size="auto", max_bytes=int(1.2 * WHOLE))(a)

    a = random((SIZE, WIDTH))
    assert_close(jax.jit(f)(w, a), jnp.tanh(a @ w.T))
    assert_close(jax.jit(jax.grad(lambda w: jnp.sum(f(w, a))))(w), jax.grad(lambda w: jnp.sum(jnp.tanh(a @ w.T)))(w))


def test_one_trace():
    traces = []

    def f(a):
        traces.append(a)
        return layers(a)

    bmap(f, batch_size="auto", max_bytes=int(1.2 * WHOLE))(random((SIZE, WIDTH)))
    assert len(traces) == 1


@pytest.mark.parametrize(("batch_size", "wanted"), [(2, 2), (100, 5), (None, 5)])
def test_batch_size_for_a_function_without_arguments(batch_size, wanted):
    assert bmap(lambda: jnp.arange(3.0), axis_size=5, batch_size=batch_size).batch_size_for() == wanted


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_batch_size_for_along_any_axis(axis):
    assert bmap(jnp.sin, in_axes=axis, batch_size=100).batch_size_for(random((7, 5))) == (7, 5)[axis]


@pytest.mark.parametrize("batch_size", [3, 100, None])
def test_batch_size_for_a_given_one(batch_size):
    assert bmap(jnp.sin, batch_size=batch_size).batch_size_for(random(7)) == (3 if batch_size == 3 else 7)


@pytest.mark.parametrize("per_element", [1, 10, 1000])
@pytest.mark.parametrize("size", [1, 2, 1000, 100_000])
def test_the_search(per_element, size):
    def bytes_for(batch_size):
        return 500 + per_element * batch_size

    for largest in {1, size // 3 + 1, size}:
        found = largest_batch_size(bytes_for, size, bytes_for(largest))
        assert largest - max(1, largest // 32) <= found <= largest


def test_the_search_where_memory_grows_in_steps():
    def bytes_for(batch_size):
        return 1000 * -(-batch_size // 64)

    assert bytes_for(largest_batch_size(bytes_for, 5000, 20_000)) <= 20_000


@pytest.mark.parametrize("size", [1000, 5000, 100_000])
def test_the_search_where_memory_grows_with_the_square(size):
    largest = size * 9 // 10
    found = largest_batch_size(lambda batch_size: batch_size**2, size, largest**2)
    assert largest - largest // 32 <= found <= largest


def test_the_choice_is_made_for_what_is_closed_over():
    repeats = [1]
    ours = bmap(lambda x: jnp.sort(jnp.tile(x, repeats[0])).sum(), batch_size="auto", max_bytes=2 * WHOLE)
    a = random((SIZE, WIDTH))
    chosen = []
    for number in (1, 40, 1):
        repeats[0] = number
        chosen.append(ours.batch_size_for(a))
    assert chosen[0] == chosen[2] > chosen[1]


def test_the_choice_is_made_once_for_functions_made_anew(monkeypatch):
    compiled = []
    original = bmap_request.compiled_bytes
    monkeypatch.setattr(bmap_request, "compiled_bytes", lambda *args: compiled.append(args) or original(*args))
    ours = bmap(lambda f, x: f(x), (None, 0), batch_size="auto", max_bytes=int(1.2 * WHOLE))
    a = random((SIZE, WIDTH))
    chosen = [ours.batch_size_for(lambda x: layers(x), a)]  # noqa: PLW0108  # another function each time
    tries = len(compiled)
    chosen += [ours.batch_size_for(lambda x: layers(x), a) for _ in range(3)]  # noqa: PLW0108
    assert len(compiled) == tries
    assert len(set(chosen)) == 1
    ours.batch_size_for(jnp.sin, a)
    assert len(compiled) > tries


def test_the_oldest_choices_are_forgotten(monkeypatch):
    monkeypatch.setattr(bmap_request, "MOST_CHOSEN", 2)
    ours = bmap(jnp.sin, batch_size="auto", max_bytes=10**6)
    for size in range(1, 6):
        assert ours.batch_size_for(random(size)) == size
    assert len(ours.batch_size_for.__self__.chosen) == 2


@pytest.mark.parametrize("jit", [False, True])
def test_an_axis_around_the_call(jit):
    ours = bmap(lambda x: x / jax.lax.psum(x, "around"), batch_size="auto", max_bytes=10**6)
    mapped = jax.vmap(ours, axis_name="around")
    text = "compiles the function on its own, where the axes around it are not known, and it uses 'around'. Give a num"
    with pytest.raises(ValueError, match=text):
        (jax.jit(mapped) if jit else mapped)(random((3, 5)))


def test_axes_inside_and_its_own():
    def f(x):
        return jax.vmap(lambda y: y / jax.lax.psum(y, "inside"), axis_name="inside")(x) + jax.lax.pmean(x, "i")

    ours = bmap(f, batch_size="auto", max_bytes=10**7, axis_name="i")
    assert_close(ours(random((5, 3))), jax.vmap(f, axis_name="i")(random((5, 3))))


def test_inside_shard_map(auto_mesh):
    def f(x):
        return jnp.sum(jnp.sort(jnp.tile(x, 5)))

    ours = bmap(f, batch_size="auto", max_bytes=WHOLE // 4)
    spec = jax.sharding.PartitionSpec("x")
    a = random((SIZE, WIDTH))
    assert ours.batch_size_for(a[: SIZE // 4]) < SIZE // 4
    found = jax.jit(jax.shard_map(ours, mesh=auto_mesh, in_specs=spec, out_specs=spec))(a)
    assert_close(found, jax.vmap(f)(a))


class Device:
    """Stands in for a device."""

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit, "bytes_in_use": 3}


def test_the_devices_memory(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5000), Device(None)])
    assert available_bytes([]) == 5000
    assert available_bytes([np.ones(3)]) == 5000


def test_the_memory_of_the_devices_that_the_arguments_are_on(monkeypatch):
    devices = [Device(5000), Device(4000), Device(3000), Device(None)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)

    def array(*numbers):
        found = Mock(spec=jax.Array)
        found.devices = lambda: {devices[number] for number in numbers}
        return found

    assert available_bytes([array(0, 1), array(1)]) == 4000
    with pytest.raises(ValueError, match="does not tell how much memory it has"):
        available_bytes([array(0, 3)])


def test_a_single_element_is_tried_before_nothing_is_said_to_fit():
    tried = []

    def bytes_for(batch_size):
        tried.append(batch_size)
        return batch_size**2

    assert largest_batch_size(bytes_for, 10**6, 1) == 1
    assert tried[-1] == 1
    with pytest.raises(ValueError, match=r"with 1 element\(s\) at a time"):
        largest_batch_size(lambda batch_size: batch_size + 1, 10**6, 1)
