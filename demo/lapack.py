"""jaxlib's own LAPACK kernel, with batchrules' rules in place of JAX's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import custom_calls, largest_difference, times_in_turns
from table import Row, Section

import batchrules

TARGET = "lapack_dgeqrf_ffi"
METHODS = ("sequential", "sequential_unrolled", "expand_dims", "broadcast_all", "legacy_vectorized")
COUNT, ROWS, COLUMNS = 64, 24, 16
ALLOWED = 1e-12


def qr_factors(matrix: jax.Array, method: str | None) -> Sequence[jax.Array]:
    """Householder QR by LAPACK's dgeqrf: R with the reflectors below it, and their scales."""
    rows, columns = matrix.shape
    factors = jax.ShapeDtypeStruct((rows, columns), matrix.dtype)
    scales = jax.ShapeDtypeStruct((min(rows, columns),), matrix.dtype)
    call = jax.ffi.ffi_call(
        TARGET,
        (factors, scales),
        input_layouts=[(1, 0)],  # Fortran order: LAPACK's
        output_layouts=[(1, 0), (0,)],
        input_output_aliases={0: 0},
        vmap_method=method,
    )
    return call(matrix)


def lines() -> Iterator[Section | Row]:
    """One row for each method."""
    yield Section(
        f"LAPACK QR through jax.ffi ({TARGET}), {COUNT} matrices of {ROWS} x {COLUMNS}: "
        "register(ffi_call_p, ...)\n"
        "  calls: custom calls in the compiled program, times the trips of the loops around"
    )
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, ROWS, COLUMNS)))
    jnp.linalg.qr(matrices[0])  # the first use makes jaxlib load its LAPACK
    one_by_one = jax.jit(lambda matrix: qr_factors(matrix, "sequential"))
    reference = jax.tree.map(lambda *parts: np.stack(parts), *[one_by_one(matrix) for matrix in matrices])
    for method in METHODS:
        yield _row(method, matrices, reference)


def _row(method: str, matrices: jax.Array, reference: Any) -> Row:
    jax_own = _compiled(method, matrices)
    primitive = _ffi_call_primitive(matrices[0])
    batchrules.register(primitive, method, update_params=batchrules.ffi_update_params)
    try:
        ours = _compiled(None, matrices)  # JAX's own rule would refuse this
    finally:
        batchrules.unregister(primitive)
    difference = largest_difference(ours(matrices), reference)
    ms, jax_ms = times_in_turns(lambda: ours(matrices), lambda: jax_own(matrices), rounds=200)
    return Row(
        method=method,
        calls=custom_calls(ours, TARGET),
        expected_calls=COUNT if method.startswith("sequential") else 1,
        jax_calls=custom_calls(jax_own, TARGET),
        ms=ms,
        jax_ms=jax_ms,
        difference=difference,
        allowed=ALLOWED,
    )


def _compiled(method: str | None, matrices: jax.Array) -> jax.stages.Compiled:
    # A new function each time: JAX would reuse the program that it traced under the other rule.
    mapped: Callable[[jax.Array], Sequence[jax.Array]] = jax.vmap(lambda matrix: qr_factors(matrix, method))
    return jax.jit(mapped).lower(matrices).compile()


def _ffi_call_primitive(matrix: jax.Array) -> Any:
    """The primitive behind `jax.ffi.ffi_call`, which has no public name."""
    return jax.make_jaxpr(lambda x: qr_factors(x, "sequential"))(matrix).eqns[0].primitive
