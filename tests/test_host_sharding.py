"""Host calls on several devices: right on every device, and made as often as they must be."""

import collections
import contextlib
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import batchrules

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")
N, K = 8, 4
XS = np.arange(float(N))
YS = np.arange(float(N * K)).reshape(N, K)
WANTED = 2 * XS + YS.sum(axis=1)


def mesh_of(shape, names, axis_type):
    devices = jax.devices("cpu")[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


@pytest.fixture(scope="module")
def auto_mesh_2d():
    return mesh_of((2, 2), ("a", "b"), AxisType.Auto)


@pytest.fixture(scope="module")
def explicit_mesh_2d():
    return mesh_of((2, 2), ("a", "b"), AxisType.Explicit)


def using(mesh):
    """The mesh as the context's, or no context for None."""
    if mesh is None:
        return contextlib.nullcontext()
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # the latter on jax 0.7
    return set_mesh(mesh)


class Counted:
    """A host function of a number and a row, and the shapes that its calls were given."""

    def __init__(self, method="sequential", **options):
        self.shapes = collections.Counter()
        self.call = batchrules.host_call(
            self._function, jax.ShapeDtypeStruct((), "float64"), method=method, name="counted", verify=False, **options
        )

    def _function(self, x, y):
        self.shapes[x.shape, y.shape] += 1
        return 2 * x + y.sum(axis=-1)

    @property
    def calls(self):
        return self.shapes.total()


class Doubled:
    """A host function of one array."""

    def __init__(self, method="sequential"):
        self.calls = 0
        self.call = batchrules.host_call(self._function, lambda x: x, method=method, name="doubled", verify=False)

    def _function(self, x):
        self.calls += 1
        return x * 2


def check(result, wanted, spec=None):
    """Compare every device's data, the type, and what a second program makes of the result."""
    for shard in result.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index])
    again = jax.jit(lambda x: x + 1)(result)
    np.testing.assert_array_equal(np.asarray(again), wanted + 1)
    if spec is not None:
        assert jax.typeof(result).sharding.spec == spec
        assert result.sharding.is_equivalent_to(NamedSharding(result.sharding.mesh, spec), result.ndim)


def maybe_jit(jit, function):
    return jax.jit(function) if jit else function


def skip_eager_vmap_on_08(jit):
    if not jit and JAX_VERSION == (0, 8):
        pytest.skip("jax 0.8 raises in its own eager vmap over an Explicit axis")


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("spec", [P("x"), P()])
@pytest.mark.parametrize("method", METHODS)
def test_auto_axis_runs_once_and_every_device_has_the_result(auto_mesh, method, spec, jit):
    counted = Counted(method)
    xs, ys = jax.device_put((XS, YS), NamedSharding(auto_mesh, spec))
    check(maybe_jit(jit, jax.vmap(counted.call))(xs, ys), WANTED)
    wanted_shapes = {((), (K,)): N} if method == "sequential" else {((N,), (N, K)): 1}
    assert counted.shapes == wanted_shapes


@pytest.mark.parametrize("jit", [True, False])
def test_auto_axis_without_vmap_runs_once(auto_mesh, jit):
    doubled = Doubled()
    ys = jax.device_put(YS, NamedSharding(auto_mesh, P("x")))
    check(maybe_jit(jit, doubled.call)(ys), 2 * YS)
    assert doubled.calls == 1


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("jit", [True, False])
def test_devices_in_any_order_and_number(order, jit):
    doubled = Doubled()
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu"))[list(order)], ("x",))
    check(maybe_jit(jit, doubled.call)(jax.device_put(YS, NamedSharding(mesh, P("x")))), 2 * YS)
    assert doubled.calls == 1


@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("a", "b"), P(("a", "b"))])
def test_auto_mesh_of_two_axes_runs_once(auto_mesh_2d, spec):
    doubled = Doubled()
    check(jax.jit(doubled.call)(jax.device_put(YS, NamedSharding(auto_mesh_2d, spec))), 2 * YS)
    assert doubled.calls == 1


def test_auto_mesh_with_operands_on_another_mesh_of_the_same_devices(auto_mesh, auto_mesh_2d):
    counted = Counted("expand_dims")
    xs = jax.device_put(XS, NamedSharding(auto_mesh, P("x")))
    ys = jax.device_put(YS, NamedSharding(auto_mesh_2d, P("a", "b")))
    check(jax.jit(jax.vmap(counted.call))(xs, ys), WANTED)
    assert counted.calls == 1


def test_several_outputs_on_several_devices(auto_mesh):
    shapes = {"a": jax.ShapeDtypeStruct((), "float32"), "b": jax.ShapeDtypeStruct((2, K), "bool")}
    calls = []

    def both(x):
        calls.append(x.shape)
        return {"a": x.sum(dtype="float32"), "b": np.stack([x > 2, x > 3])}

    results = jax.jit(jax.vmap(batchrules.host_call(both, shapes)))(
        jax.device_put(YS, NamedSharding(auto_mesh, P("x")))
    )
    check(results["a"], YS.sum(axis=1, dtype="float32"))
    for shard in results["b"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.stack([YS > 2, YS > 3], axis=1)[shard.index])
    assert len(calls) == N


BITS = {
    "float16": ml_dtypes.finfo("float16").dtype,
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    **{
        name: np.dtype(name)
        for name in (
            *("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("bool", "complex64", "complex128"),
        )
    },
}


@pytest.mark.parametrize("dtype", BITS.values(), ids=BITS)
def test_results_reach_every_device_bit_for_bit(auto_mesh, dtype):
    """Negative zeros, infinities, NaNs with a payload, the smallest and the largest integers."""
    bits = np.random.default_rng(7).integers(0, 256, size=16 * dtype.itemsize, dtype=np.uint8)
    # The other kinds are any bits; a bool has two values.
    array = (bits[:16] % 2).astype(bool) if dtype.kind == "b" else bits.view(dtype)
    if dtype.kind in "fc":
        array[:2] = -0.0, np.nan
    copied = batchrules.host_call(lambda x: array.copy(), lambda x: x, name="copied")  # noqa: ARG005
    result = jax.jit(copied)(jax.device_put(array, NamedSharding(auto_mesh, P("x"))))
    assert result.dtype == dtype
    assert len(result.addressable_shards) == 4
    for shard in result.addressable_shards:
        assert np.asarray(shard.data).tobytes() == array[shard.index].tobytes()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_results_without_elements_on_several_devices(auto_mesh, shape):
    doubled = Doubled("expand_dims")
    xs = jax.device_put(np.zeros(shape), NamedSharding(auto_mesh, P()))
    assert jax.jit(jax.vmap(doubled.call))(xs).shape == shape
    # An empty batch makes no call, and XLA has no need for a result without elements.
    assert doubled.calls == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_call_without_arguments_runs_once_on_several_devices(auto_mesh, mapped):
    calls = []

    def constant():
        calls.append(None)
        return np.array([1.0, 2.0])

    call = batchrules.host_call(constant, jax.ShapeDtypeStruct((2,), "float64"))
    add = (lambda x: x + call()[0]) if mapped else (lambda xs: xs + call()[:1])
    xs = jax.device_put(XS, NamedSharding(auto_mesh, P("x")))
    check(jax.jit(jax.vmap(add) if mapped else add)(xs), XS + 1)
    assert len(calls) == 1


# --- Explicit axes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_explicit_axis_calls_per_shard_and_stays_sharded(explicit_mesh, method, context, jit):
    skip_eager_vmap_on_08(jit)
    counted = Counted(method)
    xs, ys = jax.device_put((XS, YS), NamedSharding(explicit_mesh, P("x")))
    with using(explicit_mesh if context else None):
        check(maybe_jit(jit, jax.vmap(counted.call))(xs, ys), WANTED, P("x"))
    wanted_shapes = {((), (K,)): N} if method == "sequential" else {((2,), (2, K)): 4}
    assert counted.shapes == wanted_shapes


@pytest.mark.parametrize(("method", "lead"), [("expand_dims", (1, K)), ("legacy_vectorized", (K,))])
@pytest.mark.parametrize("on_mesh", [True, False])
def test_explicit_axis_with_a_replicated_operand(explicit_mesh, method, lead, on_mesh):
    counted = Counted(method)
    xs = jax.device_put(XS, NamedSharding(explicit_mesh, P("x")))
    row = jax.device_put(YS[3], NamedSharding(explicit_mesh, P())) if on_mesh else YS[3]
    with using(explicit_mesh):
        check(jax.jit(jax.vmap(counted.call, in_axes=(0, None)))(xs, row), 2 * XS + YS[3].sum(), P("x"))
    assert counted.shapes == {((2,), lead): 4}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_explicit_axis_with_a_batch_size_counts_per_shard(explicit_mesh, batch_size):
    counted = Counted("expand_dims", batch_size=batch_size)
    xs, ys = jax.device_put((XS, YS), NamedSharding(explicit_mesh, P("x")))
    check(jax.jit(jax.vmap(counted.call))(xs, ys), WANTED, P("x"))
    assert counted.calls == {1: N, 3: 4}[batch_size]


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_explicit_replicated_argument_runs_once(explicit_mesh, context, jit):
    doubled = Doubled()
    ys = jax.device_put(YS, NamedSharding(explicit_mesh, P()))
    with using(explicit_mesh if context else None):
        check(maybe_jit(jit, doubled.call)(ys), 2 * YS, P(None, None))
    assert doubled.calls == 1


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_explicitly_sharded_element_is_gathered_and_runs_once(explicit_mesh, context, jit):
    doubled = Doubled()
    ys = jax.device_put(YS, NamedSharding(explicit_mesh, P("x")))
    with using(explicit_mesh if context else None):
        check(maybe_jit(jit, doubled.call)(ys), 2 * YS, P(None, None))
    assert doubled.calls == 1


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_mapped_and_element_dimension_explicitly_sharded(explicit_mesh_2d, context, jit):
    skip_eager_vmap_on_08(jit)
    counted = Counted("expand_dims")
    xs = jax.device_put(XS, NamedSharding(explicit_mesh_2d, P("a")))
    ys = jax.device_put(YS, NamedSharding(explicit_mesh_2d, P("a", "b")))
    with using(explicit_mesh_2d if context else None):
        check(maybe_jit(jit, jax.vmap(counted.call))(xs, ys), WANTED, P("a"))
    # Once for each part of the axis "a", whose devices along "b" share the call.
    assert counted.shapes == {((4,), (4, K)): 2}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_explicit_axis_of_a_larger_mesh_is_called_once_per_part(explicit_mesh_2d, context, jit):
    skip_eager_vmap_on_08(jit)
    counted = Counted("expand_dims")
    xs, ys = jax.device_put((XS, YS), NamedSharding(explicit_mesh_2d, P("b")))
    with using(explicit_mesh_2d if context else None):
        check(maybe_jit(jit, jax.vmap(counted.call))(xs, ys), WANTED, P("b"))
    assert counted.shapes == {((4,), (4, K)): 2}


def test_axis_sharded_over_two_explicit_mesh_axes(explicit_mesh_2d):
    counted = Counted("expand_dims")
    xs, ys = jax.device_put((XS, YS), NamedSharding(explicit_mesh_2d, P(("a", "b"))))
    check(jax.jit(jax.vmap(counted.call))(xs, ys), WANTED, P(("a", "b")))
    assert counted.shapes == {((2,), (2, K)): 4}


@pytest.mark.parametrize("outer_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_nested_vmaps_over_different_mesh_axes(explicit_mesh_2d, method, outer_first):
    counted = Counted(method)
    xs = jax.device_put(XS[:4], NamedSharding(explicit_mesh_2d, P("a")))
    ys = jax.device_put(YS[:6], NamedSharding(explicit_mesh_2d, P("b")))
    wanted = 2 * XS[:4, None] + YS[:6].sum(axis=1)[None]
    over_x, over_y = (0, None), (None, 0)
    outer, inner = (over_x, over_y) if outer_first else (over_y, over_x)
    mapped = jax.vmap(jax.vmap(counted.call, in_axes=inner), in_axes=outer)
    if outer_first:
        check(jax.jit(mapped)(xs, ys), wanted, P("a", "b"))
    else:
        check(jax.jit(mapped)(xs, ys), wanted.T, P("b", "a"))
    # 2 of the 4 x with 3 of the 6 y on each of 4 devices.
    assert counted.shapes == ({((), (K,)): 24} if method == "sequential" else {((6,), (6, K)): 4})


def test_nested_vmaps_of_which_one_axis_is_sharded(explicit_mesh):
    counted = Counted("expand_dims")
    xs = jax.device_put(XS, NamedSharding(explicit_mesh, P("x")))
    wanted = 2 * XS[:, None] + YS[:3].sum(axis=1)[None]
    with using(explicit_mesh):
        mapped = jax.vmap(jax.vmap(counted.call, in_axes=(None, 0)), in_axes=(0, None))
        check(jax.jit(mapped)(xs, YS[:3]), wanted, P("x", None))
    assert counted.shapes == {((6,), (6, K)): 4}


@pytest.mark.parametrize("context", [True, False])
def test_in_axes_and_out_axes_of_an_explicit_axis(explicit_mesh_2d, context):
    doubled = Doubled("expand_dims")
    ys = jax.device_put(YS.T.copy(), NamedSharding(explicit_mesh_2d, P(None, "a")))
    with using(explicit_mesh_2d if context else None):
        check(jax.jit(jax.vmap(doubled.call, in_axes=1, out_axes=1))(ys), 2 * YS.T, P(None, "a"))
    assert doubled.calls == 2


@pytest.mark.parametrize("jit", [True, False])
def test_in_axes_one_of_an_explicit_axis_that_would_not_divide_the_element(explicit_mesh, jit):
    """`jnp.asarray` on a traced value would shard the 3 rows in place of the 8 columns on jax 0.7 and 0.8."""
    skip_eager_vmap_on_08(jit)
    doubled = Doubled("expand_dims")
    ys = jax.device_put(YS.T[:3].copy(), NamedSharding(explicit_mesh, P(None, "x")))
    check(maybe_jit(jit, jax.vmap(doubled.call, in_axes=1))(ys), 2 * YS[:, :3], P("x", None))
    assert doubled.calls == 4


def test_numpy_arguments_while_an_explicit_mesh_is_set(explicit_mesh):
    doubled = Doubled("expand_dims")
    with using(explicit_mesh):
        for function in (jax.vmap(doubled.call), jax.jit(jax.vmap(doubled.call)), jax.jit(doubled.call)):
            result = function(YS)
            assert all(np.array_equal(shard.data, 2 * YS[shard.index]) for shard in result.addressable_shards)
    assert doubled.calls == 3


# --- shard_map --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_shard_map_calls_for_its_own_shard(auto_mesh, method, check_vma, jit):
    counted = Counted(method)
    mapped = jax.shard_map(
        jax.vmap(counted.call),
        mesh=auto_mesh,
        in_specs=(P("x"), P("x")),
        out_specs=P("x"),
        check_vma=check_vma,
    )
    check(maybe_jit(jit, mapped)(XS, YS), WANTED)
    assert counted.shapes == ({((), (K,)): N} if method == "sequential" else {((2,), (2, K)): 4})


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_an_operand_that_does_not_vary(auto_mesh, check_vma):
    counted = Counted("expand_dims")
    mapped = jax.shard_map(
        jax.vmap(counted.call, in_axes=(0, None)),
        mesh=auto_mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=check_vma,
    )  # fmt: skip
    check(jax.jit(mapped)(XS, YS[1]), 2 * XS + YS[1].sum())
    assert counted.shapes == {((2,), (1, K)): 4}


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_two_mesh_axes(auto_mesh_2d, check_vma):
    counted = Counted("expand_dims")
    mapped = jax.shard_map(
        jax.vmap(jax.vmap(counted.call, in_axes=(None, 0)), in_axes=(0, None)),
        mesh=auto_mesh_2d, in_specs=(P("a"), P("b")), out_specs=P("a", "b"), check_vma=check_vma,
    )  # fmt: skip
    check(jax.jit(mapped)(XS, YS), 2 * XS[:, None] + YS.sum(axis=1)[None])
    assert counted.shapes == {((16,), (16, K)): 4}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_partially_manual_shard_map_calls_once_per_part(auto_mesh_2d, method, check_vma, jit):
    """The axis "a" is manual; of the two devices along "b", which share the part, only one calls."""
    if not jit and not check_vma and JAX_VERSION < (0, 12):
        pytest.skip("before jax 0.12, an eager and partially manual shard_map needs check_vma")
    counted = Counted(method)
    mapped = jax.shard_map(
        jax.vmap(counted.call),
        mesh=auto_mesh_2d, in_specs=(P("a"), P("a")), out_specs=P("a"), check_vma=check_vma, axis_names={"a"},
    )  # fmt: skip
    check(maybe_jit(jit, mapped)(XS, YS), WANTED)
    assert counted.shapes == ({((), (K,)): N} if method == "sequential" else {((4,), (4, K)): 2})


def test_partially_manual_shard_map_with_data_split_along_the_other_axis(auto_mesh_2d):
    counted = Counted("expand_dims")
    xs, ys = jax.device_put((XS, YS), NamedSharding(auto_mesh_2d, P(("a", "b"))))
    mapped = jax.shard_map(
        jax.vmap(counted.call),
        mesh=auto_mesh_2d,
        in_specs=(P("a"), P("a")),
        out_specs=P("a"),
        axis_names={"a"},
    )
    check(jax.jit(mapped)(xs, ys), WANTED)
    assert counted.shapes == {((4,), (4, K)): 2}


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_out_specs_without_the_axis_that_a_result_varies_over_is_an_error(auto_mesh, method):
    counted = Counted(method)
    mapped = jax.shard_map(
        jax.vmap(counted.call), mesh=auto_mesh, in_specs=(P("x"), P("x")), out_specs=P(), check_vma=True
    )
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(mapped)(XS, YS)
    assert counted.calls == 0


@pytest.mark.parametrize("varying", [0, 1])
def test_out_specs_without_the_axis_is_an_error_whichever_operand_varies(auto_mesh, varying):
    counted = Counted("expand_dims")
    in_axes, in_specs = [None, None], [P(), P()]
    in_axes[varying], in_specs[varying] = 0, P("x")
    args = (XS, YS[0]) if varying == 0 else (XS[0], YS)
    mapped = jax.shard_map(
        jax.vmap(counted.call, in_axes=in_axes), mesh=auto_mesh, in_specs=tuple(in_specs), out_specs=P()
    )
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(mapped)(*args)


def test_result_of_unvarying_operands_does_not_vary(auto_mesh):
    counted = Counted("expand_dims")
    mapped = jax.shard_map(jax.vmap(counted.call), mesh=auto_mesh, in_specs=(P(), P()), out_specs=P())
    check(jax.jit(mapped)(XS, YS), WANTED)


def test_host_call_between_collectives_in_a_shard_map(auto_mesh):
    doubled = Doubled("expand_dims")

    def body(xs):
        total = jax.lax.psum(jax.vmap(doubled.call)(xs).sum(), "x")
        return doubled.call(total[None])[0] + xs

    mapped = jax.shard_map(body, mesh=auto_mesh, in_specs=P("x"), out_specs=P("x"))
    check(jax.jit(mapped)(XS), XS + 4 * XS.sum())


def test_shard_map_over_an_explicit_mesh(explicit_mesh):
    counted = Counted("expand_dims")
    xs, ys = jax.device_put((XS, YS), NamedSharding(explicit_mesh, P("x")))
    with using(explicit_mesh):
        mapped = jax.shard_map(jax.vmap(counted.call), in_specs=(P("x"), P("x")), out_specs=P("x"))
        check(jax.jit(mapped)(xs, ys), WANTED, P("x"))
    assert counted.shapes == {((2,), (2, K)): 4}


# --- one device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("device", [0, 3])
def test_results_stay_on_the_device_of_the_arguments(device, jit):
    doubled = Doubled("expand_dims")
    where = jax.devices("cpu")[device]
    result = maybe_jit(jit, jax.vmap(doubled.call))(jax.device_put(YS, where))
    assert result.devices() == {where}
    check(result, 2 * YS)


def test_results_follow_the_default_device():
    doubled = Doubled()
    where = jax.devices("cpu")[2]
    with jax.default_device(where):
        assert doubled.call(XS).devices() == {where}
        assert jax.jit(doubled.call)(XS).devices() == {where}


def test_arguments_on_different_devices_are_an_error():
    counted = Counted()
    here, there = jax.devices("cpu")[:2]
    with pytest.raises(ValueError, match="incompatible devices"):
        counted.call(jax.device_put(1.0, here), jax.device_put(YS[0], there))
    assert counted.calls == 0
