"""A C++ kernel built from source (kernel.cc), wrapped with `device_call`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import largest_difference, times_in_turns
from scipy.linalg import solve_banded
from table import Row, Section

import batchrules

SOURCE = Path(__file__).with_name("kernel.cc")
TARGET = "batchrules_demo_tridiagonal"
METHODS = ("sequential", "sequential_unrolled", "expand_dims", "broadcast_all", "legacy_vectorized")
COUNT, SIZE = 64, 64
IN_AXES = (None, 0, None, 0)  # of lower, diagonal, upper, right-hand side
ALLOWED = 1e-12


def tridiagonal(*operands: jax.Array, vmap_method: str | None = None) -> jax.Array:
    """Solve tridiagonal systems: lower, diagonal, upper, right-hand side, each (n) or (lead..., n)."""
    lead = jnp.broadcast_shapes(*(operand.shape[:-1] for operand in operands))
    shape = jax.ShapeDtypeStruct((*lead, operands[-1].shape[-1]), operands[-1].dtype)
    return jax.ffi.ffi_call(TARGET, shape, vmap_method=vmap_method)(*operands)


def lines() -> Iterator[Section | Row | str]:
    """One row for each method, or one line that says why there are none."""
    compiler = _find_compiler()
    if compiler is None:
        yield "The C++ kernel is left out. No working C++17 compiler found (CXX, c++, g++, clang++)."
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernel.so")
        subprocess.run(_command(compiler, SOURCE, library), check=True)
        calls_made = _load(library)
    yield Section(
        f"C++ tridiagonal solver built from demo/kernel.cc, {COUNT} systems of {SIZE}, two of four operands "
        "mapped: device_call\n  calls: counted by the kernel itself; JAX: ffi_call with the same method"
    )
    systems = _systems()
    reference = _one_by_one(systems)
    difference = largest_difference(reference, _by_scipy(systems))
    if not difference <= ALLOWED:
        raise ArithmeticError(f"The kernel itself is wrong: {difference:.1e} from scipy.linalg.solve_banded.")
    for method in (*METHODS, "auto"):
        yield _row(method, systems, reference, calls_made)


def _find_compiler() -> str | None:
    """A compiler that makes a shared library; one on PATH may be a stub that only asks to be installed."""
    named = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = (shutil.which(name) for name in named if name)
    return next((path for path in found if path and _works(path)), None)


def _works(compiler: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cc")
        probe.write_text("#include <atomic>\n")
        made = subprocess.run(_command(compiler, probe, Path(folder, "probe.so")), check=False, capture_output=True)
    return made.returncode == 0


def _command(compiler: str, source: Path, library: Path) -> list[str]:
    # As system headers, JAX's own give no warnings.
    headers = ("-isystem", jax.ffi.include_dir())
    return [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", *headers, str(source), "-o", str(library)]


def _load(path: Path) -> Callable[[], int]:
    """Register the kernel with JAX; gives the function that tells how often it was called."""
    library = ctypes.cdll.LoadLibrary(str(path))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.TridiagonalHandler), platform="cpu")
    library.CallsMade.restype = ctypes.c_int64
    return library.CallsMade


def _systems() -> tuple[jax.Array, ...]:
    """Implicit steps of diffusion with decay: one stencil, and a decay rate and a source for each element."""
    rng = np.random.default_rng(0)
    off_diagonal = np.full(SIZE, -1.0)
    diagonal = 2.0 + rng.uniform(0.1, 1.0, size=(COUNT, 1)) * np.ones(SIZE)
    source = rng.normal(size=(COUNT, SIZE))
    return tuple(jnp.asarray(x) for x in (off_diagonal, diagonal, off_diagonal, source))


def _elements(systems: tuple[jax.Array, ...]) -> Iterator[tuple[jax.Array, ...]]:
    for i in range(COUNT):
        yield tuple(x if axis is None else x[i] for x, axis in zip(systems, IN_AXES, strict=True))


def _one_by_one(systems: tuple[jax.Array, ...]) -> np.ndarray[Any, Any]:
    alone = jax.jit(tridiagonal)
    return np.stack([np.asarray(alone(*element)) for element in _elements(systems)])


def _by_scipy(systems: tuple[jax.Array, ...]) -> np.ndarray[Any, Any]:
    banded = ((np.stack([np.roll(u, 1), d, np.roll(lo, -1)]), b) for lo, d, u, b in _elements(systems))
    return np.stack([solve_banded((1, 1), bands, rhs) for bands, rhs in banded])


def _row(
    method: str,
    systems: tuple[jax.Array, ...],
    reference: np.ndarray[Any, Any],
    calls_made: Callable[[], int],
) -> Row:
    wrap = batchrules.device_call(method=method, signature="(n),(n),(n),(n)->(n)")
    ours = jax.jit(jax.vmap(wrap(tridiagonal), in_axes=IN_AXES))
    # JAX has no auto: its side is given the method that auto finds.
    peer_method = "expand_dims" if method == "auto" else method
    peer = jax.vmap(lambda *operands: tridiagonal(*operands, vmap_method=peer_method), in_axes=IN_AXES)
    jax_own = jax.jit(peer)
    counts = [calls_made()]
    for function in (ours, jax_own):
        jax.block_until_ready(function(*systems))
        counts.append(calls_made())
    ms, jax_ms = times_in_turns(lambda: ours(*systems), lambda: jax_own(*systems), rounds=200)
    return Row(
        method="auto, by its signature" if method == "auto" else method,
        calls=counts[1] - counts[0],
        expected_calls=COUNT if method.startswith("sequential") else 1,
        jax_calls=counts[2] - counts[1],
        ms=ms,
        jax_ms=jax_ms,
        difference=largest_difference(ours(*systems), reference),
        allowed=ALLOWED,
    )
