"""A registered primitive against JAX's own rule on the same `ffi_call`: run time and tracing time.

The primitive is `ffi_call`'s own, on jaxlib's LAPACK kernel for a QR factorisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Prepared, Row, median_seconds, ratio_row, show

import batchrules

TARGET = "lapack_sgeqrf_ffi"
METHODS = ("sequential", "sequential_unrolled", "expand_dims", "broadcast_all", "legacy_vectorized")
COUNT, SIZE = 64, 16


def factorise(matrix: jax.Array, method: str | None) -> Any:
    factors = jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
    scales = jax.ShapeDtypeStruct((matrix.shape[-1],), matrix.dtype)
    call = jax.ffi.ffi_call(
        TARGET, (factors, scales), input_layouts=[(1, 0)], output_layouts=[(1, 0), (0,)], vmap_method=method
    )
    return call(matrix)


def rows() -> Iterator[Row]:
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=(COUNT, SIZE, SIZE)), dtype="float32")
    jnp.linalg.qr(matrices[0])  # the first use makes jaxlib load its LAPACK
    primitive = jax.make_jaxpr(lambda x: factorise(x, "sequential"))(matrices[0]).eqns[0].primitive
    for method in METHODS:
        yield from _rows(method, matrices, primitive)


def _rows(method: str, matrices: jax.Array, primitive: Any) -> Iterator[Row]:
    def install() -> None:
        batchrules.register(primitive, method, update_params=batchrules.ffi_update_params)

    def remove() -> None:
        batchrules.unregister(primitive)

    def trace(vmap_method: str | None) -> Any:
        # A new function each time: JAX would find the old one's trace.
        return jax.jit(jax.vmap(lambda matrix: factorise(matrix, vmap_method))).trace(matrices)

    trace_theirs = functools.partial(trace, method)
    trace_ours = functools.partial(trace, None)  # JAX's own rule would refuse this

    theirs = trace_theirs().lower().compile()
    install()
    ours = trace_ours().lower().compile()
    remove()
    for mine, other in zip(ours(matrices), theirs(matrices), strict=True):
        assert np.array_equal(mine, other)
    ran = median_seconds({"ours": lambda: ours(matrices), "theirs": lambda: theirs(matrices)}, rounds=301, repeats=5)
    traced = median_seconds({"ours": Prepared(install, trace_ours, remove), "theirs": trace_theirs}, rounds=201)
    peer = f"ffi_call's own, {method}"
    yield ratio_row(f"registered, {method}, run", peer, ran["ours"], ran["theirs"], 1.05)
    yield ratio_row(f"registered, {method}, tracing", peer, traced["ours"], traced["theirs"], 1.05)


if __name__ == "__main__":
    show(rows())
