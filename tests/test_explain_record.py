"""`explain` says before a program runs what `record` sees when it does: calls, elements and bytes."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import FORWARD, REVERSE, SECOND, XS, X
from host_derivatives import WAVES
from host_endpoints import METHODS, Endpoints
from sharded import using

import batchrules
from batchrules import explain, finite_difference, host_call, record
from batchrules._explain_count import Count

FIRST = {**FORWARD, **REVERSE}
BRANCHED = {"grad of cond"}
every_method = pytest.mark.parametrize("method", METHODS)


def seen(log):
    """What was called, by function and endpoint: calls, elements, bytes in and out, and the sizes of the calls."""
    by_endpoint = collections.defaultdict(list)
    for call in log.calls:
        if call.purpose == "batch":
            by_endpoint[call.name, call.endpoint].append(call)
    return {
        key: tuple(
            sum(column) for column in zip(*((1, c.elements, c.bytes_in, c.bytes_out) for c in calls), strict=True)
        )
        for key, calls in by_endpoint.items()
    }


def told(report):
    """The same from a report, as bounds."""
    tables = collections.defaultdict(list)
    for site in report.sites:
        tables[site.name, site.endpoint].append((site.calls, site.elements, site.bytes_in, site.bytes_out))
    return {key: [sum(column[1:], column[0]) for column in zip(*rows, strict=True)] for key, rows in tables.items()}


def check(program, *args, exact=True, promised=False):
    """Explain a program, run it, and compare.

    Args:
        program: The program.
        args: Its arguments.
        exact: Whether all numbers must be known beforehand.
        promised: Whether outputs may lead with 1 where the report counts what was promised.
    """
    report = explain(program, *args)
    with record() as log:
        jax.block_until_ready(jax.jit(program)(*args))
    said, was = told(report), seen(log)
    assert was.keys() <= said.keys(), str(report)
    for key, counts in [*said.items(), (None, report.total.counts)]:
        zero = (0, 0, 0, 0)
        numbers = was.get(key, zero) if key else [sum(column) for column in zip(zero, *was.values(), strict=True)]
        for i, (count, number) in enumerate(zip(counts, numbers, strict=True)):
            assert count.low <= number or (promised and i == 3), f"{key} {numbers}\n{report}"
            assert count.high is None or number <= count.high, f"{key} {numbers}\n{report}"
            assert count.exact or not exact, str(report)
    return report


@every_method
@pytest.mark.parametrize("name", FIRST)
def test_composition(name, method):
    f = Endpoints(WAVES, method).host_call(("jvp", "vjp"))
    # A call of this function gives what no mapped argument changes once, with a leading 1.
    check(lambda: FIRST[name](f), exact=name not in BRANCHED, promised=method == "expand_dims")


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
@pytest.mark.parametrize("name", FIRST)
def test_composition_by_jacobian(name, method):
    f = Endpoints(WAVES, method).host_call(("jacobian",))
    check(lambda: FIRST[name](f), exact=name not in BRANCHED)


@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("name", SECOND)
def test_second_derivative(name, method):
    endpoints = Endpoints(WAVES, method)
    f = endpoints.bare(**endpoints.twice())
    check(lambda: SECOND[name](f), promised=method == "expand_dims")


@pytest.mark.parametrize("name", ["vjp", "vmap of jvp", "vmap of grad", "jacrev of nested vmaps", "grad of scan"])
def test_passed_outputs(name):
    f = Endpoints(WAVES, "broadcast_all").host_call(("jvp", "vjp"), pass_outputs=True)
    check(lambda: FIRST[name](f))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["jacfwd of nested vmaps", "jacrev of nested vmaps", "vmap of jacrev", "grad of vmap"])
def test_batch_size(name, batch_size, method):
    f = Endpoints(WAVES, method).host_call(("jacobian", "vjp"), batch_size=batch_size)
    check(lambda: FIRST[name](f), promised=method == "expand_dims")


def square(x, w):
    """A function that handles any leading dimensions."""
    return x * x * w


def squares(method="broadcast_all", **options):
    return host_call(square, ROW, name="square", method=method, **options)


def square_jvp(args, tangents):
    (x, w), (tx, tw) = args, tangents
    along_x = 0 * x if tx is None else 2 * x * w * tx
    return along_x if tw is None else along_x + x * x * tw


def square_vjp(args, cotangents, needed):
    x, w = args
    return 2 * x * w * cotangents if needed[0] else None, x * x * cotangents if needed[1] else None


ROW = jax.ShapeDtypeStruct((3,), "float64")
W = jnp.array([1.0, 2.0, 3.0])
SCHEMES = ("central", "forward", "complex_step")
DIFFERENCES = {
    "jvp": lambda f: jax.jvp(f, (X, W), (W, X)),
    "jvp in one argument": lambda f: jax.jvp(lambda x: f(x, W), (X,), (W,)),
    "grad": lambda f: jax.grad(lambda x: f(x, W).sum())(X),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(X, W),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(X, W),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x, W).sum()))(XS),
    "grad of vmap": lambda f: jax.grad(lambda x, w: jax.vmap(f, (0, None))(x, w).sum(), (0, 1))(XS, W),
    "vmap of jacfwd": lambda f: jax.vmap(jax.jacfwd(f), (0, None))(XS, W),
    "jacrev of vmap": lambda f: jax.jacrev(jax.vmap(f, (0, None)))(XS, W),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_finite_differences(name, method, scheme):
    check(lambda: DIFFERENCES[name](squares(method, **finite_difference(square, scheme))))


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"executor": 2}], ids=str)
@every_method
def test_where_is_a_bound(method, options):
    f = squares(method, **options)
    report = check(jax.vmap(lambda x, w: f.where(x[0] > 0, x, w), (0, None)), XS, W, exact=False)
    assert report.total.elements == Count(0, 4)
    assert "where: only elements whose mask is True are called" in report.sites[0].notes


def test_skip_zero_is_a_bound():
    f = squares("sequential", vjp=square_vjp, skip_zero=True)
    cotangents = jnp.zeros((4, 3)).at[2, 1].set(1)
    report = check(jax.vmap(jax.vjp(f, X, W)[1]), cotangents, exact=False)
    assert report.total.calls == Count(0, 4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_skip_zero_of_finite_differences_is_a_bound(scheme):
    f = squares("sequential", skip_zero=True, **finite_difference(square, scheme))
    tangents = jnp.zeros((4, 3)).at[2, 1].set(1)
    program = jax.vmap(lambda x, t: jax.jvp(lambda x: f(x, W), (x,), (t,))[1])
    report = check(program, XS, tangents, exact=False)
    assert all(site.calls.low == 0 for site in report.sites)


def test_an_empty_batch_makes_no_call():
    report = check(jax.vmap(squares(), (0, None)), jnp.zeros((0, 3)), W)
    assert report.total.calls == Count(0, 0)


@pytest.mark.parametrize("executor", [1, 3])
@every_method
def test_executor(method, executor):
    check(jax.vmap(squares(method, executor=executor, batch_size=2), (0, None)), XS, W)


def test_a_function_that_was_not_one_of_a_batch():
    def rank(x):
        return x - x.max()

    schema = {"x": batchrules.ArraySpec((..., 3), "float64")}
    f = host_call(rank, ROW, schema=schema, signature="(i)->(i)")
    program = jax.vmap(f)
    assert explain(program, XS).sites[0].method == "expand_dims"
    with pytest.warns(batchrules.BatchContractWarning):
        jax.block_until_ready(program(XS))
    report = check(program, XS)
    assert report.sites[0].method == "sequential"
    assert "was seen not to treat its elements one by one" in report.sites[0].reason
    assert report.hints == ()


# --- loops, branches, and what is equal ------------------------------------------------------------------------------


def carried(f, xs):
    return jax.lax.scan(lambda c, x: (f(c, x), None), xs[0], xs)[0]


def nested(f, xs):
    def row(c, x):
        return jax.lax.scan(lambda d, y: (f(d, y * x), None), c, xs[:2])[0], f(x, W)

    return jax.lax.scan(row, xs[0], xs)


PROGRAMS = {
    "scan": (carried, 4),
    "scan in scan": (nested, 12),
    "map": (lambda f, xs: jax.lax.map(lambda x: f(x, W), xs), 4),
    "map in batches": (lambda f, xs: jax.lax.map(lambda x: f(x, W), xs, batch_size=3), 2),
    "map of vmap": (lambda f, xs: jax.lax.map(lambda x: jax.vmap(f, (None, 0))(x, xs), xs), 4),
    "fori_loop": (lambda f, xs: jax.lax.fori_loop(0, 5, lambda i, c: f(c, xs[i]), W), 5),
    "bmap": (lambda f, xs: batchrules.bmap(f, (0, None), batch_size=2)(xs, W), 2),
    "bmap with a rest": (lambda f, xs: batchrules.bmap(f, (0, None), batch_size=3)(xs[:, :], W), 2),
    "the same in every chunk": (
        lambda f, xs: batchrules.bmap(
            lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: c * f(w, W), x), (0, None), batch_size=2
        )(xs, 2 * xs[0]),
        1,
    ),
    "the same in every chunk, in a jit": (
        lambda f, xs: batchrules.bmap(jax.jit(lambda x, w: x * f(w, W)), (0, None), batch_size=2)(xs, 2 * xs[0]), 1
    ),
    "bmap in vmap": (lambda f, xs: jax.vmap(batchrules.bmap(f, (0, None), batch_size=2), (None, 0))(xs, xs), 2),
    "unrolled": (lambda f, xs: jax.lax.scan(lambda c, x: (f(c, x), None), W, xs, unroll=2)[0], 4),
    "no pass": (lambda f, xs: carried(f, xs[:0]) if len(xs) == 0 else carried(f, xs[:1]), 1),
    "jit": (lambda f, xs: jax.jit(f)(xs[0], W) + jax.jit(f)(xs[1], W), 2),
    "remat": (lambda f, xs: jax.checkpoint(f)(xs[0], W), 1),
    "equal calls": (lambda f, xs: f(xs[0], W) + f(xs[0], W), 1),
    "equal calls in a jit": (lambda f, xs: f(2 * xs[0], W) + jax.jit(lambda x: f(2 * x, W))(xs[0]), 1),
    "equal loops": (lambda f, xs: carried(f, xs) + carried(f, xs), 4),
    "unequal loops": (lambda f, xs: carried(f, xs) + carried(f, 2 * xs), 8),
    "equal batches": (lambda f, xs: jax.vmap(f, (0, None))(xs, W) + jax.vmap(f, (0, None))(xs, W), 1),
    "dead": (lambda f, xs: (f(xs[0], W), xs)[1], 0),
    "dead in a scan": (lambda f, xs: jax.lax.scan(lambda c, x: (c + x, f(x, W)), W, xs)[0], 0),
    "the same in every pass": (lambda f, xs: jax.lax.map(lambda x: x * f(W, W), xs), 1),
    "the same in every inner pass": (
        lambda f, xs: jax.lax.map(lambda x: jax.lax.map(lambda y: y * f(x, W), xs), xs), 4
    ),
    "a carry that stays": (lambda f, xs: jax.lax.scan(lambda c, x: (c, x * f(c, W)), 2 * W, xs)[1], 1),
    "outside and in every pass": (lambda f, xs: f(W, W) + jax.lax.map(lambda x: x * f(W, W), xs)[0], 1),
    "a constant": (lambda f, xs: xs[0] + f(np.ones(3), np.ones(3)), 1),
    "custom_vjp": (lambda f, xs: wrapped(f)(xs[0]), 1),
    "grad of custom_vjp": (lambda f, xs: jax.grad(lambda x: wrapped(f)(x).sum())(xs[0]), 1),
    "custom_jvp": (lambda f, xs: jvp_wrapped(f)(xs[0]), 1),
    "grad of bmap": (
        lambda f, xs: jax.grad(lambda xs: batchrules.bmap(f, (0, None), batch_size=2)(xs, W).sum())(xs), 2
    ),
    "grad of bmap with checkpoint": (
        lambda f, xs: jax.grad(lambda xs: batchrules.bmap(f, (0, None), batch_size=2, checkpoint=True)(xs, W).sum())(
            xs
        ),
        2,
    ),
    "value_and_grad of bmap": (
        lambda f, xs: jax.value_and_grad(lambda xs: batchrules.bmap(f, (0, None), batch_size=2)(xs, W).sum())(xs), 4
    ),
    "value_and_grad of bmap with checkpoint": (
        lambda f, xs: jax.value_and_grad(
            lambda xs: batchrules.bmap(f, (0, None), batch_size=2, checkpoint=True)(xs, W).sum()
        )(xs),
        4,
    ),
    "grad of scan of remat": (
        lambda f, xs: jax.grad(
            lambda x: jax.lax.scan(jax.checkpoint(lambda c, y: (f(c, y), None)), x, xs)[0].sum()
        )(xs[0]),
        8,
    ),
    "associative_scan": (lambda f, xs: jax.lax.associative_scan(jax.vmap(f), xs), 3),
    "random numbers": (lambda f, xs: f(xs[0] + noise(0), W) + f(xs[0] + noise(0), W) + f(xs[0] + noise(1), W), 2),
    "sums along different axes": (lambda f, xs: f(added(xs[:3], 0), W) + f(added(xs[:3], 1), W), 2),
    "a loop that stands still": (
        lambda f, xs: jax.lax.map(lambda x: jax.lax.map(lambda y: y + f(W, W) + f(x, W), xs), xs), 5
    ),
    "custom_linear_solve": (
        lambda f, xs: jax.lax.custom_linear_solve(
            lambda v: 2 * v, xs[0], lambda _, b: f(b, W), lambda _, b: f(b, 2 * W), symmetric=False
        ),
        1,
    ),
}  # fmt: skip


def noise(seed):
    return jax.random.normal(jax.random.key(seed), (3,))


def added(x, axis):
    return jax.lax.reduce(x, 0.0, jax.lax.add, (axis,))


def wrapped(f):
    @jax.custom_vjp
    def g(x):
        return f(x, W)

    g.defvjp(lambda x: (f(x, W), x), lambda x, ct: (ct * f(x, W) * 0,))
    return g


def jvp_wrapped(f):
    @jax.custom_jvp
    def g(x):
        return f(x, W)

    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    program, calls = PROGRAMS[name]
    report = check(lambda xs: program(squares(jvp=square_jvp, vjp=square_vjp), xs), XS)
    assert report.total.calls == Count(calls, calls)


BOUNDED = {
    "vmap of while": lambda f: jax.vmap(
        lambda x: jax.lax.while_loop(lambda c: c.sum() < 30, lambda c: jnp.abs(f(c, W)) + 1, x)
    ),
    "scan in while": lambda f: (
        lambda xs: jax.lax.while_loop(
            lambda c: c.sum() < 30, lambda c: jax.lax.map(lambda y: f(y, c), xs).sum(0) ** 2 + 1, xs[0]
        )
    ),
    "cond in cond": lambda f: (
        lambda xs: jax.lax.cond(
            xs[0, 0] > 0, lambda x: jax.lax.cond(x[1] > 0, lambda: f(x, W), lambda: x), lambda x: f(x, W) * 2, xs[0]
        )
    ),
    "switch": lambda f: (
        lambda xs: jax.lax.switch(
            (xs[0, 0] > 0).astype("int32"), [lambda x: x, lambda x: f(x, W), lambda x: f(f(x, W), W)], xs[0]
        )
    ),
    "custom_root": lambda f: (
        lambda xs: jax.lax.custom_root(lambda y: y - xs[0], xs[0], lambda _, y: f(y, W) * 0 + xs[0], lambda _, y: y)
    ),
    "unknown fori_loop": lambda f: (
        lambda xs: jax.lax.fori_loop(0, (xs[0, 0] > 0).astype("int32") + 2, lambda i, c: c + f(xs[i], W), xs[0])
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds(name):
    check(BOUNDED[name](squares()), XS, exact=False)


def test_what_only_xla_sees_is_equal():
    """XLA knows that `x + 0` is `x`: the report is a bound there."""
    f = squares()
    report = explain(lambda x: f(x + 0, W) + f(x, W), X)
    with record() as log:
        jax.block_until_ready(jax.jit(lambda x: f(x + 0, W) + f(x, W))(X))
    assert len(log.calls) <= report.total.calls.low == 2


def test_both_branches_call():
    def program(x):
        return jax.lax.cond(x[0] > 0, lambda: f(x, W), lambda: jax.vmap(f, (0, None))(XS, W).sum(0))

    f = squares("sequential")
    report = check(program, X, exact=False)
    assert [site.calls for site in report.sites] == [Count(0, 4), Count(0, 1)]
    assert report.total.calls == Count(1, 4)
    assert [site.places for site in report.sites] == [("the False branch of a cond",), ("the True branch of a cond",)]


def test_one_branch_calls_in_a_scan():
    f = squares()
    program = lambda xs: jax.lax.map(lambda x: jax.lax.cond(x[0] > 0, lambda: f(x, W), lambda: x), xs)  # noqa: E731
    report = check(program, XS, exact=False)
    assert report.total.calls == Count(0, 4)
    assert report.sites[0].places == ("a scan of 4", "the True branch of a cond")


def test_vmap_of_cond_calls_all():
    f = squares()
    check(jax.vmap(lambda x: jax.lax.cond(x[0] > 0, lambda: f(x, W), lambda: x)), XS)


def test_while_loop():
    f = squares()

    def program(x):
        return jax.lax.while_loop(lambda c: f(c, 2 * W).sum() < 50, lambda c: c + f(W, c) + 1, x) + f(x, 3 * W)

    report = check(program, X, exact=False)
    assert [site.calls for site in report.sites] == [Count(1, None), Count(0, None), Count(1, 1)]
    assert report.total.calls == Count(2, None)
    assert str(report.total.calls) == "at least 2"


def test_the_same_in_every_pass_of_a_while_loop():
    f = squares()
    check(lambda x: jax.lax.while_loop(lambda c: c.sum() < 20, lambda c: c + jnp.abs(f(W, W)), x), X)


# --- devices ---------------------------------------------------------------------------------------------------------


MANY = jnp.arange(24.0).reshape(8, 3)
ROWS_OVER_X = jax.sharding.PartitionSpec("x")


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_shard_map(auto_mesh, method):
    f = squares(method, vjp=square_vjp)

    def shard(xs):
        return jax.vmap(f, (0, None))(xs, W) + jax.vmap(jax.grad(lambda x: f(x, W).sum()))(xs)

    program = jax.shard_map(shard, mesh=auto_mesh, in_specs=ROWS_OVER_X, out_specs=ROWS_OVER_X)
    report = check(program, MANY)
    assert report.total.elements == Count(16, 16)
    assert report.sites[0].axes[0].size == 2
    assert report.sites[0].places == ("a shard_map over 4 devices",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pmap():
    f = squares()
    program = jax.pmap(lambda x: f(x, W), devices=jax.devices("cpu")[:4])
    report = explain(program, XS)
    with record() as log:
        jax.block_until_ready(program(XS))
    assert len(log.calls) == 4
    assert report.total.calls == Count(4, 4)


def test_shard_map_of_scan(auto_mesh):
    f = squares()
    program = jax.shard_map(
        lambda xs: jax.lax.scan(lambda c, x: (f(c, x), f(x, xs[0])), xs[0], xs)[1],
        mesh=auto_mesh, in_specs=ROWS_OVER_X, out_specs=ROWS_OVER_X,
    )  # fmt: skip
    report = check(program, MANY)
    assert report.total.calls == Count(8, 8)


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_arrays_on_several_devices(auto_mesh, method):
    f = squares(method)
    xs = jax.device_put(MANY, jax.sharding.NamedSharding(auto_mesh, ROWS_OVER_X))
    check(
        lambda xs: jax.vmap(f, (0, None))(xs, W) + jax.vmap(f, (0, None))(xs, W) + jax.lax.map(lambda x: f(x, W), xs),
        xs,
    )


@pytest.mark.parametrize("method", ["sequential", "broadcast_all", "expand_dims"])
@pytest.mark.parametrize("name", ["vmap", "grad of vmap", "nested"])
def test_explicit_mesh(explicit_mesh, method, name):
    f = squares(method, vjp=square_vjp)
    programs = {
        "vmap": jax.vmap(f, (0, None)),
        "grad of vmap": jax.grad(lambda xs, w: jax.vmap(f, (0, None))(xs, w).sum(), (0, 1)),
        "nested": jax.vmap(jax.vmap(f, (None, 0)), (0, None)),
    }
    w = jnp.stack([W, 2 * W]) if name == "nested" else W
    with using(explicit_mesh):
        xs = jax.device_put(MANY, jax.sharding.NamedSharding(explicit_mesh, ROWS_OVER_X))
        report = check(programs[name], xs, w)
    assert "4 devices, each with its shard" in report.sites[0].places
