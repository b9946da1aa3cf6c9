"""A PyTorch module on the CPU, differentiated by torch.func, against the same network in JAX."""

import copy
import functools
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import assert_close
from jax.test_util import check_grads

import batchrules

with warnings.catch_warnings():
    # PyTorch warns of what is old in its own modules while it is imported.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'batchrules[torch]'")

pytestmark = [
    # It also looks for graphics cards, and uses what it calls deprecated itself.
    pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning"),
]

INPUTS, HIDDEN, OUTPUTS = 3, 4, 2
MODULE = torch.nn.Sequential(
    torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)
).double()
SHAPES = {name: tuple(parameter.shape) for name, parameter in MODULE.named_parameters()}
RESULT = jax.ShapeDtypeStruct((OUTPUTS,), "float64")

RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in SHAPES.items()}
MANY_PARAMS = {name: jnp.stack([value, value + 0.5]) for name, value in PARAMS.items()}
XS = jnp.asarray(RNG.normal(size=(4, INPUTS)))
X = XS[0]


class OwnModule(threading.local):
    """A module for each thread: functional_call puts the parameters into the module while it runs."""

    def __init__(self):
        self.module = copy.deepcopy(MODULE)


OWN = OwnModule()


def network(params, x):
    """One row through the module."""
    return torch.func.functional_call(OWN.module, params, (x,))


def as_torch(tree):
    """Copies, since PyTorch has no tensors that are read-only."""
    return jax.tree.map(torch.tensor, tree)


def as_numpy(tree):
    return jax.tree.map(lambda tensor: tensor.detach().numpy(), tree)


def zeros_for_none(args, tangents):
    return jax.tree.map(lambda x, t: np.zeros_like(x) if t is None else t, args, tangents)


def call(params, x):
    return as_numpy(network(*as_torch((params, x))))


def jvp(args, tangents):
    return as_numpy(torch.func.jvp(network, as_torch(args), as_torch(zeros_for_none(args, tangents)))[1])


def vjp(args, cotangents, needed):
    bars = as_numpy(torch.func.vjp(network, *as_torch(args))[1](torch.tensor(cotangents)))
    return jax.tree.map(lambda is_needed, bar: bar if is_needed else None, needed, bars)


def of_many(function):
    """By torch.func.vmap where the arguments lead with a batch, all alike."""

    def one_or_many(params, *args):
        return (torch.func.vmap(function) if params["0.bias"].ndim == 2 else function)(params, *args)

    return one_or_many


def call_many(params, x):
    return as_numpy(of_many(network)(*as_torch((params, x))))


def jvp_many(args, tangents):
    def along(params, x, dparams, dx):
        return torch.func.jvp(network, (params, x), (dparams, dx))[1]

    return as_numpy(of_many(along)(*as_torch((*args, *zeros_for_none(args, tangents)))))


def vjp_many(args, cotangents, needed):
    def across(params, x, y_bar):
        return torch.func.vjp(network, params, x)[1](y_bar)

    bars = as_numpy(of_many(across)(*as_torch((*args, cotangents))))
    return jax.tree.map(lambda is_needed, bar: bar if is_needed else None, needed, bars)


FORMS = {
    "one": functools.partial(batchrules.host_call, call, RESULT, jvp=jvp, vjp=vjp),
    "many": functools.partial(
        batchrules.host_call, call_many, RESULT, jvp=jvp_many, vjp=vjp_many, method="broadcast_all"
    ),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def twin(params, x):
    hidden = jnp.tanh(params["0.weight"] @ x + params["0.bias"])
    return params["2.weight"] @ hidden + params["2.bias"]


def loss(f):
    return lambda params, x: jnp.sum(f(params, x) ** 2)


def nest(f):
    return jax.vmap(jax.vmap(f, (None, 0)), (0, None))


PROGRAMS = {
    "call": lambda f: f(PARAMS, X),
    "vmap": lambda f: jax.vmap(f, (None, 0))(PARAMS, XS),
    "nested vmaps": lambda f: nest(f)(MANY_PARAMS, XS),
    "jvp": lambda f: jax.jvp(f, (PARAMS, X), (PARAMS, XS[1])),
    "jvp in x": lambda f: jax.jvp(lambda x: f(PARAMS, x), (X,), (XS[1],)),
    "jacfwd": lambda f: jax.jacfwd(f, 1)(PARAMS, X),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(PARAMS, X),
    "value_and_grad": lambda f: jax.value_and_grad(loss(f))(PARAMS, X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(loss(f), (0, 1)), (None, 0))(PARAMS, XS),
    "grad of vmap": lambda f: jax.grad(loss(jax.vmap(f, (None, 0))))(PARAMS, XS),
    "grad of nested vmaps": lambda f: jax.grad(loss(nest(f)), (0, 1))(MANY_PARAMS, XS),
    "vmap of jacrev": lambda f: jax.vmap(jax.jacrev(f, 1), (None, 0))(PARAMS, XS),
    "one of the parameters": lambda f: jax.grad(lambda bias: loss(f)({**PARAMS, "0.bias": bias}, X))(PARAMS["0.bias"]),
    "mixed with JAX": lambda f: jax.grad(lambda params: jnp.sum(jnp.sin(f(params, jnp.cos(f(params, X)[:1] * X)))))(
        PARAMS
    ),
}


@every_form
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_against_the_twin(name, jit, form):
    program = PROGRAMS[name]
    result = jax.jit(lambda: program(form()))() if jit else program(form())
    assert_close(result, program(twin), 1e-10, 1e-10)


@every_form
def test_check_grads(form):
    check_grads(form(), (PARAMS, X), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_a_batch_is_one_call():
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return call_many(params, x)

    f = batchrules.host_call(counted, RESULT, vjp=vjp_many, method="broadcast_all", verify=False)
    jax.block_until_ready(jax.jit(lambda: PROGRAMS["nested vmaps"](f))())
    assert calls == [(2 * len(XS), INPUTS)]


@pytest.mark.parametrize("name", ["vmap", "vmap of grad", "grad of nested vmaps"])
def test_threads(name):
    f = batchrules.host_call(call, RESULT, vjp=vjp, executor=3)
    assert_close(jax.jit(lambda: PROGRAMS[name](f))(), PROGRAMS[name](twin), 1e-10, 1e-10)
