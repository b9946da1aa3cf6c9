"""How many requests a program makes: the fewest that the Tesseract allows."""

import jax
import jax.numpy as jnp
import pytest
from batchrules_tesseract import TesseractClient, apply_tesseract
from twins import NUMBERS, SS, XS, call, total

VECTORISED = ("auto", "expand_dims", "broadcast_all")


@pytest.fixture
def fresh(recipe):
    """A client that remembers nothing of other tests."""
    with TesseractClient(recipe.url) as client:
        yield client


def counted(recipe, function, *args):
    """The calls of the second run: the first one also asks for shapes, and checks vectorised calls."""
    jax.block_until_ready(function(*args))
    recipe.forget()
    jax.block_until_ready(function(*args))
    return dict(recipe.calls())


def test_a_first_eager_call_asks_for_shapes_once(recipe, fresh):
    for _ in range(3):
        call(fresh)(XS[0], SS[0])
    assert recipe.calls() == {"abstract_eval": 1, "apply": 3}


def test_each_shape_is_asked_for_once(recipe, fresh):
    for size in (1, 2, 1, 2):
        call(fresh)(jnp.ones(size), jnp.ones(size))
    assert recipe.calls()["abstract_eval"] == 2


def test_a_trace_asks_for_shapes_once(recipe, fresh):
    f = jax.jit(jax.vmap(call(fresh, vmap_method="sequential")))
    for _ in range(2):
        jax.block_until_ready(f(XS, SS))
    assert recipe.calls() == {"abstract_eval": 1, "apply": 8}


def test_other_static_values_are_other_shapes(solver):
    with TesseractClient(solver.url) as client:
        for delay in (0.0, 0.001, 0.0):
            apply_tesseract(client, {"x": jnp.ones(3), "delay": delay})
    assert solver.calls() == {"abstract_eval": 2, "apply": 3}


@pytest.mark.parametrize("method", VECTORISED)
@pytest.mark.parametrize("jit", [False, True])
def test_a_batch_is_one_request(recipe, fresh, method, jit):
    f = jax.vmap(call(fresh, vmap_method=method))
    assert counted(recipe, jax.jit(f) if jit else f, XS, SS) == {"apply": 1}


@pytest.mark.parametrize("method", VECTORISED)
def test_nested_vmaps_are_one_request(recipe, fresh, method):
    f = jax.vmap(jax.vmap(call(fresh, vmap_method=method), (0, None)), (None, 0))
    assert counted(recipe, f, XS, SS) == {"apply": 1}
    assert recipe.lines()[0].startswith("apply (16,3)")


def test_sequential_is_one_request_for_each_element(recipe, fresh):
    assert counted(recipe, jax.vmap(call(fresh, vmap_method="sequential")), XS, SS) == {"apply": 4}


def test_auto_is_sequential_where_a_number_would_not_line_up(recipe, fresh):
    assert counted(recipe, jax.vmap(call(fresh, vmap_method="auto")), XS, NUMBERS) == {"apply": 4}


def test_an_unmapped_number_does_not_hinder_auto(recipe, fresh):
    f = jax.vmap(call(fresh, vmap_method="auto"), (0, None))
    assert counted(recipe, f, XS, NUMBERS[0]) == {"apply": 1}


def test_chunks(recipe, fresh):
    f = jax.vmap(call(fresh, vmap_method="auto", batch_size=3))
    assert counted(recipe, f, XS, SS) == {"apply": 2}


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_a_jacobian_is_one_request_with_the_endpoint(recipe, fresh, mode):
    counts = counted(recipe, mode(call(fresh, vmap_method="auto")), XS[0], SS[0])
    assert counts == {"apply": 1, "jacobian": 1}


@pytest.mark.parametrize(
    ("mode", "endpoint"), [(jax.jacfwd, "jacobian_vector_product"), (jax.jacrev, "vector_jacobian_product")]
)
def test_a_jacobian_is_one_request_without_the_endpoint(recipe, fresh, mode, endpoint):
    function = call(fresh, vmap_method="auto", materialize_jacobian=False)
    assert counted(recipe, mode(function), XS[0], SS[0]) == {"apply": 1, endpoint: 1}


def test_a_batch_of_gradients_is_one_request(recipe, fresh):
    f = jax.vmap(jax.grad(total(call(fresh, vmap_method="auto")), (0, 1)))
    assert counted(recipe, f, XS, SS) == {"apply": 1, "vector_jacobian_product": 1}


def test_a_gradient_whose_value_is_not_used_makes_no_call_for_it(recipe, fresh):
    f = jax.jit(jax.grad(lambda x, s: call(fresh)(x, s).sum()))
    assert counted(recipe, f, XS[0], SS[0]) == {"vector_jacobian_product": 1}


def test_two_equal_calls_of_a_program_are_one(recipe, fresh):
    f = call(fresh)
    assert counted(recipe, jax.jit(lambda x, s: f(x, s) + f(x, s)), XS[0], SS[0]) == {"apply": 1}


def test_an_empty_batch_makes_no_request(recipe, fresh):
    f = jax.vmap(call(fresh, vmap_method="auto"))
    assert f(XS[:0], SS[:0]).shape == (0, 3)
    assert recipe.calls() == {"abstract_eval": 1}
