"""`explain` of device calls and registered primitives, which `record` cannot see: they count their calls themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from sharded import using

import batchrules
from batchrules import _jax_versions, device_call, explain, host_call
from batchrules._explain_count import Count

ROW = jax.ShapeDtypeStruct((3,), "float64")
X, W = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 3.0, 4.0])
XS = jnp.arange(12.0).reshape(4, 3)
METHODS = ("sequential", "sequential_unrolled", "expand_dims", "broadcast_all")


class Counted:
    """A function of JAX operations that notes the bytes of what it is given and gives, each time it runs."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, w):
        return self.noted(x * x * w, x, w)

    def noted(self, result, *given):
        sizes = sum(array.nbytes for array in given), result.nbytes

        def note(value):
            self.calls.append(sizes)
            return value

        shape = jax.ShapeDtypeStruct(result.shape, result.dtype)
        return jax.pure_callback(note, shape, result)

    def jvp(self, args, tangents):
        (x, w), (tx, tw) = args, tangents
        assert tw is None, "these tests differentiate in x alone"
        return self.noted(2 * x * w * tx, x, w, tx)

    def vjp(self, args, cotangents, needed):
        (x, w), (_, needs_w) = args, needed
        assert not needs_w, "these tests differentiate in x alone"
        return self.noted(2 * x * w * cotangents, x, w, cotangents), None

    def jacobian(self, args, needed):
        x, w = args
        assert not needed[1], "these tests differentiate in x alone"
        diagonal = 2 * x * w
        return self.noted(jnp.expand_dims(diagonal, -1) * jnp.eye(3).reshape((1,) * (x.ndim - 1) + (3, 3)), x, w), None


def made(method, *endpoints, **options):
    counted = Counted()
    given = {name: getattr(counted, name) for name in endpoints}
    return counted, device_call(counted, method=method, name="square", **given, **options)


def check(counted, program, *args):
    """Explain, run, and compare."""
    report = explain(program, *args)
    counted.calls.clear()
    jax.block_until_ready(jax.jit(program)(*args))
    sites = [site for site in report.sites if site.kind == "device_call"]
    assert sum(site.calls.low for site in sites) == len(counted.calls), str(report)
    assert all(site.calls.exact for site in sites)
    assert sum(site.bytes_in.low for site in sites) == sum(given for given, _ in counted.calls), str(report)
    assert sum(site.bytes_out.low for site in sites) == sum(gave for _, gave in counted.calls), str(report)
    return report


FIRST = {
    "call": lambda f: f(X, W),
    "vmap": lambda f: jax.vmap(f, (0, None))(XS, W),
    "nested": lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None))(XS, XS),
    "scan": lambda f: jax.lax.map(lambda x: f(x, W), XS),
    "equal": lambda f: jax.vmap(f, (0, None))(XS, W) + jax.vmap(f, (0, None))(XS, W),
    "empty": lambda f: jax.vmap(f, (0, None))(XS[:0], W),
    "jit": lambda f: jax.jit(f)(X, W),
}
DERIVED = {
    "jvp": lambda f: jax.jvp(lambda x: f(x, W), (X,), (W,)),
    "grad": lambda f: jax.grad(lambda x: f(x, W).sum())(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x, W).sum()))(XS),
    "grad of vmap": lambda f: jax.grad(lambda xs: jax.vmap(f, (0, None))(xs, W).sum())(XS),
    "jacfwd": lambda f: jax.jacfwd(f)(X, W),
    "jacrev": lambda f: jax.jacrev(f)(X, W),
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FIRST)
def test_calls(name, method, batch_size):
    counted, f = made(method, batch_size=batch_size)
    check(counted, lambda: FIRST[name](f))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [("jvp", "vjp"), ("jvp", "jacobian")], ids=" ".join)
@pytest.mark.parametrize("name", DERIVED)
def test_derivatives(name, given, method):
    counted, f = made(method, *given)
    check(counted, lambda: DERIVED[name](f))


def test_without_endpoints_it_says_so():
    f = device_call(lambda x, w: x * w, method="broadcast_all", name="times")
    report = explain(jax.vmap(jax.grad(lambda x: f(x, W).sum())), XS)
    (site,) = report.sites
    assert (site.name, site.endpoint, site.kind) == ("times", "vjp", "device_call")
    assert "JAX differentiates the code of the call" in site.notes[0]


def test_host_calls_inside_a_device_call():
    inner = host_call(lambda x: 2 * x, ROW, name="inner", method="sequential")
    f = device_call(inner, method="sequential", name="outer")
    report = explain(jax.vmap(f), XS)
    with batchrules.record() as log:
        jax.block_until_ready(jax.jit(jax.vmap(f))(XS))
    outer, within = report.sites
    assert (outer.name, outer.calls) == ("outer", Count(4, 4))
    assert (within.name, within.calls, within.places) == ("inner", Count(4, 4), ("device_call outer", "a scan of 4"))
    assert len(log.calls) == 4


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_device_call_in_shard_map(auto_mesh, method):
    _, f = made(method)
    rows = jax.sharding.PartitionSpec("x")
    program = jax.shard_map(jax.vmap(f), mesh=auto_mesh, in_specs=(rows, rows), out_specs=rows)
    xs = jnp.ones((8, 3))
    (site,) = explain(program, xs, xs).sites
    assert site.elements == Count(8, 8)
    assert site.calls == (Count(8, 8) if method == "sequential" else Count(4, 4))


@pytest.mark.parametrize("method", ["sequential", "broadcast_all"])
def test_device_call_on_an_explicit_mesh(explicit_mesh, method):
    counted, f = made(method)
    with using(explicit_mesh):
        rows = jax.sharding.NamedSharding(explicit_mesh, jax.sharding.PartitionSpec("x"))
        xs = jax.device_put(jnp.ones((8, 3)), rows)
        report = check(counted, jax.vmap(f, (0, None)), xs, W)
    assert report.sites[0].places == ("4 devices, each with its shard",)


# --- registered primitives -------------------------------------------------------------------------------------------


@pytest.fixture
def scale_p():
    """A primitive that is nothing to JAX but its name."""
    primitive = Primitive("scale")
    primitive.def_abstract_eval(lambda x: x)
    primitive.def_impl(lambda x: 2 * x)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
    yield primitive
    if batchrules.registered(primitive):
        batchrules.unregister(primitive)


CALLS = {
    "sequential": (Count(4, 4), 24),
    "sequential_unrolled": (Count(4, 4), 24),
    "expand_dims": (Count(1, 1), 96),
}


@pytest.mark.parametrize("method", CALLS)
def test_registered(scale_p, method):
    batchrules.register(scale_p, method=method)
    (site,) = explain(jax.vmap(scale_p.bind), XS).sites
    calls, each = CALLS[method]
    assert (site.name, site.kind, site.method) == ("scale", "registered", method)
    assert (site.calls, site.elements, site.first) == (calls, None, None)
    assert site.bytes_in == site.bytes_out == Count(calls.low * each, calls.low * each)
    assert site.reason == f"register was given method={method!r}"


def test_registered_in_chunks(scale_p):
    batchrules.register(scale_p, method="expand_dims", batch_size=3)
    report = explain(jax.vmap(scale_p.bind), XS)
    assert [site.notes[0] for site in report.sites] == [
        "bound to float64[3,3], mapped axes included",
        "bound to float64[1,3], mapped axes included",
    ]
    assert report.sites[0].reason.endswith("in binds of at most 3 elements")


def test_registered_with_a_function(scale_p):
    batchrules.register(scale_p, method=lambda params: params.get("how", "broadcast_all"))
    (site,) = explain(jax.vmap(scale_p.bind), XS).sites
    assert site.method == "broadcast_all"
    assert site.reason == "register was given a function that reads it from the parameters"


def test_an_unregistered_primitive_is_not_listed(scale_p):
    assert explain(scale_p.bind, X).sites == ()


def test_hijax():
    base = _jax_versions.hijax_primitive_class()
    if base is None:
        pytest.skip(f"jax {jax.__version__} has no HiJAX primitive classes")

    class Twice(base):
        def __init__(self, aval):
            self.in_avals, self.out_aval, self.params = (aval,), aval, {}
            super().__init__()

        def expand(self, x):
            return 2 * x

    batchrules.register(Twice, "sequential", call=Twice.expand)
    try:
        (site,) = explain(jax.vmap(lambda x: Twice(jax.typeof(x))(x)), XS).sites
    finally:
        batchrules.unregister(Twice)
    assert (site.name, site.kind, site.calls) == ("Twice", "registered", Count(4, 4))


def test_numpy_twin():
    """The counting functions are what they say: the tests above compare with them."""
    counted, f = made("sequential")
    np.testing.assert_array_equal(f(X, W), X * X * W)
    assert counted.calls == [(48, 24)]
