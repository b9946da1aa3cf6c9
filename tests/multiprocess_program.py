"""What one of the two JAX processes of `test_host_multiprocess.py` runs, each with two of four devices.

`python multiprocess_program.py 0 ADDRESS FILE` writes to the file, as JSON, for each program: which elements this
process called for, and which shards of the result it has; or its failure.
"""

import json
import os
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import batchrules

XS = np.arange(8, dtype="float32")
OPTIONS = {"in order": {}, "threads": {"executor": 2}, "vectorised": {"method": "expand_dims"}}


class SolverError(Exception):
    """No convergence."""


class Square:
    """A host function that remembers the elements it was given, and those that its vjp was given."""

    def __init__(self, bad=None):
        self.bad = bad
        self.given = []
        self.given_back = []

    def call(self, x):
        self.given += np.ravel(x).tolist()
        if self.bad in np.ravel(x):
            raise SolverError(f"no convergence at {self.bad}")
        return x * x

    def vjp(self, args, cotangents, needed):
        del needed
        self.given_back += np.ravel(args[0]).tolist()
        return (2 * args[0] * cotangents,)

    def host_call(self, **options):
        shape = jax.ShapeDtypeStruct((), "float32")
        return batchrules.host_call(self.call, shape, vjp=self.vjp, name="square", verify=False, **options)


class Way:
    """A mesh of all devices, and how a call is mapped over them."""

    def __init__(self, kind, *, by_hand):
        self.mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
        self.by_hand = by_hand

    def program(self, function):
        mapped = jax.vmap(function)
        if self.by_hand:
            mapped = jax.shard_map(mapped, mesh=self.mesh, in_specs=P("x"), out_specs=P("x"))
        return jax.jit(mapped)

    def run(self, function):
        """The result for the elements from 0 to 7, two on each device."""
        return self.run_compiled(self.program(function))

    def run_compiled(self, program):
        spread = jax.make_array_from_callback(XS.shape, NamedSharding(self.mesh, P("x")), XS.__getitem__)
        return jax.block_until_ready(program(spread))


def success(way, square, function):
    result = way.run(function)
    shards = [[list(range(8)[s.index[0]]), np.asarray(s.data).tolist()] for s in result.addressable_shards]
    return {"given": sorted(square.given), "given back": sorted(square.given_back), "shards": sorted(shards)}


def failure(way, square):
    try:
        way.run(square.host_call())
    except Exception as error:  # noqa: BLE001  # the test looks at it
        return {"error": str(error), "given": sorted(square.given)}
    return {"error": None}


def failures(way, square, *bad):
    """The failures of one program, one for each element that is bad in its turn."""
    program, errors = way.program(square.host_call()), []
    for square.bad in bad:
        try:
            way.run_compiled(program)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            errors.append(str(error))
    return {"errors": errors}


def results():
    ways = {
        "shard_map": Way(AxisType.Auto, by_hand=True),
        "explicit": Way(AxisType.Explicit, by_hand=False),
        "auto": Way(AxisType.Auto, by_hand=False),
    }
    for name, way in ways.items():
        for how, options in OPTIONS.items():
            square = Square()
            yield f"{name}, {how}", success(way, square, square.host_call(**options))
        square = Square()
        yield f"{name}, grad", success(way, square, jax.grad(square.host_call()))
    # Inside a shard_map of the user's own, a device that fails fails alone.
    for name in ("explicit", "auto"):
        for bad in (1, 5):
            yield f"{name}, bad {bad}", failure(ways[name], Square(bad))
        square = Square()
        yield f"{name}, after", success(ways[name], square, square.host_call())
    yield "explicit, bad 1, then 5", failures(ways["explicit"], Square(), 1, 5)


def main():
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
    # Not printed: gloo prints too.
    pathlib.Path(sys.argv[3]).write_text(json.dumps(dict(results())), encoding="utf-8")
    jax.distributed.shutdown()
    # Not a normal exit, which would raise the errors of the failed programs again.
    os._exit(0)


if __name__ == "__main__":
    main()
