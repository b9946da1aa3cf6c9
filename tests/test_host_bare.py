"""A function that has run once takes a shorter way from then on; what it may do wrong there is told as before."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules

SHAPE = jax.ShapeDtypeStruct((3,), "float64")
X = jnp.arange(3.0)


class Later:
    """A vjp and a jvp of x -> x ** 2, which return `answer` once it is set."""

    def __init__(self):
        self.answer = None

    def vjp(self, args, cotangents, needed):
        assert needed == (True,)
        return (2 * args[0] * cotangents,) if self.answer is None else self.answer()

    def jvp(self, args, tangents):
        return 2 * args[0] * tangents[0] if self.answer is None else self.answer()


def call(**endpoints):
    return batchrules.host_call(lambda x: x**2, SHAPE, method="sequential", name="square", **endpoints)


MODES = {
    "grad": lambda later: jax.jit(jax.grad(lambda x: call(vjp=later.vjp)(x).sum())),
    "jvp": lambda later: jax.jit(lambda x: jax.jvp(call(jvp=later.jvp), (x,), (jnp.ones(3),))[1]),
    "grad of vmap": lambda later: jax.jit(
        lambda x: jax.grad(lambda xs: jax.vmap(call(vjp=later.vjp))(xs).sum())(jnp.stack([x, x]))[0]
    ),
    "jvp of vmap": lambda later: jax.jit(
        lambda x: jax.jvp(jax.vmap(call(jvp=later.jvp)), (jnp.stack([x, x]),), (jnp.ones((2, 3)),))[1][0]
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_run_gives_the_same(mode):
    f = MODES[mode](Later())
    for _ in range(4):
        np.testing.assert_array_equal(f(X), 2 * X)


@pytest.mark.parametrize("mode", MODES)
def test_none_is_zero_in_a_later_run_too(mode):
    later = Later()
    f = MODES[mode](later)
    f(X)
    later.answer = (lambda: None) if "jvp" in mode else (lambda: (None,))
    np.testing.assert_array_equal(f(X), np.zeros(3))


WRONG = {
    "no number": (np.array(["a", "b", "c"]), "<U1"),
    "masked": (np.ma.array(np.ones(3), mask=[True, False, False]), "mask"),
    "another shape": (np.ones(4), r"expected \(3,\), got \(4,\)|\(4,\)"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_array_is_told_in_a_later_run(mode, what):
    wrong, text = WRONG[what]
    later = Later()
    f = MODES[mode](later)
    f(X)
    later.answer = (lambda: wrong) if "jvp" in mode else (lambda: (wrong,))
    with pytest.raises(Exception, match=text):
        jax.block_until_ready(f(X))


@pytest.mark.parametrize("executor", [None, 2])
def test_a_masked_result_is_refused_in_a_later_run(executor):
    results = [np.ones(3)]
    f = batchrules.host_call(lambda _: results[0], SHAPE, method="sequential", executor=executor)
    for program, argument in ((jax.jit(f), X), (jax.jit(jax.vmap(f)), jnp.stack([X, X]))):
        results[0] = np.ones(3)
        jax.block_until_ready(program(argument))
        results[0] = np.ma.array(np.ones(3), mask=[True, False, False])
        with pytest.raises(Exception, match="mask"):
            jax.block_until_ready(program(argument))


@pytest.mark.parametrize("mode", ["grad", "grad of vmap"])
def test_another_structure_is_told_in_a_later_run(mode):
    later = Later()
    f = MODES[mode](later)
    f(X)
    later.answer = lambda: (np.ones(3), np.ones(3))
    with pytest.raises(Exception, match="the vjp endpoint must return a tree like the arguments"):
        jax.block_until_ready(f(X))


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_is_told_with_its_endpoint_in_a_later_run(mode):
    later = Later()
    f = MODES[mode](later)
    f(X)

    def fails():
        raise ArithmeticError("no slope")

    later.answer = fails
    with pytest.raises(Exception, match=r"square.* \((vjp|jvp)\)[\s\S]*ArithmeticError: no slope"):
        jax.block_until_ready(f(X))


@pytest.mark.parametrize("argnums", [0, 1])
@pytest.mark.parametrize("executor", [None, 4])
@pytest.mark.parametrize("gives", ["what is needed", "both"])
def test_one_of_two_arguments(argnums, executor, gives):
    def vjp(args, cotangents, needed):
        assert needed == (argnums == 0, argnums == 1)
        both = args[1] * cotangents, args[0] * cotangents
        return both if gives == "both" else tuple(ct if w else None for ct, w in zip(both, needed, strict=True))

    f = batchrules.host_call(lambda x, y: x * y, SHAPE, method="sequential", vjp=vjp, executor=executor)
    g = jax.jit(jax.vmap(jax.grad(lambda x, y: f(x, y).sum(), argnums)))
    xs, ys = jnp.arange(6.0).reshape(2, 3), 1 + jnp.arange(6.0).reshape(2, 3)
    for _ in range(3):
        np.testing.assert_array_equal(g(xs, ys), (ys, xs)[argnums])


def test_results_in_a_buffer_that_the_function_uses_again_are_copied_in_threads():
    # With one thread the calls are made in order, and each result is stored before the next call.
    own = threading.local()

    def into_buffer(x):
        own.buffer = getattr(own, "buffer", np.zeros(3))
        np.multiply(x, 2, out=own.buffer)
        return own.buffer

    f = batchrules.host_call(into_buffer, SHAPE, method="sequential", executor=2)
    g = jax.jit(jax.vmap(f))
    xs = jnp.arange(600.0).reshape(200, 3)
    for _ in range(3):
        np.testing.assert_array_equal(g(xs), 2 * xs)
