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
from batchrules._values import number_as

_PATH = "mask"


def masked(site: HostSite) -> HostSite:
    """The site whose first operand says whether an element is called. Where it is not, its outputs are zero."""
    return replace(site, paths=(_PATH, *site.paths), masks=1)


def as_bool(mask: Any, name: str) -> bool:
    """The mask as a Python bool, where JAX takes no part."""
    array = np.asarray(mask)
    _check(array.shape, array.dtype, name)
    return bool(array)


def checked_mask(mask: Any, name: str) -> Any:
    """The mask as a JAX array."""
    array = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    _check(array.shape, array.dtype, name)
    return as_operand(array)


def _check(shape: tuple[int, ...], dtype: Any, name: str) -> None:
    if shape != () or dtype != np.dtype("bool"):
        raise TypeError(
            f"{name}.where: mask must be a boolean scalar; got {dtype}{list(shape)}. It says whether ONE element is "
            "called; jax.vmap maps over it like over any argument."
        )


def checked_otherwise(otherwise: Any, site: HostSite) -> list[Any]:
    """What stands for each output where the mask is False; a number is a 0-d NumPy array here."""
    results = site.results
    if otherwise is None or _is_number(otherwise):
        return [_number(otherwise or 0, position, site) for position in range(len(results))]
    leaves, tree = _trees.flatten(otherwise)
    wanted = _trees.flatten(site.body.tree(range(len(results))))[1]
    if tree != wanted:
        raise TypeError(
            f"{site.name}.where: otherwise must be a tree like the result, {wanted}, a number, or None for zeros; got "
            f"{tree} (a * is an array)."
        )
    return [_like(leaf, position, site) for position, leaf in enumerate(leaves)]


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | np.bool_ | np.number)


def _number(value: Any, position: int, site: HostSite) -> np.ndarray[Any, Any]:
    plain = value.item() if isinstance(value, np.generic) else value
    result = site.results[position]
    try:
        return number_as(plain, result.dtype)
    except ValueError as error:
        raise TypeError(
            f"{site.name}.where: otherwise is {value!r}, but output {result.path or position!r} has dtype "
            f"{result.dtype}, and {error}."
        ) from error


def _like(leaf: Any, position: int, site: HostSite) -> Any:
    if _is_number(leaf):
        return _number(leaf, position, site)
    result = site.results[position]
    found = f"a {type(leaf).__name__}"
    if _trees.is_array(leaf):
        if tuple(leaf.shape) == result.shape and leaf.dtype == result.dtype:
            return leaf
        found = f"{leaf.dtype}{list(leaf.shape)}"
    raise TypeError(
        f"{site.name}.where: otherwise must be like the result: output {result.path or position!r} is "
        f"{result.dtype}{list(result.shape)}, and otherwise has {found}."
    )


def in_jax(others: list[Any], site: HostSite) -> list[Any]:
    """What stands for each output, as JAX arrays of its shape."""
    return [jnp.broadcast_to(as_operand(x), r.shape) for x, r in zip(others, site.results, strict=True)]


def in_numpy(others: list[Any], site: HostSite) -> Any:
    """What stands for the result, where JAX takes no part."""
    filled = [np.broadcast_to(np.asarray(x), r.shape).copy() for x, r in zip(others, site.results, strict=True)]
    return site.body.tree(filled)
