"""Host calls inside loops and branches and around them, and the calls that need not be made."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import batchrules

XS = np.arange(8.0)
METHODS = ("sequential", "expand_dims", "broadcast_all")


class Doubled:
    """A host function that doubles, and counts its calls by the shape they were given."""

    def __init__(self, method="expand_dims"):
        self.shapes = collections.Counter()
        self.call = batchrules.host_call(self._function, lambda x: x, method=method, name="doubled", verify=False)

    def _function(self, x):
        self.shapes[x.shape] += 1
        return x * 2

    @property
    def calls(self):
        return self.shapes.total()


@pytest.fixture(params=METHODS)
def doubled(request):
    return Doubled(request.param)


def twin(x):
    return x * 2


def scan(f, x):
    return jax.lax.scan(lambda carry, step: (f(carry) + step, carry), x, jnp.arange(3.0))


def fori(f, x):
    return jax.lax.fori_loop(0, 3, lambda i, carry: f(carry) + i.astype(carry.dtype), x)


def while_loop(f, x):
    return jax.lax.while_loop(lambda c: c[0] < 100.0, lambda c: (f(c[0]) + 1, c[1] + 1), (x, 0))


def cond(f, x):
    return jax.lax.cond(x > 3, f, lambda x: x - 1, x)


def switch(f, x):
    return jax.lax.switch(x.astype(int) % 3, [f, lambda x: f(x) + 1, lambda x: -x], x)


def remat(f, x):
    return jax.checkpoint(lambda x: f(jnp.sin(x)) + f(x))(x)


def nested(f, x):
    """A branch in a loop in a loop."""

    def inner(i, carry):
        return jax.lax.cond(i % 2 == 0, f, lambda x: x + 1, carry)

    return jax.lax.fori_loop(0, 2, lambda _, carry: jax.lax.fori_loop(0, 3, inner, carry), x)


COMPOSITIONS = (scan, fori, while_loop, cond, switch, remat, nested)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_alone(composition, jit):
    def run(f):
        function = lambda x: composition(f, x)  # noqa: E731
        return (jax.jit(function) if jit else function)(jnp.float64(5.0))

    jax.tree.map(np.testing.assert_array_equal, run(Doubled().call), run(twin))


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_vmap_around(doubled, composition, jit):
    def run(f):
        function = jax.vmap(lambda x: composition(f, x))
        return (jax.jit(function) if jit else function)(XS)

    jax.tree.map(np.testing.assert_array_equal, run(doubled.call), run(twin))


@pytest.mark.parametrize("composition", [scan, fori, remat, nested])
def test_vmap_inside(doubled, composition):
    def run(f):
        return jax.jit(lambda xs: composition(jax.vmap(f), xs))(XS)

    jax.tree.map(np.testing.assert_array_equal, run(doubled.call), run(twin))


def test_while_loop_and_cond_with_vmap_inside(doubled):
    def run(f):
        mapped = jax.vmap(f)
        loop = jax.lax.while_loop(lambda c: c.sum() < 500.0, lambda c: mapped(c) + 1, XS)
        return loop, jax.lax.cond(loop[0] > 3, mapped, lambda x: x, loop)

    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: run(doubled.call))(), run(twin))


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_on_several_devices(auto_mesh, composition):
    doubled = Doubled()
    xs = jax.device_put(XS, NamedSharding(auto_mesh, P("x")))
    got = jax.jit(jax.vmap(lambda x: composition(doubled.call, x)))(xs)
    wanted = jax.vmap(lambda x: composition(twin, x))(XS)
    for result, expected in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        for shard in result.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])


def test_remat_outside_of_vmap(doubled):
    got = jax.jit(jax.checkpoint(jax.vmap(doubled.call)))(XS)
    np.testing.assert_array_equal(got, 2 * XS)


# --- which calls are made ---------------------------------------------------------------------------------


def test_vectorised_call_in_a_vmapped_scan_is_one_per_step():
    doubled = Doubled("expand_dims")
    jax.block_until_ready(jax.jit(jax.vmap(lambda x: scan(doubled.call, x)))(XS))
    assert doubled.shapes == {(8,): 3}


def test_dead_result_makes_no_call_under_jit():
    doubled = Doubled()
    jax.block_until_ready(jax.jit(lambda x: (doubled.call(x), x + 1)[1])(XS))
    assert doubled.calls == 0


def test_dead_result_makes_no_call_in_a_scan():
    doubled = Doubled()
    steps = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c + 1, doubled.call(c)), x, None, length=3)[0])
    jax.block_until_ready(steps(XS))
    assert doubled.calls == 0


def test_dead_result_makes_no_call_on_several_devices(auto_mesh):
    doubled = Doubled()
    xs = jax.device_put(XS, NamedSharding(auto_mesh, P("x")))
    jax.block_until_ready(jax.jit(lambda x: (doubled.call(x), x + 1)[1])(xs))
    assert doubled.calls == 0


def test_result_used_in_part_is_one_call():
    calls = []

    def two(x):
        calls.append(x)
        return x + 1, x + 2

    call = batchrules.host_call(two, lambda x: (x, x))
    np.testing.assert_array_equal(jax.jit(lambda x: call(x)[1])(XS), XS + 2)
    assert len(calls) == 1


def test_branch_not_taken_makes_no_call():
    doubled = Doubled()
    branch = jax.jit(lambda p, x: jax.lax.cond(p, doubled.call, lambda x: x, x))
    np.testing.assert_array_equal(branch(False, XS), XS)
    assert doubled.calls == 0
    np.testing.assert_array_equal(branch(True, XS), 2 * XS)
    assert doubled.calls == 1


def test_branch_not_taken_makes_no_call_under_vmap_with_an_unmapped_predicate():
    doubled = Doubled()
    branch = jax.vmap(lambda p, x: jax.lax.cond(p, doubled.call, lambda x: x, x), in_axes=(None, 0))
    np.testing.assert_array_equal(jax.jit(branch)(False, XS), XS)
    assert doubled.calls == 0


def test_mapped_predicate_runs_everything_in_one_call():
    doubled = Doubled("expand_dims")
    branch = jax.jit(jax.vmap(lambda x: cond(doubled.call, x)))
    np.testing.assert_array_equal(branch(XS), np.where(XS > 3, 2 * XS, XS - 1))
    assert doubled.shapes == {(8,): 1}


def test_loop_without_trips_gives_its_input():
    """XLA may hoist a call that does not change out of a loop, so whether it is made is not promised."""
    doubled = Doubled()
    loop = jax.jit(lambda x, trips: jax.lax.fori_loop(0, trips, lambda _, c: c + doubled.call(x), x))
    np.testing.assert_array_equal(loop(XS, 0), XS)
    assert doubled.calls <= 1


def test_loop_invariant_call_in_a_loop_has_the_right_result():
    doubled = Doubled()
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 4, lambda _, c: c + doubled.call(x), x))
    np.testing.assert_array_equal(loop(XS), 9 * XS)
    assert doubled.calls in (1, 4)


# --- equal calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
def test_two_equal_calls_in_one_program_are_one_call(mapped):
    doubled = Doubled("expand_dims")
    f = jax.vmap(doubled.call) if mapped else doubled.call
    np.testing.assert_array_equal(jax.jit(lambda x: f(x) + f(x))(XS), 4 * XS)
    assert doubled.calls == 1


def test_equal_calls_through_two_wrappers_are_one_call():
    """Parameters compare by value: the same function, wrapped twice in the same way."""
    calls = []

    def function(x):
        calls.append(x.shape)
        return x * 2

    first, second = (batchrules.host_call(function, lambda x: x, schema={"x": batchrules.ArraySpec()}) for _ in "ab")
    np.testing.assert_array_equal(jax.jit(lambda x: first(x) + second(x))(XS), 4 * XS)
    assert len(calls) == 1


def test_calls_on_different_data_are_two_calls():
    doubled = Doubled()
    np.testing.assert_array_equal(jax.jit(lambda x: doubled.call(x) + doubled.call(x + 1))(XS), 4 * XS + 2)
    assert doubled.calls == 2


def test_equal_calls_in_a_shard_map_are_one_call_on_each_device(auto_mesh):
    doubled = Doubled()
    mapped = jax.shard_map(
        lambda x: doubled.call(x) + doubled.call(x), mesh=auto_mesh, in_specs=P("x"), out_specs=P("x")
    )
    np.testing.assert_array_equal(jax.jit(mapped)(XS), 4 * XS)
    assert doubled.calls == 4


@pytest.mark.xfail(strict=True, reason="XLA merges equal callbacks, but not the collectives around them")
def test_equal_calls_on_several_devices_are_one_call(auto_mesh):
    doubled = Doubled()
    xs = jax.device_put(XS, NamedSharding(auto_mesh, P("x")))
    np.testing.assert_array_equal(jax.jit(lambda x: doubled.call(x) + doubled.call(x))(xs), 4 * XS)
    assert doubled.calls == 1


def options_that_differ():
    yield "method", {"method": "sequential"}, {"method": "expand_dims"}
    yield "batch_size", {"method": "expand_dims", "batch_size": 2}, {"method": "expand_dims", "batch_size": 3}
    yield "name", {"name": "one"}, {"name": "another"}
    yield "allow_jax", {"allow_jax": False}, {"allow_jax": True}


@pytest.mark.parametrize(("first", "second"), [pair[1:] for pair in options_that_differ()])
def test_calls_with_different_options_stay_two(first, second):
    calls = []

    def function(x):
        calls.append(x.shape)
        return x * 2

    calls_of = (batchrules.host_call(function, lambda x: x, verify=False, **options) for options in (first, second))
    one, two = map(jax.vmap, calls_of)
    jax.block_until_ready(jax.jit(one)(XS))
    alone = collections.Counter(calls)
    calls.clear()
    jax.block_until_ready(jax.jit(two)(XS))
    alone.update(calls)
    calls.clear()
    jax.block_until_ready(jax.jit(lambda x: one(x) + two(x))(XS))
    assert collections.Counter(calls) == alone


@pytest.mark.parametrize("values", [(1, True, 1.0), (0.0, -0.0)])
def test_static_arguments_that_compare_equal_but_differ_stay_different(values):
    """`1 == True == 1.0` and `0.0 == -0.0`, yet the function can tell them apart."""
    shown = []

    def show(x, n):
        shown.append(repr(n))
        return x + len(shown)

    call = batchrules.host_call(show, lambda x, n: x, static_argnames="n")  # noqa: ARG005
    jax.block_until_ready(jax.jit(lambda x: [call(x, value) for value in values])(XS))
    assert sorted(shown) == sorted(map(repr, values))


def test_equal_static_arguments_are_one_call():
    seen = []

    def function(x, n):
        seen.append(n)
        return x * len(n)

    call = batchrules.host_call(function, lambda x, n: x, static_argnames="n")  # noqa: ARG005
    program = jax.jit(lambda x: call(x, ("a", "b")) + call(x, n=("a", "b")[:2]) + call(x, tuple("ab")))
    np.testing.assert_array_equal(program(XS), 6 * XS)
    # By position twice, which is one call, and by keyword once.
    assert len(seen) <= 2
