"""What a recording tells: a summary, a plot, a trace for Perfetto, and a table for pandas."""

import json
import os
import re
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from batchrules import FailedElementsWarning, host_call, record
from batchrules._record_lanes import lanes
from batchrules._record_report import summarised

F64 = jax.ShapeDtypeStruct((), "float64")
XS = np.arange(12.0).reshape(4, 3) + 1


def fails_at_seven(x):
    if x[0] == 7:
        raise ValueError("no convergence")
    return x.sum(-1)


def logged(function, *args):
    with record() as log:
        jax.block_until_ready(function(*args))
    return log.calls


def nap(x):
    time.sleep(0.02)
    return x


@pytest.fixture(scope="module")
def log():
    f = host_call(nap, F64, executor=2, name="nap")
    g = host_call(fails_at_seven, F64, on_error="nan", name="fails <&>")
    with record() as log:
        jax.block_until_ready(jax.vmap(f)(np.arange(4.0)))
        with pytest.warns(FailedElementsWarning, match="1 of 4"):
            jax.block_until_ready(jax.vmap(g)(XS))
    return log


def test_a_summary_counts(log):
    known = log.summary().to_dict()
    json.dumps(known)
    first, second = known["rows"]
    assert (first["name"], first["endpoint"], first["calls"], first["elements"]) == ("nap", "call", 4, 4)
    assert (first["bytes_in"], first["bytes_out"], first["failures"]) == (32, 32, 0)
    assert second["failures"] == 1
    assert 0.02 <= first["p50"] <= first["p95"] <= first["max"]
    assert (known["calls"], known["checks"], known["retries"]) == (8, 0, 0)
    assert 1 <= known["concurrency"] <= 2
    assert 0 < known["share"] <= 1
    assert known["inside"] <= known["wall"]


def like(log, **changes):
    """The first call of a log, but for this."""
    return replace(log.calls[0], **changes)


def test_a_summary_of_known_calls(log):
    calls = [like(log, duration=i / 100, bytes_in=i, bytes_out=2) for i in range(1, 101)]
    (row,) = summarised(calls, 1.0).rows
    assert (row.p50, row.p95, row.max) == pytest.approx((0.505, 0.9505, 1.0))
    assert (row.bytes_in, row.bytes_out) == (5050, 200)


def test_the_time_inside_is_counted_once(log):
    """Two workers at the same time, one within itself, and a pause."""
    spans = [("a", 0, 2), ("a", 0.5, 1), ("b", 1, 2), ("a", 5, 1)]
    calls = [like(log, worker=worker, start=start, duration=duration) for worker, start, duration in spans]
    summary = summarised(calls, 10.0)
    assert (summary.inside, summary.share, summary.concurrency) == pytest.approx((4, 0.4, 5 / 4))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"duration": 1e-6}, "1.00 µs"),
        ({"duration": 999.4e-6}, "999 µs"),
        ({"duration": 999.6e-6}, "1.00 ms"),
        ({"duration": 0.9996}, "1.00 s"),
        ({"duration": 999.6}, "1000 s"),
        ({"bytes_in": 999}, "999 B"),
        ({"bytes_in": 1000}, "1.00 kB"),
        ({"bytes_in": 999_400}, "999 kB"),
        ({"bytes_in": 999_600}, "1.00 MB"),
        ({"bytes_out": 12_345_678_901}, "12.3 GB"),
        ({"bytes_out": 10**21}, "1000000 PB"),
    ],
    ids=str,
)
def test_numbers_have_three_digits(log, changes, text):
    assert f" {text} " in str(summarised([like(log, **changes)], 1.0)).splitlines()[1]


def test_a_summary_is_a_table(log):
    lines = str(log.summary()).splitlines()
    assert lines[0].split() == ["function", "endpoint", "calls", "elements", "p50", "p95", "max", "in", "out", "failed"]
    assert lines[1].split()[:4] == ["nap", "call", "4", "4"]
    assert lines[2].endswith(" 1")
    assert "inside foreign code" in lines[-1]


def test_a_table_fits_100_columns():
    name = "a_function_with_a_name_that_is_far_too_long_for_a_table_of_a_hundred_columns"
    found = logged(host_call(nap, F64, name=name), 1.0)
    big = {"endpoint": "vjp.jvp", "elements": 10**9, "bytes_in": 999_999_999, "duration": 123456.0}
    table = str(summarised([replace(found[0], **big)] * 1000, 1e6))
    assert max(map(len, table.splitlines())) == 100
    # Its start and its end: two functions may differ in either.
    assert re.search(r"a_function\w*…\w*columns", table)
    short = str(summarised([replace(found[0], name="f")], 1.0))
    assert "…" not in short


def test_a_summary_of_nothing():
    with record() as log:
        pass
    assert str(log.summary()).startswith("No foreign calls in ")
    assert log.summary().to_dict()["rows"] == []
    assert "<p>" in log._repr_html_()


def test_a_summary_in_a_notebook(log):
    html = log._repr_html_()
    assert "<td>fails &lt;&amp;&gt;</td>" in html
    assert html.count("<tr>") == 3
    assert repr(log) == "<Recording of 8 calls>"


def test_a_worker_that_calls_within_a_call_is_one_worker():
    inner = host_call(nap, F64)
    found = logged(host_call(lambda x: np.asarray(inner(x)), F64), 1.0)
    assert summarised(found, 1.0).concurrency == pytest.approx(1.0)


def test_perfetto(log, tmp_path):
    path = tmp_path / "trace.json"
    log.to_perfetto(path)
    trace = json.loads(path.read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(names.values()) == {call.worker for call in log.calls}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == 8
    for event in complete:
        assert event.keys() == {"ph", "name", "cat", "ts", "dur", "pid", "tid", "args"}
        assert event["tid"] in names
        assert event["dur"] > 0
    by_time = sorted(complete, key=lambda event: event["ts"])
    assert [event["ts"] for event in by_time] == pytest.approx([1e6 * call.start for call in log.calls])
    assert [event["args"]["failure"] for event in by_time] == [call.failure for call in log.calls]
    assert all(event["ph"] in {"X", "M"} and event["pid"] == os.getpid() for event in events)


def test_calls_of_two_workers_of_one_name_do_not_cross_in_a_trace(log):
    spans = [(0, 10), (1, 2), (3, 5), (4, 6), (7, 12), (12, 13)]
    found = lanes([replace(log.calls[0], worker="w", start=start, duration=end - start) for start, end in spans])
    drawn = {name: [(c.start, c.start + c.duration) for c in of_lane] for name, of_lane in found.items()}
    assert drawn == {"w": [(0, 10), (1, 2), (3, 5), (12, 13)], "w (2)": [(4, 6), (7, 12)]}


def test_calls_that_follow_each_other_at_once_share_a_lane(log):
    assert len(lanes([like(log, worker="w", start=start, duration=1) for start in range(3)])) == 1


def test_pandas(log):
    pytest.importorskip("pandas", reason="pandas is an optional extra")
    frame = log.to_pandas()
    assert list(frame.columns) == [
        "name", "endpoint", "method", "elements", "first", "last", "start", "duration", "worker", "bytes_in",
        "bytes_out", "failure", "purpose",
    ]  # fmt: skip
    assert list(frame["start"]) == [call.start for call in log.calls]
    assert list(frame.groupby("name")["elements"].sum()) == [4, 4]


def test_a_plot(log):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    _, given = plt.subplots()
    ax = log.plot(given)
    assert ax is given
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_yticklabels()] == list(dict.fromkeys(call.worker for call in log.calls))
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"nap", "fails <&>"}
    assert log.plot() is not given
    plt.close("all")


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [("pandas", "pandas", lambda log: log.to_pandas()), ("matplotlib", "plot", lambda log: log.plot())],
)
def test_a_missing_package_is_named(log, monkeypatch, package, extra, use):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"needs the package {package}; pip install 'batchrules\[{extra}\]'"):
        use(log)


class Missing:
    """An import system that lacks a package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, *_):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)
