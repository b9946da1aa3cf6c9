"""A filter: a program that reads numbers and writes numbers, started once for each call."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close

import batchrules

# Reads a number a line, writes x³ - 2 x of each; a number that is too large ends it with a message.
FILTER = """
import sys
for line in sys.stdin:
    x = float(line)
    if abs(x) > 100:
        sys.exit(f"out of range: {x}")
    print(repr(x**3 - 2 * x))
"""
# Isolated and without site-packages it starts in a few milliseconds.
COMMAND = [sys.executable, "-I", "-S", "-c", FILTER]

SIZE = 3
RESULT = jax.ShapeDtypeStruct((SIZE,), "float64")
XS = jnp.asarray(np.random.default_rng(0).normal(size=(4, SIZE)))


class FilterError(Exception):
    """What the filter wrote before it gave up."""


def cubic(x):
    text = "\n".join(map(repr, x.ravel().tolist()))
    done = subprocess.run(COMMAND, input=text, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise FilterError(done.stderr.strip())
    return np.array(done.stdout.split(), dtype="float64").reshape(x.shape)


def twin(x):
    return x**3 - 2 * x


def nest(f):
    return jax.vmap(jax.vmap(lambda x, y: f(x) * y, (None, 0)), (0, None))


PROGRAMS = {
    "call": lambda f: f(XS[0]),
    "vmap": lambda f: jax.vmap(f)(XS),
    "nested vmaps": lambda f: nest(f)(XS, XS[:2]),
    "scan": lambda f: jax.lax.scan(lambda carry, x: (f(carry) / 8, f(x)), XS[0], XS[:2]),
}
DERIVATIVES = {
    "jacfwd": lambda f: jax.jacfwd(f)(XS[0]),
    "jacrev": lambda f: jax.jacrev(f)(XS[0]),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(XS[:2]),
}
# One process for each element, in order or four at a time; or one for all of them.
CONDUCT = {
    "in order": {},
    "on threads": {"executor": 4},
    "at once": {"method": "expand_dims"},
}
every_conduct = pytest.mark.parametrize("options", CONDUCT.values(), ids=CONDUCT)


@every_conduct
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_against_the_twin(name, jit, options):
    f = batchrules.host_call(cubic, RESULT, **options)
    result = jax.jit(lambda: PROGRAMS[name](f))() if jit else PROGRAMS[name](f)
    assert_close(result, PROGRAMS[name](twin), 1e-12, 1e-12)


@every_conduct
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_by_differences(name, options):
    """A black box of the purest kind: nothing but numbers in and numbers out."""
    f = batchrules.host_call(cubic, RESULT, **batchrules.finite_difference(cubic), **options)
    assert_close(jax.jit(lambda: DERIVATIVES[name](f))(), DERIVATIVES[name](twin), 1e-8, 1e-8)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_processes_run_at_once(jit):
    meeting = threading.Barrier(4)

    def together(x):
        meeting.wait(60)
        return cubic(x)

    program = jax.vmap(batchrules.host_call(together, RESULT, executor=4))
    assert_close((jax.jit(program) if jit else program)(XS), twin(XS), 1e-12)


@pytest.mark.parametrize("executor", [None, 2], ids=["in order", "threads"])
def test_a_process_that_fails_is_named(executor):
    f = batchrules.host_call(cubic, RESULT, executor=executor)
    bad = XS.at[2, 1].set(1e3)
    with pytest.raises(FilterError, match=r"out of range: 1000\.0") as failure:
        jax.vmap(f)(bad)
    assert "'cubic' failed at element (2,), with arguments x (3,)" in failure.value.__notes__[0]
    with pytest.raises(FilterError), batchrules.original_errors():
        jax.block_until_ready(jax.jit(jax.vmap(f))(bad))


@pytest.mark.parametrize("executor", [None, 2], ids=["in order", "threads"])
def test_a_process_that_fails_can_be_a_nan(executor):
    f = batchrules.host_call(cubic, RESULT, executor=executor, on_error="nan")
    with pytest.warns(batchrules.FailedElementsWarning, match=r"1 of 4 elements failed: \(2,\).*out of range"):
        result = jax.vmap(f)(XS.at[2, 1].set(1e3))
    assert_close(result, twin(XS).at[2].set(jnp.nan), 1e-12)


def test_no_process_is_started_where_the_mask_is_false():
    started = []

    def counted(x):
        started.append(1)
        return cubic(x)

    f = batchrules.host_call(counted, RESULT)
    masks = jnp.array([True, False, False, True])
    result = jax.vmap(lambda mask, x: f.where(mask, x, otherwise=-1.0))(masks, XS)
    assert_close(result, jnp.where(masks[:, None], twin(XS), -1.0), 1e-12)
    assert len(started) == 2
