"""`progress()` and `host_call(progress=...)`: one bar that counts the elements that were called."""

import io
import multiprocessing
import re
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import dispatched_calls as calls
import jax
import numpy as np
import pytest

from batchrules import ArraySpec, BatchContractWarning, FailedElementsWarning, Schema, host_call, progress
from batchrules._events import LISTENERS

tqdm = pytest.importorskip("tqdm.auto", reason="tqdm is an optional extra")

F64 = jax.ShapeDtypeStruct((), "float64")
XS = np.arange(6.0)


class Terminal(io.StringIO):
    """A terminal, as far as anyone can tell."""

    def isatty(self):
        return True


def a_terminal(monkeypatch):
    """A terminal in the place of stderr. No fixture, because pytest sets its own stderr after those."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.fixture
def bars(monkeypatch):
    """The bars that were opened."""
    opened = []

    class Kept(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Kept)
    return opened


def are_closed(bars):
    return bool(bars) and all(bar.disable for bar in bars)


def last_line(stream):
    """What is seen when all is done."""
    return re.split(r"[\r\n]+", stream.getvalue().rstrip())[-1]


def counted(stream):
    """Elements called, and elements in all."""
    return tuple(map(int, re.search(r"(\d+)/(\d+) \[", last_line(stream)).groups()))


def double(x):
    return 2 * x


def fails_at_three(x):
    if np.any(x == 3):
        raise ValueError("no convergence")
    return 2 * x


def run(f, xs=XS, way=jax.jit):
    return jax.block_until_ready(way(jax.vmap(f))(xs))


# --- progress() ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "sequential"},
        {"method": "sequential", "executor": 2},
        {"method": "expand_dims"},
        {"method": "expand_dims", "batch_size": 4},
        {"method": "broadcast_all", "batch_size": 2, "executor": 2},
    ],
    ids=str,
)
def test_all_elements_count(way, options):
    stream = io.StringIO()
    f = host_call(double, F64, **options)
    with progress(file=stream, force=True):
        run(f, way=way)
    assert counted(stream) == (6, 6)
    assert "elements/s" in last_line(stream)


def test_the_total_grows_as_batches_start():
    stream = io.StringIO()
    f = host_call(double, F64)
    with progress("sweep", file=stream, force=True):
        run(f)
        first = counted(stream)
        run(f)
        f(1.0)
    assert first[1] == 6
    assert counted(stream) == (13, 13)
    assert last_line(stream).startswith("sweep: 100%")


def test_many_short_batches_are_not_drawn_one_by_one():
    stream = io.StringIO()
    f = host_call(double, F64)
    with progress(file=stream, force=True):
        jax.block_until_ready(jax.jit(lambda xs: jax.lax.map(f, xs))(np.arange(2000.0)))
    assert counted(stream) == (2000, 2000)
    assert stream.getvalue().count("\r") < 500


def test_an_empty_batch_shows_nothing():
    stream = io.StringIO()
    with progress(file=stream, force=True):
        run(host_call(double, F64), XS[:0])
    assert stream.getvalue() == ""


def test_elements_that_fail_are_told():
    stream = io.StringIO()
    f = host_call(fails_at_three, F64, on_error="nan")
    with progress(file=stream, force=True), pytest.warns(FailedElementsWarning, match="1 of 6"):
        run(f)
    assert counted(stream) == (6, 6)
    assert "failed=1" in last_line(stream)


def test_elements_that_are_tried_again_fail_once():
    stream = io.StringIO()
    f = host_call(fails_at_three, F64, on_error="nan", method="expand_dims", batch_size=3, verify=False)
    with progress(file=stream, force=True), pytest.warns(FailedElementsWarning, match="1 of 6"):
        run(f)
    assert counted(stream) == (9, 9)
    assert "failed=1" in last_line(stream)


def test_a_distrusted_function_counts_twice():
    stream = io.StringIO()
    spec = ArraySpec((..., 1), "float64")
    f = host_call(lambda x: x[..., 0] / np.sqrt((x * x).sum()), F64, schema=Schema({"x": spec}))
    with progress(file=stream, force=True), pytest.warns(BatchContractWarning, match="one element at a time"):
        run(f, XS[:, None] + 1)
    assert counted(stream) == (12, 12)


@pytest.mark.parametrize("executor", [None, 2])
def test_nothing_is_left_after_a_failure(bars, executor):
    stream = io.StringIO()
    f = host_call(fails_at_three, F64, executor=executor)
    with (
        pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="no convergence"),
        progress(file=stream, force=True),
    ):
        run(f)
    assert counted(stream)[1] == 6
    assert LISTENERS == []
    seen = stream.getvalue()
    run(host_call(double, F64))
    assert stream.getvalue() == seen
    assert are_closed(bars)


def test_several_threads():
    stream = io.StringIO()
    f = jax.jit(jax.vmap(host_call(double, F64)))
    with progress(file=stream, force=True), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: jax.block_until_ready(f(XS)), range(10)))
    assert counted(stream) == (60, 60)


def test_processes():
    stream = io.StringIO()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        f = host_call(calls.fails_at_7, calls.SCALAR, executor=pool, on_error="nan")
        with progress(file=stream, force=True), pytest.warns(FailedElementsWarning, match="1 of 4"):
            run(f, np.arange(5.0, 9.0, dtype="float32"))
    assert counted(stream) == (4, 4)
    assert "failed=1" in last_line(stream)


def test_nested_bars_both_count():
    outer, inner = io.StringIO(), io.StringIO()
    f = host_call(double, F64)
    with progress("outer", file=outer, force=True):
        run(f)
        with progress("inner", file=inner, force=True):
            run(f)
    assert (counted(outer), counted(inner)) == ((12, 12), (6, 6))


# --- who watches --------------------------------------------------------------------------------------------------


def test_no_bar_where_there_is_no_terminal(capsys):
    with progress():
        run(host_call(double, F64))
        assert LISTENERS == []
    run(host_call(double, F64, progress=True))
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with progress():
        run(host_call(double, F64))
    assert counted(terminal) == (6, 6)


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress():
        run(host_call(double, F64))


def test_a_notebook_watches(monkeypatch, capsys):
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with progress():
        run(host_call(double, F64))
    # Not the notebook's own widget, because this is none.
    assert "6/6" in capsys.readouterr().err


# --- host_call(progress=...) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "shown"), [(True, "host_call 'double': 100%"), ("doubling", "doubling: 100%")])
@pytest.mark.parametrize("options", [{}, {"executor": 2}, {"method": "expand_dims"}], ids=str)
def test_a_bar_for_one_function(monkeypatch, given, shown, options):
    terminal = a_terminal(monkeypatch)
    f = host_call(double, F64, progress=given, **options)
    run(f)
    run(host_call(double, F64))
    assert counted(terminal) == (6, 6)
    assert last_line(terminal).startswith(shown)


def test_a_bar_for_each_batch(monkeypatch):
    terminal = a_terminal(monkeypatch)
    f = host_call(double, F64, progress=True)
    run(f)
    run(f, XS[:2])
    assert counted(terminal) == (2, 2)
    assert terminal.getvalue().count("6/6") == 1


def test_a_single_call_has_no_bar(monkeypatch):
    terminal = a_terminal(monkeypatch)
    f = host_call(double, F64, progress=True)
    f(1.0)
    jax.block_until_ready(jax.jit(f)(1.0))
    assert terminal.getvalue() == ""


def test_a_bar_for_a_derivative(monkeypatch):
    terminal = a_terminal(monkeypatch)
    f = host_call(double, F64, vjp=lambda _args, ct, _needed: (2 * ct,), progress=True)
    run(jax.grad(f))
    assert last_line(terminal).startswith("host_call 'double' (vjp): 100%")


def test_batches_at_the_same_time_share_a_bar(monkeypatch, bars):
    terminal = a_terminal(monkeypatch)
    both = threading.Barrier(2, timeout=60)

    def meets(x):
        if x == 0:
            both.wait()
        return x

    f = host_call(meets, F64, progress=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda xs: jax.block_until_ready(jax.vmap(f)(xs)), [XS, XS]))
    assert "12/12" in terminal.getvalue()
    assert are_closed(bars)


def test_the_bar_of_a_function_ends_with_its_failure(monkeypatch, bars):
    terminal = a_terminal(monkeypatch)
    f = host_call(fails_at_three, F64, progress=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="no convergence"):
            jax.vmap(f)(XS)
    assert are_closed(bars)
    run(f, XS[:3])
    assert counted(terminal) == (3, 3)


def test_both_kinds_of_bars(monkeypatch):
    terminal = a_terminal(monkeypatch)
    stream = io.StringIO()
    with progress("all", file=stream, force=True):
        run(host_call(double, F64, progress="own"))
    assert counted(stream) == (6, 6)
    assert counted(terminal) == (6, 6)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1, None, 0.5])
def test_progress_of_another_type(bad):
    with pytest.raises(TypeError, match=r"^host_call 'double': progress must be True, False or a description"):
        host_call(double, F64, progress=bad)


def test_a_description_of_another_type():
    with pytest.raises(TypeError, match=r"^progress: description must be a string or None; got 3\."), progress(3):
        pass


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    text = r"needs the package tqdm; pip install 'batchrules\[progress\]' installs it"
    with pytest.raises(ImportError, match=f"^progress {text}"), progress():
        pass
    with pytest.raises(ImportError, match=f"^host_call 'double': progress {text}"):
        host_call(double, F64, progress=True)
