"""Two JAX processes on one machine: which of them calls, for which elements, and that both have the right results."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

import batchrules

PROGRAM = pathlib.Path(__file__).with_name("multiprocess_program.py")
SECONDS = 240  # a wait that never ends is the failure of a device that the others wait for
PROCESSES = (0, 1)
WAYS = ("in order", "threads", "vectorised")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process called and got."""
    folder = tmp_path_factory.mktemp("processes")
    address = f"localhost:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(batchrules.__file__).parent.parent)}
    environment.pop("XLA_FLAGS", None)
    running = []
    try:
        for process in PROCESSES:
            command = [sys.executable, PROGRAM, str(process), address, folder / f"{process}.json"]
            # A file, because a pipe that nobody reads stops the process when it is full.
            with (folder / f"{process}.log").open("wb") as log:
                running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        ends = [process.wait(SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert ends == [0, 0], "\n".join((folder / f"{process}.log").read_text()[-3000:] for process in PROCESSES)
    return [json.loads((folder / f"{process}.json").read_text()) for process in PROCESSES]


def own_elements(process):
    return [4.0 * process + i for i in range(4)]


def shards(process, value):
    """The two shards of a process, each of two elements: their places and their numbers."""
    first = 4 * process
    return [[[i, i + 1], [value(i), value(i + 1)]] for i in (first, first + 2)]


def whole(value):
    """The whole result on each of two devices."""
    return [[list(range(8)), [value(i) for i in range(8)]]] * 2


def square(i):
    return float(i * i)


def slope(i):
    return float(2 * i)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("way", ["shard_map", "explicit"])
@pytest.mark.parametrize("process", PROCESSES)
def test_each_process_calls_for_its_own_shards(results, process, way, how):
    result = results[process][f"{way}, {how}"]
    assert result["given"] == own_elements(process)
    assert result["shards"] == shards(process, square)


@pytest.mark.parametrize("way", ["shard_map", "explicit"])
@pytest.mark.parametrize("process", PROCESSES)
def test_so_it_does_for_derivatives(results, process, way):
    result = results[process][f"{way}, grad"]
    assert (result["given"], result["given back"]) == ([], own_elements(process))
    assert result["shards"] == shards(process, slope)


@pytest.mark.parametrize("how", WAYS)
def test_where_the_compiler_chooses_the_first_process_calls_for_all(results, how):
    first, second = (result[f"auto, {how}"] for result in results)
    assert (first["given"], second["given"]) == ([float(i) for i in range(8)], [])
    # How the result is split is the compiler's choice; every part must be right.
    for result in (first, second):
        assert len(result["shards"]) == 2
        assert all(numbers == [square(i) for i in places] for places, numbers in result["shards"])


def test_so_it_does_for_derivatives_too(results):
    first, second = (result["auto, grad"] for result in results)
    assert (first["given back"], second["given back"]) == ([float(i) for i in range(8)], [])
    for result in (first, second):
        assert all(numbers == [slope(i) for i in places] for places, numbers in result["shards"])


@pytest.mark.parametrize(
    ("way", "bad", "caller", "place"),
    [
        ("auto", 1, 0, "element (1,),"),
        ("auto", 5, 0, "element (5,),"),
        ("explicit", 1, 0, "element (1,) of its device's shard,"),
        ("explicit", 5, 1, "element (1,) of its device's shard,"),
    ],
)
def test_a_failure_raises_in_both(results, way, bad, caller, place):
    texts = [result[f"{way}, bad {bad}"]["error"] for result in results]
    assert f"'square' failed at {place}" in texts[caller]
    assert f"SolverError: no convergence at {bad}" in texts[caller]
    assert "failed in the process that called it" in texts[1 - caller]


def test_a_failure_in_the_other_process_is_not_taken_for_an_old_one_of_its_own(results):
    """One program fails in the first process, and later in the second."""
    texts = [result["explicit, bad 1, then 5"]["errors"] for result in results]
    for caller, bad in enumerate((1, 5)):
        assert f"SolverError: no convergence at {bad}" in texts[caller][caller]
        assert "failed in the process that called it" in texts[1 - caller][caller]


@pytest.mark.parametrize("way", ["auto", "explicit"])
@pytest.mark.parametrize("process", PROCESSES)
def test_both_go_on_after_it(results, process, way):
    result = results[process][f"{way}, after"]
    assert all(numbers == [square(i) for i in places] for places, numbers in result["shards"])
