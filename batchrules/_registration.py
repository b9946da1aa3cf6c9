"""What `register` was told: a `Registration`, and the `BatchInfo` that its `update_params` is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from batchrules import _batch
from batchrules._batch import Axes, BatchAxis
from batchrules._methods import Choice, Lead, MethodRequest, asked_for, method_of
from batchrules._schema import Schema, Signature

Method = str | Callable[[dict[str, Any]], str]
NOTHING: Any = object()


class BatchInfo(NamedTuple):
    """What one vectorised bind of a primitive is given; for `update_params`.

    Attributes:
        axis_size: The size of the mapped axis.
        axis_name: Its name, if it has one.
        in_batched: For each operand, whether it is mapped.
        method: The method of this bind, never `"auto"`.
        batch_size: The number of elements that this bind is given: what its mapped operands lead with.
        in_led: For each operand, whether it has a leading dimension more than in the unbatched bind.

    Example:
        >>> import batchrules
        >>> def lead_with_batch(params, batch):
        ...     return {**params, "shape": (batch.batch_size, *params["shape"])}
        >>> batch = batchrules.BatchInfo(4, None, (True,), "broadcast_all", batch_size=4, in_led=(True,))
        >>> lead_with_batch({"shape": (2, 3)}, batch)
        {'shape': (4, 2, 3)}
    """

    axis_size: int
    axis_name: Any
    in_batched: tuple[bool, ...]
    method: str
    batch_size: int
    in_led: tuple[bool, ...]


@dataclass(frozen=True)
class Registration:
    """The batching rule of a primitive, as it was registered.

    Attributes:
        primitive: The primitive, or the HiJAX primitive class.
        method: A method's name, or a function from the primitive's parameters to one.
        batch_size: The most elements that a vectorised bind is given, or None.
        schema: What the primitive takes, or None.
        signature: Its gufunc signature, or None.
        update_params: The function that adapts the parameters of vectorised binds, or None.
        call: For a HiJAX class, the operation on arrays of any leading shape; else None.
        before: The rule that stood there before the first registration, or `NOTHING`.

    Example:
        >>> import batchrules
        >>> from jax.extend.core import Primitive
        >>> halve_p = Primitive("halve")
        >>> batchrules.register(halve_p, "broadcast_all", batch_size=8)
        >>> rule = batchrules.registered(halve_p)
        >>> rule.method, rule.batch_size
        ('broadcast_all', 8)
    """

    primitive: Any
    method: Method
    batch_size: int | None = None
    schema: Schema | None = None
    signature: Signature | None = None
    update_params: Callable[[dict[str, Any], BatchInfo], dict[str, Any]] | None = None
    call: Callable[..., Any] | None = None
    before: Any = field(default=NOTHING, repr=False, compare=False)

    @property
    def where(self) -> str:
        """What messages call the primitive."""
        name = getattr(self.primitive, "name", None) or getattr(self.primitive, "__name__", str(self.primitive))
        return f"primitive {name!r}"

    def method_for(self, *operands: Any, in_axes: Sequence[int | None], **params: Any) -> Choice:
        """Tell which method a batch of these operands would use, and why. Nothing is bound.

        Args:
            *operands: Batched operands: arrays, or anything with `.shape`.
            in_axes: For each operand, its mapped axis or None.
            **params: The primitive's parameters, where the method is a function of them.

        Returns:
            A `Choice` with the name of the method and the reason in words.

        Raises:
            ValueError: `in_axes` that does not fit the operands, or maps axes of several sizes, or none.

        Example:
            >>> import numpy as np, batchrules
            >>> from jax.extend.core import Primitive
            >>> halve_p = Primitive("halve")
            >>> batchrules.register(halve_p, "auto")
            >>> batchrules.registered(halve_p).method_for(np.ones((4, 3)), in_axes=(0,)).method
            'sequential'
        """
        shapes = [np.shape(operand) for operand in operands]
        self._check_in_axes(shapes, in_axes)
        in_front = [_mapped_in_front(shape, axis) for shape, axis in zip(shapes, in_axes, strict=True)]
        in_batched = tuple(axis is not None for axis in in_axes)
        sizes = {shape[0] for shape, batched in zip(in_front, in_batched, strict=True) if batched}
        if len(sizes) != 1:
            raise ValueError(f"{self.where}: the mapped axes must have one size; got {sorted(sizes) or 'none mapped'}.")
        structs = [jax.ShapeDtypeStruct(shape, bool) for shape in in_front]
        return self.choose((BatchAxis(sizes.pop(), in_batched),), structs, params)

    def _check_in_axes(self, shapes: Sequence[tuple[int, ...]], in_axes: Any) -> None:
        if not isinstance(in_axes, tuple | list) or len(in_axes) != len(shapes):
            raise ValueError(
                f"{self.where}: in_axes needs an axis or None for each of the {len(shapes)} operands; got {in_axes!r}."
            )
        for shape, axis in zip(shapes, in_axes, strict=True):
            if axis is not None and not -len(shape) <= axis < len(shape):
                raise ValueError(f"{self.where}: there is no axis {axis} in an operand of shape {shape}.")

    def choose(self, axes: Axes, operands: Sequence[Any], params: dict[str, Any]) -> Choice:
        """The method for a batch, whose operands have their mapped axis in front."""
        method = method_of(self.method, params, self.where) if callable(self.method) else self.method
        if method == "auto":
            paths = [f"args.{i}" for i in range(len(operands))]
            shapes = [tuple(operand.shape) for operand in operands]
            choice = _batch.choose_for(
                MethodRequest(method, self.schema, self.signature, self.where), axes, paths, shapes
            )
        else:
            choice = asked_for(method, _batch.mapped(axes, len(operands)))
        aliased = _aliased_operands(params)
        return replace(choice, leads=_with_batch(choice.leads, aliased)) if aliased else choice


def _mapped_in_front(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    axis %= len(shape)
    return (shape[axis], *shape[:axis], *shape[axis + 1 :])


def _aliased_operands(params: dict[str, Any]) -> set[int]:
    """The operands that share their memory with an output, as `ffi_call` and `pallas_call` name them."""
    aliases = params.get("input_output_aliases")
    if not aliases:
        return set()
    pairs = aliases.items() if hasattr(aliases, "items") else aliases
    return {pair[0] for pair in pairs}


def _with_batch(leads: tuple[Lead, ...], operands: set[int]) -> tuple[Lead, ...]:
    """An operand that shares its memory with an output must have the output's size."""
    return tuple(Lead.BATCH if i in operands else lead for i, lead in enumerate(leads))
