"""`jacobian=` and `pass_outputs=` of device calls, against a pure-JAX twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import SECOND, assert_close
from foreign import METHODS
from test_device_derivatives import SMOOTH

import batchrules

RNG = np.random.default_rng(0)
XS, YS = (jnp.asarray(RNG.normal(size=(4, 3))) for _ in range(2))
X, Y = XS[0], YS[1]


def twin(x, y):
    return {"a": jnp.sin(x) * y, "b": jnp.sum(x * x * y, axis=-1)}


class Counted:
    """A device call with some of the endpoints, each of which counts its traces."""

    def __init__(self, given, method="expand_dims", **options):
        self.calls = []
        endpoints = {name: getattr(self, name) for name in given}
        self.call = batchrules.device_call(twin, method=method, **endpoints, **options)

    def jacobian(self, args, needed, **outputs):
        self.calls.append(("jacobian", tuple(x.shape for x in args), needed, sorted(outputs)))
        x, y = args
        eye = jnp.eye(3)
        lead = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        by_x, by_y = jnp.broadcast_to(jnp.cos(x) * y, (*lead, 3)), jnp.broadcast_to(jnp.sin(x), (*lead, 3))
        rows = (by_x[..., None] * eye[(None,) * len(lead)], by_y[..., None] * eye[(None,) * len(lead)])
        sums = (jnp.broadcast_to(2 * x * y, (*lead, 3)), jnp.broadcast_to(x * x, (*lead, 3)))
        return {
            "a": tuple(block if wanted else None for block, wanted in zip(rows, needed, strict=True)),
            "b": tuple(block if wanted else None for block, wanted in zip(sums, needed, strict=True)),
        }

    def vjp(self, args, cotangents, needed, **outputs):
        self.calls.append(("vjp", tuple(x.shape for x in args), needed, sorted(outputs)))
        lead = next(c for c in cotangents.values() if c is not None)
        x, y = (jnp.broadcast_to(v, (*lead.shape[: lead.ndim - (lead.shape[-1:] == (3,))], 3)) for v in args)
        a = jnp.zeros_like(x) if cotangents["a"] is None else cotangents["a"]
        b = jnp.zeros(x.shape[:-1]) if cotangents["b"] is None else cotangents["b"]
        return jnp.cos(x) * y * a + 2 * x * y * b[..., None], jnp.sin(x) * a + x * x * b[..., None]


def total(f):
    return lambda x, y: jnp.sum(jnp.cos(f(x, y)["a"])) + 2 * f(x, y)["b"]


COMPOSITIONS = {
    "jvp": lambda f: jax.jvp(f, (X, Y), (Y, X)),
    "grad": lambda f: jax.grad(total(f), (0, 1))(X, Y),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(X, Y),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(X, Y),
    "jacrev of one argument": lambda f: jax.jacrev(f, 1)(X, Y),
    "vmap of jacrev": lambda f: jax.vmap(jax.jacrev(f, (0, 1)), (0, None))(XS, Y),
    "vmap of grad, unmapped": lambda f: jax.vmap(jax.grad(total(f), 1), (0, None))(XS, Y),
    "jacrev of vmap": lambda f: jax.jacrev(jax.vmap(f, (None, 0)), (0, 1))(X, YS),
    "jacfwd of nested vmaps": lambda f: jax.jacfwd(jax.vmap(jax.vmap(f, (0, None)), (None, 0)), 1)(XS, YS),
    "grad of vmap": lambda f: jax.grad(lambda x, y: jnp.sum(jax.vmap(f, (0, None))(x, y)["a"] ** 2), (0, 1))(XS, Y),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("pass_outputs", [False, True])
def test_jacobian_alone_serves_both_modes(name, pass_outputs):
    f = Counted(["jacobian"], pass_outputs=pass_outputs)
    assert_close(jax.jit(lambda: COMPOSITIONS[name](f.call))(), COMPOSITIONS[name](twin))
    assert {tuple(outputs) for *_, outputs in f.calls} == {("outputs",) if pass_outputs else ()}


# Under `legacy_vectorized` ranks differ, which strict JAX code such as this does not line up.
@pytest.mark.parametrize("method", [m for m in METHODS if m != "legacy_vectorized"])
def test_every_method(method):
    f = Counted(["jacobian"], method)
    for name in ("jacrev", "vmap of jacrev", "grad of vmap"):
        assert_close(jax.jit(lambda name=name: COMPOSITIONS[name](f.call))(), COMPOSITIONS[name](twin))


def test_cotangents_mapped_over_unmapped_arguments_take_one_jacobian():
    f = Counted(["jacobian", "vjp"])
    assert_close(jax.jit(jax.jacrev(f.call, (0, 1)))(X, Y), jax.jacrev(twin, (0, 1))(X, Y))
    assert f.calls == [("jacobian", ((3,), (3,)), (True, True), [])]
    f.calls.clear()
    assert_close(jax.jit(jax.grad(total(f.call)))(X, Y), jax.grad(total(twin))(X, Y))
    assert {call[0] for call in f.calls} == {"vjp"}


def test_needed_tells_the_arguments_in_use():
    f = Counted(["jacobian"])
    jax.jit(jax.jacrev(f.call, 1))(X, Y)
    assert [needed for _, _, needed, _ in f.calls] == [(False, True)]


# --- second derivatives: JAX traces the contraction, and the Jacobian in it -----------------------------------------


def smooth_jacobian(args, needed, outputs=None):
    """The Jacobian of `SMOOTH` for one element, or for a batch whose arrays lead with its size or with 1."""
    del needed, outputs
    ranks = [len(shape) for shape in SMOOTH.shapes]
    blocks = jax.jacobian(SMOOTH.twin, (0, 1, 2))
    if all(x.ndim == rank for x, rank in zip(args, ranks, strict=True)):
        return blocks(*args)
    led = [x if x.ndim > rank else x[None] for x, rank in zip(args, ranks, strict=True)]
    size = max(x.shape[0] for x in led)
    return jax.vmap(blocks)(*(jnp.broadcast_to(x, (size, *x.shape[1:])) for x in led))


def by_jacobian(method, **options):
    return batchrules.device_call(
        lambda *args: SMOOTH(jnp, *args), method=method, jacobian=smooth_jacobian, name="smooth", **options
    )


def second(name, f):
    return jax.jit(lambda: SECOND[name](f))()


@pytest.fixture(scope="module")
def twin_results():
    return {name: second(name, SMOOTH.twin) for name in SECOND}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_by_a_jacobian_alone(name, twin_results):
    assert_close(second(name, by_jacobian("expand_dims")), twin_results[name])


@pytest.mark.parametrize("name", ["hessian of nested vmaps", "vmap of hessian"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sequential", {}),
        ("broadcast_all", {"batch_size": 3}),
        ("expand_dims", {"pass_outputs": True}),
        ("legacy_vectorized", {}),
    ],
)
def test_second_derivatives_by_every_method(name, method, options, twin_results):
    assert_close(second(name, by_jacobian(method, **options)), twin_results[name])


def test_third_derivatives_outside_jit():
    f = batchrules.device_call(lambda x: x**4, method="expand_dims", jacobian=lambda args, _: (4 * args[0] ** 3,))
    thrice = jax.vmap(jax.grad(jax.grad(jax.grad(f))))
    np.testing.assert_allclose(thrice(X), 24 * X)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_second_derivatives_of_other_dtypes(dtype):
    f = batchrules.device_call(
        lambda x: x * x * x, method="expand_dims", jacobian=lambda args, _: (3 * args[0] * args[0],)
    )
    x = jnp.arange(4).astype(dtype)
    twice = lambda f: jax.grad(jax.grad(f, holomorphic=x.dtype.kind == "c"), holomorphic=x.dtype.kind == "c")  # noqa: E731
    result, wanted = (jax.jit(jax.vmap(twice(g)))(x) for g in (f, lambda x: x * x * x))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("lead", [(), (4,)], ids=["one element", "a batch"])
def test_second_derivatives_check_the_shape_of_a_block(lead):
    def jacobian(args, needed):
        del needed
        # Elementwise, where the block of a vector by a vector is a matrix.
        return (3 * args[0] ** 2,)

    f = batchrules.device_call(lambda x: x**3, method="expand_dims", jacobian=jacobian, name="cube")
    program = jax.vmap(jax.hessian(lambda x: f(x).sum())) if lead else jax.hessian(lambda x: f(x).sum())
    with pytest.raises(batchrules.ResultError, match=r"the jacobian endpoint's block of output 0 by argument 0 has"):
        jax.jit(program)(jnp.ones((*lead, 3)))


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian])
@pytest.mark.parametrize("mapped", [(0, None), (None, 0)], ids=str)
def test_an_output_that_depends_on_no_mapped_argument(mapped, transform):
    """It comes back once, and so does its derivative: not once for each element, nor their sum."""

    def function(x, y):
        return {"both": x * y, "y": y**3}

    def jacobian(args, needed):
        del needed
        x, y = args
        shape = jnp.broadcast_shapes(x.shape, y.shape)
        eye, zero = jnp.eye(3)[(None,) * (x.ndim - 1)], jnp.zeros((*y.shape, 3))
        by_x, by_y = (jnp.broadcast_to(v, shape)[..., None] * eye for v in (y, x))
        return {"both": (by_x, by_y), "y": (zero, (3 * y * y)[..., None] * eye)}

    f = batchrules.device_call(function, method="expand_dims", jacobian=jacobian)
    args = [XS if axis == 0 else Y for axis in mapped]

    def derivative(f):
        return jax.jit(transform(jax.vmap(f, mapped), (0, 1)))(*args)

    assert_close(derivative(f), derivative(function))


def test_finite_differences_are_for_host_calls():
    with pytest.raises(TypeError, match=r"device_call 'twin': finite_difference is for host_call.*give jvp=, vjp= or"):
        batchrules.device_call(twin, **batchrules.finite_difference(twin))
    with pytest.raises(TypeError, match="finite_difference is for host_call"):
        batchrules.device_call(twin, jvp=batchrules.finite_difference(twin).jvp)


def test_on_an_explicit_mesh(explicit_mesh):
    from jax.sharding import NamedSharding, PartitionSpec

    xs = jax.device_put(XS, NamedSharding(explicit_mesh, PartitionSpec("x")))
    y = jax.device_put(Y, NamedSharding(explicit_mesh, PartitionSpec()))
    f = Counted(["jacobian"])
    result = jax.jit(jax.grad(lambda y: jnp.sum(jax.vmap(f.call, (0, None))(xs, y)["a"] ** 2)))(y)
    wanted = jax.grad(lambda y: jnp.sum(jax.vmap(twin, (0, None))(XS, y)["a"] ** 2))(Y)
    for shard in result.addressable_shards:
        np.testing.assert_allclose(shard.data, wanted, 1e-9)


def test_wrong_endpoint():
    with pytest.raises(TypeError, match="device_call 'twin': jacobian must be a function or None; got 3"):
        batchrules.device_call(twin, jacobian=3)
    with pytest.raises(TypeError, match="pass_outputs must be True or False"):
        batchrules.device_call(twin, pass_outputs=1)


def test_jacobian_of_another_structure():
    def jacobian(args, needed):
        del needed
        return {"a": args}

    f = batchrules.device_call(twin, jacobian=jacobian)
    with pytest.raises(batchrules.ResultError, match="the jacobian endpoint must return a tree like the outputs"):
        jax.jacrev(f)(X, Y)
