"""Host and device calls as methods of a class: bound to an instance, they have all that they have unbound."""

import functools
import inspect
import pickle
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass

import batchrules
from batchrules import ArraySpec, finite_difference

F64 = jax.ShapeDtypeStruct((), "float64")
XS = jnp.arange(4.0)
ANY = {"x": ArraySpec((...,), "float64")}


class Solver:
    """An instance is a static argument."""

    def __init__(self, gain):
        self.gain = gain

    @batchrules.host_call(result_shape=F64, static_argnames="self", schema=ANY, jvp=lambda args, t: args[0].gain * t[1])
    def solve(self, x):
        """Solve it."""
        return self.gain * x

    @batchrules.device_call(static_argnames="self", schema=ANY)
    def run(self, x):
        """Run it."""
        return self.gain * x


@register_dataclass
@dataclass
class Model:
    """An instance is a container of arrays."""

    gain: object

    @batchrules.host_call(result_shape=F64)
    def solve(self, x):
        return self.gain * x

    @batchrules.device_call
    def run(self, x):
        return self.gain * x


both = pytest.mark.parametrize("name", ["solve", "run"])
owners = pytest.mark.parametrize("owner", [Solver(3.0), Model(jnp.array(3.0))], ids=["static", "container"])


@both
@owners
def test_calls(owner, name):
    call = getattr(owner, name)
    for way in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(way(call)(2.0), 6.0)
        np.testing.assert_array_equal(way(jax.vmap(call))(XS), 3 * XS)
        np.testing.assert_array_equal(way(jax.vmap(lambda x: call(x=x)))(XS), 3 * XS)


@both
def test_looks_like_a_bound_method(name):
    call = getattr(Solver(3.0), name)
    assert call.__name__ == name
    assert call.__doc__.startswith(name.title())
    assert str(inspect.signature(call)) == "(x)"
    assert repr(call) == f"<bound {'host' if name == 'solve' else 'device'}_call {name!r} method='auto'>"
    assert call.__self__.gain == 3.0
    assert isinstance(call, functools.partial)


@both
def test_method_for(name):
    call = getattr(Solver(3.0), name)
    for choice in (call.method_for(XS), call.method_for(XS, in_axes=(0,)), call.method_for(x=XS)):
        assert choice.method == "expand_dims"
        assert len(choice.leads) == 1
    assert getattr(Model(jnp.array(3.0)), name).method_for(XS, in_axes=[0]).method == "sequential"


@owners
def test_where(owner):
    masked = lambda x: owner.solve.where(x > 1, x, otherwise=-1.0)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.vmap(masked))(XS), [-1, -1, 6, 9])


def test_replace():
    call = Solver(3.0).solve.replace(method="sequential", name="other")
    assert repr(call) == "<bound host_call 'other' method='sequential'>"
    assert call.method_for(XS).method == "sequential"
    np.testing.assert_array_equal(jax.vmap(call)(XS), 3 * XS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'methods'"):
        call.replace(methods="auto")


def test_derivatives():
    np.testing.assert_array_equal(jax.vmap(jax.jacfwd(Solver(3.0).solve))(XS), [3.0] * 4)


def test_host_function_is_bound_too():
    solver = Solver(3.0)
    assert solver.solve.host_function(2.0) == 6.0
    f = batchrules.host_call(solver.solve.host_function, F64, **finite_difference(solver.solve))
    np.testing.assert_allclose(jax.grad(f)(2.0), 3.0, 1e-6)


def test_other_instances_are_other_calls():
    """Nothing of one instance is kept for another, nor for the same one once it has changed."""
    first, second = Solver(3.0), Solver(5.0)
    assert [jax.jit(solver.solve)(1.0) for solver in (first, second)] == [3, 5]
    first.gain = 7.0
    assert jax.jit(first.solve)(1.0) == 7


def test_pickle():
    solve = pickle.loads(pickle.dumps(Solver(3.0).solve.host_function))  # noqa: S301  # our own
    assert solve(2.0) == 6.0
