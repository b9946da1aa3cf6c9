"""Derivatives of host calls on several devices: right on every device, and made as often as they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import SS, XS, YS, S, X, Y
from host_derivatives import WAVES
from host_endpoints import GIVEN, METHODS, Endpoints
from jax.sharding import PartitionSpec as P
from sharded import assert_right_everywhere, auto, explicit, put, using

XX = jnp.concatenate([XS, YS * 2])  # 8 rows: two for each of four devices
TT = jnp.concatenate([SS, SS - 1])
every_method = pytest.mark.parametrize("method", METHODS)
every_given = pytest.mark.parametrize("given", [GIVEN["jvp, vjp"], GIVEN["jacobian"]], ids=["jvp, vjp", "jacobian"])
JVP_VJP = GIVEN["jvp, vjp"]


def loss(f):
    """A number that depends on a batch of x, and on y and s, which all its elements share."""

    def function(xs, y, s):
        outputs = jax.vmap(f, (0, None, None))(xs, y, s)
        return jnp.sum(jnp.sin(outputs["all"])) + jnp.sum(outputs["x"] * s)

    return function


def gradients(f):
    return jax.grad(loss(f), (0, 1, 2))


WANTED = jax.jit(gradients(WAVES.twin))(XX, Y, S)


# --- shard_map ------------------------------------------------------------------------------------------------


def within(mesh, f, *, check_vma=True):
    """The gradient inside of a shard_map: each shard's gradient of the shared arguments is summed by JAX."""
    return jax.shard_map(
        gradients(f),
        mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=(P("x"), P(), P()), check_vma=check_vma,
    )  # fmt: skip


@every_given
@every_method
def test_gradients_of_unvarying_arguments_inside_shard_map(method, given):
    """Without a cast to varying, the gradients of what the shards share would be those of one shard alone."""
    f = Endpoints(WAVES, method).host_call(given)
    assert_right_everywhere(jax.jit(within(auto("x"), f))(XX, Y, S), WANTED)


@every_given
@every_method
def test_gradients_through_shard_map(method, given):
    f = Endpoints(WAVES, method).host_call(given)

    def through(f):
        shards = jax.shard_map(
            lambda *args: jax.lax.psum(loss(f)(*args), "x"), mesh=auto("x"), in_specs=(P("x"), P(), P()), out_specs=P()
        )
        return jax.grad(shards, (0, 1, 2))

    assert_right_everywhere(jax.jit(through(f))(XX, Y, S), WANTED)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_without_jit_and_without_checks(check_vma):
    """With check_vma=False JAX sums nothing: each shard's gradient of its own data is right."""
    f = Endpoints(WAVES, "expand_dims").host_call(JVP_VJP)
    mapped = jax.shard_map(
        lambda xs: jax.grad(loss(f))(xs, Y, S), mesh=auto("x"), in_specs=P("x"), out_specs=P("x"), check_vma=check_vma
    )
    assert_right_everywhere(mapped(XX), WANTED[0])


@every_method
def test_tangents_that_vary_over_arguments_that_do_not(method):
    f = Endpoints(WAVES, method).host_call(JVP_VJP)

    def pushed(f):
        return jax.vmap(lambda t: jax.jvp(lambda x: f(x, Y, S), (X,), (t,))[1])

    mapped = jax.shard_map(pushed(f), mesh=auto("x"), in_specs=P("x"), out_specs=P("x"))
    assert_right_everywhere(jax.jit(mapped)(XX), pushed(WAVES.twin)(XX))


def test_cotangents_that_vary_over_arguments_that_do_not():
    f = Endpoints(WAVES, "expand_dims").host_call(JVP_VJP)

    def pulled(f):
        def function(ts, y):
            return jax.grad(lambda y: jnp.sum(f(X, y, S)["all"] * jnp.sum(ts, axis=0)))(y)

        return function

    mapped = jax.shard_map(pulled(f), mesh=auto("x"), in_specs=(P("x"), P()), out_specs=P())
    assert_right_everywhere(jax.jit(mapped)(XX, Y), pulled(WAVES.twin)(XX, Y))


def test_each_shard_calls_for_its_own_elements():
    endpoints = Endpoints(WAVES, "broadcast_all")
    f = endpoints.host_call(JVP_VJP, verify=False)
    jax.block_until_ready(jax.jit(within(auto("x"), f))(XX, Y, S))
    assert endpoints.counts == {"call": 4, "vjp": 4}
    assert endpoints.logs["vjp"].shapes == {((2, 3), (2, 3), (2,), (2, 3), (2,)): 4}


@pytest.mark.parametrize("name", ["jacfwd", "jacrev", "hessian"])
def test_jacobians_inside_shard_map(name):
    endpoints = Endpoints(WAVES, "expand_dims")
    f = endpoints.bare(**endpoints.twice()) if name == "hessian" else endpoints.host_call(JVP_VJP)

    def jacobian(f):
        per_element = getattr(jax, name)(lambda x, y: f(x, y, S)["all"].sum(), (0, 1))
        # What belongs to y, which the shards share, is summed over these.
        return jax.shard_map(jax.vmap(per_element, (0, None)), mesh=auto("x"), in_specs=(P("x"), P()), out_specs=P("x"))

    assert_right_everywhere(jax.jit(jacobian(f))(XX, Y), jax.jit(jacobian(WAVES.twin))(XX, Y))


def test_partially_manual_shard_map():
    f = Endpoints(WAVES, "expand_dims").host_call(JVP_VJP)
    mapped = jax.shard_map(
        gradients(f),
        mesh=auto("x", "y"), in_specs=(P("x"), P(), P()), out_specs=(P("x"), P(), P()), axis_names={"x"},
    )  # fmt: skip
    assert_right_everywhere(jax.jit(mapped)(XX, Y, S), WANTED)


# --- Auto and Explicit axes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [("x",), ()], ids=["sharded", "replicated"])
@every_given
@every_method
def test_auto_axis_runs_once_and_every_device_has_the_gradient(method, given, spec):
    endpoints = Endpoints(WAVES, method)
    f = endpoints.host_call(given, verify=False)
    mesh = auto("x")
    args = put(XX, mesh, *spec), put(Y, mesh), put(S, mesh)
    assert_right_everywhere(jax.jit(gradients(f))(*args), WANTED)
    endpoint = "jacobian" if given == ("jacobian",) else "vjp"
    count = len(XX) if method == "sequential" else 1
    assert endpoints.counts == {"call": count, endpoint: count}


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "vmap of grad"])
def test_auto_axis_of_other_derivatives(name):
    f = Endpoints(WAVES, "broadcast_all").host_call(JVP_VJP)
    mesh = auto("x")

    def derivative(f):
        many = lambda xs, y: jax.vmap(f, (0, None, None))(xs, y, S)["all"]  # noqa: E731
        if name == "vmap of grad":
            return jax.vmap(jax.grad(lambda x, y: f(x, y, S)["all"].sum(), (0, 1)), (0, None))
        return getattr(jax, name)(many, 1)

    result = jax.jit(derivative(f))(put(XX, mesh, "x"), put(Y, mesh))
    assert_right_everywhere(result, jax.jit(derivative(WAVES.twin))(XX, Y))


@pytest.mark.parametrize("context", [True, False], ids=["context", "no context"])
@every_given
@every_method
def test_explicit_axis_gradients_are_made_per_shard(method, given, context):
    endpoints = Endpoints(WAVES, method)
    f = endpoints.host_call(given, verify=False)
    mesh = explicit("x")
    args = put(XX, mesh, "x"), put(Y, mesh), put(S, mesh)
    with using(mesh if context else None):
        result = jax.jit(gradients(f))(*args)
        assert_right_everywhere(result, WANTED)
    assert [jax.typeof(leaf).sharding.spec for leaf in result] == [P("x", None), P(None), P()]
    endpoint = "jacobian" if given == ("jacobian",) else "vjp"
    count = len(XX) if method == "sequential" else 4
    assert endpoints.counts == {"call": count, endpoint: count}


def test_explicit_axis_vmap_of_grad_stays_sharded():
    f = Endpoints(WAVES, "expand_dims").host_call(JVP_VJP)
    mesh = explicit("x")

    def derivative(f):
        return jax.vmap(jax.grad(lambda x, t: f(x, Y, t)["all"].sum(), (0, 1)))

    with using(mesh):
        result = jax.jit(derivative(f))(put(XX, mesh, "x"), put(TT, mesh, "x"))
        assert_right_everywhere(result, jax.jit(derivative(WAVES.twin))(XX, TT))
    assert [jax.typeof(leaf).sharding.spec for leaf in result] == [P("x", None), P("x")]


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "jacrev"])
def test_explicit_axis_of_other_derivatives(name):
    f = Endpoints(WAVES, "broadcast_all").host_call(JVP_VJP)
    mesh = explicit("x")

    def derivative(f):
        many = lambda xs, y: jax.vmap(f, (0, None, None))(xs, y, S)["x"]  # noqa: E731
        if name == "jvp":
            return lambda xs, y: jax.jvp(many, (xs, y), (xs, y))
        return getattr(jax, name)(many, 1)

    with using(mesh):
        result = jax.jit(derivative(f))(put(XX, mesh, "x"), put(Y, mesh))
        assert_right_everywhere(result, jax.jit(derivative(WAVES.twin))(XX, Y))


def test_gradient_of_an_explicitly_sharded_element():
    """The element's own dimension is gathered, and the call made once."""
    endpoints = Endpoints(WAVES, "sequential")
    f = endpoints.host_call(JVP_VJP, verify=False)
    mesh = explicit("x", "y")
    with using(mesh):
        x = put(X, mesh)
        result = jax.jit(jax.grad(lambda x, y: f(x, y, S)["x"].sum(), (0, 1)))(x, put(Y, mesh))
        assert_right_everywhere(result, jax.grad(lambda x, y: WAVES.twin(x, y, S)["x"].sum(), (0, 1))(X, Y))
    assert endpoints.counts == {"vjp": 1}


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("jit", [True, False])
def test_gradients_stay_on_the_device_of_the_arguments(device, jit):
    f = Endpoints(WAVES, "expand_dims").host_call(JVP_VJP)
    where = jax.devices("cpu")[device]
    args = jax.device_put((XX, Y, S), where)
    result = (jax.jit(gradients(f)) if jit else gradients(f))(*args)
    for got, want in zip(result, WANTED, strict=True):
        assert got.devices() == {where}
        np.testing.assert_allclose(got, want, 1e-9, 1e-9)
