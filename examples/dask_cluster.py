"""A sweep on a Dask cluster: the ground states of disordered crystals, by SciPy's sparse eigenvalue solver.

An electron on a lattice of 8 x 8 x 8 sites sees a random potential. Its lowest energy comes from ARPACK, which JAX
does not have; the gradient is where the electron is found (Hellmann-Feynman), so it costs no second solve. The cluster
is two processes on this machine, over TCP. For a real one only the client changes: `Client("tcp://scheduler:8786")`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from dask.distributed import Client, LocalCluster
from scipy.sparse import diags_array, eye_array, kron
from scipy.sparse.linalg import eigsh

import batchrules

jax.config.update("jax_enable_x64", True)

SIDE, CRYSTALS = 8, 24
SITES = SIDE**3
RESULT = {
    "energy": jax.ShapeDtypeStruct((), "float64"),
    # The solver does not differentiate the density; to ask for it is an error that says so.
    "density": batchrules.ArraySpec((SITES,), "float64", differentiable=False),
}


def lattice():
    """The kinetic energy: the Laplacian in three directions."""
    chain, eye = (
        diags_array([-np.ones(SIDE - 1), np.full(SIDE, 2.0), -np.ones(SIDE - 1)], offsets=[-1, 0, 1]),
        eye_array(SIDE),
    )
    return kron(kron(chain, eye), eye) + kron(kron(eye, chain), eye) + kron(kron(eye, eye), chain)


def ground_state(potential):
    """The lowest energy, and the probability to find the electron at each site."""
    hamiltonian = (lattice() + diags_array(potential)).tocsc()
    energies, states = eigsh(hamiltonian, k=1, sigma=0.0, v0=np.ones(SITES))
    return {"energy": energies[0], "density": states[:, 0] ** 2}


def hellmann_feynman(args, cotangents, needed, outputs):
    return (cotangents["energy"] * outputs["density"],)


def twin(potential):
    """The energy in JAX, by a dense solver."""
    return jnp.linalg.eigvalsh(lattice().toarray() + jnp.diag(potential))[0]


def main():
    strengths = jnp.linspace(0.0, 1.0, CRYSTALS)
    disorder = jnp.asarray(np.random.default_rng(0).uniform(size=(CRYSTALS, SITES)))

    # No dashboard, so that the example needs no free port of a known number. Leave that out, and watch the tasks run.
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        electron = batchrules.host_call(
            ground_state, RESULT, vjp=hellmann_feynman, pass_outputs=True, executor=client.get_executor()
        )

        def energy(strength, sites):
            return electron(strength * sites)["energy"]

        program = jax.jit(jax.vmap(jax.value_and_grad(energy, argnums=(0, 1))))
        jax.block_until_ready(program(strengths[:2], disorder[:2]))  # the workers import batchrules and SciPy
        with batchrules.record() as log:
            energies, gradients = jax.block_until_ready(program(strengths, disorder))

    workers = {call.worker for call in log.calls}
    print(f"{CRYSTALS} energies and gradients on {cluster.scheduler_address.split(':')[0]}, {len(workers)} workers:")
    print(log.summary())
    print(f"Energies from {energies[0]:.4f}, without disorder, to {energies[-1]:.4f}.")

    dense = jax.jit(jax.value_and_grad(lambda strength, sites: twin(strength * sites), argnums=(0, 1)))
    for i in (1, CRYSTALS - 1):  # the dense solver is slow
        energy, slopes = dense(strengths[i], disorder[i])
        np.testing.assert_allclose(energies[i], energy, atol=1e-10)
        np.testing.assert_allclose(gradients[0][i], slopes[0], atol=1e-8)
        np.testing.assert_allclose(gradients[1][i], slopes[1], atol=1e-8)
    print("Energies and gradients agree with the twin in JAX.")


if __name__ == "__main__":
    main()
