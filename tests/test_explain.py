"""`explain`: its report, its text, its hints, and that it calls nothing."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchrules
from batchrules import ArraySpec, explain, host_call
from batchrules._explain_count import Count, counted

ROW = jax.ShapeDtypeStruct((3,), "float64")
NUMBER = jax.ShapeDtypeStruct((), "float64")
X = jnp.array([1.0, 2.0, 3.0])
XS = jnp.ones((100, 3))


def never(*_args, **_kwargs):
    raise AssertionError("a foreign call was made")


def norm(**options):
    return host_call(never, **{"result_shape": NUMBER, "name": "norm", "method": "broadcast_all", **options})


def row(**options):
    return norm(**{"result_shape": ROW, "name": "row", **options})


# --- what it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x", [X, np.ones(3), jax.ShapeDtypeStruct((3,), "float64")], ids=["jax", "numpy", "ShapeDtypeStruct"]
)
def test_arguments(x):
    f = norm(vjp=never)
    for program in (f, jax.jit(f), jax.grad(f), lambda x: f(x) + f(np.ones(3))):
        assert explain(program, x).sites


def test_trees_and_keywords():
    f = norm()
    (site,) = explain(lambda p, *, w: f(p["x"], w), {"x": X}, w=X).sites
    assert site.bytes_in == Count(48, 48)


def test_what_is_no_array_stays_what_it_is():
    def choose(x, how, order):
        return never(x, how, order)

    def shape(x, how, order):
        return {("two", 2): x}[how, order]

    f = host_call(choose, shape, static_argnames=("how", "order"))
    assert explain(f, X, "two", 2).total.bytes_in == Count(24, 24)
    assert explain(f, X, how="two", order=2).total.bytes_in == Count(24, 24)
    assert explain(jax.jit(f, static_argnums=(1, 2)), X, "two", 2).total.bytes_in == Count(24, 24)


def test_no_function_is_an_error():
    with pytest.raises(
        TypeError, match=r"explain: fun must be a function; got .* explain\(f, x\), not explain\(f\(x\)\)"
    ):
        explain(X)


def test_a_missing_endpoint_is_the_error_of_the_program():
    with pytest.raises(batchrules.MissingEndpointError, match="has a jvp but no vjp"):
        explain(jax.grad(norm(jvp=never)), X)


def test_no_foreign_call():
    report = explain(jnp.sin, X)
    assert report.sites == ()
    assert str(report) == "No foreign calls."
    assert report._repr_html_() == "<p>No foreign calls.</p>"
    assert report.total.calls == Count(0, 0)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_source_line():
    f = norm(vjp=never)

    def loss(xs):
        return jax.vmap(f)(xs).sum()  # the line

    line = loss.__code__.co_firstlineno + 1
    for program in (loss, jax.jit(loss), jax.grad(loss), lambda xs: jax.lax.map(loss, jnp.stack([xs, xs]))):
        report = explain(program, XS)
        assert {site.source for site in report.sites} == {f"test_explain.py:{line} (loss)"}


def test_source_line_of_a_mapped_loop():
    """JAX knows no line of the user's inside: the loop's own is the next best."""
    f = norm()

    def loss(xs):
        return jax.lax.map(f, xs)

    (site,) = explain(loss, XS).sites
    assert site.source == f"test_explain.py:{loss.__code__.co_firstlineno + 1} (loss)"


def test_axes():
    def weigh(x, weights):
        return never()

    f = host_call(weigh, NUMBER, method="expand_dims")
    program = jax.vmap(jax.vmap(f, (None, 0)), (0, 0))
    (site,) = explain(program, jnp.ones((5, 3)), jnp.ones((5, 4, 3))).sites
    assert [(axis.size, axis.arguments) for axis in site.axes] == [(5, ("x", "weights")), (4, ("weights",))]


def test_names_of_endpoints():
    f = norm(jvp=never, vjp=host_call(never, NUMBER, jvp=never, name="v"), jacobian=never)
    assert [site.endpoint for site in explain(jax.grad(f), X).sites] == ["vjp"]
    assert [site.endpoint for site in explain(jax.jacfwd(f), X).sites] == ["jacobian"]
    sites = explain(lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1], X).sites
    assert [site.endpoint for site in sites] == ["vjp.jvp"]


SPECS = {"x": ArraySpec((..., 3), "float64")}
AUTO = {"name": "f", "result_shape": NUMBER}


def documented(**options):
    def f(x):
        return never()

    return host_call(f, NUMBER, **options)


@pytest.mark.parametrize(
    ("options", "method", "reason"),
    [
        ({}, "sequential", "auto is sequential: without a schema or a signature nothing proves"),
        ({"schema": SPECS}, "expand_dims", "auto is expand_dims: the schema lets every argument"),
        ({"signature": "(n)->()"}, "expand_dims", "auto is expand_dims: the signature"),
        ({"schema": {"x": ArraySpec((3,), "float64")}}, "sequential", "the schema does not let it take a leading"),
        ({"method": "broadcast_all"}, "broadcast_all", "method='broadcast_all' was asked for"),
    ],
    ids=["nothing", "schema", "signature", "fixed shape", "asked"],
)
def test_method_and_reason(options, method, reason):
    (site,) = explain(jax.vmap(documented(**options)), XS).sites
    assert site.method == method
    assert reason in site.reason
    f = documented(**options)
    assert (site.method, site.reason) == (f.method_for(XS).method, f.method_for(XS).reason)


POOL = ThreadPoolExecutor(1)


@pytest.mark.parametrize(
    ("options", "dispatch"),
    [
        ({"method": "sequential"}, "in order"),
        ({"method": "sequential", "executor": 8}, "8 threads, groups of elements"),
        ({"method": "sequential", "executor": 500}, "100 threads, groups of elements"),
        ({"method": "sequential", "executor": 1}, "in order"),
        ({"method": "sequential", "executor": POOL}, "ThreadPoolExecutor, groups of elements"),
        ({"executor": 8, "batch_size": 30}, "4 threads, a task for each call"),
        (
            {"method": "sequential", "executor": 8, "max_in_flight": 3},
            "8 threads, groups of elements, at most 3 tasks submitted and not finished (max_in_flight)",
        ),
        ({"executor": 8}, "one call, in the thread that runs the program"),
        ({}, ""),
        ({"method": "sequential", "allow_jax": True}, "in order"),
    ],
)
def test_dispatch(options, dispatch):
    (site,) = explain(jax.vmap(norm(**options)), XS).sites
    assert site.dispatch == dispatch


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "verify: 2 or 3 elements are called again"),
        ({"on_error": "nan"}, "on_error='nan': the elements of a call that fails are called again"),
    ],
    ids=["verify", "on_error"],
)
def test_what_may_come_on_top_is_a_note(options, note):
    (site,) = explain(jax.vmap(norm(**options)), XS).sites
    assert site.calls == Count(1, 1)
    assert any(text.startswith(note) for text in site.notes)


def test_verify_false_has_no_note():
    (site,) = explain(jax.vmap(norm(verify=False)), XS).sites
    assert site.notes == ()


def test_what_jit_drops_is_a_note():
    f = norm(vjp=never)
    assert "jax.jit drops it" in explain(jax.grad(f), X).notes[0]
    assert explain(jax.value_and_grad(f), X).notes == ()


def test_equal_calls_are_a_note():
    f = norm()
    report = explain(lambda x: f(x) + f(x) + f(x), X)
    assert report.total.calls == Count(1, 1)
    assert report.notes == (
        "2 calls equal another one, whose result jax.jit takes; outside jax.jit it is called all the same",
    )


def test_numbers_that_look_equal_are_not():
    f = norm()
    program = lambda x: f(x * 0.0) + f(x * -0.0) + f(x * 1.0) + f(x * np.float64(1.0))  # noqa: E731
    assert explain(program, X).total.calls == Count(3, 3)


def test_effects_keep_calls_apart():
    """What prints is not one with what prints the same."""

    def loud(x):
        jax.debug.print("{}", x)
        return x

    f = norm()
    assert explain(lambda x: f(loud(x)) + f(loud(x)), X).total.calls == Count(1, 1)


# --- how it looks ----------------------------------------------------------------------------------------------------


EXPECTED = """\
#  foreign code  method         calls  elements each  bytes in  bytes out
-------------------------------------------------------------------------
1  norm          broadcast_all      4    30, last 10    2.4 kB      800 B
2  row           sequential         1              1      24 B       24 B
3  row (vjp)     sequential         1              1      48 B       24 B
   total                            6                  2.47 kB      848 B

1. host_call norm, test_explain.py:{line} (loss)
    mapped: 100 along args.0
    method: broadcast_all, because method='broadcast_all' was asked for
    calls: 4, with 100 elements taken together
    dispatch: in order

2. host_call row, test_explain.py:{line} (loss)
    method: sequential, because nothing is mapped, so this is one call for one element

3. host_call row (vjp), test_explain.py:{line} (loss)
    method: sequential, because nothing is mapped, so this is one call for one element"""


def test_text():
    f, g = norm(batch_size=30, verify=False), row(vjp=never)

    def loss(x, xs):
        return jax.vmap(f)(xs).sum() + g(x).sum()

    text = str(explain(jax.value_and_grad(loss), X, XS))
    assert text == EXPECTED.format(line=loss.__code__.co_firstlineno + 1)


def test_text_fits_100_columns():
    f = norm(name="a_function_with_a_name_that_is_much_longer_than_anyone_would_like_to_see_in_a_table")

    def program(xs):
        ys = jax.lax.map(lambda x: jax.lax.cond(x.sum() > 0, lambda: jax.vmap(f)(xs).sum(), lambda: f(x)), xs)
        return jax.lax.while_loop(lambda y: y < f(xs[0] * y), lambda y: y + f(xs[1] * y), ys.sum())

    text = str(explain(program, jnp.ones((1_000_003, 3))))
    assert max(map(len, text.splitlines())) <= 100
    assert "≤" in text
    assert "≥" in text


def test_html():
    f = norm(name="a<b", method="sequential")
    html = explain(jax.vmap(f), XS)._repr_html_()
    assert "a&lt;b" in html
    assert "a<b" not in html
    assert html.count("<tr") == html.count("</tr>") == 4
    assert "<b>hint</b>" in html


def test_to_dict_is_json():
    f = norm(batch_size=30)
    report = explain(lambda xs: jax.lax.cond(xs.sum() > 0, lambda: jax.vmap(f)(xs), lambda: xs[:, 0]), XS)
    plain = json.loads(json.dumps(report.to_dict()))
    (site,) = plain["sites"]
    assert site["calls"] == {"low": 0, "high": 4}
    assert (site["first"], site["last"]) == (30, 10)
    assert site["axes"] == [{"size": 100, "arguments": ["args.0"]}]
    assert plain["total"]["elements"] == {"low": 0, "high": 100}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (Count(3, 3), "3"),
        (Count(0, 3), "at most 3"),
        (Count(1, 3), "1 to 3"),
        (Count(2, None), "at least 2"),
        (Count(0, None), "at least 0"),
    ],
    ids=str,
)
def test_counts_in_words(count, text):
    assert str(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 call"),
        (0, "0 calls"),
        (Count(1, 1), "1 call"),
        (Count(0, 1), "at most 1 call"),
        (Count(1, 3), "1 to 3 calls"),
        (Count(1, None), "at least 1 calls"),
    ],
    ids=str,
)
def test_things_that_are_counted(count, text):
    assert counted(count, "call") == text


def test_an_empty_batch_in_a_loop_of_any_length_makes_no_call():
    f = jax.vmap(norm())
    report = explain(lambda x: jax.lax.while_loop(lambda y: y < 5.0, lambda y: y + f(XS[:0] * y).sum(), x), 1.0)
    assert set(report.total.counts) == {Count(0, 0)}


# --- hints -----------------------------------------------------------------------------------------------------------


def hinted(report, words):
    """The sites that a hint with these words is about."""
    return [hint.partition(")")[0].removeprefix("(") for hint in report.hints if words in hint]


JACOBIAN = "a jacobian endpoint would make these"


@pytest.mark.parametrize("by", ["jacrev", "jacfwd"])
def test_hint_jacobian(by):
    f = row(method="sequential", jvp=never, vjp=never)
    assert hinted(explain(getattr(jax, by)(f), X), JACOBIAN) == ["1"]
    assert f"as jax.{by} does" in explain(getattr(jax, by)(f), X).hints[0]


def test_no_hint_jacobian():
    one_call = row(jvp=never, vjp=never)
    has_one = row(method="sequential", vjp=never, jacobian=never)
    mapped = row(method="sequential", vjp=never)
    assert not hinted(explain(jax.jacrev(one_call), X), JACOBIAN)
    assert not hinted(explain(jax.jacrev(has_one), X), JACOBIAN)
    assert not hinted(explain(jax.vmap(jax.grad(lambda x: mapped(x).sum())), XS), JACOBIAN)


SCHEMA = "if the function takes a leading dimension, say so"


def test_hint_schema():
    assert hinted(explain(jax.vmap(norm(method="auto")), XS), SCHEMA) == ["1"]
    fixed = documented(schema={"x": ArraySpec((3,), "float64")})
    assert hinted(explain(jax.vmap(fixed), XS), SCHEMA) == ["1"]
    assert not hinted(explain(jax.vmap(documented(schema=SPECS)), XS), SCHEMA)
    assert not hinted(explain(jax.vmap(norm(method="sequential")), XS), SCHEMA)
    assert not hinted(explain(norm(method="auto"), X), SCHEMA)
    assert not hinted(explain(jax.vmap(norm(method="auto")), XS[:1]), SCHEMA)


EXECUTOR = "executor=8 would call them on 8 threads"


def test_hint_executor():
    assert hinted(explain(jax.vmap(norm(method="sequential")), XS), EXECUTOR) == ["1"]
    assert hinted(explain(jax.vmap(norm(method="sequential")), XS[:8]), EXECUTOR) == ["1"]
    assert not hinted(explain(jax.vmap(norm(method="sequential")), XS[:7]), EXECUTOR)
    assert not hinted(explain(jax.vmap(norm(method="sequential", executor=2)), XS), EXECUTOR)
    assert not hinted(explain(jax.vmap(norm(method="sequential", allow_jax=True)), XS), EXECUTOR)
    assert not hinted(explain(jax.vmap(norm()), XS), EXECUTOR)


COPIES = "'expand_dims' would give them once"


def test_hint_copies():
    big = jnp.ones(1000)
    program = jax.vmap(norm(), (0, None))
    assert hinted(explain(program, XS, big), COPIES) == ["1"]
    few_bytes, small_share = (XS, jnp.ones(30)), (jnp.ones((100, 3000)), big)
    assert not hinted(explain(program, *few_bytes), COPIES)
    assert not hinted(explain(program, *small_share), COPIES)
    assert not hinted(explain(jax.vmap(norm(method="expand_dims"), (0, None)), XS, big), COPIES)


LOOP = "jax.vmap in place of the loop"


def test_hint_loop():
    f = row()
    schema = documented(schema=SPECS)
    assert hinted(explain(lambda xs: jax.lax.map(f, xs), XS), LOOP) == ["1"]
    assert hinted(explain(lambda xs: jax.lax.map(schema, xs), XS), LOOP) == ["1"]
    assert hinted(explain(lambda xs: jax.lax.scan(lambda c, x: (c + f(x), None), X, xs)[0], XS), LOOP) == ["1"]


def test_no_hint_loop():
    f, g = row(), row(method="sequential")
    assert not hinted(explain(lambda xs: jax.lax.scan(lambda c, x: (f(c * x), None), X, xs)[0], XS), LOOP)
    assert not hinted(explain(lambda xs: jax.lax.map(g, xs), XS), LOOP)
    assert not hinted(explain(lambda xs: jax.lax.map(f, xs, batch_size=10), XS), LOOP)
    assert not hinted(explain(batchrules.bmap(f, batch_size=10), XS), LOOP)
    assert not hinted(explain(lambda xs: jax.lax.map(f, xs[:1]), XS), LOOP)


def test_hint_loop_in_a_serial_loop():
    """The inner loop could be a vmap, the outer one cannot."""
    f = row()

    def step(carry, _):
        return jax.lax.map(lambda x: f(x * carry), XS).sum(0), None

    report = explain(lambda x: jax.lax.scan(step, x, length=5)[0], X)
    (hint,) = report.hints
    assert "the scan of 100" in hint


def test_equal_hints_are_told_once():
    f = norm(method="sequential")
    report = explain(lambda xs: jax.vmap(f)(xs) + jax.vmap(f)(2 * xs), XS)
    assert hinted(report, EXECUTOR) == ["1, 2"]
