"""What a library that wraps a host call tells its users to do, in place of the options of `host_call`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import XS

import batchrules

SCALAR = jax.ShapeDtypeStruct((), "float64")
REMEDIES = {key: f"Do what helps with {key}." for key in ("method", "batch", "derivatives", "jvp", "vjp", "second")}
OWN_OPTIONS = ("method=", "jvp=", "vjp=", "jacobian=", "verify=", "finite_difference")


def cube(x):
    return x**3


def push(args, tangents):
    return 3 * args[0] ** 2 * tangents[0]


def pull(args, cotangents, needed):
    del needed
    return (3 * args[0] ** 2 * cotangents,)


def blocks(args, needed):
    del needed
    return (3 * args[0] ** 2,)


def make(fn=cube, **options):
    return batchrules.host_call(fn, SCALAR, name="cube", **options)


def error_of(program):
    with pytest.raises((ValueError, NotImplementedError)) as info:
        jax.block_until_ready(program())
    return info.value


def unit(x):
    return x / np.max(x)


X = jnp.float64(2.0)
NO_JVP = "forward-mode differentiation (jax.jvp, jax.jacfwd) needs one."
NO_VJP = "reverse-mode differentiation (jax.grad, jax.vjp, jax.jacrev) needs one."
MADE = "for first derivatives only, and this derivative of a derivative needs its"

# Which remedy, what program of a call, and what is said before.
CASES = {
    "vmap without a method": (
        "method",
        {"method": None},
        lambda f: jax.vmap(f)(XS[0]),
        "jax.vmap needs a method, and none was given.",
    ),
    "vmap of where without a method": (
        "method",
        {"method": None},
        lambda f: jax.vmap(f.where)(XS[0] > 0, XS[0]),
        "jax.vmap needs a method, and none was given.",
    ),
    "no batch": (
        "batch",
        {"fn": np.sum, "method": "expand_dims"},
        lambda f: jax.vmap(f)(XS[0]),
        "Every output must lead with the size of the batch, or with 1 if it depends on no mapped argument.",
    ),
    "a batch with mixed elements": (
        "batch",
        {"fn": unit, "method": "broadcast_all"},
        lambda f: jax.vmap(f)(jnp.arange(1.0, 5.0)),
        "from what that element gives on its own.",
    ),
    "no endpoint": (
        "derivatives",
        {},
        lambda f: jax.grad(f)(X),
        "host_call 'cube' cannot be differentiated: JAX cannot see inside a host function.",
    ),
    "no jvp": (
        "jvp",
        {"vjp": pull},
        lambda f: jax.jacfwd(f)(X),
        f"host_call 'cube' has a vjp but no jvp endpoint, and {NO_JVP}",
    ),
    "no jvp, under jit": (
        "jvp",
        {"vjp": pull},
        lambda f: jax.jit(jax.jacfwd(f))(X),
        f"host_call 'cube' has a vjp but no jvp endpoint, and {NO_JVP}",
    ),
    "no vjp": (
        "vjp",
        {"jvp": push},
        lambda f: jax.grad(f)(X),
        f"host_call 'cube' has a jvp but no vjp endpoint, and {NO_VJP}",
    ),
    "no vjp of a call inside where": (
        "vjp",
        {"jvp": push},
        lambda f: jax.grad(lambda x: f.where(x > 0, x))(X),
        f"host_call 'cube' has a jvp but no vjp endpoint, and {NO_VJP}",
    ),
    "a vjp without derivatives": (
        "second",
        {"vjp": pull},
        lambda f: jax.jit(jax.hessian(f))(X),
        f"host_call 'cube' (vjp) has no jvp endpoint, and {NO_JVP}",
    ),
    "a jvp without derivatives": (
        "second",
        {"jvp": push},
        lambda f: jax.jacfwd(jax.jacfwd(f))(X),
        f"host_call 'cube' (jvp) has no jvp endpoint, and {NO_JVP}",
    ),
    "second derivatives by a jacobian": (
        "second",
        {"jacobian": blocks},
        lambda f: jax.hessian(f)(X),
        f"host_call 'cube' (vjp) is made by the jacobian endpoint, {MADE} jvp.",
    ),
    "second derivatives by differences": (
        "second",
        batchrules.finite_difference(cube),
        lambda f: jax.jacrev(jax.jacrev(f))(X),
        f"host_call 'cube' (vjp) is made by finite differences, {MADE} vjp.",
    ),
}


@pytest.mark.parametrize(("key", "options", "program", "statement"), CASES.values(), ids=CASES)
def test_a_remedy_stands_in_place_of_the_advice(key, options, program, statement):
    usual = error_of(lambda: program(make(**options)))
    other = error_of(lambda: program(make(**options, remedies=REMEDIES)))
    said = str(other).removesuffix(f" {REMEDIES[key]}")
    assert type(other) is type(usual)
    assert said.endswith(statement)
    assert said != str(other)
    assert str(usual).startswith(f"{said} ")
    assert not any(option in str(other) for option in OWN_OPTIONS)
    assert any(option in str(usual) or "'sequential'" in str(usual) for option in OWN_OPTIONS)


@pytest.mark.parametrize(("key", "options", "program", "statement"), CASES.values(), ids=CASES)
def test_without_a_remedy_of_its_kind_an_error_is_as_usual(key, options, program, statement):
    del statement
    others = {name: text for name, text in REMEDIES.items() if name != key}
    usual = error_of(lambda: program(make(**options)))
    assert str(error_of(lambda: program(make(**options, remedies=others)))) == str(usual)


def test_the_warning_of_auto_has_the_remedy():
    function = make(unit, signature="()->()", remedies=REMEDIES)
    with pytest.warns(batchrules.BatchContractWarning) as caught:
        jax.vmap(function)(jnp.arange(1.0, 5.0))
    text = str(caught[0].message)
    assert f"{REMEDIES['batch']} As 'auto' was asked for, it is called one element at a time" in text
    assert not any(option in text for option in OWN_OPTIONS)


def test_a_first_derivative_that_there_is_not_is_what_is_missing_of_a_second():
    """Under jit the second may be all that is left of the program."""
    error = error_of(lambda: jax.jit(jax.jacfwd(jax.jacfwd(make(vjp=pull))))(X))
    assert str(error).startswith(f"host_call 'cube' has a vjp but no jvp endpoint, and {NO_JVP} Pass jvp=")
    error = error_of(lambda: jax.jit(jax.jacrev(jax.jacfwd(make(vjp=pull, remedies=REMEDIES))))(X))
    assert str(error) == f"host_call 'cube' has a vjp but no jvp endpoint, and {NO_JVP} {REMEDIES['jvp']}"


# --- the option -------------------------------------------------------------------------------------------

KEYS = "'method', 'batch', 'derivatives', 'jvp', 'vjp', 'second'"


@pytest.mark.parametrize("remedies", ["Use it.", ["method"], 3, {"jvp"}], ids=repr)
def test_remedies_that_are_no_mapping(remedies):
    with pytest.raises(TypeError, match=f"host_call 'cube': remedies must be a mapping from {KEYS}.*got .*of type"):
        make(remedies=remedies)


@pytest.mark.parametrize("text", [None, 3, ["Use it."], b"Use it."], ids=repr)
def test_a_remedy_that_is_no_text(text):
    with pytest.raises(TypeError, match=r"host_call 'cube': remedies\['vjp'\] must be a string.*got .*of type"):
        make(remedies={"jvp": "Use it.", "vjp": text})


@pytest.mark.parametrize("key", ["jacobian", "Method", 3, None], ids=repr)
def test_a_remedy_for_what_is_not_known(key):
    with pytest.raises(
        ValueError, match=f"host_call 'cube': remedies has the unknown key {key!r}. The keys are {KEYS}"
    ):
        make(remedies={key: "Use it."})


@pytest.mark.parametrize("remedies", [None, {}])
def test_no_remedies(remedies):
    assert str(error_of(lambda: jax.grad(make(remedies=remedies))(X))) == str(error_of(lambda: jax.grad(make())(X)))


def site_of(call):
    return jax.make_jaxpr(call)(X).eqns[0].params["site"]


def test_sites_with_equal_remedies_are_equal():
    turned = dict(reversed(REMEDIES.items()))
    call = make(remedies=REMEDIES)
    assert site_of(call) == site_of(make(remedies=turned))
    assert hash(site_of(call)) == hash(site_of(make(remedies=turned)))
    assert site_of(call) != site_of(make())
    assert site_of(call) != site_of(make(remedies={**REMEDIES, "jvp": "Do something else."}))


def test_a_mapping_that_changes_later_does_not_change_the_call():
    remedies = {"vjp": "Do what helps."}
    call = make(jvp=push, remedies=remedies)
    remedies["vjp"] = "Do something else."
    assert str(error_of(lambda: jax.grad(call)(X))).endswith("Do what helps.")


def test_a_decorator_and_replace_keep_them():
    @batchrules.host_call(result_shape=SCALAR, jvp=push, remedies=REMEDIES)
    def decorated(x):
        return x**3

    assert str(error_of(lambda: jax.grad(decorated)(X))).endswith(REMEDIES["vjp"])
    other = decorated.replace(method="sequential")
    assert str(error_of(lambda: jax.grad(other)(X))).endswith(REMEDIES["vjp"])
    assert "Pass vjp=" in str(error_of(lambda: jax.grad(decorated.replace(remedies=None))(X)))
