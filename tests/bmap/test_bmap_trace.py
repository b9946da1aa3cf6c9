"""The function is traced once, and computed for each element once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random
from foreign import COMBINE, METHODS, arguments, expected_calls, made
from x64 import x64

import batchrules
from batchrules._bmap import bmap
from batchrules._bmap_plan import ChunkPlan, Segment, plan_chunks


@pytest.mark.parametrize("size", [8, 11, 13])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100, None])
@pytest.mark.parametrize("reduce", [None, "sum"])
def test_one_trace(size, batch_size, reduce):
    traces = []

    def f(a):
        traces.append(a)
        return a * 2

    jax.jit(bmap(f, batch_size=batch_size, reduce=reduce)).lower(random(size))
    assert len(traces) == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_trace_for_a_gradient(checkpoint):
    traces = []

    def f(a):
        traces.append(a)
        return jnp.sin(a)

    jax.jit(jax.grad(lambda x: jnp.sum(bmap(f, batch_size=3, checkpoint=checkpoint)(x)))).lower(random(11))
    assert len(traces) == 1


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10])
def test_chunks_cover_the_axis_once(size, batch_size):
    plan = plan_chunks(size, batch_size)
    assert plan.first + plan.size * plan.count == size
    assert plan.size <= batch_size
    assert plan.first < batch_size
    assert plan.num_chunks <= 2 * -(-size // batch_size)
    chunks = [segment.start + k * segment.size for segment in plan.segments for k in range(segment.count)]
    assert chunks == [0] * (plan.first > 0) + [plan.first + k * plan.size for k in range(plan.count)]
    assert plan.segments[-1].stop == size


def test_equal_chunks_where_the_axis_divides():
    assert (plan_chunks(16000, 1024).first, plan_chunks(16000, 1024).size) == (0, 1000)
    # Two chunks more than would do.
    assert (plan_chunks(16002, 1024).first, plan_chunks(16002, 1024).size) == (0, 889)
    assert (plan_chunks(16001, 1024).first, plan_chunks(16001, 1024).size) == (641, 1024)


def test_many_chunks_are_planned_at_once():
    """Without trying every number of chunks."""
    assert plan_chunks(10**12 + 39, 10**6) == ChunkPlan(39, 10**6, 10**6)
    assert plan_chunks(2 * (10**12 + 39), 3) == ChunkPlan(0, 2, 10**12 + 39)


@pytest.mark.parametrize("size", [*range(1, 60), 97 * 64])
def test_there_are_as_few_equal_chunks_as_can_be(size):
    for batch_size in range(1, size):
        fewest = -(-size // batch_size)
        equal = [count for count in range(fewest, 2 * fewest + 1) if size % count == 0]
        plan = plan_chunks(size, batch_size)
        assert (plan.first, plan.count) == (0, equal[0]) if equal else (size % batch_size, size // batch_size)


@pytest.mark.parametrize(
    ("stop", "enabled", "wanted"),
    [
        (2**31 - 1, False, "int32"),
        (2**31 - 1, True, "int32"),
        (2**31, False, "uint32"),
        (2**31, True, "int64"),
        (2**32 - 1, False, "uint32"),
        (2**40, True, "int64"),
    ],
)
def test_an_index_holds_the_number_of_each_element(stop, enabled, wanted):
    with x64(enabled):
        assert Segment(0, 1, stop).index_type == wanted


@pytest.mark.parametrize("size", [2**31 + 3, 2**31 + 1023])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_very_long_axis(size, enabled):
    """The indices are not cut off, nor is anything counted from the end."""
    with x64(enabled):
        a = jax.ShapeDtypeStruct((size,), "int8")
        text = jax.jit(bmap(lambda x: x + x, batch_size=1024)).lower(a).as_text()
    kinds = re.findall(r"stablehlo\.dynamic_slice .*tensor<(\w+)>\) ->", text)
    # The second loop's. The first has the remainder, at the start.
    assert kinds[-1] == ("i64" if enabled else "ui32")


def test_an_axis_too_long_for_any_index():
    with x64(enabled=False), pytest.raises(ValueError, match=r"needs 64-bit indices. Turn them on: jax.config.upd"):
        jax.jit(bmap(lambda x: x + x, batch_size=1024)).lower(jax.ShapeDtypeStruct((2**32 + 1,), "int8"))


def count_elements(size, batch_size, calls):
    """A function, mapped, that appends to `calls` the leading sizes that foreign code gets."""

    def on_host(a):
        calls.append(a.shape[0] if a.ndim else 1)
        return np.sin(a)

    def f(a):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), a.dtype), a, vmap_method="expand_dims")

    return bmap(f, batch_size=batch_size)(random(size))


@pytest.mark.parametrize("size", [7, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_foreign_code_gets_each_element_once_in_chunks(size, batch_size):
    calls = []
    assert_close(count_elements(size, batch_size, calls), jnp.sin(random(size)))
    assert sum(calls) == size
    assert max(calls) <= batch_size


@pytest.mark.parametrize("size", [7, 12, 13])
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all", "legacy_vectorized"])
def test_a_host_call_gets_each_element_once_in_chunks(size, method):
    host_call = batchrules.host_call
    calls = []

    def on_host(a, b):
        calls.append(a.shape[0] if a.ndim else 1)
        return a * b

    f = host_call(on_host, jax.ShapeDtypeStruct((), "float64"), method=method, verify=False)
    a, b = random(size), random((), 1)
    assert_close(jax.jit(bmap(f, (0, None), batch_size=5))(a, b), a * b)
    assert sum(calls) == size
    assert max(calls) <= 5


@pytest.mark.parametrize("size", [7, 12, 13])
@pytest.mark.parametrize("method", METHODS)
def test_a_device_call_gets_each_element_once_in_chunks(size, method):
    x, y = arguments(COMBINE, (0, None), size)
    twin = jax.vmap(COMBINE.twin, (0, None))(x, y)
    with made("device", COMBINE, method) as foreign:
        assert_close(foreign.run(jax.jit(bmap(foreign.call, (0, None), batch_size=5)), x, y), twin)
    plan = plan_chunks(size, 5)
    chunks = [plan.first] * (plan.first > 0) + [plan.size] * plan.count
    assert foreign.log.count == sum(expected_calls(method, chunk) for chunk in chunks)
    leads = [shapes[0][0] if len(shapes[0]) == 2 else 1 for shapes in foreign.log.given]
    assert sum(leads) == size
    assert max(leads) <= 5


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_device_call_gets_chunks(method, checkpoint):
    call = batchrules.device_call(lambda x, y: COMBINE(jnp, x, y), method=method)
    ours = functools.partial(bmap, batch_size=5, checkpoint=checkpoint)

    def loss(by, f):
        return lambda x, y: jnp.sum(jnp.sin(by(f, in_axes=(0, None))(x, y)))

    args = [jnp.asarray(a) for a in arguments(COMBINE, (0, None), 13)]
    twin = jax.grad(loss(jax.vmap, COMBINE.twin), (0, 1))(*args)
    assert_close(jax.jit(jax.grad(loss(ours, call), (0, 1)))(*args), twin)


def test_a_registered_primitive_gets_chunks():
    register = batchrules.register
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    sizes = []
    primitive = Primitive("doubled")
    primitive.def_abstract_eval(lambda a: a)
    primitive.def_impl(lambda a: a * 2)

    def lowered(a):
        sizes.append(a.shape)
        return a * 2

    mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False))
    register(primitive, "expand_dims")
    assert_close(jax.jit(bmap(primitive.bind, batch_size=4))(random(11)), random(11) * 2)
    assert {shape[0] for shape in sizes} == {3, 4}


def test_what_does_not_depend_on_the_axis_is_computed_once():
    calls = []

    def on_host(w):
        calls.append(w)
        return np.asarray(w)

    def f(w, a):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), w.dtype), w, vmap_method="sequential") * a

    jax.block_until_ready(jax.jit(bmap(f, (None, 0), batch_size=3))(random(()), random(11)))
    assert len(calls) == 1


def test_effects_of_the_function_happen_once_for_each_element(capsys):
    def f(a):
        jax.debug.print("<{}>", a)
        return a

    bmap(f, batch_size=3)(jnp.arange(11))
    jax.effects_barrier()
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(f"<{i}>" for i in range(11))


def test_ordered_effects_of_an_io_callback():
    from jax.experimental import io_callback

    seen = []

    def f(a):
        io_callback(lambda a: seen.append(int(a)), None, a)
        return a

    jax.block_until_ready(bmap(f, batch_size=3)(jnp.arange(11)))
    jax.effects_barrier()
    assert sorted(seen) == list(range(11))
