"""`_rules.run` (in JAX operations) and `_host_runner.Runner` (in NumPy) are two executors of one vocabulary.

For every recorded batch they make the same calls, with the same arrays, in the same order, and give the same result;
and that is what a plain loop over the elements gives.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import METHODS, Foreign, expected_calls, whole_numbers
from hypothesis import example, given
from hypothesis import strategies as st

import batchrules
from batchrules import ArraySpec, BatchContractError, Schema, _batch, _rules
from batchrules._batch import BatchAxis
from batchrules._host_runner import Runner
from batchrules._methods import MethodRequest
from batchrules._schema import as_signature

SHAPES = ((), (2,), (1,), (0,), (2, 3))


def general(shapes):
    """A foreign function of arguments of these shapes: an output for each argument alone, and one for all together."""
    ranks = [len(shape) for shape in shapes]

    def function(xp, *args):
        alone = [(position + 2) * arg + 1 for position, arg in enumerate(args)]
        sums = [
            xp.sum(arg, axis=tuple(range(arg.ndim - rank, arg.ndim))) for arg, rank in zip(args, ranks, strict=True)
        ]
        return (*alone, sum(weight * total for weight, total in zip((1, 3, 7), sums, strict=False)))

    return Foreign("general", function, tuple(shapes))


@st.composite
def batches(draw):
    """The shapes of the arguments, and the recorded axes."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    patterns = [p for p in itertools.product([False, True], repeat=len(shapes)) if any(p)]
    axis = st.builds(BatchAxis, st.integers(0, 3), st.sampled_from(patterns))
    return shapes, tuple(draw(st.lists(axis, max_size=3)))


def arguments(shapes, axes):
    return [
        whole_numbers((*(axis.size for axis in _batch.argument_axes(axes, i)), *shape), i)
        for i, shape in enumerate(shapes)
    ]


def request_for(method, shapes):
    """What a user would have to say for `auto` to vectorise."""
    schema = Schema([ArraySpec() for _ in shapes]) if method == "auto" else None
    return MethodRequest(method, schema, where="general")


def in_numpy(foreign, request, axes, args, batch_size):
    """The outputs and the calls by the host runner."""
    calls = []

    def function(*arrays):
        calls.append(tuple(np.array(array) for array in arrays))
        return foreign(np, *arrays)

    call = batchrules.host_call(
        function, foreign.promise, method=request.method, schema=request.schema, signature=request.signature,
        batch_size=batch_size, verify=False,
    )  # fmt: skip
    (equation,) = jax.make_jaxpr(call)(*(np.zeros(shape) for shape in foreign.shapes)).eqns
    site = equation.params["site"]
    runner = Runner(site, axes, [arg.shape for arg in args])
    return runner(*args), calls, runner.choice


def in_jax(foreign, request, axes, args, batch_size):
    """The outputs and the calls by the JAX rule, its loops run in Python."""
    calls = []

    def call(leaves, size):
        del size
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            calls.append(tuple(np.asarray(leaf) for leaf in leaves))
        return list(foreign(jnp, *leaves))

    paths = [f"args.{i}" for i in range(len(args))]
    choice = _batch.choose_for(request, axes, paths, [arg.shape for arg in args])
    promised = foreign.promise(*(np.zeros(shape) for shape in foreign.shapes))
    plan = _rules.Plan(choice, batch_size, "general", promised)
    with jax.disable_jit():
        outputs = _rules.run(call, axes, [jnp.asarray(arg) for arg in args], plan)
    return [np.asarray(_rules.with_all_axes(output, axes)) for output in outputs], calls, choice


def by_a_loop(foreign, axes, args):
    """The outputs, element by element."""
    elements = [leaf.shape for leaf in foreign.promise(*(np.zeros(shape) for shape in foreign.shapes))]
    results = [np.empty((*_batch.sizes(axes), *shape)) for shape in elements]
    for index in np.ndindex(*_batch.sizes(axes)):
        places = [tuple(i for i, axis in zip(index, axes, strict=True) if axis.in_batched[a]) for a in range(len(args))]
        row = foreign(np, *(arg[(*place, ...)] for arg, place in zip(args, places, strict=True)))
        for result, value in zip(results, row, strict=True):
            result[index] = value
    return results


@given(batches(), st.sampled_from((*METHODS, "auto")), st.sampled_from([None, 1, 2, 3, 5, 100]))
@example(
    ([(), (2, 3), (2,)], (BatchAxis(2, (True, False, True)), BatchAxis(3, (False, True, False)))), "expand_dims", 4
)
@example(([(), ()], (BatchAxis(1, (True, False)),)), "expand_dims", 1)
def test_they_agree(batch, method, batch_size):
    shapes, axes = batch
    foreign, args = general(shapes), arguments(shapes, axes)
    # A host call has nothing to unroll; it makes the same calls.
    host_method = "sequential" if method == "sequential_unrolled" else method
    host, host_calls, host_choice = in_numpy(foreign, request_for(host_method, shapes), axes, args, batch_size)
    device, device_calls, device_choice = in_jax(foreign, request_for(method, shapes), axes, args, batch_size)
    assert host_choice.leads == device_choice.leads
    assert host_choice.vectorised == device_choice.vectorised
    for got, also, wanted in zip(host, device, by_a_loop(foreign, axes, args), strict=True):
        assert got.dtype == also.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(also, wanted)
    same_calls(host_calls, device_calls)
    wanted_calls = expected_calls(host_choice.method, _batch.count(axes), batch_size) if axes else 1
    assert len(host_calls) == wanted_calls


def same_calls(calls, others):
    assert [[array.shape for array in call] for call in calls] == [[array.shape for array in call] for call in others]
    for call, other in zip(calls, others, strict=True):
        for array, same in zip(call, other, strict=True):
            np.testing.assert_array_equal(array, same)


@dataclass(frozen=True)
class Broken(Foreign):
    """A foreign function that gives one output with a wrong lead, where it is given a batch."""

    broken: int
    lead: int

    def __call__(self, xp, *args):
        outputs = list(super().__call__(xp, *args))
        if any(arg.ndim > len(shape) for arg, shape in zip(args, self.shapes, strict=True)):
            outputs[self.broken] = xp.zeros((self.lead, *outputs[self.broken].shape[1:]))
        return tuple(outputs)


@given(batches(), st.sampled_from(["expand_dims", "broadcast_all", "legacy_vectorized"]), st.integers(0, 3), st.data())
def test_they_refuse_the_same(batch, method, batch_size, data):
    """A function that breaks its promise in one output breaks it for both, with the same error."""
    shapes, axes = batch
    broken, lead = data.draw(st.integers(0, len(shapes))), data.draw(st.sampled_from([0, 1, 2, 7]))
    foreign = Broken("general", general(shapes).function, tuple(shapes), broken, lead)
    args = arguments(shapes, axes)
    request = request_for(method, shapes)

    def outcome(executor):
        try:
            return [np.asarray(output) for output in executor(foreign, request, axes, args, batch_size or None)[0]]
        except BatchContractError as error:
            return error

    host, device = outcome(in_numpy), outcome(in_jax)
    assert isinstance(host, BatchContractError) == isinstance(device, BatchContractError), (host, device)
    if not isinstance(host, BatchContractError):
        for got, also in zip(host, device, strict=True):
            np.testing.assert_array_equal(got, also)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_signature_counts_as_a_proof_for_both(batch_size):
    shapes, axes = [(2,), ()], (BatchAxis(3, (True, False)),)
    request = MethodRequest("auto", None, as_signature("(i),()->(i),(),()", "general"), "general")
    foreign, args = general(shapes), arguments(shapes, axes)
    host, host_calls, choice = in_numpy(foreign, request, axes, args, batch_size)
    device, device_calls, _ = in_jax(foreign, request, axes, args, batch_size)
    assert choice.method == "expand_dims"
    same_calls(host_calls, device_calls)
    for got, also in zip(host, device, strict=True):
        np.testing.assert_array_equal(got, also)
