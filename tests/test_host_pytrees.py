"""Arguments and results in containers: they arrive as they were given, and paths name their leaves."""

import collections
import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


SCALAR = jax.ShapeDtypeStruct((), "float64")


def same():
    """A host function that gives back what it is given, and the result's shape."""
    seen = []

    def identity(tree):
        seen.append(tree)
        return tree

    return batchrules.host_call(identity, lambda tree: tree, method="expand_dims"), seen


TREES = {
    "dict": {"b": np.ones(3), "a": {"z": np.arange(3.0), "y": ()}},
    "tuple": (np.ones(3), [np.arange(3.0), (np.zeros(3),)]),
    "namedtuple": Point(np.ones(3), {"deep": np.arange(3.0)}),
    "None": (None, {"x": np.ones(3), "none": None}),
    "ordered": collections.OrderedDict(z=np.ones(3), a=np.zeros(3)),
    "defaultdict": collections.defaultdict(list, b=np.ones(3), a=np.zeros(3)),
    "jax dataclass": Model(np.ones(3), np.zeros(3), kind="cubic"),
    "jax dataclass inside": {"m": (Model(np.ones(3), {"b": np.zeros(3)}), np.arange(3.0))},
    "containers in a jax dataclass": Model(Model([np.ones(3)], None), Point(np.zeros(3), {"k": np.arange(3.0)})),
}


@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "jit vmap", "scan"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_containers_arrive_and_return_as_they_are(tree, way):
    call, seen = same()
    function = {
        "eager": call,
        "jit": jax.jit(call),
        "vmap": jax.vmap(call),
        "jit vmap": jax.jit(jax.vmap(call)),
        "scan": lambda tree: jax.lax.scan(lambda _, part: (None, call(part)), None, tree)[1],
    }[way]
    result = function(tree)
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, result, tree)
    for arrived in seen:
        assert jax.tree.structure(arrived) == jax.tree.structure(tree)
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(arrived))


@pytest.mark.parametrize("container", [collections.deque([1.0, 2.0]), time.struct_time(range(9))])
def test_containers_that_only_optree_knows(container):
    """JAX takes none of these through jit or vmap, so they are made inside."""
    calls = []

    def total(values):
        calls.append(type(values))
        return np.float64(sum(values))

    call = batchrules.host_call(total, SCALAR)
    wanted = sum(container)
    assert call(container) == wanted
    scaled = jax.jit(lambda s: call(type(container)([s * value for value in container])))
    assert scaled(2.0) == 2 * wanted
    assert calls == [type(container)] * 2


def test_dictionary_keeps_the_order_that_the_caller_gave():
    orders = []

    def function(tree):
        orders.append(list(tree))
        return tree["a"]

    call = batchrules.host_call(function, SCALAR)
    call({"z": 1.0, "a": 2.0})
    call({"a": 2.0, "z": 1.0})
    assert orders == [["z", "a"], ["a", "z"]]


def test_result_dictionary_may_be_in_any_order():
    call = batchrules.host_call(lambda x: {"b": x, "a": x + 1}, {"a": SCALAR, "b": SCALAR})
    assert jax.jit(call)(1.0) == {"a": 2.0, "b": 1.0}


def test_result_without_arrays_and_without_outputs():
    assert batchrules.host_call(lambda x: (), ())(1.0) == ()  # noqa: ARG005
    call = batchrules.host_call(lambda x: (None, x), (None, SCALAR))
    assert jax.jit(jax.vmap(call))(jnp.ones(3))[0] is None


def test_in_axes_as_a_tree():
    def function(p, scale):
        return {"sum": p.x.sum() + p.y["b"] * scale}

    call = batchrules.host_call(function, {"sum": SCALAR})
    xs, b = np.arange(6.0).reshape(2, 3), np.float64(7.0)
    got = jax.vmap(call, in_axes=(Point(1, {"b": None}), None))(Point(xs, {"b": b}), 2.0)
    np.testing.assert_array_equal(got["sum"], xs.sum(axis=0) + 14.0)


@pytest.mark.parametrize("kind", ["numpy", "jax", "list of jax"])
@pytest.mark.parametrize("jit", [True, False])
def test_in_axes_one(kind, jit):
    """`jnp.asarray` on a traced value would lose track of the axis on jax 0.7 and 0.8."""
    xs = np.arange(12.0).reshape(3, 4)
    tree = {"numpy": xs, "jax": jnp.asarray(xs), "list of jax": [jnp.asarray(xs)]}[kind]
    call = batchrules.host_call(lambda t: np.asarray(t)[..., :] * 1.0 if kind != "list of jax" else t[0],
                                jax.ShapeDtypeStruct((3,), "float64"))  # fmt: skip
    mapped = jax.vmap(call, in_axes=1, out_axes=1)
    np.testing.assert_array_equal((jax.jit(mapped) if jit else mapped)(tree), xs)


@pytest.mark.parametrize("jit", [True, False])
def test_in_axes_one_of_a_nested_vmap(jit):
    xs = np.arange(24.0).reshape(2, 3, 4)
    call = batchrules.host_call(lambda x: x * 2, lambda x: x)
    mapped = jax.vmap(jax.vmap(call, in_axes=1), in_axes=2)
    np.testing.assert_array_equal((jax.jit(mapped) if jit else mapped)(xs), 2 * xs.transpose(2, 1, 0))


# --- how arguments are passed -----------------------------------------------------------------------------


def weighted(x, y=3.0, *rest, scale=1.0, **more):
    return np.float64(100 * x + 10 * y + sum(rest) + scale + sum(more.values()))


CALLS = {
    "positional": ((1.0, 2.0), {}),
    "default": ((1.0,), {}),
    "keyword": ((), {"y": 2.0, "x": 1.0}),
    "mixed": ((1.0,), {"scale": 5.0, "y": 2.0}),
    "rest": ((1.0, 2.0, 0.25, 0.5), {"scale": 0.0}),
    "more": ((1.0,), {"zeta": 0.5, "alpha": 0.25}),
}


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("way", ["eager", "jit", "vmap"])
def test_arguments_are_passed_as_python_passes_them(args, kwargs, way):
    call = batchrules.host_call(weighted, SCALAR)
    wanted = weighted(*args, **kwargs)
    if way == "vmap":
        args, kwargs = jax.tree.map(lambda x: np.full(3, x), (args, kwargs))
        wanted = np.full(3, wanted)
    function = {"eager": call, "jit": jax.jit(call), "vmap": jax.vmap(call)}[way]
    np.testing.assert_array_equal(function(*args, **kwargs), wanted)


def powers(x, n, /, *, kind="up", offset=0.0):
    return np.float64((x**n if kind == "up" else x**-n) + offset)


@pytest.mark.parametrize("jit", [True, False])
def test_static_arguments_by_position_and_by_keyword(jit):
    call = batchrules.host_call(powers, SCALAR, static_argnames=("n", "kind"))
    outcome = lambda x: (call(x, 3), call(x, 2, kind="down"), call(x, 1, offset=x))  # noqa: E731
    assert (jax.jit(outcome) if jit else outcome)(2.0) == (8.0, 0.25, 4.0)


def test_static_arguments_before_between_and_after_arrays():
    seen = []

    def function(a, x, b, y, c="c"):
        seen.append((a, float(x), b, float(y), c))
        return x + y

    call = batchrules.host_call(function, SCALAR, static_argnames=["a", "b", "c"])
    assert jax.jit(lambda x, y: call("a", x, ("b",), y))(1.0, 2.0) == 3.0
    assert jax.jit(lambda x, y: call("a", x, b=("b",), y=y, c=None))(1.0, 2.0) == 3.0
    assert seen == [("a", 1.0, ("b",), 2.0, "c"), ("a", 1.0, ("b",), 2.0, None)]


def test_one_static_name_as_a_string_and_a_static_argument_under_vmap():
    call = batchrules.host_call(lambda x, kind: x * len(kind), lambda x, kind: x, static_argnames="kind")  # noqa: ARG005
    np.testing.assert_array_equal(jax.vmap(lambda x: call(x, "four"))(np.arange(3.0)), 4 * np.arange(3.0))


def test_result_shape_is_given_static_arguments_too():
    call = batchrules.host_call(
        lambda x, n: np.full(n, x), lambda x, n: jax.ShapeDtypeStruct((n,), x.dtype), static_argnames="n"
    )
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(lambda x: call(x, 2)))(np.arange(3.0)), np.arange(3.0).repeat(2).reshape(3, 2)
    )


@pytest.mark.parametrize("jit", [True, False])
def test_functions_that_are_instances_methods_partials_and_ufuncs(jit):
    import functools

    @dataclasses.dataclass
    class Scale:
        """Not hashable, as every dataclass with the default `eq`."""

        by: float

        def __call__(self, x):
            return x * self.by

        def method(self, x):
            return x * self.by

    functions = (Scale(2.0), Scale(2.0).method, functools.partial(np.multiply, 2.0), lambda x: x * 2)
    for function in functions:
        call = jax.vmap(batchrules.host_call(function, lambda *args: args[-1]))
        np.testing.assert_array_equal((jax.jit(call) if jit else call)(np.arange(3.0)), 2 * np.arange(3.0))


# --- paths in errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        (("text",), {}, "x"),
        (({"a": [1.0, "text"]},), {}, "x.a.1"),
        ((Point(1.0, object()),), {}, "x.y"),
        ((Model(1.0, {"k": "text"}),), {}, "x.bias.k"),
        (([Model((1.0, "text"), 2.0)],), {}, "x.0.weight.1"),
        ((1.0, 2.0, "text"), {}, "args.2"),
        ((1.0,), {"scale": "text"}, "scale"),
        ((1.0,), {"more": {"deep": "text"}}, "more.deep"),
    ],
)
def test_paths_of_arguments(args, kwargs, path):
    call = batchrules.host_call(weighted, SCALAR)
    with pytest.raises(TypeError, match=rf"host_call 'weighted': the argument '{path}' is a") as info:
        call(*args, **kwargs)
    assert "neither an array, nor a number, nor a container that optree or JAX knows" in str(info.value)


def test_advice_for_an_unknown_container_can_be_followed():
    """Optree registers only into namespaces, which host_call does not look into."""

    class Box:
        pass

    call = batchrules.host_call(lambda x: x, SCALAR)
    with pytest.raises(TypeError, match=r"jax\.tree_util\.register_") as info:
        call(Box())
    assert "optree.register_pytree_node" not in str(info.value)


@pytest.mark.parametrize(
    ("promised", "path"),
    [
        ({"a": SCALAR, "b": (SCALAR, jax.ShapeDtypeStruct((2,), "float64"))}, "b.1"),
        (Point(SCALAR, jax.ShapeDtypeStruct((2,), "float64")), "y"),
        (Model(SCALAR, [jax.ShapeDtypeStruct((2,), "float64")]), "bias.0"),
    ],
)
def test_paths_of_results(promised, path):
    ones = jax.tree.map(lambda _: np.float64(1.0), promised)
    with pytest.raises(batchrules.ResultError, match=rf"output '{path}' has shape \(\), but .* promises \(2,\)"):
        batchrules.host_call(lambda: ones, promised)()
