"""A C function, called through ctypes: one element at a time, on threads, and by an entry point for many."""

import ctypes
import functools
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close
from jax.test_util import check_grads

import batchrules

SOURCE = r"""
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

/* y[i] = sin(rate x[i]) x[i + 1], round the end to the start */
void ring(const double *x, double rate, double *y, long n) {
    for (long i = 0; i < n; i++) y[i] = sin(rate * x[i]) * x[(i + 1) % n];
}

/* What a cotangent of y is for x and for the rate. */
void ring_vjp(const double *x, double rate, const double *y_bar, double *x_bar, double *rate_bar, long n) {
    *rate_bar = 0;
    for (long i = 0; i < n; i++) x_bar[i] = 0;
    for (long i = 0; i < n; i++) {
        long next = (i + 1) % n;
        double slope = cos(rate * x[i]) * x[next] * y_bar[i];
        x_bar[i] += rate * slope;
        x_bar[next] += sin(rate * x[i]) * y_bar[i];
        *rate_bar += x[i] * slope;
    }
}

/* The same for many, each with a rate of its own. */
void rings(const double *x, const double *rate, double *y, long count, long n) {
    for (long k = 0; k < count; k++) ring(x + k * n, rate[k], y + k * n, n);
}

void rings_vjp(const double *x, const double *rate, const double *y_bar, double *x_bar, double *rate_bar,
               long count, long n) {
    for (long k = 0; k < count; k++)
        ring_vjp(x + k * n, rate[k], y_bar + k * n, x_bar + k * n, rate_bar + k, n);
}

/* Wait in C until so many threads are here; how many came before the time was up. */
static atomic_int here;
int meet(int wanted, int seconds) {
    time_t end = time(NULL) + seconds;
    atomic_fetch_add(&here, 1);
    while (atomic_load(&here) < wanted && time(NULL) <= end) sched_yield();
    return atomic_load(&here);
}
"""

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler (cc, gcc or clang) to build with")

SIZE = 4
RESULT = jax.ShapeDtypeStruct((SIZE,), "float64")
DOUBLES = np.ctypeslib.ndpointer(np.float64, flags="C_CONTIGUOUS")

RNG = np.random.default_rng(0)
XS = jnp.asarray(RNG.normal(size=(3, SIZE)))
X = XS[0]
RATES = jnp.asarray([0.5, -1.5])
RATE = RATES[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring")
    source, built = folder / "ring.c", folder / "ring.so"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run([COMPILER, "-O2", "-std=c11", "-shared", "-fPIC", "-o", built, source, "-lm"], check=True)
    functions = ctypes.CDLL(str(built))  # which lets go of the GIL while C runs
    functions.ring.argtypes = [DOUBLES, ctypes.c_double, DOUBLES, ctypes.c_long]
    functions.ring_vjp.argtypes = [DOUBLES, ctypes.c_double, *[DOUBLES] * 3, ctypes.c_long]
    functions.rings.argtypes = [*[DOUBLES] * 3, ctypes.c_long, ctypes.c_long]
    functions.rings_vjp.argtypes = [*[DOUBLES] * 5, ctypes.c_long, ctypes.c_long]
    for name in ("ring", "ring_vjp", "rings", "rings_vjp"):
        getattr(functions, name).restype = None
    return functions


def for_one(c, **options):
    """By the entry points that take one element."""

    def ring(x, rate):
        y = np.empty_like(x)
        c.ring(x, rate, y, SIZE)
        return y

    def ring_vjp(args, y_bar, needed):
        (x, rate), x_bar, rate_bar = args, np.empty(SIZE), np.empty(())
        c.ring_vjp(x, rate, y_bar, x_bar, rate_bar, SIZE)
        return x_bar if needed[0] else None, rate_bar if needed[1] else None

    return call(ring, ring_vjp, **options)


def in_rows(array):
    """What leads with N by repetition has no memory of its own, and C wants some. A single number stays one."""
    return np.asarray(array, order="C")


def for_many(c, **options):
    """By the entry points that take as many elements as there are."""

    def rings(x, rate):
        x, rate = in_rows(x), in_rows(rate)
        y = np.empty_like(x)
        c.rings(x, rate, y, rate.size, SIZE)
        return y

    def rings_vjp(args, y_bar, needed):
        x, rate, y_bar = map(in_rows, (*args, y_bar))
        x_bar, rate_bar = np.empty_like(x), np.empty_like(rate)
        c.rings_vjp(x, rate, y_bar, x_bar, rate_bar, rate.size, SIZE)
        return x_bar if needed[0] else None, rate_bar if needed[1] else None

    return call(rings, rings_vjp, method="broadcast_all", **options)


def call(function, vjp, **options):
    """A host call; C has no entry point for the jvp, so that is made of differences."""
    jvp = batchrules.finite_difference(function).jvp
    return batchrules.host_call(function, RESULT, jvp=jvp, vjp=vjp, **options)


def twin(x, rate):
    return jnp.sin(rate * x) * jnp.roll(x, -1)


def energy(f):
    return lambda x, rate: jnp.sum(f(x, rate) ** 2)


def nest(f):
    return jax.vmap(jax.vmap(f, (0, None)), (None, 0))


PROGRAMS = {
    "call": lambda f: f(X, RATE),
    "vmap": lambda f: jax.vmap(f, (0, None))(XS, RATE),
    "vmap, axis 1": lambda f: jax.vmap(f, (1, None), 1)(XS.T, RATE),
    "vmap over the scalar": lambda f: jax.vmap(f, (None, 0))(X, RATES),
    "nested vmaps": lambda f: nest(f)(XS, RATES),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(X, RATE),
    "vmap of grad": lambda f: jax.vmap(jax.grad(energy(f), (0, 1)), (0, None))(XS, RATE),
    "grad of nested vmaps": lambda f: jax.grad(energy(nest(f)), (0, 1))(XS, RATES),
    "grad in the scalar": lambda f: jax.grad(energy(nest(f)), 1)(XS, RATES),
    "vmap of jacrev": lambda f: jax.vmap(jax.jacrev(f), (0, None))(XS, RATE),
    "jacrev of nested vmaps": lambda f: jax.jacrev(nest(f), (0, 1))(XS, RATES),
}
BY_DIFFERENCES = {
    "jvp": lambda f: jax.jvp(f, (X, RATE), (XS[1], RATE)),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(X, RATE),
    "vmap of jacfwd": lambda f: jax.vmap(jax.jacfwd(f), (0, None))(XS, RATE),
    "jvp of nested vmaps": lambda f: jax.jvp(nest(f), (XS, RATES), (XS, RATES)),
}
FORMS = {
    "one": for_one,
    "one, threads": functools.partial(for_one, executor=2),
    "many": for_many,
    "many, in chunks on threads": functools.partial(for_many, executor=2, batch_size=4),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_against_the_twin(library, name, jit, form):
    f = form(library)
    result = jax.jit(lambda: PROGRAMS[name](f))() if jit else PROGRAMS[name](f)
    assert_close(result, PROGRAMS[name](twin), 1e-12, 1e-12)


@every_form
@pytest.mark.parametrize("name", BY_DIFFERENCES)
def test_forward_mode_by_differences(library, name, form):
    assert_close(BY_DIFFERENCES[name](form(library)), BY_DIFFERENCES[name](twin), 1e-8, 1e-8)


@every_form
def test_check_grads(library, form):
    check_grads(form(library), (X, RATE), order=1, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


def test_threads_are_in_c_at_once(library):
    """A call waits in C for the other one, so it sees both only if C runs on two threads, without the GIL."""
    f = batchrules.host_call(
        lambda _: np.int32(library.meet(2, 60)), jax.ShapeDtypeStruct((), "int32"), executor=2, name="meet"
    )
    assert jax.vmap(f)(jnp.arange(2)).tolist() == [2, 2]


def test_chunks_are_given_to_threads(library):
    """Each thread hands many elements to C at a time."""
    meeting, sizes = threading.Barrier(2), []

    def rings(x, rate):
        meeting.wait(60)
        sizes.append(rate.size)
        y = np.empty_like(x)
        library.rings(x, in_rows(rate), y, rate.size, SIZE)
        return y

    f = batchrules.host_call(rings, RESULT, method="broadcast_all", batch_size=2, executor=2, verify=False)
    xs = jnp.concatenate([XS, XS[:1]])
    assert_close(jax.vmap(f, (0, None))(xs, RATE), jax.vmap(twin, (0, None))(xs, RATE), 1e-12)
    assert sizes == [2, 2]
