"""What a review of the host derivatives found: each of these once gave a wrong answer, or none."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules

F64 = jax.ShapeDtypeStruct((), "float64")
XS = jnp.array([1.0, 2.0, 3.0])


def weighed(p):
    return p["a"] * 2 + p["b"] * 3


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("given", [dict, collections.OrderedDict])
def test_an_answer_in_another_kind_of_dict_is_taken_by_its_keys(kind, given):
    def vjp(args, cotangents, needed):
        del args, needed
        return (kind([("b", 3 * cotangents), ("a", 2 * cotangents)]),)

    f = batchrules.host_call(weighed, F64, vjp=vjp)
    result = jax.grad(f)(given([("b", 1.0), ("a", 1.0)]))
    assert (float(result["a"]), float(result["b"])) == (2.0, 3.0)


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_differences_of_a_function_that_reuses_its_buffer(scheme):
    buffer = np.zeros(100)

    def square(x):
        if x.ndim == 0:
            return x**2
        np.multiply(x, x, out=buffer[: len(x)])
        return buffer[: len(x)]

    f = batchrules.host_call(
        square, F64, method="expand_dims", verify=False, **batchrules.finite_difference(square, scheme)
    )
    np.testing.assert_allclose(jax.jvp(jax.vmap(f), (XS,), (jnp.ones(3),))[1], 2 * XS, 1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(XS), 2 * XS, 1e-6)


@pytest.mark.parametrize("counter", [jnp.int32(100_000), jnp.float32(1e9)], ids=["a step counter", "no bound"])
def test_an_unmapped_argument_does_not_widen_the_value_gate(counter):
    def lie(x, t):
        del t
        return (x / np.linalg.norm(x)).astype("float32")

    f = batchrules.host_call(lie, jax.ShapeDtypeStruct((3,), "float32"), method="expand_dims")
    xs = jnp.array([[1, 2, 3], [4, 5, 7]], "float32")
    with pytest.raises(batchrules.BatchContractError, match="does not treat the elements of a batch one by one"):
        jax.vmap(f, (0, None))(xs, counter)


def test_complex_step_minds_only_the_outputs_in_use():
    def several(x):
        return x**2, np.int32(3), 1.0

    shape = (F64, jax.ShapeDtypeStruct((), "int32"), batchrules.ArraySpec((), "float64", differentiable=False))
    f = batchrules.host_call(several, shape, **batchrules.finite_difference(several, "complex_step"))
    assert float(jax.grad(lambda x: f(x)[0])(2.0)) == 4.0
    assert float(jax.jvp(lambda x: f(x)[0], (2.0,), (1.0,))[1]) == 4.0
    assert jax.vmap(jax.grad(lambda x: f(x)[0]))(XS).tolist() == [2.0, 4.0, 6.0]


def test_differences_of_a_callable_without_a_hash():
    @dataclasses.dataclass
    class Simulator:
        rate: float = 2.0

        def __call__(self, x):
            return self.rate * x**2

    simulator = Simulator()
    f = batchrules.host_call(simulator, F64, method="expand_dims", **batchrules.finite_difference(simulator))
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(XS), 4 * XS, 1e-6)
