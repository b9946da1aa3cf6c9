"""Meshes of four CPU devices, and checks of results that live on them."""

import contextlib
import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def mesh_of(shape, names, axis_type):
    """A mesh of the first CPU devices."""
    devices = jax.devices("cpu")[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


def explicit(*names):
    """Four devices along one axis, or two by two along two, whose shardings are part of each array's type."""
    return mesh_of((4,) if len(names) == 1 else (2, 2), names, AxisType.Explicit)


def auto(*names):
    """The same, whose shardings the compiler chooses."""
    return mesh_of((4,) if len(names) == 1 else (2, 2), names, AxisType.Auto)


# A mesh, and the entry of a PartitionSpec that shards a dimension over it.
EXPLICIT = {"x": (("x",), "x"), "a of ab": (("a", "b"), "a"), "ab": (("a", "b"), ("a", "b"))}


JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def using(mesh):
    """The mesh as the context's, or no context for None."""
    if mesh is None:
        return contextlib.nullcontext()
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # the latter on jax 0.7
    return set_mesh(mesh)


def put(array, mesh, *spec):
    """The array, spread over the mesh."""
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def types(tree):
    """The type of each array: its shape, its dtype, and how it is sharded."""
    return [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]


def assert_right_everywhere(result, wanted):
    """Every shard on every device is right, and a second program can take the result as it is."""
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    second = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree))(result)
    for leaf, twice, right in zip(*map(jax.tree.leaves, (result, second, wanted)), strict=True):
        want = np.asarray(right)
        assert leaf.shape == want.shape
        for shard in leaf.addressable_shards:
            np.testing.assert_allclose(np.asarray(shard.data), want[shard.index], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.asarray(twice), want + want, rtol=1e-9, atol=1e-9)
