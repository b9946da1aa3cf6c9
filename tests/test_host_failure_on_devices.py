"""A host function that fails on several devices: every device fails at once, and the process stays usable.

Were one device to fail alone, the others would wait for it in a collective until XLA aborts the process, 15
to 60 s later. So each test runs in a process of its own, and the abort, or a wait, is the failure. That is also
because JAX keeps a token of the failed program, and raises again at `jax.effects_barrier()` and at exit.
"""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import batchrules

# XLA gives up after 15 s on jax 0.7, and 60 s later; starting JAX takes 2 to 5 s on a busy machine.
SECONDS = 14
PREAMBLE = """
import os
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import batchrules

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
auto = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
explicit = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
XS = np.arange(8.0)
on = lambda mesh, spec=P("x"): jax.device_put(XS, NamedSharding(mesh, spec))
good = batchrules.host_call(lambda x: 2 * x, lambda x: x, method="expand_dims", name="good")


class Simulator(Exception):
    pass


def raising(exception, fails=lambda x: True, method="sequential"):
    def solve(x):
        if fails(x):
            raise exception
        return x * 2

    return batchrules.host_call(solve, lambda x: x, method=method, name="solve")


def failure(function, *args):
    try:
        jax.block_until_ready(function(*args))
    except jax.errors.JaxRuntimeError as error:
        # Its own name for itself was XlaRuntimeError on jax 0.7.
        return f"JaxRuntimeError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    raise SystemExit("nothing was raised")


def usable():
    for mesh in (auto, explicit):
        doubled = jax.jit(jax.vmap(good))(on(mesh))
        assert all(np.array_equal(shard.data, 2 * XS[shard.index]) for shard in doubled.addressable_shards)


def leave():
    # Not a normal exit, which would raise the failed program's token again.
    sys.stdout.flush()
    os._exit(0)
"""


def run(body):
    """The lines that a process printed, which ran the body."""
    root = str(pathlib.Path(batchrules.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body) + "\nleave()\n"],
        env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
def test_all_devices_fail_at_once_with_the_foreign_text(mesh, method):
    out = run(f"""
        solve = raising(Simulator("the reactor is empty"), method={method!r})
        print(failure(jax.jit(jax.vmap(solve)), on({mesh})))
        usable()
        print("usable")
    """)
    assert out.startswith("JaxRuntimeError: ")
    assert out.endswith("Simulator: the reactor is empty\nusable\n")


def test_without_vmap_and_eagerly():
    out = run("""
        solve = raising(Simulator("the reactor is empty"))
        for function in (jax.jit(solve), solve, jax.vmap(solve)):
            print(failure(function, on(auto)).splitlines()[-1])
        usable()
    """)
    story = "ForeignCallError: host_call 'solve' failed{}: Simulator: the reactor is empty"
    whole, element = story.format(", with arguments x (8,)"), story.format(" at element (0,), with arguments x ()")
    assert out.splitlines() == [whole, whole, element]


def test_one_failing_element_of_an_explicit_axis_fails_everywhere():
    """Three devices succeed; they must not go on to wait for the fourth."""
    out = run("""
        solve = raising(Simulator("element five"), fails=lambda x: x == 5)
        print(failure(jax.jit(lambda x: jax.vmap(solve)(x).sum()), on(explicit)))
        usable()
        print("usable")
    """)
    assert out.endswith("Simulator: element five\nusable\n")


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
@pytest.mark.parametrize("exception", ["SystemExit", "KeyboardInterrupt"])
def test_leaving_the_interpreter_fails_everywhere_too(mesh, exception):
    """Foreign code may call sys.exit(), and a user may press Ctrl-C: neither is an `Exception`."""
    out = run(f"""
        solve = raising({exception}("out of here"), fails=lambda x: x == 5)
        print(failure(jax.jit(lambda x: jax.vmap(solve)(x).sum()), on({mesh})))
        usable()
        print("usable")
    """)
    assert f"{exception}: out of here\nusable\n" in out


def test_a_wrong_result_fails_everywhere_too():
    out = run("""
        wrong = batchrules.host_call(lambda x: x[:1], lambda x: x, name="wrong")
        print(failure(jax.jit(wrong), on(auto)))
        usable()
        print("usable")
    """)
    assert "host_call 'wrong': the result has shape (1,), but result_shape promises (8,)" in out
    assert out.endswith("usable\n")


def test_a_failure_in_a_loop_ends_the_loop():
    out = run("""
        calls = []
        def fails(x):
            calls.append(x)
            return len(calls) == 3
        solve = raising(Simulator("third step"), fails)
        loop = jax.jit(lambda x: jax.lax.scan(lambda c, _: (solve(c), None), x, None, length=50)[0])
        print(failure(loop, on(auto)))
        usable()
        print("usable")
    """)
    assert "Simulator: third step" in out
    assert out.endswith("usable\n")


def test_a_failure_in_a_branch_that_is_not_taken_is_none():
    out = run("""
        solve = raising(Simulator("not taken"))
        branch = jax.jit(lambda p, x: jax.lax.cond(p, solve, lambda x: x + 1, x))
        assert np.array_equal(branch(False, on(auto)), XS + 1)
        print(failure(branch, True, on(auto)))
        usable()
        print("usable")
    """)
    assert out.endswith("Simulator: not taken\nusable\n")


def test_many_failures_each_with_its_own_text():
    """More of them than are kept, all of one program."""
    out = run("""
        calls = []
        def solve(x):
            calls.append(x)
            raise Simulator(f"failure {len(calls)}")
        program = jax.jit(batchrules.host_call(solve, lambda x: x))
        for number in range(1, 71):
            assert failure(program, on(auto)).endswith(f"Simulator: failure {number}"), number
        usable()
        print("usable")
    """)
    assert out == "usable\n"


def test_a_program_that_failed_works_again():
    out = run("""
        calls = []
        def fails(x):
            calls.append(x)
            return len(calls) == 1
        program = jax.jit(raising(Simulator("only the first time"), fails))
        print(failure(program, on(auto)))
        assert np.array_equal(program(on(auto)), 2 * XS)
        print("usable")
    """)
    assert out.endswith("Simulator: only the first time\nusable\n")


@pytest.mark.parametrize("axis_names", [{"a"}, {"a", "b"}])
def test_failure_inside_a_shard_map_without_a_later_collective(axis_names):
    out = run(f"""
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        solve = raising(Simulator("in a shard"))
        mapped = jax.shard_map(solve, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={axis_names!r},
                               check_vma=False)
        print(failure(jax.jit(mapped), XS))
        usable()
        print("usable")
    """)
    assert out.endswith("Simulator: in a shard\nusable\n")


def test_a_failure_is_told_to_the_devices_that_hold_other_data():
    """And not only to those that share the data of the failed call."""
    out = run("""
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
        solve = jax.vmap(raising(Simulator("in one part"), lambda x: x == 0))
        print(failure(jax.jit(lambda xs: solve(xs).sum()), on(mesh, P("a"))))
        usable()
        print("usable")
    """)
    assert out.endswith("Simulator: in one part\nusable\n")


def test_one_device_fails_with_the_original_eagerly_and_its_text_last_under_jit():
    out = run("""
        solve = raising(Simulator("the reactor is empty"))
        print(failure(solve, XS))
        print(failure(jax.vmap(solve), XS))
        print(failure(raising(KeyboardInterrupt()), XS))
        print(failure(jax.jit(solve), XS))
        print("after", np.asarray(jax.jit(good)(XS))[1])
    """)
    assert out.startswith(2 * "Simulator: the reactor is empty\n" + "KeyboardInterrupt: \nJaxRuntimeError: ")
    assert out.endswith("Simulator: the reactor is empty\nafter 2.0\n")
