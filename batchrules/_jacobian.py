"""Derivatives by a Jacobian: when one serves, the site that gives it, and its contraction with (co)tangents.

Written once for NumPy and for JAX: `xp` is the module whose arrays these are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from batchrules import _batch
from batchrules._batch import Axes, OutAxis
from batchrules._recording import Result
from batchrules._sites import Site, select

S = TypeVar("S", bound=Site)


def serves(site: Site, axes: Axes) -> bool:
    """Whether a derived site is served by the Jacobian of its base.

    It is where the endpoint asked for is missing; and where (co)tangents are mapped over unmapped primals, since one
    Jacobian is one call.
    """
    origin = site.origin
    if origin is None or origin.base.body.endpoints.jacobian is None:
        return False
    endpoints = origin.base.body.endpoints
    if (endpoints.vjp if origin.cotangent else endpoints.jvp) is None:
        return True
    return bool(axes) and not primal_axes(site, axes)


def primal_axes(site: Site, axes: Axes) -> Axes:
    """The axes along which the fixed operands of a derived site are mapped, without its linear ones."""
    fixed = len(site.paths) - site.linear
    return tuple(
        replace(axis, in_batched=axis.in_batched[:fixed], outputs=None) for axis in axes if any(axis.in_batched[:fixed])
    )


def jacobian_site(site: S, axes: Axes, operands: Sequence[Any]) -> S:
    """The site of the Jacobian that serves a derived site.

    Its operands are the fixed ones, its outputs the blocks: for each output in use, one for each argument in use.
    `operands` are the arrays of the derived site, or anything with their shapes and dtypes.
    """
    origin = site.origin
    if origin is None:
        raise TypeError(f"{site.name} is no derivative, so no Jacobian serves it.")
    base: S = origin.base  # pyright: ignore[reportAssignmentType]  # a site is derived from one of its own kind
    inputs = _inputs(site, axes, operands)
    outputs = select(base.results, origin.outputs)
    request = replace(
        base.request,
        batched=base.request.batched | {i - base.masks for i, wanted in enumerate(origin.primals) if wanted},
        followers=base.request.followers + base.passed,
    )
    return replace(
        base,
        body=base.jacobian_body(origin.primals[base.masks :], origin.outputs),
        name=f"{base.name} (jacobian)",
        paths=site.paths[: len(site.paths) - site.linear],
        results=tuple(_block(output, argument) for output in outputs for argument in inputs),
        request=request,
        origin=None,
        linear=0,
    )


def _inputs(site: Site, axes: Axes, operands: Sequence[Any]) -> list[Result]:
    """The arguments that a Jacobian is taken in, as one element sees them."""
    if site.is_cotangent:
        return [Result(r.path.removeprefix("cotangent of "), r.shape, r.dtype) for r in site.results]
    first = len(operands) - site.linear
    paths = select(site.origin.base.paths, site.origin.primals) if site.origin else []
    # A tangent has the shape and the dtype of its primal.
    return [
        Result(path, _batch.element_shape(axes, first + k, operands[first + k].shape), operands[first + k].dtype)
        for k, path in enumerate(paths)
    ]


def _block(output: Result, argument: Result) -> Result:
    is_complex = jnp.issubdtype(argument.dtype, np.complexfloating)
    dtype = np.result_type(output.dtype, np.complex64) if is_complex else output.dtype
    return Result(f"{output.path or 'result'} by {argument.path}", (*output.shape, *argument.shape), dtype)


@dataclass(frozen=True)
class _Factor:
    """An array of a contraction, and what each of its dimensions is."""

    array: Any
    labels: tuple[Any, ...]


def contracted(xp: Any, site: Site, axes: Axes, blocks: Sequence[Any], linear: Sequence[Any]) -> list[Any]:
    """The outputs of a derived site: its Jacobian's blocks against its (co)tangents, with the axes that they keep."""
    columns = len(site.results) if site.is_cotangent else site.linear
    along = [p for p, axis in enumerate(axes) if any(axis.in_batched[: len(site.paths) - site.linear])]
    outputs = []
    for position, result in enumerate(site.results):
        products = []
        for k, vector in enumerate(linear):
            row, column = (k, position) if site.is_cotangent else (position, k)
            term = _term(site, along, blocks[row * columns + column], result)
            products.append(_product(xp, (site, axes, position), term, (vector, k)))
        # Not `sum`, which starts from 0: an old NumPy makes float32 of 0 + bfloat16.
        outputs.append(reduce(operator.add, products))
    return outputs


def _term(site: Site, along: Sequence[int], block: Any, result: Result) -> _Factor:
    """A block with its dimensions labelled: recorded axes, those of the result, and those that are summed over."""
    kept, ndim = len(result.shape), len(block.shape) - len(along)
    ours = [("kept", d) for d in range(kept)]
    others = [("summed", d) for d in range(ndim - kept)]
    return _Factor(block, (*along, *(others + ours if site.is_cotangent else ours + others)))


def _product(xp: Any, place: tuple[Site, Axes, int], block: _Factor, operand: tuple[Any, int]) -> Any:
    site, axes, position = place
    vector, k = operand
    mapped = [p for p, axis in enumerate(axes) if axis.in_batched[len(site.paths) - site.linear + k]]
    summed = [label for label in block.labels if isinstance(label, tuple) and label[0] == "summed"]
    result = site.results[position]
    present = {label for label in (*block.labels, *mapped) if isinstance(label, int)}
    kept = [p for p, axis in enumerate(axes) if axis.output(position) is OutAxis.KEPT]
    labels = [*(p for p in kept if p in present), *(("kept", d) for d in range(len(result.shape)))]
    absent = [p for p, axis in enumerate(axes) if axis.output(position) is OutAxis.ABSENT]
    factor = _Factor(vector, (*mapped, *summed))
    product = _einsum(xp, _first(block, absent), _first(factor, absent), labels)
    for p, axis in enumerate(axes):
        if p not in present and axis.output(position) is OutAxis.SUMMED:
            product = product * np.asarray(axis.size).astype(product.dtype)
    return as_promised(xp, _repeated(xp, product, axes, kept, present), result)


def _first(factor: _Factor, absent: Sequence[int]) -> _Factor:
    """The first element along the axes that an output does not depend on, where all are equal."""
    if not any(label in absent for label in factor.labels):
        return factor
    index = tuple(0 if label in absent else slice(None) for label in factor.labels)
    return _Factor(factor.array[index], tuple(label for label in factor.labels if label not in absent))


def _einsum(xp: Any, block: _Factor, vector: _Factor, labels: Sequence[Any]) -> Any:
    numbers: dict[Any, int] = {}
    number = [
        [numbers.setdefault(label, len(numbers)) for label in group] for group in (block.labels, vector.labels, labels)
    ]
    dtype = working_dtype(block.array.dtype, vector.array.dtype)
    first, second = block.array.astype(dtype), vector.array.astype(dtype)
    return xp.einsum(first, number[0], second, number[1], number[2], optimize=True)


def working_dtype(block: Any, vector: Any) -> Any:
    """Sums of 16-bit numbers are made in 32 bits."""
    wide = [np.dtype("float32") if dtype.itemsize < 4 else dtype for dtype in (block, vector)]
    return np.result_type(*wide)


def _repeated(xp: Any, product: Any, axes: Axes, kept: Sequence[int], present: set[int]) -> Any:
    """The product with every axis that it keeps, repeated along those that nothing in it depends on."""
    if all(p in present for p in kept):
        return product
    element = product.shape[sum(p in present for p in kept) :]
    aligned = [axes[p].size if p in present else 1 for p in kept]
    return xp.broadcast_to(product.reshape(*aligned, *element), (*(axes[p].size for p in kept), *element))


def as_promised(xp: Any, product: Any, result: Result) -> Any:
    """By JAX's convention what a real number pairs with is the real part."""
    is_complex = xp.iscomplexobj(product) and not jnp.issubdtype(result.dtype, np.complexfloating)
    return (product.real if is_complex else product).astype(result.dtype)
