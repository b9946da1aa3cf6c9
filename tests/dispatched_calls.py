"""Host calls that a worker process can import: behind a decorator, with endpoints, counting their calls in a folder."""

import os
import pathlib
import signal
import tempfile
import threading
from concurrent.futures import Executor

import jax
import numpy as np

import batchrules

SCALAR = jax.ShapeDtypeStruct((), "float32")
ROW = jax.ShapeDtypeStruct((3,), "float32")


class Current(Executor):
    """Stands for the executor that a test chooses: a decorator needs one when its module is imported."""

    chosen = None

    def submit(self, fn, /, *args, **kwargs):
        return self.chosen.submit(fn, *args, **kwargs)


CURRENT = Current()


class SolverError(Exception):
    """No convergence."""


def note(folder, name):
    """Count a call, whichever process it is made in."""
    handle, _ = tempfile.mkstemp(prefix=f"{name}-", dir=folder)
    os.close(handle)


def counts(folder):
    """How many calls were counted, by name."""
    names = [path.name.split("-")[0] for path in pathlib.Path(folder).iterdir()]
    return {name: names.count(name) for name in set(names)}


def _column(scale):
    return scale[..., None]


def polynomial(params, x, power, folder):
    """A tree of arguments, two static ones, and a tree of results; takes whatever leads a method sends."""
    note(folder, "call")
    y = _column(params["scale"]) * x**power + params["shift"]
    return {"y": y, "sum": y.sum(axis=-1)}


def promise(params, x, power, folder):
    del params, power, folder
    return {"y": jax.ShapeDtypeStruct(x.shape, x.dtype), "sum": jax.ShapeDtypeStruct((), x.dtype)}


def polynomial_jvp(args, tangents):
    params, x, power, folder = args
    note(folder, "jvp")
    along, dx = tangents[:2]
    ds, dh = along["scale"], along["shift"]
    dy = np.zeros_like(x)
    if ds is not None:
        dy = dy + _column(ds) * x**power
    if dh is not None:
        dy = dy + dh
    if dx is not None:
        dy = dy + _column(params["scale"]) * power * x ** (power - 1) * dx
    return {"y": dy, "sum": dy.sum(axis=-1)}


def polynomial_vjp(args, cotangents, needed):
    params, x, power, folder = args
    note(folder, "vjp")
    assert needed[2:] == (None, None)
    ct = np.zeros_like(x)
    if cotangents["y"] is not None:
        ct = ct + cotangents["y"]
    if cotangents["sum"] is not None:
        ct = ct + cotangents["sum"][..., None]
    scale = np.broadcast_to((ct * x**power).sum(axis=-1), params["scale"].shape)
    shift = np.broadcast_to(ct, params["shift"].shape)
    to_x = np.broadcast_to(_column(params["scale"]) * power * x ** (power - 1) * ct, x.shape)
    return {"scale": scale, "shift": shift}, to_x, None, None


def twin(params, x, power):
    """The same in JAX, for one element."""
    y = params["scale"] * x**power + params["shift"]
    return {"y": y, "sum": y.sum()}


# The decorators hide the functions from pickle, which looks for them by name.


@batchrules.host_call(result_shape=SCALAR, executor=CURRENT, verify=False, signature="(n)->()")
def decorated(x):
    return (x * x).sum(axis=-1)


@batchrules.host_call(result_shape=SCALAR)
def decorated_jvp(args, tangents):
    return 2 * (args[0] * tangents[0]).sum(axis=-1)


def plain_vjp(args, cotangents, needed):
    del needed
    return (2 * cotangents[..., None] * args[0],)


@batchrules.host_call(result_shape=SCALAR, executor=CURRENT, jvp=decorated_jvp, vjp=plain_vjp)
def differentiable(x):
    return (x * x).sum(axis=-1)


class Solver:
    """A host call as a method; the solver itself is a static argument, and travels with each call."""

    def __init__(self, factor):
        self.factor = factor

    def __eq__(self, other):
        return isinstance(other, Solver) and self.factor == other.factor

    def __hash__(self):
        return hash(self.factor)

    @batchrules.host_call(result_shape=ROW, executor=CURRENT, static_argnames="self")
    def solve(self, x):
        return self.factor * x


def place(x):
    """Where it runs: the process, and whether in the main thread of it."""
    del x
    return np.array([os.getpid(), threading.current_thread() is threading.main_thread()], "int64")


def fails_at_7(x):
    if x == 7:
        raise SolverError("no convergence at 7")
    return 2 * x


def odd_fails(x):
    if x % 2 == 1:
        raise SolverError(f"{x:g} is odd")
    return 2 * x


def dies_at_5(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * x


def dies_once_at_5(x, folder):
    """The first to come here with a 5 does not come back, and takes its process with it."""
    if x == 5:
        try:
            (pathlib.Path(folder) / "died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    note(folder, "call")
    return 2 * x


def twice(x):
    return 2 * x
