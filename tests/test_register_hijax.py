"""HiJAX primitive classes: `register(Class, method, call=...)` gives them a batch method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import SEQUENTIAL, VECTORISED, Foreign, assert_same, whole_numbers

import batchrules


def base_class():
    """`VJPHiPrimitive` up to jax 0.11, `HiPrim` after."""
    try:
        from jax.experimental import hijax
    except ImportError:
        return None
    return getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive", None)


Base = base_class()
if Base is None:
    pytest.skip(f"jax {jax.__version__} has no HiJAX primitive classes", allow_module_level=True)
METHODS = (*SEQUENTIAL, *VECTORISED)
X, Y = whole_numbers((4, 3), 0), whole_numbers((4, 3), 1)
SPEC = batchrules.ArraySpec()


def typeof(tree):
    return jax.tree.map(jax.typeof, tree)


def combine(model, y, k):
    """A tree from a tree; the second output depends on `y` alone."""

    def function(_, x, s, y):
        return {"both": x * k - 2 * y + s[..., None], "y": (y + 1,)}

    return Foreign("combine", function, ((3,), (), (3,)))(jnp, model["x"], model["s"][0], y)


def call(self, model, y):
    """The operation, for any leading shape."""
    return combine(model, y, self.k)


@pytest.fixture
def combined():
    """A fresh HiJAX class, and the function that applies it."""

    class Combine(Base):
        def __init__(self, model, y, k):
            self.in_avals = (model, y)
            self.out_aval = {"both": y, "y": (y,)}
            self.params = {"k": k}
            super().__init__()

        def expand(self, model, y):
            return combine(model, y, self.k)

    def apply(model, y, k=3):
        return Combine(typeof(model), typeof(y), k)(model, y)

    yield Combine, apply
    if batchrules.registered(Combine):
        batchrules.unregister(Combine)


def tree(x, s):
    return {"x": jnp.asarray(x), "s": [jnp.asarray(s)]}


IN_AXES = {
    "all": (({"x": 0, "s": [0]}, 0), tree(X, np.arange(4.0)), Y),
    "x alone": (({"x": 1, "s": [None]}, None), tree(X.T, 2.0), Y[0]),
    "y alone": ((None, 0), tree(X[0], 2.0), Y),
    "s alone": (({"x": None, "s": [0]}, None), tree(X[0], np.arange(4.0)), Y[0]),
}


def twin(model, y, k=3):
    return combine(model, y, k)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("case", IN_AXES.values(), ids=IN_AXES)
@pytest.mark.parametrize("method", METHODS)
def test_trees(combined, method, case, jit):
    in_axes, model, y = case
    cls, apply = combined
    batchrules.register(cls, method, call=call)
    program = jax.vmap(apply, in_axes)
    result = (jax.jit(program) if jit else program)(model, jnp.asarray(y))
    assert_same(result, jax.vmap(twin, in_axes)(model, jnp.asarray(y)))


@pytest.mark.parametrize("batch_size", [1, 3, 9])
@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
def test_batch_size(combined, method, batch_size):
    cls, apply = combined
    batchrules.register(cls, method, batch_size=batch_size, call=call)
    in_axes, model, y = IN_AXES["x alone"]
    result = jax.jit(jax.vmap(apply, in_axes))(model, jnp.asarray(y))
    assert_same(result, jax.vmap(twin, in_axes)(model, jnp.asarray(y)))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_nested(combined, method):
    """Inner vmaps are vectorised by `call`, which is JAX code; outer ones batch that."""
    cls, apply = combined
    batchrules.register(cls, method, call=call)
    nest = lambda f: jax.vmap(jax.vmap(f, ({"x": 0, "s": [None]}, None)), (None, 0))  # noqa: E731
    model, y = tree(X, 2.0), jnp.asarray(Y[:2])
    assert_same(jax.jit(nest(apply))(model, y), nest(twin)(model, y))


def test_out_axes_none_of_what_does_not_depend_on_the_axis(combined):
    cls, apply = combined
    batchrules.register(cls, "expand_dims", call=call)
    in_axes, model, y = IN_AXES["x alone"]
    out_axes = {"both": 0, "y": None}
    result = jax.vmap(apply, in_axes, out_axes)(model, jnp.asarray(y))
    assert_same(result, jax.vmap(twin, in_axes, out_axes)(model, jnp.asarray(y)))


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_empty_batch(combined, method):
    cls, apply = combined
    batchrules.register(cls, method, call=call)
    result = jax.vmap(apply, (None, 0))(tree(X[0], 2.0), jnp.zeros((0, 3)))
    assert_same(result, jax.vmap(twin, (None, 0))(tree(X[0], 2.0), jnp.zeros((0, 3))))


def test_auto(combined):
    cls, apply = combined
    batchrules.register(cls, "auto", call=call)
    assert batchrules.registered(cls).method_for(X, np.zeros(4), Y, in_axes=(0, 0, 0)).method == "sequential"
    batchrules.register(cls, "auto", call=call, schema=[SPEC, SPEC, SPEC])
    registration = batchrules.registered(cls)
    # The leaves of {"x": ..., "s": [...]} come in the order of their keys: the scalar first.
    assert registration.method_for(np.zeros(()), X, Y, in_axes=(None, 0, 0)).method == "expand_dims"
    assert registration.method_for(np.zeros(4), X, Y, in_axes=(0, 0, 0)).method == "sequential"
    for in_axes, model, y in IN_AXES.values():
        result = jax.jit(jax.vmap(apply, in_axes))(model, jnp.asarray(y))
        assert_same(result, jax.vmap(twin, in_axes)(model, jnp.asarray(y)))


def test_method_from_parameters(combined):
    cls, apply = combined
    seen = []

    def method(params):
        seen.append(dict(params))
        return "sequential" if params["k"] == 5 else "expand_dims"

    batchrules.register(cls, method, call=call)
    for k in (3, 5):
        result = jax.vmap(lambda y, k=k: apply(tree(X[0], 2.0), y, k))(jnp.asarray(Y))
        assert_same(result, jax.vmap(lambda y, k=k: twin(tree(X[0], 2.0), y, k))(jnp.asarray(Y)))
    assert {"k": 3} in seen
    assert {"k": 5} in seen


def test_unregister_gives_back_what_the_class_had(combined):
    cls, apply = combined
    assert "batch" not in vars(cls)
    batchrules.register(cls, "sequential", call=call)
    batchrules.register(cls, "expand_dims", call=call)
    assert batchrules.registered(cls).method == "expand_dims"
    batchrules.unregister(cls)
    assert "batch" not in vars(cls)
    assert batchrules.registered(cls) is None
    with pytest.raises(NotImplementedError):
        jax.vmap(apply, (None, 0))(tree(X[0], 2.0), jnp.asarray(Y))

    def batch(*_):
        raise AssertionError("never called")

    cls.batch = batch
    batchrules.register(cls, "expand_dims", call=call)
    assert vars(cls)["batch"] is not batch
    batchrules.unregister(cls)
    assert vars(cls)["batch"] is batch


def test_a_class_needs_a_call(combined):
    cls, _ = combined
    with pytest.raises(
        TypeError, match=r"register\('Combine'\): a HiJAX primitive class needs call=: call\(self, \*args\)"
    ):
        batchrules.register(cls, "expand_dims")
    with pytest.raises(TypeError, match=r"register\('Combine'\)"):
        batchrules.register(cls, "expand_dims", call=3)


@pytest.mark.parametrize(
    "answer",
    [lambda *args: {"both": args[2], "y": (args[2][:1, :2],)}, lambda *args: {"both": args[2].sum(0), "y": (args[2],)}],
    ids=["a part", "a sum"],
)
def test_a_call_that_breaks_its_promise(combined, answer):
    cls, apply = combined
    batchrules.register(cls, "broadcast_all", call=answer)
    with pytest.raises(batchrules.BatchContractError, match=r"primitive 'Combine' was given a batch of 4 elements"):
        jax.vmap(apply, (None, 0))(tree(X[0], 2.0), jnp.asarray(Y))


def test_a_call_that_returns_another_tree(combined):
    cls, apply = combined
    batchrules.register(cls, "broadcast_all", call=lambda self, model, y: {"both": y})  # noqa: ARG005
    with pytest.raises((batchrules.BatchContractError, TypeError, ValueError)):
        jax.vmap(apply, (None, 0))(tree(X[0], 2.0), jnp.asarray(Y))
