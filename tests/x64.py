"""64-bit types on and off. `jax.enable_x64`, a public context for it, came with jax 0.8."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def x64(enabled: bool) -> Iterator[None]:  # on or off is all there is to say
    """Inside, 64-bit types are as said; afterwards they are on, as in all tests."""
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", True)
