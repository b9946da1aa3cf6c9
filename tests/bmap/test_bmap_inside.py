"""bmap equals jax.vmap, whatever JAX can do is done inside the mapped function: values, derivatives and batches."""

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import MAX, MEAN, TAIL, assert_close, check, cosines, each, on, random, sum_of_sines, table, tuple_of
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

import batchrules
from batchrules._bmap import bmap

WIDTH = 3
AXES = (None, 0, 0)


# --- what is inside --------------------------------------------------------------------------------------------------
#
# Functions of weights, which are not mapped, of a vector and of an integer, which are.

SMOOTH, smooth = table()  # derivatives of every order, in both modes
FORWARD, forward = table()  # forward derivatives only
REVERSE, reverse = table()  # reverse derivatives only


@smooth
def scan(w, a, n):
    return lax.scan(lambda c, x: (jnp.sin(w @ c + x), jnp.sum(c * x)), a, jnp.arange(3.0))


@smooth
def scan_over_a_mapped_argument(w, a, n):
    return lax.scan(lambda c, x: (w @ c * x[0], x[1] * c), jnp.ones(WIDTH), (a, jnp.cos(a)), reverse=True)


@smooth
def scan_that_does_not_depend_on_it(w, a, n):
    return lax.scan(lambda c, _: (jnp.tanh(w @ c), None), jnp.ones(WIDTH), length=3)[0] * a


@smooth
def fori_loop(w, a, n):
    return lax.fori_loop(0, 3, lambda i, c: jnp.sin(w @ c) + a * i.astype(c.dtype), a)


@smooth
def associative_scan(w, a, n):
    return lax.associative_scan(lambda x, y: x * y + jnp.sin(x), jnp.sin(w @ a))


@smooth
def map_in_batches(w, a, n):
    return lax.map(lambda x: jnp.sin(x * a[0]), w @ a, batch_size=2)


@smooth
def cond_of_a_mapped_predicate(w, a, n):
    return lax.cond(n % 2 == 0, lambda a: jnp.sin(w @ a), lambda a: a**2, a)


@smooth
def cond_of_an_unmapped_predicate(w, a, n):
    return lax.cond(w[0, 0] < 100, lambda a: jnp.sin(w @ a), lambda a: a**2, a)


@smooth
def switch(w, a, n):
    return lax.switch(n % 3, [jnp.sin, lambda a: w @ a, lambda a: jnp.sum(w) * a**2], a)


@smooth
def switch_of_an_unmapped_index(w, a, n):
    return lax.switch((w[0, 0] > 0).astype(int), [jnp.sin, lambda a: w @ a], a)


@smooth
def jit(w, a, n):
    return jax.jit(lambda w, a: (jax.jit(jnp.tanh)(w @ a), w))(w, a)


@smooth
def checkpoint(w, a, n):
    return jax.checkpoint(lambda w, a: jnp.sin(jnp.tanh(w @ a)) * a)(w, a)


@smooth
def checkpoint_that_saves_dots(w, a, n):
    saving = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    return saving(lambda w, a: jnp.sin(w @ jnp.tanh(w @ a)))(w, a)


@smooth
def checkpoint_that_saves_a_name(w, a, n):
    saving = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("kept"))
    return saving(lambda w, a: jnp.sin(checkpoint_name(jnp.tanh(w @ a), "kept")) * a)(w, a)


@smooth
def checkpoint_of_a_scan(w, a, n):
    return jax.checkpoint(lambda w, a: lax.scan(lambda c, _: (jnp.sin(w @ c), None), a, length=2)[0])(w, a)


@smooth
def custom_jvp(w, a, n):
    @jax.custom_jvp
    def f(w, a):
        return jnp.sin(w @ a)

    f.defjvp(lambda args, moved: (f(*args), 2 * jnp.cos(args[0] @ args[1]) * (args[0] @ moved[1])))
    return f(w, a)


@smooth
def custom_jvp_of_a_static_argument(w, a, n):
    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def apply(f, a):
        return f(a)

    apply.defjvp(lambda f, args, moved: (f(*args), 3 * jnp.sin(args[0]) * moved[0]))
    return apply(jnp.tanh, w @ a)


@reverse
def custom_vjp(w, a, n):
    @jax.custom_vjp
    def f(w, a, n):
        return jnp.sin(w @ a) * n.astype(a.dtype), n

    def backward(kept, cts):
        w, a = kept
        return jnp.outer(cts[0], a), w.T @ cts[0] * 2, None

    f.defvjp(lambda w, a, n: (f(w, a, n), (w, a)), backward)
    return f(w, a, n)[0]


@reverse
def custom_vjp_of_a_static_argument(w, a, n):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
    def apply(f, a, factor):
        return f(a) * factor

    apply.defvjp(
        lambda f, a, factor: (f(a) * factor, (f(a), a)), lambda f, factor, kept, ct: (factor * f(kept[0]) * ct,)
    )
    return apply(jnp.tanh, w @ a, 3.0)


@reverse
def custom_gradient(w, a, n):
    @jax.custom_gradient
    def f(a):
        return jnp.sin(a), lambda ct: (3 * ct * jnp.tanh(a),)

    return f(w @ a)


@smooth
def custom_linear_solve(w, a, n):
    matrix = w @ w.T + 3 * jnp.eye(WIDTH)

    def solve(matvec, b):
        return jnp.linalg.solve(jax.jacobian(matvec)(b), b)

    return lax.custom_linear_solve(lambda x: matrix @ x + a**2 * x, a, solve, symmetric=True)


@smooth
def custom_root(w, a, n):
    def f(x):
        return x + 0.3 * jnp.sin(x) - w @ a

    def find(f, x):
        return lax.fori_loop(0, 40, lambda _, x: x - f(x) / (1 + 0.3 * jnp.cos(x)), x)

    return lax.custom_root(f, a, find, lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y))


@smooth
def solve(w, a, n):
    return jnp.linalg.solve(w + jnp.outer(a, a) + 9 * jnp.eye(WIDTH), a)


@smooth
def solve_of_unmapped_weights(w, a, n):
    return jnp.linalg.solve(w + 9 * jnp.eye(WIDTH), a)


@smooth
def cholesky(w, a, n):
    return jnp.linalg.cholesky(w @ w.T + jnp.outer(a, a) + 3 * jnp.eye(WIDTH))


@smooth
def sort(w, a, n):
    return jnp.sort(w @ a), jnp.sort(w * a[0], axis=0)


@smooth
def argmax(w, a, n):
    return a[jnp.argmax(w @ a)] * jnp.sin(w[jnp.argmin(a)])


@smooth
def top_k(w, a, n):
    return lax.top_k(w @ a, 2)[0]


@smooth
def gather(w, a, n):
    return jnp.sin(w[n % WIDTH]) * a[(n + 1) % WIDTH], lax.dynamic_slice(w, (n % 2, n % 3), (2, 1))


@smooth
def scatter(w, a, n):
    i = n % WIDTH
    return (
        w.at[i].add(jnp.sin(a)),
        w.at[:, i].set(a),
        a.at[jnp.array([0, 2])].multiply(jnp.cos(a[:2]), unique_indices=True),
    )


@smooth
def dynamic_update_slice(w, a, n):
    return lax.dynamic_update_slice(w, jnp.outer(a, a)[:2], (n % 2, 0))


@smooth
def cumulative(w, a, n):
    return jnp.cumsum(w @ a), jnp.cumprod(a), lax.cumlogsumexp(a), lax.cummax(w @ a, reverse=True)


@smooth
def fft(w, a, n):
    return jnp.abs(jnp.fft.fft(w @ a)) ** 2, jnp.fft.irfft(jnp.fft.rfft(a) * jnp.fft.rfft(w[0]), WIDTH)


@smooth
def complex_numbers(w, a, n):
    z = jnp.exp(lax.complex(a, w @ a))
    return jnp.real(jnp.sin(z)), jnp.imag(jnp.conj(z)), jnp.abs(z)


@smooth
def stop_gradient(w, a, n):
    return lax.stop_gradient(w @ a) * jnp.sin(a), lax.stop_gradient(w), lax.stop_gradient(a) + w[0]


@smooth
def random_numbers(w, a, n):
    key = jax.random.fold_in(jax.random.key(3), n)
    return w @ a * jax.random.normal(key, (WIDTH,)), jax.random.permutation(key, a)


@smooth
def a_key_that_is_split_in_a_loop(w, a, n):
    def step(held, _):
        key, a = held
        key, drawn = jax.random.split(key)
        return (key, jnp.sin(w @ a) * jax.random.uniform(drawn)), None

    return lax.scan(step, (jax.random.key(n), a), length=2)[0][1]


@smooth
def rounded_to_integers(w, a, n):
    rounded = lax.stop_gradient(jnp.floor(3 * a)).astype("int32")
    return jnp.where(rounded % 2 == 0, w @ a, jnp.sin(a)) * rounded.astype(a.dtype)


@smooth
def where_and_not_a_number(w, a, n):
    safe = jnp.where(a > 0, a, jnp.ones_like(a))
    return jnp.where(a > 0, jnp.log(safe), w @ a), jnp.linalg.norm(a), lax.clamp(-0.5, w @ a, 0.5)


@smooth
def derivatives(w, a, n):
    def f(w, a):
        return jnp.sum(jnp.sin(w @ a) * a)

    return (
        jax.grad(f)(w, a),
        jax.jacfwd(jax.grad(f, 1), 1)(w, a),
        jax.jvp(f, (w, a), (w, a)),
        jax.linearize(f, w, a)[1](w, a),
    )


@smooth
def vmap(w, a, n):
    inner = jax.vmap(lambda x, row: jnp.sin(x * row) - lax.pmean(x * row, "i"), axis_name="i")
    return inner(w @ a, w)


@smooth
def einsum_and_convolution(w, a, n):
    return jnp.einsum("ij,j,k->ik", w, a, jnp.sin(a)), jnp.convolve(jnp.tanh(w @ a), a)


@smooth
def values_of_other_kinds(w, a, n):
    """Constants of NumPy and of Python, a named scope, and results that are no arrays."""
    with jax.named_scope("scope"):
        return a * np.arange(3.0) * 2, 1.5, {"none": None, "weights": w * np.float64(2)}


def nested(**options):
    """A bmap inside, over the weights' rows, along other axes, with a batch size and a flag of its own."""

    def f(w, a, n):
        by_rows = bmap(lambda row, x, a: jnp.tanh(row @ a) * x, (0, 0, None), **options)
        by_columns = bmap(lambda column: jnp.sin(column) * a, 1, **({"out_axes": 1} | options))
        return by_rows(w, a, a), by_columns(w)

    return f


NESTED = {
    f"nested {batch_size} {reduce} {checkpoint}": nested(batch_size=batch_size, reduce=reduce, checkpoint=checkpoint)
    for batch_size, reduce, checkpoint in [(1, None, False), (2, None, True), (2, "sum", False), (1, "max", True)]
}


@forward
def while_loop_of_a_mapped_length(w, a, n):
    return lax.while_loop(lambda c: c[1] < n % 4, lambda c: (jnp.sin(w @ c[0]), c[1] + 1), (a, 0))[0]


@forward
def while_loop_of_an_unmapped_length(w, a, n):
    return lax.while_loop(lambda c: c[1] < jnp.sum(w > 0), lambda c: (jnp.sin(w @ c[0]), c[1] + 1), (a, 0))[0]


@forward
def while_loop_until_it_is_small(w, a, n):
    return lax.while_loop(lambda a: jnp.sum(a**2) > 0.1, lambda a: a / 2, a), jnp.sin(w)


@forward
def fori_loop_of_a_mapped_length(w, a, n):
    return lax.fori_loop(0, n % 3, lambda _, c: jnp.sin(w @ c), a)


def arguments(size):
    return random((WIDTH, WIDTH)), random((size, WIDTH), 1), jnp.arange(size)


def over_batches(f):
    """Of the weights, and of the mapped argument along the axis behind the mapped one."""

    def batches(w, a, n):
        return jax.vmap(f, (0, 1, None))(jnp.stack([w, jnp.cos(w)]), jnp.stack([a, jnp.sin(a)], 1), n)

    return batches


def push(f):
    return lambda w, a, n: jax.jvp(lambda w, a: f(w, a, n), (w, a), cosines((w, a)))


def pull(f):
    return jax.value_and_grad(sum_of_sines(f), (0, 1))


def first(f):
    return tuple_of(push(f), pull(f))


def second(f):
    return tuple_of(push(pull(f)), over_batches(pull(f)))


def forwards(f):
    return tuple_of(push(f), over_batches(f))


def backwards(f):
    return tuple_of(pull(f), over_batches(pull(f)), jax.grad(sum_of_sines(pull(f)), (0, 1)))


def compare(mapping, f, derivatives):
    check(mapping, lambda by: derivatives(by(f, AXES)), arguments(mapping.size))


@each(SMOOTH | NESTED)
def test_first_derivatives(case, mapping):
    compare(mapping, case, first)


@each(SMOOTH | NESTED)
def test_second_derivatives_and_batches(case, mapping):
    compare(mapping, case, second)


@each({name: SMOOTH[name] for name in ("jit", "sort", "switch", "gather", "checkpoint", "stop_gradient")}, MAX)
def test_extrema(case, mapping):
    compare(mapping, case, first)


@each(FORWARD)
def test_forward_derivatives(case, mapping):
    compare(mapping, case, forwards)


@each(REVERSE)
def test_reverse_derivatives(case, mapping):
    compare(mapping, case, backwards)


# --- collectives over an axis around it ------------------------------------------------------------------------------

COLLECTIVES, collective = table()


@collective
def mean_in_a_scan(w, a):
    return lax.scan(lambda c, x: (jnp.sin(c + lax.pmean(x * c * w[0], "outer")), c * x), a, jnp.arange(2.0))


@collective
def sum_in_a_branch(w, a):
    return lax.cond(w[0, 0] < 100, lambda a: lax.psum(jnp.sin(a), "outer") * a, lambda a: a, a)


@collective
def gathered_in_a_checkpoint(w, a):
    return jax.checkpoint(lambda a: jnp.sum(jnp.sin(lax.all_gather(w @ a, "outer")), axis=0) * a)(a)


@collective
def index_in_jit(w, a):
    return jax.jit(lambda a: jnp.sin(w @ a) * (lax.axis_index("outer") + lax.axis_size("outer")).astype(a.dtype))(a)


@collective
def sum_in_a_custom_derivative(w, a):
    @jax.custom_jvp
    def f(a):
        return lax.psum(jnp.sin(a), "outer")

    f.defjvp(lambda args, moved: (f(*args), lax.psum(2 * jnp.cos(args[0]) * moved[0], "outer")))
    return f(w @ a) * a


@collective
def mean_in_a_nested_bmap(w, a):
    return bmap(lambda row: jnp.sin(row - lax.pmean(row @ a, "outer")), batch_size=2, checkpoint=True)(w)


@each(COLLECTIVES)
def test_collectives(case, mapping):
    def program(by):
        mapped = jax.vmap(by(case, (None, 0)), (None, 0), axis_name="outer")
        each_gradient = jax.vmap(jax.grad(sum_of_sines(by(case, (None, 0))), 1), (None, 0), axis_name="outer")
        together = jax.value_and_grad(sum_of_sines(mapped), (0, 1))
        return tuple_of(together, each_gradient, lambda *args: jax.jvp(mapped, args, cosines(args)))

    check(mapping, program, [random((WIDTH, WIDTH)), random((2, mapping.size, WIDTH), 1)])


# --- other dtypes ----------------------------------------------------------------------------------------------------

# XLA may leave out a rounding between two operations: a few units of the last place, of numbers of about 1.
TOLERANCES = {"bfloat16": 2**-5, "float16": 2**-8, "float32": 1e-5}


@each({name: name for name in TOLERANCES})
def test_lower_precision(case, mapping):
    def program(by):
        f = by(lambda w, a: jnp.tanh(w @ a) * a, (None, 0))

        def loss(w, a):
            return jnp.mean(jnp.sin(f(w, a)))

        return jax.jit(lambda w, a: (f(w, a), jax.grad(loss, (0, 1))(w, a), jax.jvp(f, (w, a), (w, a))[1]))

    args = [(x / 2).astype(case) for x in (random((WIDTH, WIDTH)), random((mapping.size, WIDTH), 1))]
    ours, twin = program(mapping.ours)(*args), program(mapping.twin)(*args)
    assert jax.tree.map(jax.typeof, ours) == jax.tree.map(jax.typeof, twin)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(twin), strict=True):
        np.testing.assert_allclose(
            *(np.asarray(z, "float64") for z in (x, y)), atol=TOLERANCES[case], rtol=TOLERANCES[case]
        )


@on(TAIL | MEAN)
def test_complex_arguments(mapping):
    def program(by):
        f = by(lambda w, z: (jnp.exp(1j * w * z), jnp.conj(z) * w), (None, 0))

        def loss(w, z):
            return sum(jnp.sum(jnp.abs(y) ** 2) for y in f(w, z))

        gradient = jax.value_and_grad(loss, (0, 1))
        holomorphic = jax.jacrev(by(lambda w, z: jnp.sin(w * z), (None, 0)), holomorphic=True)
        return tuple_of(
            gradient, holomorphic, lambda *args: jax.jvp(gradient, args, args), lambda *args: jax.vjp(f, *args)[0]
        )

    check(
        mapping,
        program,
        [lax.complex(random(()), random((), 3)), lax.complex(random(mapping.size, 1), random(mapping.size, 2))],
    )


# --- code on the host ------------------------------------------------------------------------------------------------

SIN = {
    "call": np.sin,
    "jvp": lambda args, tangents: np.cos(args[0]) * tangents[0],
    "vjp": lambda args, cotangents, _: (np.cos(args[0]) * cotangents,),
}


def host_sin(method, **options):
    ends = {name: SIN[name] for name in ("jvp", "vjp")}
    return batchrules.host_call(np.sin, lambda x: x, method=method, name="sin", **(ends | options))


def pure_sin(method):
    """A pure_callback whose derivative is another one."""

    @jax.custom_jvp
    def sin(x):
        return called(np.sin, x)

    def called(function, x):
        return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method=method)

    sin.defjvp(lambda args, moved: (sin(*args), called(np.cos, *args) * moved[0]))
    return sin


def device_sin(**options):
    return batchrules.device_call(jnp.sin, method="broadcast_all", name="sin", **options)


DEVICE_ENDS = {
    "jvp": lambda args, tangents: jnp.cos(args[0]) * tangents[0],
    "vjp": lambda args, cotangents, _: (jnp.cos(args[0]) * cotangents,),
}
SINES = {
    "host_call one by one": host_sin("sequential"),
    "host_call of a batch": host_sin("expand_dims"),
    "host_call of equal leads": host_sin("broadcast_all", batch_size=2),
    "host_call that skips zeros": host_sin("sequential", skip_zero=True),
    "host_call in threads": host_sin("sequential", executor=2),
    "pure_callback one by one": pure_sin("sequential"),
    "pure_callback of a batch": pure_sin("expand_dims"),
    "device_call": device_sin(**DEVICE_ENDS),
    "device_call that is traced": device_sin(),
    "device_call one by one": batchrules.device_call(jnp.sin, method="sequential", name="sin", **DEVICE_ENDS),
}


def with_sin(sin):
    """Calls of mapped, of unmapped and of both, one in a loop."""

    def f(w, a):
        looped = lax.scan(lambda c, x: (sin(c * x), None), a, jnp.array([1.0, 2.0]))[0]
        return sin(w @ a) * a, sin(w), looped

    return f


@each(SINES)
def test_sines_of_others(case, mapping):
    """Their own derivatives are used; the twin is jax.vmap of JAX's sine."""

    def program(by, sin):
        f = by(with_sin(sin), (None, 0))
        gradient = jax.value_and_grad(sum_of_sines(f), (0, 1))
        return jax.jit(
            tuple_of(
                jax.jacrev(f, 1),
                lambda *args: jax.jvp(f, args, cosines(args)),
                lambda w, a: jax.vmap(gradient, (0, None))(jnp.stack([w, 2 * w]), a),
            )
        )

    args = random((WIDTH, WIDTH)), random((mapping.size, WIDTH), 1)
    assert_close(program(mapping.ours, case)(*args), program(mapping.twin, jnp.sin)(*args))


class Seen:
    """Which elements a callback was given, and how often."""

    def __init__(self):
        self.counts = collections.Counter()

    def __call__(self, n):
        self.counts[int(n)] += 1
        return np.float64(n)


def debugged(seen):
    def f(a, n):
        jax.debug.callback(seen, n)
        return jnp.sin(a)

    return f


def debugged_in_a_branch(seen):
    def f(a, n):
        return lax.scan(lambda c, _: (jnp.sin(c), jax.debug.callback(seen, n)), a, length=1)[0]

    return f


def with_effect(seen):
    return lambda a, n: jnp.sin(a) * io_callback(seen, jax.ShapeDtypeStruct((), "float64"), n)


WATCHED = {"debug.callback": debugged, "debug.callback in a scan": debugged_in_a_branch, "io_callback": with_effect}


def total(f):
    return lambda a, n: jnp.sum(f(a, n))


WAYS = {
    "value": lambda f: f,
    "jvp": lambda f: lambda a, n: jax.jvp(lambda a: f(a, n), (a,), (a,)),
    "jacfwd": jax.jacfwd,
    "grad": lambda f: jax.grad(total(f)),
    "hessian": lambda f: jax.hessian(total(f)),
}
REPEATED = ("grad", "hessian")  # with checkpoint


def refusal(watched, checkpoint, way):
    """What is raised where an effect would be repeated that must not be, as by jax.checkpoint."""
    if watched is with_effect and checkpoint and way in REPEATED:
        return pytest.raises(NotImplementedError, match=r"repeat the side effects of io_callback. Use checkpoint=False")
    return contextlib.nullcontext()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("watched", WATCHED.values(), ids=WATCHED)
def test_callbacks_see_each_element_once(watched, way, checkpoint):
    """With checkpoint once more on the way back, as under jax.checkpoint."""
    seen = Seen()
    ours = WAYS[way](bmap(watched(seen), batch_size=3, checkpoint=checkpoint))
    with refusal(watched, checkpoint, way) as refused:
        jax.block_until_ready(jax.jit(ours)(random(7), jnp.arange(7)))
    jax.effects_barrier()
    if refused is None:
        assert seen.counts == dict.fromkeys(range(7), 2 if checkpoint and way in REPEATED else 1)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("watched", WATCHED.values(), ids=WATCHED)
def test_callbacks_see_each_element_of_a_batch_once(watched, checkpoint):
    seen = Seen()
    ours = jax.vmap(WAYS["grad"](bmap(watched(seen), batch_size=3, checkpoint=checkpoint)))
    with refusal(watched, checkpoint, "grad") as refused:
        jax.block_until_ready(jax.jit(ours)(random((2, 7)), jnp.arange(14).reshape(2, 7)))
    jax.effects_barrier()
    if refused is None:
        assert seen.counts == dict.fromkeys(range(14), 1 + checkpoint)


def test_effects_beside_what_every_chunk_needs():
    """The gradient needs something that is computed of the unmapped argument alone, beside a callback of the mapped."""
    seen = []

    def f(w, x):
        jax.debug.callback(lambda y: seen.append(y.shape), x.reshape(1, 3) @ w)
        return jnp.sin(x @ w) * w[0] ** 2

    jax.grad(lambda w: jnp.sum(bmap(f, (None, 0), batch_size=3)(w, random((7, 3)))))(random((3, 3), 1))
    jax.effects_barrier()
    assert seen == [(1, 3)] * 7


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_host_call_is_made_once_for_each_element(checkpoint):
    """And so are its derivatives."""
    calls = collections.Counter()

    def counted(name):
        def call(*args):
            calls[name] += 1
            return SIN[name](*args)

        return call

    ends = {name: counted(name) for name in ("jvp", "vjp")}
    sin = batchrules.host_call(counted("call"), lambda x: x, method="sequential", name="sin", **ends)
    jax.block_until_ready(
        jax.jit(jax.value_and_grad(sum_of_sines(bmap(sin, batch_size=3, checkpoint=checkpoint))))(random(7))
    )
    assert calls == {"call": 7, "vjp": 7}
