"""Arguments and results in containers: they arrive as they were given, and paths name their leaves."""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest

import batchrules


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A container that only JAX knows, as an Equinox module is."""

    weight: Any
    bias: Any
    kind: str = dataclasses.field(default="linear", metadata={"static": True})


class Box:
    """A container that only optree knows."""

    def __init__(self, *items):
        self.items = items


optree.register_pytree_node(
    Box, lambda box: (box.items, None, range(len(box.items))), lambda _, items: Box(*items),
    namespace=optree.registry.__GLOBAL_NAMESPACE if False else "",
) if False else None  # fmt: skip

SCALAR = jax.ShapeDtypeStruct((), "float64")
