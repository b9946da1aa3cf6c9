"""bmap equals jax.vmap under every transformation around it, in any order, and inside loops and branches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmap_cases import (
    ANY,
    MAX,
    MEAN,
    NETWORK_AXES,
    NETWORK_OUT_AXES,
    STACKED,
    SUM,
    TAIL,
    assert_close,
    check,
    cosines,
    each,
    network,
    network_arguments,
    on,
    random,
    sum_of_sines,
    table,
    tuple_of,
)
from jax import export, lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ALL = (0, 1, 2)
POLICIES = {
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "batched_dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


# There jax.lax.map cannot be transposed beside a mapped constant either.
needs_transposed_scans = pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="JAX before 0.9 transposes scans only within a derivative"
)


def mapped(by):
    return by(network, NETWORK_AXES, NETWORK_OUT_AXES)


def loss(by):
    return sum_of_sines(mapped(by))


def stack(tree, count=3):
    """As many directions, each another."""
    return jax.tree.map(lambda x: jnp.stack([jnp.cos(k + x) for k in range(count)]), tree)


def call(f, *args):
    return f(*args)


# --- transformations of transformations ------------------------------------------------------------------------------

TRANSFORMED, transformed = table()


@transformed
def checkpoint(by):
    return tuple_of(*(jax.grad(jax.checkpoint(loss(by), policy=policy), ALL) for policy in POLICIES.values()))


@transformed
def checkpoint_of_checkpoint(by):
    def twice(*args):
        return jnp.sin(jax.checkpoint(lambda *args: jax.checkpoint(loss(by))(*args) ** 2)(*args))

    return jax.value_and_grad(twice, ALL)


@transformed
def jit_of_grad_of_jit(by):
    return jax.jit(jax.grad(jax.jit(lambda *args: jax.jit(loss(by), inline=True)(*args) ** 2), ALL))


@transformed
def linearize(by):
    def linearized(*args):
        out, push = jax.linearize(mapped(by), *args)
        return out, push(*cosines(args)), jax.vmap(push)(*stack(args))

    return linearized


@transformed
def transpose_of_linearize(by):
    def pulled(*args):
        out, push = jax.linearize(mapped(by), *args)
        return jax.linear_transpose(push, *args)(cosines(out))

    return pulled


@transformed
def vjp(by):
    def pulled(*args):
        out, pull = jax.vjp(mapped(by), *args)
        return pull(cosines(out)), pull(out), jax.vmap(pull)(stack(out)), jax.jvp(pull, (out,), (cosines(out),))

    return pulled


@transformed
def vjp_with_respect_to_its_cotangent(by):
    def pulled_back(*args):
        out, pull = jax.vjp(mapped(by), *args)
        return jax.grad(sum_of_sines(pull))(cosines(out))

    return pulled_back


@transformed
def vjp_of_a_batch(by):
    """The pulling functions are results of a vmap: what is kept for the way back is batched."""

    def pulled(w, a, shift):
        out, pull = jax.vmap(lambda w, a: jax.vjp(mapped(by), w, a, shift))(stack(w), stack(a))
        return jax.vmap(call)(pull, cosines(out))

    return pulled


@transformed
def jacfwd_of_jacrev(by):
    return jax.jacfwd(jax.jacrev(loss(by), (1, 2)), (0, 2))


@transformed
def jacrev_of_jacfwd(by):
    return jax.jacrev(jax.jacfwd(mapped(by), 2), 2)


@transformed
def hessian(by):
    return jax.hessian(loss(by), (0, 2))


@transformed
def forward_over_reverse(by):
    return lambda *args: jax.jvp(jax.grad(loss(by), ALL), args, cosines(args))


@transformed
def reverse_over_forward(by):
    return jax.grad(lambda *args: jax.jvp(loss(by), args, cosines(args))[1], ALL)


@transformed
def reverse_over_reverse(by):
    return jax.grad(sum_of_sines(jax.grad(loss(by), ALL)), ALL)


@transformed
def forward_over_forward(by):
    return lambda *args: jax.jvp(lambda *args: jax.jvp(mapped(by), args, cosines(args)), args, args)


@transformed
def vmap_of_forward_over_reverse(by):
    def product(w, a, shift, moved):
        return jax.jvp(jax.grad(loss(by), (0, 1)), (w, a, shift), (moved, a, shift))[1]

    return lambda w, a, shift: jax.vmap(product, (None, 2, None, 0))(w, jnp.stack([a, a + 1, -a], 2), shift, stack(w))


@transformed
def third_derivative(by):
    def along(t, *args):
        return loss(by)(*(jnp.sin(t * x) for x in args))

    return lambda *args: jax.grad(jax.jacfwd(jax.grad(along)))(0.7, *args)


@transformed
def vmap_of_grad_by_the_unmapped(by):
    return lambda w, a, shift: jax.vmap(jax.grad(loss(by), ALL), (0, None, None))(stack(w), a, shift)


@transformed
def vmap_of_grad_by_some(by):
    """The batch's axis is before, or behind, the axis that bmap maps, or at the end."""

    def gradients(axis):
        return lambda w, a, shift: jax.vmap(jax.grad(loss(by), ALL), (None, axis, 0), (0, axis, 1))(
            w, jnp.moveaxis(stack(a), 0, axis), stack(shift)
        )

    return tuple_of(*map(gradients, range(3)))


@transformed
def vmap_of_vmap_of_grad(by):
    inner = jax.vmap(jax.grad(loss(by), ALL), (None, 0, None), (0, 1, -1))
    return lambda w, a, shift: jax.vmap(inner, (0, None, 1), -1)(stack(w), stack(a, 2), stack(shift).T)


@transformed
def vmap_of_one_element(by):
    return lambda *args: jax.vmap(jax.value_and_grad(loss(by), ALL))(*(x[None] for x in args))


@transformed
def grad_of_vmap(by):
    return lambda *args: jax.grad(sum_of_sines(jax.vmap(mapped(by))), ALL)(*stack(args))


@transformed
def grad_by_each_argument(by):
    return tuple_of(*(jax.grad(loss(by), i) for i in [0, 1, 2, (0, 2), (2, 1)]))


@transformed
def grad_by_what_is_closed_over(by):
    def of_elements(w, a, shift):
        constant = jnp.arange(4.0)
        inner = by(lambda a, s: (jnp.tanh(w @ a + constant) * s * jnp.sum(shift), jnp.cos(w)), (1, 0))
        return inner(a, shift)

    return jax.value_and_grad(sum_of_sines(of_elements), ALL)


@transformed
def jvp_of_some(by):
    def moved(*args):
        w, a, shift = args
        return (
            jax.jvp(lambda w: mapped(by)(w, a, shift), (w,), (jnp.cos(w),)),
            jax.jvp(lambda shift: mapped(by)(w, a, shift), (shift,), (shift,)),
            jax.jvp(mapped(by), args, jax.tree.map(jnp.zeros_like, args)),
        )

    return moved


@transformed
def custom_jvp_around(by):
    @jax.custom_jvp
    def f(*args):
        return mapped(by)(*args)

    @f.defjvp
    def f_jvp(primals, tangents):
        out, moved = jax.jvp(mapped(by), primals, tangents)
        return out, jax.tree.map(lambda x: 2 * x, moved)

    return tuple_of(jax.grad(sum_of_sines(f), ALL), jax.jacfwd(f, 2))


@transformed
def custom_vjp_around(by):
    """What it keeps is the function that pulls back."""

    @jax.custom_vjp
    def f(*args):
        return mapped(by)(*args)

    f.defvjp(lambda *args: jax.vjp(mapped(by), *args), lambda pull, ct: jax.tree.map(lambda x: 2 * x, pull(ct)))
    return tuple_of(
        jax.grad(sum_of_sines(f), ALL),
        lambda w, *args: jax.vmap(jax.grad(sum_of_sines(f)), (0, None, None))(w[None], *args),
    )


@transformed
def custom_vjp_with_a_function(by):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def apply(f, *args):
        return f(*args)

    apply.defvjp(lambda f, *args: (f(*args), args), lambda f, args, ct: jax.vjp(f, *args)[1](ct))
    return jax.grad(sum_of_sines(functools.partial(apply, mapped(by))), ALL)


@transformed
def custom_gradient_around(by):
    @jax.custom_gradient
    def f(*args):
        return jax.vjp(mapped(by), *args)

    return jax.grad(sum_of_sines(f), ALL)


@transformed
def has_aux(by):
    def with_aux(*args):
        out = mapped(by)(*args)
        return jnp.sum(jnp.sin(out["hidden"])), (out, jnp.arange(3))

    def pulled(*args):
        out, pull, aux = jax.vjp(with_aux, *args, has_aux=True)
        return out, pull(jnp.ones(())), aux

    return tuple_of(
        jax.value_and_grad(with_aux, ALL, has_aux=True),
        jax.jacfwd(with_aux, 2, has_aux=True),
        pulled,
        lambda *args: jax.jvp(with_aux, args, cosines(args), has_aux=True),
    )


@transformed
def one_result_of_three(by):
    def only(name):
        return sum_of_sines(lambda *args: mapped(by)(*args)[name])

    return tuple_of(*(jax.grad(only(name), ALL) for name in NETWORK_OUT_AXES))


@transformed
def results_that_nobody_uses(by):
    return jax.grad(lambda *args: 0 * sum_of_sines(lambda *args: args)(*args) + len(mapped(by)(*args)), ALL)


@transformed
def results_that_are_used_again(by):
    def twice(w, a, shift):
        out = mapped(by)(w, a, shift)
        again = mapped(by)(w + jnp.sum(out["hidden"]), a * jnp.mean(out["norm"]), jnp.sin(shift))
        return out, again

    return jax.value_and_grad(sum_of_sines(twice), ALL)


@each(TRANSFORMED, ANY | MAX)
def test_transformed(case, mapping):
    check(mapping, case, network_arguments(mapping.size))


# --- loops and branches whose bodies contain it ----------------------------------------------------------------------

LOOPS, loop = table()


def step(by, w, a, shift):
    out = mapped(by)(w, a, shift)
    return jnp.sin(w + jnp.sum(jnp.sin(out["hidden"]))), jnp.cos(a) / 2 + jnp.sin(jnp.mean(out["norm"])) / 2, shift


@loop
def scan(by):
    """The mapped arguments are carried, or one of the scanned."""

    def scanned(w, a, shift):
        carried, _ = lax.scan(lambda args, _: (step(by, *args), None), (w, a, shift), length=2)
        return carried, lax.scan(lambda w, a: step(by, w, a, shift)[:2], w, stack(a), reverse=True)

    return scanned


@loop
def scan_over_other_weights(by):
    return lambda w, a, shift: lax.scan(lambda a, w: (step(by, w, a, shift)[1], mapped(by)(w, a, shift)), a, stack(w))


@loop
def fori(by):
    return lambda *args: lax.fori_loop(0, 3, lambda _, args: step(by, *args), args)


@loop
def map_(by):
    return lambda w, a, shift: lax.map(lambda w: mapped(by)(w, a, shift), stack(w))


@loop
def scan_of_checkpoint(by):
    body = jax.checkpoint(lambda args, _: (step(by, *args), None), prevent_cse=False)
    return lambda *args: lax.scan(body, args, length=2)[0]


@loop
def cond(by):
    """The predicate is an element of the batch under vmap, so both branches are computed."""

    def branched(w, a, shift):
        return lax.cond(jnp.sum(w) > 0, lambda *args: step(by, *args), lambda *args: args, w, a, shift)

    return branched


@loop
def cond_of_a_constant(by):
    return lambda w, a, shift: lax.cond(
        jnp.sum(shift) > -100, lambda w: mapped(by)(w, a, shift), lambda w: mapped(by)(-w, a, shift), w
    )


@loop
def switch(by):
    def branched(w, a, shift):
        branches = [lambda w: step(by, w, a, shift), lambda w: (w, a, shift), lambda w: step(by, jnp.sin(w), a, shift)]
        return lax.switch(jnp.sum(w > 0) % 3, branches, w)

    return branched


def while_loop(by):
    def goes_on(held):
        return held[1] < 1 + jnp.sum(held[0][0] > 0) % 3

    return lambda *args: lax.while_loop(goes_on, lambda held: (step(by, *held[0]), held[1] + 1), (args, 0))[0]


@loop
def scan_of_grad(by):
    """The derivative is taken in the loop."""
    gradient = jax.grad(loss(by), ALL)

    def descend(args, _):
        return jax.tree.map(lambda x, g: x - 0.01 * g, args, gradient(*args)), None

    return lambda *args: lax.scan(descend, args, length=2)[0]


def forward(by, looped):
    looped = looped(by)
    return tuple_of(
        lambda *args: jax.jvp(looped, args, cosines(args)),
        lambda w, a, shift: jax.vmap(looped, (0, None, None))(stack(w), a, shift),
    )


def reverse(by, looped):
    gradient = jax.value_and_grad(sum_of_sines(looped(by)), ALL)
    return tuple_of(gradient, lambda w, a, shift: jax.vmap(gradient, (0, None, 1))(stack(w), a, stack(shift).T))


@each(LOOPS)
def test_forward_derivatives_of_loops(case, mapping):
    check(mapping, lambda by: forward(by, case), network_arguments(mapping.size))


@each(LOOPS, ANY | MAX)
def test_gradients_of_loops(case, mapping):
    check(mapping, lambda by: reverse(by, case), network_arguments(mapping.size))


@on(TAIL | MEAN)
def test_in_a_while_loop(mapping):
    """It has no reverse mode, nor has it for jax.vmap."""
    check(mapping, lambda by: forward(by, while_loop), network_arguments(mapping.size))


@on(TAIL | SUM)
def test_the_condition_of_a_while_loop(mapping):
    def looped(by):
        def goes_on(a):
            return sum_of_sines(by(lambda a: jnp.sum(a**2)))(a) > 0.1

        return lambda a: lax.while_loop(goes_on, lambda a: 0.9 * a, a)

    def both(by):
        return tuple_of(looped(by), lambda a: jax.vmap(looped(by))(stack(a)))

    check(mapping, both, [random((mapping.size, 3))])


# --- what a solver or an optimiser does with it ----------------------------------------------------------------------


@needs_transposed_scans
@on(STACKED)
def test_an_operator_of_a_linear_solver(mapping):
    """What the solver is given is transposed."""

    def program(by):
        def solved(w, a):
            def operator(x):
                return by(lambda a, x: w @ x + 9 * x + a**2 * x)(a, x)

            def solve(operator, b):
                return lax.fori_loop(0, 60, lambda _, x: x + (b - operator(x)) / 12, b)

            return lax.custom_linear_solve(operator, jnp.cos(a), solve, solve)

        return tuple_of(jax.value_and_grad(sum_of_sines(solved), (0, 1)), jax.jacfwd(solved))

    check(mapping, program, [random((3, 3)), random((mapping.size, 3), 1)])


# --- collectives over an axis around it ------------------------------------------------------------------------------

OUTER = {
    "psum": lambda w, a: lax.psum(jnp.tanh(w * a), "outer"),
    "pmean of the unmapped": lambda w, a: a * lax.pmean(jnp.sin(w), "outer"),
    "all_gather": lambda w, a: jnp.sum(jnp.sin(lax.all_gather(w * a, "outer")), axis=0) * a,
    "axis_index": lambda w, a: jnp.sin(w * a) * lax.axis_index("outer").astype(a.dtype),
    "ppermute": lambda w, a: a * lax.ppermute(w * a, "outer", [(0, 1), (1, 2), (2, 0)]),
    "all_to_all": lambda w, a: a * lax.all_to_all(w * a, "outer", 0, 0),
    "in a scan": lambda w, a: lax.scan(lambda c, x: (c + lax.pmean(x * c * w, "outer"), c * x), a, jnp.arange(2.0)),
    "in a checkpoint": lambda w, a: jax.checkpoint(lambda a: lax.psum(jnp.sin(w * a), "outer") * a)(a),
    "in jit": jax.jit(lambda w, a: lax.psum(w * a, "outer") * a),
}


def outer_program(f):
    """The values; a derivative that all elements of the outer axis have in common; and one for each."""

    def program(by):
        inner = by(f, (None, 0))
        values = jax.vmap(inner, axis_name="outer")
        gradients = jax.vmap(jax.grad(sum_of_sines(inner), (0, 1)), axis_name="outer")
        return tuple_of(
            values, jax.grad(sum_of_sines(values), (0, 1)), gradients, lambda *args: jax.jvp(values, args, args)
        )

    return program


@each(OUTER)
def test_collectives_over_an_outer_axis(case, mapping):
    check(mapping, outer_program(case), [random((3, 3)), random((3, mapping.size, 3), 1)])


@on(STACKED)
def test_a_maximum_over_an_outer_axis(mapping):
    check(
        mapping,
        lambda by: jax.vmap(by(lambda a: a - lax.pmax(a, "outer")), axis_name="outer"),
        [random((3, mapping.size))],
    )


@on(TAIL | SUM)
def test_a_name_for_sharding_an_outer_axis(mapping, auto_mesh):
    here = NamedSharding(auto_mesh, P())

    def f(w, a):
        return jnp.tanh(lax.with_sharding_constraint(w * a, here)) * a

    def program(by):
        value_and_grad = jax.value_and_grad(sum_of_sines(by(f, (None, 0))), (0, 1))
        return jax.vmap(value_and_grad, spmd_axis_name="x")

    check(mapping, program, [random((4, 3)), random((4, mapping.size, 3), 1)])


# --- arguments of other dtypes ---------------------------------------------------------------------------------------


def mixed(a, w, n, flag, key):
    noisy = jnp.where(flag, a * jax.random.normal(key, a.shape), jnp.sin(w * a))
    return {"noisy": noisy, "n": n + 1, "flag": ~flag, "key": key, "picked": w[n % 3] * a}


MIXED_AXES = (0, None, 0, 0, 0)


def mixed_arguments(size):
    return random((size, 3)), random(3, 1), jnp.arange(size), jnp.arange(size) % 2 == 0, jax.random.split(KEY, size)


KEY = jax.random.key(3)
FLOATS = ("noisy", "picked")


def mixed_loss(by):
    def floats(*args):
        out = by(mixed, MIXED_AXES)(*args)
        return [out[name] for name in FLOATS]

    return sum_of_sines(floats)


def motion_of(x):
    """A tangent; a float0 where the argument has none."""
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.cos(x) if is_float else np.zeros(x.shape, jax.dtypes.float0)


def readable(tree):
    """Zeros for float0, which NumPy does not compare."""
    return jax.tree.map(lambda x: np.zeros(x.shape, bool) if x.dtype == jax.dtypes.float0 else x, tree)


def mixed_jvp(by):
    return lambda *args: jax.jvp(by(mixed, MIXED_AXES), args, tuple(map(motion_of, args)))


def mixed_grad(by):
    return jax.grad(mixed_loss(by), (0, 1, 2, 3), allow_int=True)


def mixed_vjp(by):
    def pulled(*args):
        out, pull = jax.vjp(by(mixed, MIXED_AXES), *args)
        return pull(jax.tree.map(motion_of, out))

    return pulled


MIXED = {"jvp": mixed_jvp, "grad": mixed_grad, "vjp": mixed_vjp}


@each(MIXED, STACKED)
def test_float0(case, mapping):
    args = mixed_arguments(mapping.size)
    assert_close(readable(case(mapping.ours)(*args)), readable(case(mapping.twin)(*args)))


@on(TAIL | MEAN)
def test_gradients_beside_integers_bools_and_keys(mapping):
    def program(by):
        def floats(*args):
            return by(lambda *args: [mixed(*args)[name] for name in FLOATS], MIXED_AXES)(*args)

        gradient = jax.value_and_grad(sum_of_sines(floats), (0, 1))
        batch = jax.vmap(gradient, (None, 0, None, None, None))
        second = jax.grad(sum_of_sines(gradient), (0, 1))
        return tuple_of(gradient, second, lambda a, w, *others: batch(a, stack(w), *others))

    check(mapping, program, mixed_arguments(mapping.size))


@on(STACKED)
def test_only_unmapped_arguments_have_a_derivative(mapping):
    def program(by):
        chosen = by(lambda w, n: jnp.sin(w[n % 3]) * n.astype(w.dtype), (None, 0))
        return tuple_of(jax.value_and_grad(sum_of_sines(chosen)), jax.jacfwd(chosen), jax.hessian(sum_of_sines(chosen)))

    check(mapping, program, [random(3), jnp.arange(mapping.size)])


# --- programs that give back, repeat or ignore what they are given ---------------------------------------------------

TRIVIAL, trivial = table()


@trivial
def the_argument(w, a):
    return a


@trivial
def the_unmapped_argument(w, a):
    return w


@trivial
def both(w, a):
    return w, a


@trivial
def each_twice(w, a):
    return a, a, w, w


@trivial
def nothing_mapped(w, a):
    return jnp.sin(w)


@trivial
def nothing_unmapped(w, a):
    return jnp.sin(a)


@trivial
def a_constant_and_a_product(w, a):
    return jnp.ones(2), a * w


@trivial
def a_constant_and_the_argument(w, a):
    return jnp.arange(2.0), a


@trivial
def containers_of_nothing(w, a):
    return None, (), {"a": a}


@trivial
def scaled_and_as_it_is(w, a):
    return 2 * a, a, w


def trivial_program(f):
    def program(by):
        mapped = by(f, (None, 0))
        gradient = jax.value_and_grad(sum_of_sines(mapped), (0, 1))
        return tuple_of(
            gradient,
            lambda *args: jax.jvp(mapped, args, cosines(args)),
            lambda w, a: jax.vmap(gradient, (0, None))(stack(w), a),
            lambda w, a: jax.vmap(gradient, (None, 1))(w, jnp.stack([a, a * 2], 1)),
            lambda *args: jax.jvp(gradient, args, cosines(args)),
        )

    return program


@each(TRIVIAL, ANY | MAX)
def test_trivial_functions(case, mapping):
    check(mapping, trivial_program(case), [random(3), random((mapping.size, 3), 1)])


SHAPES = {  # of the unmapped argument, and of an element, with the size of the axis and the batch size
    "no element": ((3,), (3,), 0, 3),
    "one element": ((3,), (3,), 1, 1),
    "numbers": ((), (), 7, 3),
    "empty elements": ((0,), (0,), 7, 3),
    "empty matrices": ((2, 0), (2, 0), 8, 4),
    "vectors of one": ((1,), (1,), 7, 3),
    "one at a time": ((3,), (3,), 5, 1),
    "all but one": ((3,), (3,), 7, 6),
}


@each(SHAPES, TAIL | SUM | MEAN)
def test_sizes(case, mapping):
    unmapped, element, size, batch_size = case
    mapping = dataclasses.replace(mapping, size=size, batch_size=batch_size)
    args = random(unmapped), random((size, *element), 1)
    check(mapping, trivial_program(lambda w, a: (jnp.tanh(w * a), jnp.sum(a), jnp.sum(w))), args)


@pytest.mark.parametrize("outer", [0, 1])
@on(STACKED)
def test_batches_of_no_and_of_one_element(mapping, outer):
    def program(by):
        return jax.vmap(jax.value_and_grad(sum_of_sines(by(lambda w, a: jnp.tanh(w * a), (None, 0))), (0, 1)))

    check(mapping, program, [random((outer, 3)), random((outer, mapping.size, 3), 1)])


PAIRS = {"0 and 1": (0, 1), "1 and 0": (1, 0), "1 and 1": (1, 1), "0 and none": (0, None)}


@each(PAIRS)
def test_one_argument_passed_twice(case, mapping):
    def program(by):
        def twice(a):
            return by(lambda x, y: (jnp.sin(x) * jnp.sum(y), x @ y), case)(a, a)

        return tuple_of(
            jax.value_and_grad(sum_of_sines(twice)),
            lambda a: jax.jvp(jax.grad(sum_of_sines(twice)), (a,), (a,)),
            lambda a: jax.vmap(jax.grad(sum_of_sines(twice)))(jnp.stack([a, a.T])),
        )

    check(mapping, program, [random((mapping.size, mapping.size))])


# --- linear functions ------------------------------------------------------------------------------------------------

LINEAR_FUNCTIONS = {
    "mapped": (0, lambda w, a: w @ a),
    "unmapped": (None, lambda w, a: a @ w),
    "with itself": (0, lambda w, a: (w @ a, jnp.sum(a), a)),
    "in a scan": (0, lambda w, a: lax.scan(lambda x, y: (w @ x, y * x), a, jnp.arange(2.0))),
    "in a checkpoint": (0, lambda w, a: jax.checkpoint(lambda a: w @ a)(a)),
}


@needs_transposed_scans
@each(LINEAR_FUNCTIONS)
def test_linear_transpose(case, mapping):
    """Of several cotangents, of a batch of them, of a pair with a direction, and transposed again."""
    axis, f = case
    w, a = random((3, 3)), random((3,) if axis is None else (mapping.size, 3), 1)

    def program(by):
        function = by(functools.partial(f, w), axis, axis_size=mapping.size)

        def transposed(a):
            out = function(a)
            pull = jax.linear_transpose(function, a)
            twice = jax.linear_transpose(lambda ct: pull(ct)[0], out)
            return pull(out), jax.vmap(pull)(stack(out)), jax.jvp(pull, (out,), (cosines(out),)), twice(a)

        return transposed

    check(mapping, program, [a])


# --- around the whole program ----------------------------------------------------------------------------------------


@on(TAIL | SUM)
def test_donated_arguments(mapping):
    args = network_arguments(mapping.size)
    ours = jax.jit(jax.grad(loss(mapping.ours), ALL), donate_argnums=ALL)
    assert_close(ours(*(x + 0 for x in args)), jax.jit(jax.grad(loss(mapping.twin), ALL))(*args))


@on(TAIL | SUM)
def test_static_arguments(mapping):
    def program(by):
        def powers(exponent, name, a):
            return jax.grad(sum_of_sines(by(lambda a: getattr(jnp, name)(a) ** exponent)))(a)

        return jax.jit(powers, static_argnums=(0, 1))

    a = random((mapping.size, 3))
    for exponent, name in [(2, "sin"), (3, "sin"), (3, "cos")]:
        assert_close(program(mapping.ours)(exponent, name, a), program(mapping.twin)(exponent, name, a))


@on(TAIL | SUM)
def test_functions_that_pull_back_are_results_of_jit(mapping):
    def pulled(by):
        args = network_arguments(mapping.size)
        out, pull = jax.jit(lambda *args: jax.vjp(mapped(by), *args))(*args)
        return out, pull(cosines(out)), jax.jit(jax.vmap(pull))(stack(out))

    assert_close(pulled(mapping.ours), pulled(mapping.twin))


@on(TAIL)
def test_without_jit(mapping):
    args = network_arguments(mapping.size)
    ours, twin = (tuple_of(jax.grad(loss(by), ALL), jax.jacfwd(mapped(by), 2)) for by in (mapping.ours, mapping.twin))
    assert_close(ours(*args), twin(*args))


@on(TAIL | SUM)
def test_with_jit_disabled(mapping):
    args = network_arguments(mapping.size)
    with jax.disable_jit():
        ours = jax.value_and_grad(loss(mapping.ours), ALL)(*args)
    assert_close(ours, jax.value_and_grad(loss(mapping.twin), ALL)(*args))


CHECKED = (
    "checkpoint",
    "linearize",
    "vjp",
    "forward_over_reverse",
    "reverse_over_reverse",
    "vmap_of_grad_by_some",
    "grad_by_what_is_closed_over",
    "custom_vjp_around",
    "one_result_of_three",
)


@pytest.fixture
def jax_checks():
    """Every program is checked by JAX when it is traced, and so are leaks."""
    jax.config.update("jax_enable_checks", True)
    yield
    jax.config.update("jax_enable_checks", False)


@each({name: TRANSFORMED[name] for name in CHECKED}, TAIL | SUM)
def test_programs_are_well_typed(case, mapping, jax_checks):
    jax.jit(case(mapping.ours)).trace(*network_arguments(mapping.size))


@on(TAIL | SUM)
def test_no_tracer_leaks(mapping):
    args = network_arguments(mapping.size)
    with jax.checking_leaks():
        jax.make_jaxpr(tuple_of(jax.grad(loss(mapping.ours), ALL), jax.jacfwd(mapped(mapping.ours), 2)))(*args)


@on(TAIL | SUM)
def test_export(mapping):
    args = network_arguments(mapping.size)
    exported = export.export(jax.jit(jax.grad(loss(mapping.ours), ALL)))(*args)
    assert_close(exported.call(*args), jax.jit(jax.grad(loss(mapping.twin), ALL))(*args))


@on(TAIL | SUM)
def test_a_traced_program_is_a_function_again(mapping):
    """What it is traced to is evaluated, and differentiated, by itself."""
    args = network_arguments(mapping.size)
    traced = jax.make_jaxpr(lambda *args: jax.tree.leaves(mapped(mapping.ours)(*args)))(*args)
    again = jaxpr_as_fun(traced)

    def twin(*args):
        return jax.tree.leaves(mapped(mapping.twin)(*args))

    assert_close(jax.jit(again)(*args), jax.jit(twin)(*args))
    assert_close(jax.jit(jax.grad(sum_of_sines(again), ALL))(*args), jax.jit(jax.grad(sum_of_sines(twin), ALL))(*args))
