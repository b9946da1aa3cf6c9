"""Programs that run in a process of their own: a hang, an abort or a signal ends that one and not the tests."""

import os
import pathlib
import subprocess
import sys
import textwrap

import batchrules

PREAMBLE = """
import concurrent.futures
import gc
import os
import signal
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import batchrules

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
F64 = jax.ShapeDtypeStruct((), "float64")


def on(xs, kind="Auto"):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(AxisType, kind),))
    return jax.device_put(xs, NamedSharding(mesh, P("x")))


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batchrules")]


def outcome(function, *args):
    try:
        jax.block_until_ready(function(*args))
    except jax.errors.JaxRuntimeError as error:
        # Its own name for itself was XlaRuntimeError on jax 0.7.
        return f"JaxRuntimeError: {str(error).splitlines()[-1]}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def original(function):
    return batchrules.original_errors()(lambda *args: jax.block_until_ready(function(*args)))


def leave():
    # Not a normal exit: a program that failed on several devices would raise its error again there.
    sys.stdout.flush()
    os._exit(0)
"""


def run(body: str, *, seconds: float = 60) -> list[str]:
    """The lines that a process printed, which ran the body after the preamble."""
    root = str(pathlib.Path(batchrules.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body) + "\nleave()\n"],
        env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout.splitlines()
