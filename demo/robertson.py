"""SciPy's stiff solver on the Robertson reaction, swept over rate constants and initial states.

The reaction (Robertson 1966; Hairer & Wanner, Solving ODEs II, IV.1), with concentrations a, b, c:

    a' = -k1 a + k3 b c        b' = k1 a - k3 b c - k2 b^2        c' = k2 b^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import largest_difference, times_in_turns
from scipy.integrate import solve_ivp
from scipy.sparse import csc_matrix
from table import Row, Section

import batchrules

Array = np.ndarray[Any, Any]

RATE_SETS, STATES = 6, 4
COUNT = RATE_SETS * STATES
T_END = 1e4
RTOL, ATOL = 1e-6, 1e-9
# Two integrations that took different steps agree to about the solver's tolerance, not to the last bit.
ALLOWED = 1e-5
STATE = jax.ShapeDtypeStruct((3,), "float64")
SIGNATURE = "(r),(s),()->(s)"
METHODS = ("sequential", "expand_dims", "broadcast_all", "legacy_vectorized")


def final_state(rates: Any, state: Any, t_end: Any) -> Array:
    """The concentrations at `t_end`; a batch is integrated as one block-structured system.

    Args:
        rates: (..., 3), the rate constants k1, k2, k3.
        state: (..., 3), the concentrations at time 0.
        t_end: (...), the time to integrate to.

    Returns:
        (..., 3), with the leading dimensions of the arguments broadcast together.
    """
    rates, state, t_end = np.asarray(rates), np.asarray(state), np.asarray(t_end)
    lead = np.broadcast_shapes(rates.shape[:-1], state.shape[:-1], t_end.shape)
    k = np.broadcast_to(rates, (*lead, 3)).reshape(-1, 3)
    start = np.broadcast_to(state, (*lead, 3)).reshape(-1)
    # Every element runs over the time 0..1 of its own, so that they share one clock.
    scale = np.broadcast_to(t_end, lead).reshape(-1, 1)
    solution = solve_ivp(
        lambda _, y: (scale * _velocity(k, y.reshape(-1, 3))).reshape(-1),
        (0.0, 1.0),
        start,
        method="BDF",
        jac=lambda _, y: _block_diagonal(scale[:, None] * _slopes(k, y.reshape(-1, 3))),
        rtol=RTOL,
        atol=ATOL,
    )
    if not solution.success:
        raise ArithmeticError(f"solve_ivp stopped early: {solution.message}")
    return solution.y[:, -1].reshape(*lead, 3)


def _velocity(k: Array, y: Array) -> Array:
    a, b, c = y.T
    lost, back, made = k[:, 0] * a, k[:, 2] * b * c, k[:, 1] * b * b
    return np.stack([back - lost, lost - back - made, made], axis=-1)


def _slopes(k: Array, y: Array) -> Array:
    """The Jacobian of each element: (elements, 3, 3)."""
    _, b, c = y.T
    k1, k2, k3 = k.T
    zero = np.zeros_like(b)
    first = np.stack([-k1, k3 * c, k3 * b], axis=-1)
    last = np.stack([zero, 2 * k2 * b, zero], axis=-1)
    return np.stack([first, -first - last, last], axis=-2)


def _block_diagonal(blocks: Array) -> Any:
    count = len(blocks)
    if count == 1:
        return blocks[0]
    rows = np.repeat(np.arange(3 * count).reshape(count, 1, 3), 3, axis=1)
    columns = np.arange(0, 9 * count + 1, 3)
    return csc_matrix((blocks.swapaxes(1, 2).reshape(-1), rows.reshape(-1), columns))


class Counted:
    """`final_state`, with a count of its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rates: Any, state: Any, t_end: Any) -> Array:
        self.calls += 1
        return final_state(rates, state, t_end)


def lines() -> Iterator[Section | Row]:
    """One row for each method; the last two sweep a grid by two nested vmaps."""
    yield Section(
        f"SciPy solve_ivp (BDF) on the Robertson reaction, {RATE_SETS} sets of rate constants x {STATES} "
        "initial states: host_call\n  calls: counted in Python; JAX: pure_callback with the same method"
    )
    rates, states = _sweep()
    pairs = jnp.repeat(rates, STATES, axis=0), jnp.tile(states, (RATE_SETS, 1))
    reference = np.stack([final_state(k, y, T_END) for k, y in zip(*map(np.asarray, pairs), strict=True)])
    for method in METHODS:
        yield _row(method, method, _in_pairs, pairs, reference)
    yield _row("auto, by its signature", "auto", _in_pairs, pairs, reference)
    yield _row("expand_dims, two vmaps", "expand_dims", _over_grid, (rates, states), reference)


def _sweep() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    rates = np.array([0.04, 3e7, 1e4]) * np.exp(rng.normal(scale=0.2, size=(RATE_SETS, 3)))
    started = rng.uniform(0.0, 0.3, size=STATES)
    states = np.stack([1.0 - started, np.zeros(STATES), started], axis=-1)
    return jnp.asarray(rates), jnp.asarray(states)


def _in_pairs(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(function, in_axes=(0, 0, None))


def _over_grid(function: Callable[..., Any]) -> Callable[..., Any]:
    over_states = jax.vmap(function, in_axes=(None, 0, None))
    return jax.vmap(over_states, in_axes=(0, None, None))


def _row(
    label: str, method: str, mapped: Callable[..., Any], swept: tuple[jax.Array, jax.Array], reference: Array
) -> Row:
    mine, theirs = Counted(), Counted()
    # The check of the first batch, on two elements called on their own, would be two calls that JAX does not make.
    called = batchrules.host_call(mine, STATE, method=method, signature=SIGNATURE, verify=False, name="final_state")
    ours = jax.jit(mapped(called))
    # JAX has no auto: its side is given the method that auto finds.
    peer_method = "expand_dims" if method == "auto" else method
    jax_own = jax.jit(mapped(lambda *args: jax.pure_callback(theirs, STATE, *args, vmap_method=peer_method)))
    args = (*swept, jnp.asarray(T_END))
    result = jax.block_until_ready(ours(*args))
    jax.block_until_ready(jax_own(*args))
    calls, jax_calls = mine.calls, theirs.calls
    ms, jax_ms = times_in_turns(lambda: ours(*args), lambda: jax_own(*args), rounds=3 if method == "sequential" else 15)
    return Row(
        method=label,
        calls=calls,
        expected_calls=COUNT if method == "sequential" else 1,
        jax_calls=jax_calls,
        ms=ms,
        jax_ms=jax_ms,
        difference=largest_difference(result.reshape(COUNT, 3), reference),
        allowed=0.0 if method == "sequential" else ALLOWED,
    )
