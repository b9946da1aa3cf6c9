"""A real Tesseract is started, called by each method, and the requests it got are counted.

python demo/run.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchrules_tesseract import apply_tesseract
from tesseracts.serving import Served, serve

jax.config.update("jax_enable_x64", True)  # noqa: FBT003  # the interface of JAX

ELEMENTS = 16
SLOW = 0.02


def main() -> None:
    print("A solver that takes 20 ms a call, served by tesseract-runtime with 4 workers:")
    with serve("solver", workers=4) as served:
        xs = jnp.linspace(0.0, 1.0, ELEMENTS * 3).reshape(ELEMENTS, 3)
        print(f"\n  {'program':44} {'ms':>6}  requests")
        for method, more in (("sequential", {}), ("sequential", {"executor": 16}), ("expand_dims", {}), ("auto", {})):
            words = " ".join([f"vmap, {method}", *(f"{key}={value}" for key, value in more.items())])
            show(words, served, jax.vmap(solver(served.url, vmap_method=method, **more)), xs, xs**2 + 1.0)
        nest = jax.vmap(jax.vmap(solver(served.url, vmap_method="auto")))
        show("vmap of vmap, auto", served, nest, xs.reshape(4, 4, 3), (xs**2 + 1.0).reshape(4, 4, 3))
        gradient = jax.vmap(jax.grad(lambda x: solver(served.url, vmap_method="auto")(x).sum()))
        show("vmap of grad, auto", served, gradient, xs, 2.0 * xs)
        jacobian = jax.jacrev(solver(served.url, vmap_method="auto"))
        show("jacrev, no jacobian endpoint, auto", served, jacobian, xs[0], jnp.diag(2.0 * xs[0]))


def solver(url: str, **options: Any) -> Callable[[Any], Any]:
    """The Tesseract as a function of its input."""
    return lambda x: apply_tesseract(url, {"x": x, "delay": SLOW}, **options)["y"]


def show(words: str, served: Served, function: Callable[..., Any], x: Any, expected: Any) -> None:
    """Run a program twice, check it, and count the requests of the second run."""
    program = jax.jit(function)
    jax.block_until_ready(program(x))
    served.forget()
    start = time.perf_counter()
    result = jax.block_until_ready(program(x))
    milliseconds = (time.perf_counter() - start) * 1e3
    if not jnp.allclose(result, expected):
        raise SystemExit(f"{words}: wrong numbers")
    counts = ", ".join(f"{count} {endpoint}" for endpoint, count in sorted(served.calls().items()))
    print(f"  {words:44} {milliseconds:6.0f}  {counts}")


if __name__ == "__main__":
    main()
