"""Many calls from many threads, with failures injected at random, and programs that could wait for one another."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from programs import run

import batchrules

ROOT = pathlib.Path(batchrules.__file__).parent.parent


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="the soak reads its memory from /proc")
def test_short_soak():
    """A process of its own: what it measures is its memory and its threads."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--calls", "2000", "--threads", "8"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    found = re.match(
        r"(\d+) calls from 8 threads in .*: (\d+) failures injected and named, 0 wrong, 0 threads left", last
    )
    assert found, last
    calls, failures = map(int, found.groups())
    assert calls >= 2000
    assert calls / 5 < failures < calls / 2


ROUNDS = """
import random

LARGE = np.arange(160_000.0)
assert LARGE.nbytes > 1 << 20
pool = concurrent.futures.ThreadPoolExecutor(3)


def twice(x):
    return x * 2


def nested(x):
    return inner(x) / 2 + inner(x) / 2


make = lambda function, **options: batchrules.host_call(function, lambda x: x, verify=False, **options)
inner = make(twice)
calls = [
    make(twice), make(twice, executor=2), make(twice, executor=pool), make(twice, method="expand_dims"),
    make(twice, method="broadcast_all", batch_size=1, executor=pool), make(nested), make(nested, executor=2),
    make(nested, executor=pool), make(lambda x: threaded_inner(x), executor=pool),
]
threaded_inner = make(twice, executor=pool)
programs = [*map(jax.jit, calls), *(jax.jit(jax.vmap(call)) for call in calls), *map(jax.vmap, calls)]


def queued(program, xs, length):
    results = xs
    for _ in range(length):
        # Nothing is waited for until the end.
        results = program(results) * 0.5
    return results


def work(number):
    draw = random.Random(number)
    xs = jnp.asarray((LARGE + number).reshape(4, -1))
    for turn in range(ROUNDS):
        result = queued(draw.choice(programs), xs, 2)
        assert np.array_equal(result, xs), (number, turn)
    return ROUNDS
"""


def test_two_hundred_rounds_never_hang():
    """Programs queued and called from several threads, with pools, large arrays, and host calls in host calls."""
    out = run(
        ROUNDS
        + """
ROUNDS = 50
with concurrent.futures.ThreadPoolExecutor(4) as threads:
    print(sum(threads.map(work, range(4))))
pool.shutdown()
print(ours())
""",
        seconds=120,
    )
    assert out == ["200", "[]"]
