"""`check_register`: honest rules pass, and one that forgets a shape, an axis or a layout is found."""

import jax
import jax.numpy as jnp
import pytest
from foreign import COMBINE, RANKS, Log, bound, opaque, whole_numbers
from primitives import single

import batchrules
from batchrules.testing import BatchDisagreement, check_register

VECTORISED = ("expand_dims", "broadcast_all", "legacy_vectorized")


@pytest.fixture
def made():
    """Makes primitives, and takes their rules away afterwards."""
    primitives = []

    def make(name, function):
        primitives.append(single(name, function))
        return primitives[-1]

    yield make
    for primitive in primitives:
        if batchrules.registered(primitive):
            batchrules.unregister(primitive)


def permuted(x, *, layout):
    return jnp.transpose(x, layout)


def reduced(x, *, axis):
    return x.sum(axis=axis)


def tiled(x, *, shape):
    return jnp.broadcast_to(x[..., None], shape)


def later(params, batch):
    """The layout of arrays with one dimension more."""
    return {"layout": (0, *(i + 1 for i in params["layout"]))}


def wrong_later(params, batch):
    """The new dimension comes last."""
    return {"layout": (*params["layout"], len(params["layout"]))}


SQUARE = whole_numbers((3, 3), 0)
HONEST = {
    "layout": (permuted, (SQUARE,), {"layout": (1, 0)}, later),
    "axis": (reduced, (SQUARE,), {"axis": 0}, lambda params, _: {"axis": params["axis"] + 1}),
    "shape": (tiled, (SQUARE[0],), {"shape": (3, 2)}, lambda p, batch: {"shape": (batch.batch_size, *p["shape"])}),
    "no parameters": (lambda x: 2 * x, (SQUARE,), {}, None),
}
FORGETFUL = {
    "no update_params for a layout": (permuted, (SQUARE,), {"layout": (1, 0)}, None),
    "the new dimension in another place": (permuted, (SQUARE,), {"layout": (1, 0)}, wrong_later),
    "a layout as it was": (permuted, (SQUARE,), {"layout": (1, 0)}, lambda *_: {"layout": (1, 0, 2)}),
    "an axis as it was": (reduced, (SQUARE,), {"axis": 0}, lambda params, _: params),
    "a shape as it was": (tiled, (SQUARE[0],), {"shape": (3, 3)}, lambda params, _: params),
    "the size of the axis": (
        tiled, (SQUARE[0],), {"shape": (3, 2)}, lambda p, batch: {"shape": (batch.axis_size, *p["shape"])},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "args", "params", "update"), HONEST.values(), ids=HONEST)
def test_honest(made, function, args, params, update):
    primitive = made("honest", function)
    batchrules.register(primitive, "expand_dims", update_params=update)
    before = batchrules.registered(primitive)
    report = check_register(primitive, *args, params=params, methods=["sequential", "expand_dims", "broadcast_all"])
    assert report.counts["vmap"] >= 10
    assert report.counts["batch_size=2"] == 3
    assert batchrules.registered(primitive) == before


@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
@pytest.mark.parametrize(("function", "args", "params", "update"), FORGETFUL.values(), ids=FORGETFUL)
def test_a_rule_that_forgets(made, function, args, params, update, method):
    primitive = made("forgetful", function)
    batchrules.register(primitive, method, update_params=update)
    with pytest.raises(BatchDisagreement) as caught:
        check_register(primitive, *args, params=params)
    hint = "there is no update_params that fits" if update is None else "look at what update_params makes of"
    assert all(hint in found.cause for found in caught.value.disagreements)
    assert str(params) in str(caught.value)
    assert batchrules.registered(primitive).method == method


def test_sequential_binds_need_no_update_params(made):
    primitive = made("forgetful", permuted)
    batchrules.register(primitive, "sequential", update_params=wrong_later)
    check_register(primitive, SQUARE, params={"layout": (1, 0)})


def test_a_primitive_that_depends_on_other_elements(made):
    primitive = made("normalised", lambda x: x / jnp.max(jnp.abs(x)))
    batchrules.register(primitive, "expand_dims")
    with pytest.raises(BatchDisagreement, match="depends on the other elements of the batch"):
        check_register(primitive, SQUARE)


@pytest.mark.parametrize("method", VECTORISED)
def test_several_operands(method):
    primitive = opaque(COMBINE, Log())
    batchrules.register(primitive, method)
    args = [whole_numbers(shape, i) for i, shape in enumerate(COMBINE.shapes)]
    report = check_register(primitive, *args, call=bound(COMBINE, primitive))
    assert any("Differentiation rule" in reason for reason in report.left_out)
    batchrules.unregister(primitive)


def test_operands_of_several_ranks():
    primitive = opaque(RANKS, Log())
    batchrules.register(primitive, "expand_dims")
    args = [whole_numbers(shape, i) for i, shape in enumerate(RANKS.shapes)]
    check_register(primitive, *args, call=bound(RANKS, primitive), in_axes=[(0, None, 0), (None, -1, None)])
    batchrules.unregister(primitive)


def test_a_call_that_is_jitted(made):
    """JAX keeps what it was batched by; the rule of each method is tried nevertheless."""
    primitive = made("normalised", lambda x: x / jnp.max(jnp.abs(x)))
    batchrules.register(primitive, "sequential")
    call = jax.jit(primitive.bind)
    check_register(primitive, SQUARE[0], call=call, endpoints=())
    with pytest.raises(BatchDisagreement, match="method 'expand_dims': the result of an element depends"):
        check_register(primitive, SQUARE[0], call=call, endpoints=(), methods=["sequential", "expand_dims"])
    check_register(primitive, SQUARE[0], call=call, endpoints=())


def test_a_method_that_is_a_parameter(made):
    primitive = made("double", lambda x, *, how: 2 * x)  # noqa: ARG005  # the rule reads it
    batchrules.register(primitive, lambda params: params["how"])
    assert check_register(primitive, SQUARE, params={"how": "broadcast_all"}).total > 0


def test_nothing_is_registered(made):
    primitive = made("double", lambda x: 2 * x)
    with pytest.raises(ValueError, match=r"check_register\(double\): nothing is registered for double"):
        check_register(primitive, SQUARE)


def test_params_and_call_exclude_each_other(made):
    primitive = made("double", lambda x: 2 * x)
    batchrules.register(primitive, "expand_dims")
    with pytest.raises(TypeError, match=r"params= is for primitive\.bind; call= takes its place"):
        check_register(primitive, SQUARE, params={}, call=primitive.bind)


def hijax_class():
    try:
        from jax.experimental import hijax
    except ImportError:
        return None
    return getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive", None)


@pytest.fixture
def scale():
    base = hijax_class()
    if base is None:
        pytest.skip(f"jax {jax.__version__} has no HiJAX primitive classes")

    class Scale(base):
        def __init__(self, x_type, factor):
            self.in_avals, self.out_aval = (x_type,), x_type
            self.params = {"factor": factor}
            super().__init__()

        def expand(self, x):
            return self.factor * x

    yield Scale
    if batchrules.registered(Scale):
        batchrules.unregister(Scale)


def test_a_hijax_class(scale):
    batchrules.register(scale, "broadcast_all", call=lambda self, x: scale(jax.typeof(x), self.factor)(x))
    report = check_register(scale, SQUARE, call=lambda x: scale(jax.typeof(x), 3.0)(x), endpoints=())
    assert report.counts["nested vmap"] > 0
    with pytest.raises(TypeError, match=r"check_register\(Scale\): a HiJAX class needs call="):
        check_register(scale, SQUARE)


def test_a_call_of_a_hijax_class_that_lies(scale):
    batchrules.register(
        scale, "broadcast_all", call=lambda self, x: scale(jax.typeof(x), self.factor)(x / jnp.max(jnp.abs(x)))
    )
    with pytest.raises(BatchDisagreement):
        check_register(scale, SQUARE, call=lambda x: scale(jax.typeof(x), 3.0)(x), endpoints=())
