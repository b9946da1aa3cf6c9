"""Any function, any nest of vmaps, any way to differentiate it, any endpoints, any method: the twin's result."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close
from foreign import Foreign, with_axis
from host_derivatives import Smooth
from host_endpoints import GIVEN, METHODS, Endpoints
from hypothesis import given, settings
from hypothesis import strategies as st

# Each example compiles a program or two.
FEWER = settings(max_examples=max(10, settings.default.max_examples // 2), report_multiple_bugs=False)
SHAPES = ((), (2,), (1,), (2, 3), (0, 2))


@dataclasses.dataclass(frozen=True)
class General:
    """A square of each argument alone, and one product in which all have a part."""

    shapes: tuple[tuple[int, ...], ...]

    def _summed(self, xp, args):
        for arg, shape in zip(args, self.shapes, strict=True):
            yield xp.sum(arg, axis=tuple(range(arg.ndim - len(shape), arg.ndim)))

    def __call__(self, xp, *args):
        squares = {f"alone{i}": arg * arg for i, arg in enumerate(args)}
        return {**squares, "mixed": math.prod(1 + s for s in self._summed(xp, [xp.sin(arg) for arg in args]))}

    def slopes(self, args):
        """What "mixed" gains by each argument."""
        parts = [1 + s for s in self._summed(np, [np.sin(arg) for arg in args])]
        for i, (arg, shape) in enumerate(zip(args, self.shapes, strict=True)):
            others = np.asarray(math.prod(parts[:i] + parts[i + 1 :]) + 0 * parts[i])
            yield others.reshape(others.shape + (1,) * len(shape)) * np.cos(arg)

    def push(self, args, tangents, _):
        alone = {f"alone{i}": 2 * arg * t for i, (arg, t) in enumerate(zip(args, tangents, strict=True))}
        moved = [slope * t for slope, t in zip(self.slopes(args), tangents, strict=True)]
        return {**alone, "mixed": sum(self._summed(np, moved))}

    def pull(self, args, c, _):
        mixed = [c["mixed"].reshape(c["mixed"].shape + (1,) * len(shape)) for shape in self.shapes]
        alone = [2 * arg * c[f"alone{i}"] for i, arg in enumerate(args)]
        return [a + m * slope for a, m, slope in zip(alone, mixed, self.slopes(args), strict=True)]

    def blocks(self, args, _):
        lead = args[0].shape[: args[0].ndim - len(self.shapes[0])]
        zeros = [[np.zeros((*lead, *row, *column)) for column in self.shapes] for row in self.shapes]
        for i, (arg, shape) in enumerate(zip(args, self.shapes, strict=True)):
            size = math.prod(shape)
            diagonal = 2 * arg.reshape((*lead, size, 1)) * np.eye(size)
            zeros[i][i] = diagonal.reshape((*lead, *shape, *shape))
        return {**{f"alone{i}": row for i, row in enumerate(zeros)}, "mixed": list(self.slopes(args))}


def general(shapes):
    """That function of arguments of these shapes."""
    function = General(tuple(shapes))
    results = {**{f"alone{i}": shape for i, shape in enumerate(shapes)}, "mixed": ()}
    foreign = Foreign("general", function, function.shapes)
    return Smooth(foreign, results, function.push, function.pull, function.blocks)


@st.composite
def nests(draw, most=2):
    """The shapes of the arguments, for each vmap its in_axes and out_axes, and the arguments."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    inner = [tuple(shape) for shape in shapes]
    ranks = {**{f"alone{i}": len(shape) for i, shape in enumerate(shapes)}, "mixed": 0}
    levels = []
    for _ in range(draw(st.integers(0, most))):
        mapped = draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)).filter(any))
        in_axes = tuple(
            draw(st.integers(-len(shape) - 1, len(shape))) if is_mapped else None
            for shape, is_mapped in zip(inner, mapped, strict=True)
        )
        size = draw(st.integers(0, 3))
        out_axes = {name: draw(st.integers(-rank - 1, rank)) for name, rank in ranks.items()}
        inner = [with_axis(shape, axis, size) for shape, axis in zip(inner, in_axes, strict=True)]
        ranks = {name: rank + 1 for name, rank in ranks.items()}
        levels.append((in_axes, out_axes))
    generator = np.random.default_rng(draw(st.integers(0, 9)))
    return shapes, levels, [generator.normal(size=shape) for shape in inner]


def nested(function, levels, *, as_first=False):
    """The function under these vmaps; `as_first` where it gives not its outputs but something else."""
    for in_axes, out_axes in levels:
        function = jax.vmap(function, in_axes, 0 if as_first else out_axes)
    return function


def waved(tree):
    return jax.tree.map(jnp.cos, tree)


def summed(f):
    return lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(*args)))


# Each takes f, the vmaps, the arguments, and which of these to differentiate in.
WAYS = {
    "jvp of the nest": lambda f, levels, args, nums: jax.jvp(
        lambda *moving: nested(f, levels)(*put(args, nums, moving)), [args[i] for i in nums], [args[i] for i in nums]
    )[1],
    "vjp of the nest": lambda f, levels, args, nums: pulled(
        lambda *moving: nested(f, levels)(*put(args, nums, moving)), [args[i] for i in nums]
    ),
    "jacfwd of the nest": lambda f, levels, args, nums: jax.jacfwd(nested(f, levels), nums)(*args),
    "jacrev of the nest": lambda f, levels, args, nums: jax.jacrev(nested(f, levels), nums)(*args),
    "nest of grad": lambda f, levels, args, nums: nested(jax.grad(summed(f), nums), levels, as_first=True)(*args),
    "nest of jacfwd": lambda f, levels, args, nums: nested(jax.jacfwd(f, nums), levels, as_first=True)(*args),
    "nest of jacrev": lambda f, levels, args, nums: nested(jax.jacrev(f, nums), levels, as_first=True)(*args),
    "grad within the nest": lambda f, levels, args, nums: nested(
        jax.grad(summed(nested(f, levels[:1])), nums), levels[1:], as_first=True
    )(*args),
}


def put(args, nums, moving):
    args = list(args)
    for i, value in zip(nums, moving, strict=True):
        args[i] = value
    return args


def pulled(f, args):
    outputs, pull = jax.vjp(f, *args)
    return pull(waved(outputs))


@FEWER
@given(
    nests(),
    st.sampled_from(sorted(WAYS)),
    st.sampled_from(METHODS),
    st.sampled_from(sorted(GIVEN)),
    st.sampled_from([None, 1, 2, 5]),
    st.fixed_dictionaries({name: st.booleans() for name in ("pass_outputs", "skip_zero", "jit")}),
    st.data(),
)
def test_derivatives(nest, way, method, endpoints, batch_size, flags, data):
    shapes, levels, args = nest
    nums = tuple(sorted(data.draw(st.sets(st.integers(0, len(shapes) - 1), min_size=1))))
    smooth, jit = general(shapes), flags.pop("jit")
    f = Endpoints(smooth, method).host_call(GIVEN[endpoints], batch_size=batch_size, **flags)

    def program(f, jit):
        run = lambda *args: WAYS[way](f, levels, args, nums)  # noqa: E731
        return (jax.jit(run) if jit else run)(*map(jnp.asarray, args))

    assert_close(program(f, jit), program(smooth.twin, jit=True))


@FEWER
@given(
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.sampled_from(METHODS),
    st.sampled_from(sorted(GIVEN)),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([(0, 0), (0, None), (None, 0), (None, None)]),
    st.sampled_from(["jvp", "grad", "jacrev", "vmap of grad"]),
    st.booleans(),
)
def test_masked_calls(mask, method, endpoints, batch_size, in_axes, way, jit):
    """Where the mask is False there is no call, and the derivative is that of `otherwise`."""
    smooth = general([(2,), ()])
    f = Endpoints(smooth, method)
    call = f.host_call(GIVEN[endpoints], batch_size=batch_size)
    generator = np.random.default_rng(len(mask))
    mask = jnp.asarray(mask)
    args = [
        jnp.asarray(generator.normal(size=with_axis(s, axis, len(mask))))
        for s, axis in zip([(2,), ()], in_axes, strict=True)
    ]
    other = jax.tree.map(
        lambda s: jnp.asarray(generator.normal(size=s)), smooth.results, is_leaf=lambda s: isinstance(s, tuple)
    )

    def chosen(mask, x, s, other):
        return call.where(mask, x, s, otherwise=other)

    def twin(mask, x, s, other):
        return jax.tree.map(lambda a, b: jnp.where(mask, a, b), smooth.twin(x, s), other)

    def program(one):
        many = lambda x, s, o: jax.vmap(one, (0, *in_axes, None))(mask, x, s, o)  # noqa: E731
        if way == "jvp":
            return jax.jvp(many, (*args, other), (*args, other))
        if way == "grad":
            return jax.grad(summed(many), (0, 1, 2))(*args, other)
        if way == "jacrev":
            return jax.jacrev(many, (0, 1))(*args, other)
        return jax.vmap(jax.grad(summed(one), (1, 2, 3)), (0, *in_axes, None))(mask, *args, other)

    assert_close((jax.jit(program, static_argnums=0) if jit else program)(chosen), program(twin))
    if method == "sequential" and jit is False and way == "jvp":
        assert f.logs["call"].count == int(mask.sum())


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    yield
    jax.clear_caches()
