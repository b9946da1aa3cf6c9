"""A PyTorch module as a JAX function: in batches, and differentiated forward and in reverse by torch.func.

A network, trained in PyTorch, has learned where a robot's hand is for given angles of its joints. JAX uses the module
as it is: Newton's method (forward mode) finds the angles for 500 points at once, and a gradient (reverse mode) tells
which angles matter for the hand's height.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

import batchrules

torch.set_num_threads(1)  # the module is small, and JAX has threads of its own

ANGLES, HAND = 2, 2


def where_the_hand_is(angles):
    upper, lower = angles[..., 0], angles.sum(-1)
    return torch.stack([upper.cos() + lower.cos(), upper.sin() + lower.sin()], dim=-1)


def trained():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(ANGLES, 48), torch.nn.Tanh(), torch.nn.Linear(48, HAND))
    angles = 0.2 + 1.3 * torch.rand(400, ANGLES)
    optimiser = torch.optim.LBFGS(module.parameters(), max_iter=200)

    def misfit():
        optimiser.zero_grad()
        loss = ((module(angles) - where_the_hand_is(angles)) ** 2).mean()
        loss.backward()
        return loss

    optimiser.step(misfit)
    print(f"trained in PyTorch: the hand is off by {misfit().item() ** 0.5:.4f}")
    return module.requires_grad_(requires_grad=False)


MODULE = trained()

# --- the foreign code: NumPy in, NumPy out. torch.tensor copies: what JAX gives must not be written into --------------


def hand(angles):
    return MODULE(torch.tensor(angles)).numpy()


def hand_jvp(args, tangents):
    _, moved = torch.func.jvp(MODULE, (torch.tensor(args[0]),), (torch.tensor(tangents[0]),))
    return moved.numpy()


def hand_vjp(args, cotangents, needed):
    _, pull = torch.func.vjp(MODULE, torch.tensor(args[0]))
    return tuple(cotangent.numpy() for cotangent in pull(torch.tensor(cotangents)))


# The signature says that a module takes leading dimensions, as torch.nn's layers do. So a batch is one call.
in_torch = batchrules.host_call(
    hand, jax.ShapeDtypeStruct((HAND,), "float32"), signature="(n)->(m)", jvp=hand_jvp, vjp=hand_vjp
)


def in_jax(angles):
    """The twin: the same weights in JAX."""
    first, last = MODULE[0], MODULE[2]
    hidden = jnp.tanh(first.weight.numpy() @ angles + first.bias.numpy())
    return last.weight.numpy() @ hidden + last.bias.numpy()


def reach(arm, point, angles):
    """Six steps of Newton's method."""

    def step(angles, _):
        jacobian = jax.jacfwd(arm)(angles)
        return angles - jnp.linalg.solve(jacobian, arm(angles) - point), None

    return jax.lax.scan(step, angles, length=6)[0]


def height(arm, angles):
    return arm(angles)[1]


def main():
    rng = np.random.default_rng(0)
    wanted = jnp.asarray(rng.uniform(0.4, 1.2, size=(500, ANGLES)), dtype="float32")
    points = jax.vmap(in_jax)(wanted)
    starts = jnp.full_like(wanted, 0.8)

    with batchrules.record() as log:
        found = jax.jit(jax.vmap(lambda point, start: reach(in_torch, point, start)))(points, starts)
        slopes = jax.jit(jax.vmap(jax.grad(lambda angles: height(in_torch, angles))))(wanted)
        jacobians = jax.jit(jax.vmap(jax.jacrev(in_torch)))(wanted)
        jax.block_until_ready((found, slopes, jacobians))
    print(log.summary())

    np.testing.assert_allclose(jax.vmap(in_jax)(found), points, atol=1e-5)
    np.testing.assert_allclose(slopes, jax.vmap(jax.grad(lambda angles: height(in_jax, angles)))(wanted), atol=1e-4)
    np.testing.assert_allclose(jacobians, jax.vmap(jax.jacfwd(in_jax))(wanted), atol=1e-4)
    print("500 points are reached; slopes and Jacobians agree with the twin in JAX.")


if __name__ == "__main__":
    main()
