"""The foreign functions that the tests batch, each in three forms, and beside each a pure-JAX twin.

One function is written once, for NumPy and for JAX, on arrays that all have the same number of leading dimensions.
Its twin is that function on one element, which `jax.vmap` batches by JAX's own rules. Its three forms are opaque to
JAX: a host call, a device call and a registered primitive. They count their calls and remember the shapes they got.
All values are small whole numbers, so that results agree exactly.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

import batchrules

ENTRIES = ("host", "device", "register")
SEQUENTIAL = ("sequential", "sequential_unrolled")
VECTORISED = ("expand_dims", "broadcast_all", "legacy_vectorized")
METHODS = (*SEQUENTIAL, *VECTORISED)
# A host call loops on the host, and has nothing to unroll.
ENTRIES_AND_METHODS = [(e, m) for e in ENTRIES for m in METHODS if (e, m) != ("host", "sequential_unrolled")]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Foreign:
    """A foreign function: `function(xp, *args)`, with `xp` NumPy or JAX's, and the shapes of one element."""

    name: str
    function: Callable[..., Any]
    shapes: Shapes

    def __call__(self, xp: Any, *args: Any) -> Any:
        """Call it as any method may: with or without leading dimensions."""
        ranks = [len(shape) for shape in self.shapes]
        leads = [arg.ndim - rank for arg, rank in zip(args, ranks, strict=True)]
        most = max(leads)
        if any(0 < lead < most for lead in leads) or min(leads) < 0:
            raise ValueError(f"{self.name} cannot tell which leading dimensions belong together: {leads}")
        lined_up = [arg if lead == most else arg[(None,) * most] for arg, lead in zip(args, leads, strict=True)]
        outputs = self.function(xp, *lined_up)
        if min(leads) == most:
            return outputs
        lead = np.broadcast_shapes(*(arg.shape[:most] for arg in lined_up))
        return jax.tree.map(lambda x: xp.broadcast_to(x, (*lead, *x.shape[most:])), outputs)

    def twin(self, *args: Any) -> Any:
        """The same for one element, in JAX operations."""
        return self.function(jnp, *map(as_array, args))

    def promise(self, *args: Any) -> Any:
        """What it returns for arguments of these types."""
        return jax.eval_shape(functools.partial(self, jnp), *args)


def as_array(value: Any) -> jax.Array:
    """A JAX array; one that is traced as it is, since `jnp.asarray` loses track of its in_axes on jax 0.7 and 0.8."""
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


@dataclass
class Log:
    """The calls that a foreign function got: for each, the shapes of its arguments."""

    given: list[Shapes] = field(default_factory=list)

    def add(self, args: Sequence[Any]) -> None:
        """Note one call."""
        self.given.append(tuple(np.shape(arg) for arg in args))

    def clear(self) -> None:
        """Forget them."""
        self.given.clear()

    @property
    def count(self) -> int:
        """How many calls there were."""
        return len(self.given)

    @property
    def shapes(self) -> dict[Shapes, int]:
        """How many calls there were of each shape."""
        return dict(collections.Counter(self.given))


@dataclass(frozen=True)
class Made:
    """A foreign function in one of its forms."""

    call: Callable[..., Any]
    log: Log
    primitive: Primitive | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a program that makes calls, and the log of these alone."""
        self.log.clear()
        return jax.block_until_ready(function(*args))


def opaque(foreign: Foreign, log: Log) -> Primitive:
    """A primitive that JAX cannot look inside: no rule but its types, and a host function that runs it."""
    primitive = Primitive(f"foreign_{foreign.name}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))

    def types(*avals: Any) -> list[Any]:
        promised = foreign.promise(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals))
        return [jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(promised)]

    def on_host(*args: Any) -> tuple[Any, ...]:
        log.add(args)
        return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(foreign(np, *args)))

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any) -> Sequence[Any]:
        return mlir.emit_python_callback(
            ctx, on_host, None, list(operands), ctx.avals_in, ctx.avals_out, has_side_effect=False
        )[0]

    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, lower)
    return primitive


def bound(foreign: Foreign, primitive: Primitive) -> Callable[..., Any]:
    """The JAX function that binds a primitive and gives the tree that the foreign function returns."""

    def function(*args: Any) -> Any:
        arrays = [as_array(arg) for arg in args]
        tree = jax.tree.structure(foreign.promise(*arrays))
        return jax.tree.unflatten(tree, primitive.bind(*arrays))

    return function


@contextlib.contextmanager
def made(entry: str, foreign: Foreign, method: str, **options: Any) -> Iterator[Made]:
    """A foreign function behind one of the three entry points, with a method of its own."""
    log = Log()
    if entry == "host":

        def on_host(*args: Any) -> Any:
            log.add(args)
            return foreign(np, *args)

        # The two extra elements of the value gate would be counted among the calls.
        yield Made(batchrules.host_call(on_host, foreign.promise, method=method, **{"verify": False, **options}), log)
        return
    primitive = opaque(foreign, log)
    function = bound(foreign, primitive)
    if entry == "device":
        yield Made(batchrules.device_call(function, method=method, **options), log, primitive)
        return
    batchrules.register(primitive, method, **options)
    try:
        yield Made(function, log, primitive)
    finally:
        batchrules.unregister(primitive)


def whole_numbers(shape: Sequence[int], seed: int, dtype: Any = "float64") -> np.ndarray[Any, Any]:
    """Small whole numbers, hardly ever equal in two rows."""
    values = np.random.default_rng(seed).integers(-8, 9, tuple(shape))
    return values.astype(dtype)


def arguments(foreign: Foreign, in_axes: Sequence[int | None], size: int) -> list[np.ndarray[Any, Any]]:
    """Arguments for one `jax.vmap` with these axes."""
    return [
        whole_numbers(with_axis(shape, axis, size), i)
        for i, (shape, axis) in enumerate(zip(foreign.shapes, in_axes, strict=True))
    ]


def with_axis(shape: Sequence[int], axis: int | None, size: int) -> tuple[int, ...]:
    """The shape with an axis of that size at that place, counted as `in_axes` counts."""
    if axis is None:
        return tuple(shape)
    place = axis % (len(shape) + 1)
    return (*shape[:place], size, *shape[place:])


def expected_calls(method: str, elements: int, batch_size: int | None = None) -> int:
    """The calls that a batch of so many elements takes."""
    if method in SEQUENTIAL or elements == 0:
        return elements
    return math.ceil(elements / (batch_size or elements))


def assert_same(result: Any, wanted: Any) -> None:
    """The same tree of arrays: structure, shapes, dtypes and every value."""
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(_comparable(got), _comparable(want))


def _comparable(array: Any) -> np.ndarray[Any, Any]:
    """NumPy finds NaN unlike NaN in the dtypes that it does not know, such as bfloat16."""
    plain = np.asarray(array)
    return plain.astype("float32") if plain.dtype.kind == "V" else plain


def _combine(xp: Any, x: Any, y: Any) -> Any:
    del xp
    return x * x * y - 2 * y + x


def _ranks(xp: Any, matrix: Any, vector: Any, scalar: Any) -> Any:
    product = xp.sum(matrix * vector[..., None, :], axis=-1)
    return product * scalar[..., None] - vector[..., :2]


def _several(xp: Any, x: Any, y: Any) -> Any:
    return {"both": x - 2 * y, "first": xp.sum(x * x, axis=-1), "second": y + 1}


def _discrete(xp: Any, x: Any, y: Any) -> Any:
    return x > y, (xp.sum(x > y, axis=-1).astype("int32"), x - y)


def _scalars(xp: Any, s: Any, t: Any) -> Any:
    del xp
    return s * s - t


def _weave(xp: Any, x: Any, y: Any) -> Any:
    lead = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return xp.concatenate(
        [xp.broadcast_to(x[..., ::-1], (*lead, x.shape[-1])), xp.broadcast_to(y[..., :1], (*lead, 1))], axis=-1
    )


# Arguments of equal rank; swapped ones show.
COMBINE = Foreign("combine", _combine, ((3,), (3,)))
# Arguments of every rank, 0-d too.
RANKS = Foreign("ranks", _ranks, ((2, 3), (3,), ()))
# Several outputs; each but the first depends on one argument only.
SEVERAL = Foreign("several", _several, ((3,), (3,)))
# Boolean and integer outputs beside a float.
DISCRETE = Foreign("discrete", _discrete, ((3,), (3,)))
# Nothing but 0-d arrays.
SCALARS = Foreign("scalars", _scalars, ((), ()))
# No arithmetic: takes any dtype.
WEAVE = Foreign("weave", _weave, ((3,), (3,)))
FOREIGN = (COMBINE, RANKS, SEVERAL, DISCRETE, SCALARS, WEAVE)
