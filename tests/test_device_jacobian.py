"""`jacobian=` and `pass_outputs=` of device calls, against a pure-JAX twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import METHODS

import batchrules

RNG = np.random.default_rng(0)
XS, YS = (jnp.asarray(RNG.normal(size=(4, 3))) for _ in range(2))
X, Y = XS[0], YS[1]


def twin(x, y):
    return {"a": jnp.sin(x) * y, "b": jnp.sum(x * x * y, axis=-1)}


class Counted:
    """A device call with some of the endpoints, each of which counts its traces."""

    def __init__(self, given, method="expand_dims", **options):
        self.calls = []
        endpoints = {name: getattr(self, name) for name in given}
        self.call = batchrules.device_call(twin, method=method, **endpoints, **options)

    def jacobian(self, args, needed, **outputs):
        self.calls.append(("jacobian", tuple(x.shape for x in args), needed, sorted(outputs)))
        x, y = args
        eye = jnp.eye(3)
        lead = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        by_x, by_y = jnp.broadcast_to(jnp.cos(x) * y, (*lead, 3)), jnp.broadcast_to(jnp.sin(x), (*lead, 3))
        rows = (by_x[..., None] * eye[(None,) * len(lead)], by_y[..., None] * eye[(None,) * len(lead)])
        sums = (jnp.broadcast_to(2 * x * y, (*lead, 3)), jnp.broadcast_to(x * x, (*lead, 3)))
        return {
            "a": tuple(block if wanted else None for block, wanted in zip(rows, needed, strict=True)),
            "b": tuple(block if wanted else None for block, wanted in zip(sums, needed, strict=True)),
        }

    def vjp(self, args, cotangents, needed, **outputs):
        self.calls.append(("vjp", tuple(x.shape for x in args), needed, sorted(outputs)))
        lead = next(c for c in cotangents.values() if c is not None)
        x, y = (jnp.broadcast_to(v, (*lead.shape[: lead.ndim - (lead.shape[-1:] == (3,))], 3)) for v in args)
        a = jnp.zeros_like(x) if cotangents["a"] is None else cotangents["a"]
        b = jnp.zeros(x.shape[:-1]) if cotangents["b"] is None else cotangents["b"]
        return jnp.cos(x) * y * a + 2 * x * y * b[..., None], jnp.sin(x) * a + x * x * b[..., None]


def total(f):
    return lambda x, y: jnp.sum(jnp.cos(f(x, y)["a"])) + 2 * f(x, y)["b"]


COMPOSITIONS = {
    "jvp": lambda f: jax.jvp(f, (X, Y), (Y, X)),
    "grad": lambda f: jax.grad(total(f), (0, 1))(X, Y),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(X, Y),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(X, Y),
    "jacrev of one argument": lambda f: jax.jacrev(f, 1)(X, Y),
    "vmap of jacrev": lambda f: jax.vmap(jax.jacrev(f, (0, 1)), (0, None))(XS, Y),
    "vmap of grad, unmapped": lambda f: jax.vmap(jax.grad(total(f), 1), (0, None))(XS, Y),
    "jacrev of vmap": lambda f: jax.jacrev(jax.vmap(f, (None, 0)), (0, 1))(X, YS),
    "jacfwd of nested vmaps": lambda f: jax.jacfwd(jax.vmap(jax.vmap(f, (0, None)), (None, 0)), 1)(XS, YS),
    "grad of vmap": lambda f: jax.grad(lambda x, y: jnp.sum(jax.vmap(f, (0, None))(x, y)["a"] ** 2), (0, 1))(XS, Y),
}


def assert_close(result, wanted):
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), 1e-9, 1e-9)


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("pass_outputs", [False, True])
def test_jacobian_alone_serves_both_modes(name, pass_outputs):
    f = Counted(["jacobian"], pass_outputs=pass_outputs)
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f.call))(), COMPOSITIONS[name](twin))
    assert {tuple(outputs) for *_, outputs in f.calls} == {("outputs",) if pass_outputs else ()}


# Under `legacy_vectorized` ranks differ, which strict JAX code such as this does not line up.
@pytest.mark.parametrize("method", [m for m in METHODS if m != "legacy_vectorized"])
def test_every_method(method):
    f = Counted(["jacobian"], method)
    for name in ("jacrev", "vmap of jacrev", "grad of vmap"):
        assert_close(jax.jit(lambda name=name: COMPOSITIONS[name](f.call))(), COMPOSITIONS[name](twin))


def test_cotangents_mapped_over_unmapped_arguments_take_one_jacobian():
    f = Counted(["jacobian", "vjp"])
    assert_close(jax.jit(jax.jacrev(f.call, (0, 1)))(X, Y), jax.jacrev(twin, (0, 1))(X, Y))
    assert f.calls == [("jacobian", ((3,), (3,)), (True, True), [])]
    f.calls.clear()
    assert_close(jax.jit(jax.grad(total(f.call)))(X, Y), jax.grad(total(twin))(X, Y))
    assert {call[0] for call in f.calls} == {"vjp"}


def test_needed_tells_the_arguments_in_use():
    f = Counted(["jacobian"])
    jax.jit(jax.jacrev(f.call, 1))(X, Y)
    assert [needed for _, _, needed, _ in f.calls] == [(False, True)]


def test_on_an_explicit_mesh(explicit_mesh):
    from jax.sharding import NamedSharding, PartitionSpec

    xs = jax.device_put(XS, NamedSharding(explicit_mesh, PartitionSpec("x")))
    y = jax.device_put(Y, NamedSharding(explicit_mesh, PartitionSpec()))
    f = Counted(["jacobian"])
    result = jax.jit(jax.grad(lambda y: jnp.sum(jax.vmap(f.call, (0, None))(xs, y)["a"] ** 2)))(y)
    wanted = jax.grad(lambda y: jnp.sum(jax.vmap(twin, (0, None))(XS, y)["a"] ** 2))(Y)
    for shard in result.addressable_shards:
        np.testing.assert_allclose(shard.data, wanted, 1e-9)


def test_wrong_endpoint():
    with pytest.raises(TypeError, match="device_call 'twin': jacobian must be a function or None; got 3"):
        batchrules.device_call(twin, jacobian=3)
    with pytest.raises(TypeError, match="pass_outputs must be True or False"):
        batchrules.device_call(twin, pass_outputs=1)


def test_jacobian_of_another_structure():
    def jacobian(args, needed):
        del needed
        return {"a": args}

    f = batchrules.device_call(twin, jacobian=jacobian)
    with pytest.raises(batchrules.ResultError, match="the jacobian endpoint must return a tree like the outputs"):
        jax.jacrev(f)(X, Y)
