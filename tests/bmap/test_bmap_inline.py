"""What does not depend on the mapped axis is computed once, also inside functions that are jitted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import assert_close, random, sum_of_sines

from batchrules import host_call
from batchrules._bmap import bmap
from batchrules._bmap_inline import with_open_jits

SIZE, WIDTH, BATCH = 4096, 64, 16
WEIGHTS = 8 * WIDTH**2


@jax.jit
def soft(w, a):
    return jnp.tanh(jax.nn.softplus(w) @ a)


@jax.jit
def passes_through(w, a):
    return w, w.sum() * a


@jax.custom_jvp
def has_a_rule(w, a):
    return w @ a


@has_a_rule.defjvp
def _(primals, tangents):
    w, a = primals
    return w @ a, tangents[0] @ a + jnp.cos(w) @ tangents[1]


HIDING = {
    "jit": soft,
    "jit in jit": jax.jit(lambda w, a: 2 * soft(w, a)),
    "twice the same": lambda w, a: soft(w, soft(w, a)),
    "solve": lambda w, a: jnp.linalg.solve(w + 9 * jnp.eye(len(a)), a),
    "a result that is an argument": passes_through,
    "a static argument": lambda w, a: jax.jit(lambda n, w, a: jnp.exp(w[:n]) @ a, static_argnums=0)(3, w, a),
    "a constant": jax.jit(lambda w, a: (np.eye(a.shape[0]) + jnp.exp(w)) @ a),
    "custom_jvp": jax.jit(lambda w, a: jax.nn.relu(w) @ jax.nn.relu(a)),
    "a derivative rule": has_a_rule,
    "a condition": jax.jit(lambda w, a: jax.lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, jnp.where(w > 0, w, 0) @ a)),
}


def arguments(size=11, width=4):
    return random((width, width)) * 0.3, random((size, width), 1)


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_values_and_derivatives(name, checkpoint):
    f, args = HIDING[name], arguments()

    def both(way):
        ours = bmap(f, (None, 0), batch_size=3, checkpoint=checkpoint)
        assert_close(jax.jit(way(ours))(*args), way(jax.vmap(f, (None, 0)))(*args))

    both(lambda mapped: mapped)
    both(lambda mapped: jax.grad(sum_of_sines(mapped), (0, 1)))
    both(lambda mapped: lambda *args: jax.jvp(mapped, args, args))
    both(lambda mapped: jax.jacfwd(jax.grad(sum_of_sines(mapped))))
    both(lambda mapped: lambda w, a: jax.vmap(mapped, (0, None))(jnp.stack([w, 2 * w]), a))


def mapped_by_jax(f, w, a):
    return jax.lax.map(lambda a: f(w, a), a, batch_size=BATCH)


@pytest.mark.parametrize("name", ["jit", "jit in jit", "twice the same", "solve", "custom_jvp", "a derivative rule"])
def test_memory_of_a_gradient_does_not_grow_with_the_chunks(name):
    f, (w, a) = HIDING[name], arguments(SIZE, WIDTH)

    def gradient(mapped):
        return jax.grad(lambda w, a: jnp.sum(mapped(w, a) ** 2), (0, 1))

    found, peers = (
        jax.jit(gradient(mapped)).lower(w, a).compile().memory_analysis().temp_size_in_bytes
        for mapped in (bmap(f, (None, 0), batch_size=BATCH), lambda w, a: mapped_by_jax(f, w, a))
    )
    # An array of the weights' size for each chunk would be 256 of them, which is four times the whole argument.
    assert found < peers + a.nbytes + 8 * WEIGHTS


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_foreign_calls(deep, checkpoint):
    calls = []

    def on_host(w):
        calls.append(w)
        return np.sin(w)

    foreign = host_call(on_host, lambda w: w, method="sequential", verify=False)
    f = jax.jit(lambda w, a: foreign(w) * a)
    if deep:
        f = jax.jit(functools.partial(lambda f, w, a: f(w, a) + 1, f))
    w, a = jnp.asarray(0.5), random(17)
    jax.block_until_ready(jax.jit(bmap(f, (None, 0), batch_size=4))(w, a))
    assert len(calls) == 1
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(bmap(f, (None, 0), batch_size=4, checkpoint=checkpoint)(w, a))))
    assert_close(jax.jit(gradient)(a), jax.grad(lambda a: jnp.sum(jnp.sin(jnp.sin(w) * a + float(deep))))(a))
    assert len(calls) == 2


def test_effects():
    seen = []

    @jax.jit
    def f(w, a):
        jax.debug.callback(seen.append, w)
        return w * a

    jax.block_until_ready(jax.jit(bmap(f, (None, 0), batch_size=4))(0.5, random(17)))
    jax.effects_barrier()
    assert len(seen) == 1


# --- which jits are opened --------------------------------------------------------------------------------------------


def names(f, *inputs):
    program = with_open_jits(jax.make_jaxpr(f)(*inputs))
    return [eqn.params.get("name", eqn.primitive.name) for eqn in program.jaxpr.eqns]


W = random((4, 4))


def test_a_jit_that_hides_nothing_stays():
    def layer(a):
        return jnp.tanh(a @ a)

    assert names(jax.jit(layer), W) == ["layer"]


def test_a_jit_of_what_is_closed_over_alone_stays():
    def prepared(w):
        return jnp.exp(w)

    assert names(lambda a: jax.jit(prepared)(W) @ a, W) == ["prepared", "dot_general"]


def test_only_the_jit_that_hides_something_is_opened():
    def layer(a):
        return jnp.tanh(a @ a)

    def hides(w, a):
        return jnp.exp(w) @ jax.jit(layer)(a)

    assert names(lambda a: jax.jit(hides)(W, a), W) == ["exp", "layer", "dot_general"]


def test_a_jit_that_only_makes_constants_beside_stays():
    def rectified(a):
        return jnp.maximum(a, jnp.zeros((4, 4)))

    assert names(jax.jit(rectified), W) == ["rectified"]


@pytest.mark.parametrize("option", ["in_shardings", "out_shardings"])
def test_a_jit_that_says_where_something_lies_stays(option):
    def placed(w, a):
        return jnp.exp(w) @ a

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert names(functools.partial(jax.jit(placed, **{option: place}), W), W) == ["placed"]
