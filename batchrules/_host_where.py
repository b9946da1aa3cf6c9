"""`f.where(mask, ...)`: a call that is made only where a mask is True."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchrules import _trees
from batchrules._host_site import HostSite
from batchrules._placement import as_operand

_PATH = "mask"


def masked(site: HostSite) -> HostSite:
    """The site whose first operand says whether an element is called. Where it is not, its outputs are zero."""
    return replace(site, paths=(_PATH, *site.paths), masks=1)


def as_bool(mask: Any, name: str) -> bool:
    """The mask as a Python bool, where JAX takes no part."""
    _check(np.shape(mask), np.result_type(mask), name)
    return bool(mask)


def checked_mask(mask: Any, name: str) -> Any:
    """The mask as a JAX array."""
    array = as_operand(mask if isinstance(mask, jax.Array) else np.asarray(mask))
    _check(array.shape, array.dtype, name)
    return array


def _check(shape: tuple[int, ...], dtype: Any, name: str) -> None:
    if shape != () or dtype != np.dtype("bool"):
        raise TypeError(
            f"{name}.where: mask must be a boolean scalar; got {dtype}{list(shape)}. It says whether ONE element is "
            "called; jax.vmap maps over it like over any argument."
        )


def checked_otherwise(otherwise: Any, site: HostSite) -> list[Any]:
    """What stands for each output where the mask is False."""
    results = site.results
    if otherwise is None:
        return [jnp.zeros(result.shape, result.dtype) for result in results]
    if isinstance(otherwise, bool | int | float | complex):
        return [jnp.full(result.shape, otherwise, result.dtype) for result in results]
    leaves, tree = _trees.flatten(otherwise)
    wanted = _trees.flatten(site.body.tree(range(len(results))))[1]
    if tree != wanted:
        raise TypeError(
            f"{site.name}.where: otherwise must be a tree like the result, {wanted}, a number, or None for zeros; got "
            f"{tree} (a * is an array)."
        )
    return [_like(leaf, position, site) for position, leaf in enumerate(leaves)]


def _like(leaf: Any, position: int, site: HostSite) -> Any:
    result = site.results[position]
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return jnp.full(result.shape, leaf, result.dtype)
    array = as_operand(leaf)
    if array.shape != result.shape or array.dtype != result.dtype:
        raise TypeError(
            f"{site.name}.where: otherwise must be like the result: output {result.path or position!r} is "
            f"{result.dtype}{list(result.shape)}, and otherwise has {array.dtype}{list(array.shape)}."
        )
    return array


def without_jax(results: Any, site: HostSite, otherwise: Any) -> Any:
    """The result where JAX takes no part; `results` is None where the mask is False."""
    if results is not None:
        return results
    if otherwise is None or isinstance(otherwise, bool | int | float | complex):
        filled = [np.full(result.shape, otherwise or 0, result.dtype) for result in site.results]
        return site.body.tree(filled)
    return otherwise
