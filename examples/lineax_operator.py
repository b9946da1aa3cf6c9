"""Linear systems whose matrix only foreign code knows: Lineax's conjugate gradients around SciPy's sparse products.

Heat flows through a plate of 20 x 20 cells, whose materials conduct differently. The code that assembles the plate
gives products with its matrix, and no more. Conjugate gradients solve for the temperatures of 12 plates at once, and
the solution is differentiable: where must a plate conduct better to keep its hottest cell cool?
"""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from scipy.sparse import coo_array

import batchrules

jax.config.update("jax_enable_x64", True)

SIDE, PLATES = 20, 12
CELLS = SIDE * SIDE


def walls():
    """The matrix of differences over each wall between two cells, and to a cold frame around the plate."""
    cells = np.arange(CELLS).reshape(SIDE, SIDE)
    padded = np.pad(cells, 1, constant_values=-1)
    left = np.concatenate([padded[1:-1, :-1].ravel(), padded[:-1, 1:-1].ravel()])
    right = np.concatenate([padded[1:-1, 1:].ravel(), padded[1:, 1:-1].ravel()])
    rows = np.arange(left.size)
    entries = [(rows[side >= 0], side[side >= 0], sign) for side, sign in ((left, -1.0), (right, 1.0))]
    row, column = (np.concatenate([entry[i] for entry in entries]) for i in (0, 1))
    value = np.concatenate([np.full(rows.size, sign) for rows, _, sign in entries])
    return coo_array((value, (row, column)), shape=(left.size, CELLS)).tocsr()


WALLS = walls()

# --- the foreign code: the heat that leaves each cell. Its arguments may be rows of a batch ---------------------------


def outflow(temperature, conductivity):
    return (conductivity * (temperature @ WALLS.T)) @ WALLS


def outflow_jvp(args, tangents):
    (temperature, conductivity), (warmer, better) = args, tangents
    moved = 0.0 if warmer is None else outflow(warmer, conductivity)
    return moved if better is None else moved + outflow(temperature, better)


def outflow_vjp(args, cotangents, needed):
    temperature, conductivity = args
    by_conductivity = (temperature @ WALLS.T) * (cotangents @ WALLS.T) if needed[1] else None
    return outflow(cotangents, conductivity), by_conductivity


foreign = batchrules.host_call(
    outflow, lambda temperature, _: temperature, signature="(n),(w)->(n)", jvp=outflow_jvp, vjp=outflow_vjp
)

# --- JAX and Lineax ---------------------------------------------------------------------------------------------------


def by_lineax(conductivity, heating):
    operator = lx.FunctionLinearOperator(
        lambda temperature: foreign(temperature, conductivity),
        jax.eval_shape(lambda: heating),
        lx.positive_semidefinite_tag,
    )
    return lx.linear_solve(operator, heating, lx.CG(rtol=1e-10, atol=1e-10)).value


def by_matrix(conductivity, heating):
    """The twin, which needs the matrix."""
    dense = jnp.asarray(WALLS.toarray())
    return jnp.linalg.solve(dense.T @ (conductivity[:, None] * dense), heating)


def hottest(solve, conductivity, heating):
    """A smooth maximum of the temperatures."""
    return jax.nn.logsumexp(20 * solve(conductivity, heating)) / 20


def main():
    rng = np.random.default_rng(0)
    conductivities = jnp.asarray(np.exp(0.5 * rng.normal(size=(PLATES, WALLS.shape[0]))))
    heating = jnp.zeros(CELLS).at[CELLS // 3].set(1.0)

    def program(solve):
        return jax.jit(jax.vmap(jax.value_and_grad(functools.partial(hottest, solve)), in_axes=(0, None)))

    with batchrules.record() as log:
        peaks, gradients = jax.block_until_ready(program(by_lineax)(conductivities, heating))
    products = sum(call.elements for call in log.calls if call.purpose == "batch")
    print(f"{PLATES} plates, solved and differentiated: {products} products, in {len(log.calls)} foreign calls")
    best = int(jnp.argmin(gradients[0]))
    print(f"plate 0 peaks at {peaks[0]:.3f}; it helps most to conduct better at wall {best}: {gradients[0, best]:.4f}")

    twin_peaks, twin_gradients = program(by_matrix)(conductivities, heating)
    np.testing.assert_allclose(peaks, twin_peaks, rtol=1e-7)
    np.testing.assert_allclose(gradients, twin_gradients, atol=1e-7)
    print("Peaks and gradients agree with the twin, which has the matrix.")


if __name__ == "__main__":
    main()
