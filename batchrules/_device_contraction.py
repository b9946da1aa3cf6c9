"""The Jacobian of a device call against its (co)tangents, inside its body, where JAX differentiates through it.

First derivatives are contracted outside, by `_jacobian`, over all recorded axes at once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax.numpy as jnp

from batchrules import _jacobian
from batchrules._errors import ResultError

_LEAD = 0  # the label of the batch

_Factor = tuple[Any, tuple[int, ...]]  # an array, and a label for each of its dimensions


@dataclass(frozen=True)
class Jacobian:
    """The blocks of a Jacobian, and what they are of.

    Attributes:
        blocks: For each output, one block for each argument.
        outputs: The outputs: things with `.shape` and `.dtype`.
        primals: The arguments.
        size: The number of elements that these arrays are of; None for one element, without a leading dimension.
        where: Whose Jacobian it is, for messages.
    """

    blocks: Sequence[Any]
    outputs: Sequence[Any]
    primals: Sequence[Any]
    size: int | None
    where: str

    def forward(self, tangents: Sequence[Any]) -> list[Any]:
        """The tangents of the outputs, from those of the arguments."""
        return [
            _total([self._product((j, k), tangent, in_argument=True) for k, tangent in enumerate(tangents)])
            for j in range(len(self.outputs))
        ]

    def reverse(self, cotangents: Sequence[Any]) -> list[Any]:
        """The cotangents of the arguments, from those of the outputs."""
        return [
            _total([self._product((j, k), cotangent, in_argument=False) for j, cotangent in enumerate(cotangents)])
            for k in range(len(self.primals))
        ]

    @property
    def _lead(self) -> int:
        return 0 if self.size is None else 1

    def _product(self, place: tuple[int, int], vector: Any, *, in_argument: bool) -> Any:
        """A block against the tangent of its argument, or the cotangent of its output, in the form of the other."""
        output, primal = self.outputs[place[0]], self.primals[place[1]]
        block = self.blocks[place[0] * len(self.primals) + place[1]]
        rows = output.ndim - self._lead
        columns = block.ndim - self._lead - rows
        self._check(place, block, columns)
        row, column = tuple(range(1, 1 + rows)), tuple(range(1 + rows, 1 + rows + columns))
        summed, kept, like = (column, row, output) if in_argument else (row, column, primal)
        product = _einsum(_factor(block, (*row, *column)), _factor(vector, summed), kept)
        return _jacobian.as_promised(jnp, _fitted(product, like, len(kept)), like)

    def _check(self, place: tuple[int, int], block: Any, columns: int) -> None:
        """Raise if a block does not have the shape of its output, and then that of its argument."""
        output, primal = self.outputs[place[0]], self.primals[place[1]]
        argument = primal.shape[max(primal.ndim - columns, 0) :]
        leads = [()] if self.size is None else [(self.size,), (1,)]
        has_rank = columns >= 0 and primal.ndim - columns in (0, self._lead)
        if not has_rank or block.shape not in [(*lead, *output.shape[self._lead :], *argument) for lead in leads]:
            raise ResultError(
                f"{self.where}: the jacobian endpoint's block of output {place[0]} by argument {place[1]} has shape "
                f"{list(block.shape)}, expected the shape of the output and then that of the argument, which are "
                f"{list(output.shape)} and {list(primal.shape)}"
                f"{'' if self.size is None else ', where each leads with the batch'}."
            )


def _total(products: Sequence[Any]) -> Any:
    # Not `sum`, whose 0 is of another dtype.
    return reduce(operator.add, products)


def _factor(array: Any, labels: tuple[int, ...]) -> _Factor:
    """An array with its labels; a lead of 1 stands for all elements and is left out."""
    if array.ndim == len(labels):
        return array, labels
    return (array[0], labels) if array.shape[0] == 1 else (array, (_LEAD, *labels))


def _einsum(block: _Factor, vector: _Factor, kept: tuple[int, ...]) -> Any:
    """Their product, summed over what is not kept; it leads with the batch if one of them does."""
    dtype = _jacobian.working_dtype(block[0].dtype, vector[0].dtype)
    operands = [part for array, labels in (block, vector) for part in (array.astype(dtype), list(labels))]
    lead = [_LEAD] if _LEAD in (*block[1], *vector[1]) else []
    return jnp.einsum(*operands, [*lead, *kept], optimize=True)


def _fitted(product: Any, like: Any, rank: int) -> Any:
    """The product of an element of so many dimensions, with the lead that it is to have."""
    if product.ndim == like.ndim > rank and like.shape[0] == 1:
        # An output that leads with 1 depends on no mapped argument, and all rows are equal.
        return product[:1]
    return jnp.broadcast_to(jnp.expand_dims(product, range(like.ndim - product.ndim)), like.shape)
