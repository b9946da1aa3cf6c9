"""HiJAX primitive classes: `Class.batch`, made from a method and a `call`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from batchrules import _jax_versions, _rules
from batchrules._mapped_bind import MappedBind
from batchrules._methods import Choice
from batchrules._registration import NOTHING, Registration


def is_primitive_class(candidate: Any) -> bool:
    """Whether this is a HiJAX primitive class."""
    base = _jax_versions.hijax_primitive_class()
    return base is not None and isinstance(candidate, type) and issubclass(candidate, base)


def install(registration: Registration) -> Any:
    """Give the class a `batch` method; return the one that it defined itself, or `NOTHING`."""
    before = vars(registration.primitive).get("batch", NOTHING)
    registration.primitive.batch = _batch_method(registration)
    return before


def restore(cls: Any, before: Any) -> None:
    """Give the class back the `batch` method that it had."""
    if before is NOTHING:
        del cls.batch
    else:
        cls.batch = before


def _batch_method(registration: Registration) -> Callable[..., tuple[Any, Any]]:
    def batch(self: Any, axis_data: Any, args: Any, dims: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree_util.tree_flatten(args)
        flat_dims = tree.flatten_up_to(dims)
        if all(dim is None for dim in flat_dims):
            return self(*args), jax.tree_util.tree_map(lambda _: None, self.out_aval)
        in_batched = tuple(dim is not None for dim in flat_dims)
        apply = _Apply(registration, self, tree)
        results = jax.tree_util.tree_leaves(self.out_aval)
        bind = MappedBind(registration, axis_data, in_batched, self.params, apply, results)
        values, out_dims = bind.run([_rules.to_front(x, dim) for x, dim in zip(leaves, flat_dims, strict=True)])
        return apply.tree_of(values), apply.tree_of(out_dims)

    return batch


class _Apply:
    """Applies a HiJAX primitive to flat leaves."""

    def __init__(self, registration: Registration, primitive: Any, tree: Any) -> None:
        self._registration = registration
        self._primitive = primitive
        self._tree = tree

    def __call__(self, choice: Choice, leaves: Sequence[Any], size: int | None) -> Sequence[Any]:
        """Apply it to one element (size None), or to so many at once through `call`."""
        del choice
        args = jax.tree_util.tree_unflatten(self._tree, leaves)
        call = self._registration.call
        result = self._primitive(*args) if size is None or call is None else call(self._primitive, *args)
        leaves, tree = jax.tree_util.tree_flatten(result)
        expected = jax.tree_util.tree_structure(self._primitive.out_aval)
        if tree != expected:
            raise TypeError(f"{self._registration.where}: call returned {tree}, but the primitive gives {expected}.")
        return leaves

    def tree_of(self, leaves: Sequence[Any]) -> Any:
        """The leaves in the structure of the result."""
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(self._primitive.out_aval), leaves)
