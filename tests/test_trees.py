"""Flattening: containers of optree and of JAX come back as they were, and paths name their leaves."""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchrules
from batchrules import _trees


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A container that only JAX knows."""

    weight: Any
    bias: Any
    kind: str = dataclasses.field(default="linear", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Pair:
    """One that JAX knows without names for its children."""

    def __init__(self, first, second):
        self.children = (first, second)

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __eq__(self, other):
        return isinstance(other, Pair) and self.children == other.children

    __hash__ = None


class Slots:
    """A container that neither knows."""


# A tree, its leaves, their paths.
TREES = {
    "leaf": (1.5, [1.5], [""]),
    "None": (None, [], []),
    "tuple": ((1, (2, 3)), [1, 2, 3], ["0", "1.0", "1.1"]),
    "list": ([1, [2], []], [1, 2], ["0", "1.0"]),
    "dict": ({"b": 1, "a": {"c": 2}}, [2, 1], ["a.c", "b"]),
    "dict of numbers": ({2: 1, 10: 3}, [1, 3], ["2", "10"]),
    "ordered": (collections.OrderedDict(z=1, a=2), [1, 2], ["z", "a"]),
    "defaultdict": (collections.defaultdict(int, z=1, a=2), [2, 1], ["a", "z"]),
    "deque": (collections.deque([1, 2]), [1, 2], ["0", "1"]),
    "namedtuple": (Point(1, {"k": 2}), [1, 2], ["x", "y.k"]),
    "dataclass": (Model(1, 2, "cubic"), [1, 2], ["weight", "bias"]),
    "dataclass inside": ({"m": [Model(1, 2)]}, [1, 2], ["m.0.weight", "m.0.bias"]),
    "inside a dataclass": (Model({"k": 1}, (2, None, 3)), [1, 2, 3], ["weight.k", "bias.0", "bias.2"]),
    "dataclass in dataclass": (
        Model(Model(1, 2), Point(3, 4)), [1, 2, 3, 4], ["weight.weight", "weight.bias", "bias.x", "bias.y"],
    ),
    "empty dataclass": (Model(None, ()), [], []),
}  # fmt: skip
every_tree = pytest.mark.parametrize(("tree", "leaves", "paths"), TREES.values(), ids=TREES)


@every_tree
def test_flatten_and_unflatten(tree, leaves, paths):
    flat, structure = _trees.flatten(tree)
    assert flat == leaves
    assert structure.count == len(leaves)
    assert _trees.unflatten(structure, flat) == tree
    assert type(_trees.unflatten(structure, flat)) is type(tree)
    assert _trees.paths(tree) == paths


@every_tree
def test_structures_compare_by_value(tree, leaves, paths):
    del paths
    structure = _trees.flatten(tree)[1]
    again = _trees.flatten(_trees.unflatten(structure, [np.ones(3)] * len(leaves)))[1]
    assert structure == again
    assert hash(structure) == hash(again)
    others = [_trees.flatten(other)[1] for other, _, _ in TREES.values() if other is not tree]
    assert structure not in others


def test_children_without_names_have_positions():
    tree = {"p": Pair(1, Pair([2], 3))}
    flat, structure = _trees.flatten(tree)
    assert flat == [1, 2, 3]
    assert _trees.unflatten(structure, flat) == tree
    assert [path.split(".")[0] for path in _trees.paths(tree)] == ["p"] * 3
    assert len(set(_trees.paths(tree))) == 3


def test_static_parts_of_a_jax_container_are_part_of_the_structure():
    assert _trees.flatten(Model(1, 2, "a"))[1] != _trees.flatten(Model(1, 2, "b"))[1]


def test_a_container_of_optree_alone():
    class Box:
        def __init__(self, inside):
            self.inside = inside

    optree.register_pytree_node(
        Box, lambda box: ((box.inside,), None, ("inside",)), lambda _, kids: Box(*kids), namespace="t"
    )
    leaves, _ = _trees.flatten(Box(3))
    assert len(leaves) == 1
    assert isinstance(leaves[0], Box)


def test_arrays_of_any_kind_are_leaves():
    arrays = [np.ones(2), np.float32(1), jax.numpy.ones(2), 1, 2.0, 3j, True, jax.ShapeDtypeStruct((2,), "float32")]
    assert all(got is array for got, array in zip(_trees.flatten(arrays)[0], arrays, strict=True))
    assert _trees.paths(arrays) == [str(i) for i in range(len(arrays))]


def test_structure_as_text():
    assert str(_trees.flatten({"a": (1, 2)})[1]) == "{'a': (*, *)}"
    assert "Model" in str(_trees.flatten([Model(1, 2)])[1])


leaves = st.integers() | st.none()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.builds(Point, inner, inner)
        | st.builds(Model, inner, inner, st.sampled_from(["linear", "cubic"]))
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree(tree):
    flat, structure = _trees.flatten(tree)
    assert flat == jax.tree.leaves(tree)
    assert _trees.unflatten(structure, flat) == tree
    paths = _trees.paths(tree)
    assert len(paths) == len(set(paths)) == structure.count == len(flat)
    numbers = _trees.unflatten(structure, range(len(flat)))
    assert _trees.flatten(numbers) == (list(range(len(flat))), structure)


@given(trees, st.data())
def test_matched_takes_none_for_a_branch(tree, data):
    flat, structure = _trees.flatten(tree)
    kept = data.draw(st.lists(st.booleans(), min_size=len(flat), max_size=len(flat)))
    partial = _trees.unflatten(structure, [leaf if keep else None for leaf, keep in zip(flat, kept, strict=True)])
    assert _trees.matched(partial, tree) == [leaf if keep else None for leaf, keep in zip(flat, kept, strict=True)]
    assert _trees.matched(None, tree) == [None] * len(flat)


@pytest.mark.parametrize(
    ("tree", "like", "wanted"),
    [
        ({"a": 1, "b": None}, {"a": 0, "b": [0, 0]}, [1, None, None]),
        (("x", None), (0, Model(0, 0)), ["x", None, None]),
        ((1, Model(2, None)), (0, Model(0, [0])), [1, 2, None]),
        (5, 0, [5]),
        ([1, 2], (0, 0), [1, 2]),
    ],
)
def test_matched(tree, like, wanted):
    assert _trees.matched(tree, like) == wanted


@pytest.mark.parametrize(
    ("tree", "like"), [((1,), (0, 0)), (3, (0, 0)), ({"a": 1}, {"a": 0, "b": 0}), ([1, [2, 3]], [0, [0]])]
)
def test_matched_refuses_another_structure(tree, like):
    with pytest.raises(ValueError, match=r"expected \d+ children"):
        _trees.matched(tree, like)


def test_matched_refuses_other_keys():
    """The same number of children under other names is another structure."""
    with pytest.raises(ValueError, match="expected"):
        _trees.matched({"x": 1, "y": 2}, {"a": 0, "b": 0})


def test_matched_refuses_a_container_where_a_leaf_belongs():
    with pytest.raises(ValueError, match="expected"):
        _trees.matched({"a": (1, 2)}, {"a": 0})


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        ("text", r"'f': the argument 'x' is a str, which is neither an array, nor a number, nor a container"),
        (Slots(), r"'f': the argument 'x' is a Slots, .*jax\.tree_util\.register_dataclass.*static_argnames"),
        (np.array(["a"]), r"'f': the argument 'x' is an array of dtype <U1, which JAX cannot hold"),
        (np.array([object()]), r"'f': the argument 'x' is an array of dtype object"),
        (np.array(["2020"], "datetime64[Y]"), r"'f': the argument 'x' is an array of dtype datetime64\[Y\]"),
        (np.zeros(2, [("a", "f4")]), r"'f': the argument 'x' is an array of dtype \[\('a', '<f4'\)\]"),
        (np.zeros(2, "longdouble"), r"'f': the argument 'x' is an array of dtype"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("entry_point", [batchrules.device_call, batchrules.host_call])
def test_leaves_that_are_refused(entry_point, leaf, text):
    options = {"result_shape": ()} if entry_point is batchrules.host_call else {}
    call = entry_point(lambda x: (), name="f", **options)  # noqa: ARG005
    with pytest.raises(TypeError, match=text):
        call(leaf)
    with pytest.raises(TypeError, match=text.replace("'x'", r"'x\.a'")):
        call({"a": leaf})
