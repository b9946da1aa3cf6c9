"""The elements of a batch of finite differences whose directions are all zeros: they need no calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from batchrules import _batch, _host_where
from batchrules._batch import Axes
from batchrules._host_elements import Array
from batchrules._host_site import HostSite


def with_all_axes(axes: Axes, operand: int, array: Array) -> Array:
    """An operand with every axis present."""
    aligned = array.reshape(_batch.aligned_shape(axes, operand, array.shape))
    element = _batch.element_shape(axes, operand, array.shape)
    return np.broadcast_to(aligned, (*_batch.sizes(axes), *element))


def nonzero_elements(vectors: Iterable[Array], sizes: tuple[int, ...]) -> Array | None:
    """For each element, whether any of its directions is not zero; None where all are such."""
    nonzero = np.zeros(sizes, np.bool_)
    for vector in vectors:
        nonzero |= vector.astype(np.bool_).any(axis=tuple(range(len(sizes), vector.ndim)))
    return None if nonzero.all() else nonzero


def masked_batch(
    site: HostSite, axes: Axes, arrays: Sequence[Array], wanted: Array
) -> tuple[HostSite, Axes, list[Array]]:
    """The batch with a mask, as `where` has it: only for wanted elements is the function called.

    Args:
        site: The call site, with a mask of its own or without.
        axes: The recorded axes.
        arrays: The operands, with their mapped axes in front.
        wanted: One bool for each element along the last axes.
    """
    mask = np.broadcast_to(wanted, _batch.sizes(axes))
    if site.masks:
        mask = mask & with_all_axes(axes, 0, arrays[0])
    given = tuple(replace(axis, in_batched=(True, *axis.in_batched[site.masks :])) for axis in axes)
    return (site if site.masks else _host_where.masked(site)), given, [mask, *arrays[site.masks :]]


def zero_elsewhere(output: Array, wanted: Array) -> Array:
    """An output that leads with all axes, zero where an element is not wanted."""
    aligned = wanted.reshape(wanted.shape + (1,) * (output.ndim - wanted.ndim))
    return np.where(aligned, output, np.zeros((), output.dtype))
