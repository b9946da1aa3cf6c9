"""Whether a function leaves its arguments as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from batchrules._host_call import HostCall
from batchrules._testing_causes import MUTATES
from batchrules._testing_check import Checker
from batchrules._testing_comparisons import as_numpy
from batchrules._testing_leaves import Example


def check_arguments_kept(checker: Checker, fun: Callable[..., Any], example: Example) -> bool:
    """Call it once with arrays that nothing else holds, and look at them afterwards."""
    kinds: list[Callable[[Any], Any]] = [lambda leaf: leaf.array(leaf.value.copy())]
    if isinstance(fun, HostCall):
        kinds.append(lambda leaf: leaf.value.copy())
    return all(_kept(checker, fun, example, [make(leaf) for leaf in example.leaves]) for make in kinds)


def _kept(checker: Checker, fun: Callable[..., Any], example: Example, arrays: Sequence[Any]) -> bool:
    # Trees of its own: a function may write into a container too.
    args = example.arguments(arrays)
    jax.block_until_ready(fun(*args))
    left, tree = jax.tree.flatten(args)
    if tree != example.tree:
        _found(checker, f"the containers of its arguments are {tree} after the call, and were {example.tree}")
        return False
    for leaf, array in zip(example.leaves, left, strict=True):
        now = as_numpy(array)
        if now.shape != leaf.shape or now.tobytes() != np.asarray(leaf.value).tobytes():
            _found(checker, f"{leaf.name} is not what it was before the call")
            return False
    return True


def _found(checker: Checker, evidence: str) -> None:
    checker.found(MUTATES, "one call with the example", evidence, "calls")
