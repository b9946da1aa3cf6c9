"""A SciPy ODE solver as a JAX function: a sweep over its parameters in two processes, with gradients by its adjoint.

Predators and prey (Lotka-Volterra) are counted at 20 times. How well do 24 guesses at the four rates explain the
counts, and which way should each guess move? SciPy integrates; JAX maps and differentiates.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import batchrules

jax.config.update("jax_enable_x64", True)

TIMES = np.linspace(0.5, 10.0, 20)
START = np.array([1.0, 0.5])
TRUE_RATES = np.array([1.1, 0.8, 0.9, 0.6])
ACCURACY = {"method": "DOP853", "rtol": 1e-9, "atol": 1e-10}


# --- the foreign code: it knows nothing of JAX, and takes one element ------------------------------------------------


def change(state, rates):
    prey, predators = state
    return prey * (rates[0] - rates[1] * predators), predators * (rates[2] * prey - rates[3])


def simulate(rates):
    """Both populations at each of TIMES: (20, 2)."""
    solution = solve_ivp(lambda _, state: change(state, rates), (0.0, TIMES[-1]), START, t_eval=TIMES, **ACCURACY)
    return solution.y.T


def adjoint(args, cotangents, needed, outputs):
    """Integrate backwards in time: the state, its adjoint (a, b), and the gradient gathered so far."""
    (rates,) = args

    def backwards(_, packed):
        prey, predators, a, b, *_ = packed
        by_prey = a * (rates[0] - rates[1] * predators) + b * rates[2] * predators
        by_predators = -a * rates[1] * prey + b * (rates[2] * prey - rates[3])
        by_rates = a * prey, -a * prey * predators, b * prey * predators, -b * predators
        return [*change((prey, predators), rates), -by_prey, -by_predators, *(-x for x in by_rates)]

    packed = np.zeros(8)
    for i in reversed(range(TIMES.size)):
        packed[:2], packed[2:4] = outputs[i], packed[2:4] + cotangents[i]
        until = TIMES[i - 1] if i else 0.0
        packed = solve_ivp(backwards, (TIMES[i], until), packed, **ACCURACY).y[:, -1]
    return (packed[4:],)


# --- the twin: the same in JAX, by 40 Runge-Kutta steps between two counts -------------------------------------------


def twin(rates):
    def step(state, _):
        dt = TIMES[0] / 40
        k1 = jnp.stack(change(state, rates))
        k2 = jnp.stack(change(state + dt / 2 * k1, rates))
        k3 = jnp.stack(change(state + dt / 2 * k2, rates))
        k4 = jnp.stack(change(state + dt * k3, rates))
        return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def between_counts(state, _):
        state, _ = jax.lax.scan(step, state, length=40)
        return state, state

    return jax.lax.scan(between_counts, jnp.asarray(START), length=TIMES.size)[1]


def sweep(simulator, counts, guesses):
    """Misfit and its gradient, for each guess."""
    misfit_of = jax.value_and_grad(lambda rates: jnp.mean((simulator(rates) - counts) ** 2))
    return jax.block_until_ready(jax.jit(jax.vmap(misfit_of))(guesses))


def timed_sweep(words, simulator, counts, guesses):
    with batchrules.record() as log:
        start = time.perf_counter()
        result = sweep(simulator, counts, guesses)
    calls = sum(call.endpoint == "call" for call in log.calls)
    workers = len({call.worker for call in log.calls})
    print(f"{words:20} {calls:4} integrations, {len(log.calls) - calls:3} adjoints,", end=" ")
    print(f"{workers} processes, {time.perf_counter() - start:4.1f} s")
    return result


def main():
    rng = np.random.default_rng(0)
    counts = simulate(TRUE_RATES) * np.exp(0.05 * rng.normal(size=(TIMES.size, 2)))
    guesses = jnp.asarray(TRUE_RATES * np.exp(0.2 * rng.normal(size=(24, 4))))
    populations = jax.ShapeDtypeStruct((TIMES.size, 2), "float64")

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        by_adjoint = batchrules.host_call(simulate, populations, vjp=adjoint, pass_outputs=True, executor=pool)
        by_difference = batchrules.host_call(
            simulate, populations, executor=pool, **batchrules.finite_difference(simulate)
        )
        sweep(by_adjoint, counts, guesses[:2])  # starts the processes
        misfits, gradients = timed_sweep("adjoint", by_adjoint, counts, guesses)
        _, rough = timed_sweep("finite differences", by_difference, counts, guesses)

    best = jnp.argmin(misfits)
    print(f"best of {len(guesses)}: rates {np.round(guesses[best], 2)}, misfit {misfits[best]:.4f},")
    print(f"             to move along {np.round(-gradients[best], 3)} (the true rates are {TRUE_RATES})")

    twin_misfits, twin_gradients = sweep(twin, counts, guesses)
    np.testing.assert_allclose(misfits, twin_misfits, rtol=1e-6)
    np.testing.assert_allclose(gradients, twin_gradients, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(rough, twin_gradients, atol=1e-4, rtol=1e-4)
    print("Misfits and gradients agree with the twin in JAX.")


if __name__ == "__main__":
    main()
