"""A SciPy solver, differentiated by the implicit function theorem, against Newton's method in JAX.

The equation is a boundary value problem, -u'' + wind u' + rate u³ = source on (0, 1) with u = 0 at both ends, by finite
differences on SIZE points. The wind makes its Jacobian unsymmetric, so a transpose that is missing shows.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close
from jax.test_util import check_grads
from scipy import optimize

import batchrules

SIZE = 5
STEP = 1 / (SIZE + 1)
BEND = (2 * np.eye(SIZE) - np.eye(SIZE, k=1) - np.eye(SIZE, k=-1)) / STEP**2
SLOPE = (np.eye(SIZE, k=1) - np.eye(SIZE, k=-1)) / (2 * STEP)
RESULT = {"u": jax.ShapeDtypeStruct((SIZE,), "float64"), "evaluations": jax.ShapeDtypeStruct((), "int64")}

RNG = np.random.default_rng(0)
SOURCES = jnp.asarray(RNG.normal(size=(3, SIZE)) * 30)
SOURCE = SOURCES[0]
RATES = jnp.asarray([0.5, 2.0, 8.0])
WINDS = jnp.asarray([-4.0, 1.0, 6.0])
PHYSICS = {"rate": RATES[1], "wind": WINDS[2]}


def residual(u, physics, source):
    return BEND @ u + physics["wind"] * (SLOPE @ u) + physics["rate"] * u**3 - source


def matrix(u, physics):
    """The Jacobian of the residual in u."""
    return BEND + physics["wind"] * SLOPE + np.diag(3 * physics["rate"] * u**2)


def solve(physics, source):
    found = optimize.root(residual, np.zeros(SIZE), (physics, source), jac=lambda u, p, _: matrix(u, p), tol=1e-13)
    if not found.success:
        raise ArithmeticError(found.message)
    return {"u": found.x, "evaluations": np.int64(found.nfev)}


def tangent(args, tangents, outputs):
    """J du = -(dF/dphysics dphysics + dF/dsource dsource)."""
    (physics, _), (dphysics, dsource), u = args, tangents, outputs["u"]
    moved = np.zeros(SIZE) if dsource is None else dsource.copy()
    if dphysics["rate"] is not None:
        moved -= dphysics["rate"] * u**3
    if dphysics["wind"] is not None:
        moved -= dphysics["wind"] * (SLOPE @ u)
    return {"u": np.linalg.solve(matrix(u, physics), moved), "evaluations": None}


def adjoint(args, cotangents, needed, outputs):
    """One transposed solve, whatever is needed."""
    (physics, _), u = args, outputs["u"]
    weights = np.linalg.solve(matrix(u, physics).T, cotangents["u"])
    rate = -(weights @ u**3) if needed[0]["rate"] else None
    wind = -(weights @ (SLOPE @ u)) if needed[0]["wind"] else None
    return {"rate": rate, "wind": wind}, weights if needed[1] else None


def solver(**options):
    return batchrules.host_call(solve, RESULT, jvp=tangent, vjp=adjoint, pass_outputs=True, **options)


def newton(physics, source):
    """The twin: Newton's method, which doubles the digits at each step; JAX differentiates through the loop."""

    def step(u, _):
        jacobian = BEND + physics["wind"] * SLOPE + jnp.diag(3 * physics["rate"] * u**2)
        return u - jnp.linalg.solve(jacobian, residual(u, physics, source)), None

    return jax.lax.scan(step, jnp.zeros(SIZE), length=10)[0]


def u_of(f):
    return lambda physics, source: f(physics, source)["u"]


def energy(f):
    return lambda physics, source: jnp.sum(jnp.sin(f(physics, source)) ** 2)


def over_sources(f):
    return jax.vmap(f, (None, 0))


def over_all(f):
    """Every rate and wind with every source."""
    return jax.vmap(over_sources(f), (0, None))


MANY_PHYSICS = {"rate": RATES, "wind": WINDS}

PROGRAMS = {
    "call": lambda f: f(PHYSICS, SOURCE),
    "vmap": lambda f: over_sources(f)(PHYSICS, SOURCES),
    "vmap of vmap": lambda f: over_all(f)(MANY_PHYSICS, SOURCES),
    "vmap over the rate only": lambda f: jax.vmap(f, ({"rate": 0, "wind": None}, None))(
        {**PHYSICS, "rate": RATES}, SOURCE
    ),
    "jvp": lambda f: jax.jvp(f, (PHYSICS, SOURCE), (PHYSICS, SOURCES[1])),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(PHYSICS, SOURCE),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(PHYSICS, SOURCE),
    "grad in the source only": lambda f: jax.grad(energy(f), 1)(PHYSICS, SOURCE),
    "vmap of grad": lambda f: over_sources(jax.grad(energy(f), (0, 1)))(PHYSICS, SOURCES),
    "grad of vmap": lambda f: jax.grad(energy(over_sources(f)), (0, 1))(PHYSICS, SOURCES),
    "vmap of jacrev": lambda f: over_sources(jax.jacrev(f))(PHYSICS, SOURCES),
    "jacrev of vmap": lambda f: jax.jacrev(over_sources(f), (0, 1))(PHYSICS, SOURCES[:2]),
    "jacfwd of vmap of vmap": lambda f: jax.jacfwd(over_all(f))(MANY_PHYSICS, SOURCES[:2]),
    "grad of vmap of vmap": lambda f: jax.grad(energy(over_all(f)), (0, 1))(MANY_PHYSICS, SOURCES),
    "vmap of value_and_grad": lambda f: over_sources(jax.value_and_grad(energy(f)))(PHYSICS, SOURCES),
    "remat": lambda f: jax.grad(jax.checkpoint(energy(f)))(PHYSICS, SOURCE),
}


def under_jit(program, f):
    return jax.jit(lambda: program(f))()


@functools.cache
def wanted(name):
    """What the twin gives."""
    return under_jit(PROGRAMS[name], newton)


@pytest.mark.parametrize("executor", [None, 3], ids=["in order", "threads"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_against_newton(name, executor):
    assert_close(under_jit(PROGRAMS[name], u_of(solver(executor=executor))), wanted(name), 1e-7, 1e-9)


@pytest.mark.parametrize("name", ["vmap of vmap", "jacrev", "vmap of grad", "grad of vmap", "jacfwd of vmap of vmap"])
def test_outside_jit(name):
    assert_close(PROGRAMS[name](u_of(solver(executor=3))), wanted(name), 1e-7, 1e-9)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_check_grads(mode):
    check_grads(u_of(solver()), (PHYSICS, SOURCE), order=1, modes=[mode], atol=1e-6, rtol=1e-6)


def test_the_solution_is_not_computed_again():
    """An adjoint needs the solution: with pass_outputs it is given it, and one solve serves all the rows."""
    solved = []

    def counted(physics, source):
        solved.append(1)
        return solve(physics, source)

    f = batchrules.host_call(counted, RESULT, vjp=adjoint, pass_outputs=True)
    jax.block_until_ready(jax.jit(jax.jacrev(u_of(f), (0, 1)))(PHYSICS, SOURCE))
    assert len(solved) == 1
    jax.block_until_ready(jax.jit(jax.grad(energy(over_all(u_of(f))), (0, 1)))(MANY_PHYSICS, SOURCES))
    assert len(solved) == 1 + len(RATES) * len(SOURCES)


def test_threads_solve_at_once():
    meeting = threading.Barrier(3)

    def together(physics, source):
        meeting.wait(60)
        return solve(physics, source)

    f = batchrules.host_call(together, RESULT, executor=3)
    assert_close(over_sources(u_of(f))(PHYSICS, SOURCES), wanted("vmap"), 1e-9)


def test_a_solver_that_fails_is_named():
    def limited(physics, source):
        if abs(source).max() > 1000:
            raise ArithmeticError("the iteration does not converge")
        return solve(physics, source)

    f = u_of(batchrules.host_call(limited, RESULT, name="boundary_value"))
    sources = SOURCES.at[2].mul(1e6)
    with pytest.raises(ArithmeticError, match="does not converge") as failure:
        over_sources(f)(PHYSICS, sources)
    assert "boundary_value" in failure.value.__notes__[0]
    assert "element (2,)" in failure.value.__notes__[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)boundary_value.*element \(2,\).*does not converge"):
        jax.block_until_ready(jax.jit(over_sources(f))(PHYSICS, sources))
    assert isinstance(batchrules.last_error(), ArithmeticError)


# The second derivatives: the adjoint's own tangent, with du/dargs in it, since the endpoint is given the solution.


def like_the_needed(args, _, needed):
    return jax.tree.map(lambda is_needed, x: x if is_needed else None, needed, args)


def tangent_of_adjoint(primals, tangents, outputs):
    (args, cotangents, needed), (dargs, dcotangents, _) = primals, tangents
    (physics, _), u = args, outputs["u"]
    dphysics = {name: np.zeros(()) if move is None else move for name, move in dargs[0].items()}
    du = tangent(args, (dphysics, dargs[1]), outputs)["u"]
    transposed = matrix(u, physics).T
    weights = np.linalg.solve(transposed, cotangents["u"])
    bent = dphysics["wind"] * SLOPE + np.diag(6 * physics["rate"] * u * du + 3 * dphysics["rate"] * u**2)
    change = np.zeros(SIZE) if dcotangents["u"] is None else dcotangents["u"]
    dweights = np.linalg.solve(transposed, change - bent.T @ weights)
    rate = -(dweights @ u**3 + weights @ (3 * u**2 * du))
    wind = -(dweights @ (SLOPE @ u) + weights @ (SLOPE @ du))
    answer = {"rate": rate, "wind": wind}, dweights
    return like_the_needed(answer, None, needed)


SECOND = {
    "hessian": lambda f: jax.hessian(energy(f), (0, 1))(PHYSICS, SOURCE),
    "hessian-vector product": lambda f: jax.jvp(jax.grad(energy(f), (0, 1)), (PHYSICS, SOURCE), (PHYSICS, SOURCES[1])),
    "vmap of hessian": lambda f: over_sources(jax.hessian(energy(f)))(PHYSICS, SOURCES),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_against_newton(name):
    twice = batchrules.host_call(adjoint, like_the_needed, static_argnames="needed", jvp=tangent_of_adjoint)
    f = u_of(batchrules.host_call(solve, RESULT, jvp=tangent, vjp=twice, pass_outputs=True))
    assert_close(under_jit(SECOND[name], f), under_jit(SECOND[name], newton), 1e-6, 1e-9)
