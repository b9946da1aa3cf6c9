"""The ten defects that were seen in tesseract-jax 0.5.1, each against a served Tesseract."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchrules_tesseract import TesseractClient, apply_tesseract
from twins import call, close, twin

from batchrules import BatchContractError

X = jnp.arange(9.0).reshape(3, 3)
S = jnp.asarray([1.0, 2.0, 3.0])
EXPLICIT = ("expand_dims", "broadcast_all")
RIGHT = ("auto", "auto_experimental", "sequential")


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
@pytest.mark.parametrize("method", [*RIGHT, *EXPLICIT])
def test_1_and_2_a_number_beside_a_vector_is_right_or_an_error(recipe, method, axes):
    args = X if axes[0] == 0 else X[1], S if axes[1] == 0 else S[1]
    function = jax.vmap(call(recipe.url, vmap_method=method), axes)
    try:
        got = function(*args)
    except BatchContractError:
        assert method in EXPLICIT
        return
    close(got, jax.vmap(twin, axes)(*args))


@pytest.mark.parametrize("method", [*RIGHT, *EXPLICIT])
def test_2_nested_vmaps_over_the_two(recipe, method):
    def nest(f):
        return jax.vmap(jax.vmap(f, (0, None)), (None, 0))(X, S)

    try:
        got = nest(call(recipe.url, vmap_method=method))
    except BatchContractError:
        assert method in EXPLICIT
        return
    close(got, nest(twin))


@pytest.mark.parametrize("method", RIGHT)
def test_3_an_unmapped_argument_of_fixed_rank(nested, method):
    def f(s):
        return apply_tesseract(nested.url, {"body": {"v": S, "s": s}}, vmap_method=method)["out"]["total"]

    close(jax.vmap(f)(S), 6.0 * S)


@pytest.mark.parametrize("method", EXPLICIT)
def test_3_an_explicit_method_says_which_input_takes_no_batch(nested, method):
    def f(s):
        return apply_tesseract(nested.url, {"body": {"v": S, "s": s}}, vmap_method=method)["out"]["total"]

    with pytest.raises(BatchContractError, match=r"body\.s"):
        jax.vmap(f)(S)


def test_4_arrays_without_derivatives_are_vectorised_too(recipe):
    def f(offset):
        return apply_tesseract(recipe.url, {"x": X[0], "s": S, "offset": offset}, vmap_method="auto")["y"]

    close(jax.vmap(f)(X), jax.vmap(lambda offset: twin(X[0], S) + offset)(X))
    recipe.forget()
    jax.block_until_ready(jax.vmap(f)(X))
    assert recipe.calls() == {"apply": 1}


@pytest.mark.parametrize("method", [*RIGHT, *EXPLICIT])
def test_5_gradients_in_an_unmapped_number(recipe, method):
    def gradients(f):
        return jax.vmap(jax.grad(lambda s, x: f(x, s).sum()), (None, 0))(S[1], X)

    try:
        got = gradients(call(recipe.url, vmap_method=method))
    except BatchContractError:
        assert method in EXPLICIT
        return
    close(got, gradients(twin))


@pytest.mark.parametrize("method", ["auto", *EXPLICIT])
@pytest.mark.parametrize("materialize", [None, False])
def test_6_batched_cotangents_are_one_request(servers, method, materialize):
    served = servers("recipe", "jacobian")
    function = call(served.url, vmap_method=method, materialize_jacobian=materialize)
    jax.jacrev(function)(X[0], S)
    served.forget()
    close(jax.jacrev(function)(X[0], S), jax.jacrev(twin)(X[0], S))
    assert served.calls() == {"apply": 1, "vector_jacobian_product": 1}


def test_7_python_numbers_in_optional_and_dict_fields(nested):
    got = apply_tesseract(nested.url, {"body": {"v": S, "s": 2.0}, "gain": 0.5, "loads": {"k": 1.5}})
    assert got["out"]["total"] == 7.5


def test_7_a_traced_value_for_an_int_is_a_readable_error(nested):
    with pytest.raises(TypeError, match=r"'body\.steps' is a traced value"):
        jax.jit(lambda n: apply_tesseract(nested.url, {"body": {"v": S, "steps": n}}))(1)


@pytest.mark.parametrize("jit", [False, True])
def test_8_a_failure_names_the_element(faulty, jit):
    f = jax.vmap(lambda x: apply_tesseract(faulty.url, {"x": x}, vmap_method="sequential")["y"])
    with pytest.raises((RuntimeError, jax.errors.JaxRuntimeError)) as caught:
        jax.block_until_ready((jax.jit(f) if jit else f)(jnp.asarray([1.0, 2.0, -1.0, 4.0])))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "(2,)" in text
    assert "status 500" in text
    assert faulty.url in text


@pytest.mark.filterwarnings("ignore::batchrules.FailedElementsWarning")
@pytest.mark.parametrize("executor", [None, 4])
def test_8_the_other_elements_are_not_lost(faulty, executor):
    def f(x):
        inputs = {"x": x}
        options = {"vmap_method": "sequential", "on_error": "nan", "executor": executor}
        return apply_tesseract(faulty.url, inputs, **options)["y"]

    got = jax.vmap(f)(jnp.asarray([1.0, 2.0, -1.0, 4.0]))
    np.testing.assert_array_equal(got, [2.0, 4.0, np.nan, 8.0])


@pytest.mark.parametrize("x", [-2.0, -3.0], ids=["hangs", "kills its worker"])
def test_9_a_hanging_or_dead_worker_is_an_error_within_the_timeout(doomed, x):
    started = time.monotonic()
    with TesseractClient(doomed.url, timeout=2.0) as client:
        f = jax.vmap(lambda x: apply_tesseract(client, {"x": x}, vmap_method="sequential")["y"])
        with pytest.raises(OSError, match=doomed.url) as caught:
            f(jnp.asarray([1.0, x]))
    assert "(1,)" in "\n".join(caught.value.__notes__)
    assert time.monotonic() - started < 15


def test_9_there_is_a_timeout_by_default():
    assert TesseractClient("localhost")._settings.timeout == 600.0  # noqa: SLF001  # options have no public name


def test_10_without_abstract_eval_the_user_says_the_shapes(servers):
    served = servers("recipe", "abstract_eval")
    shapes = {"y": jax.ShapeDtypeStruct((3,), "float64"), "negative": jax.ShapeDtypeStruct((3,), "bool")}
    function = call(served.url, vmap_method="auto", result_shape=shapes)
    close(jax.vmap(function)(X, X), jax.vmap(twin)(X, X))
    by_inputs = call(served.url, vmap_method="auto", result_shape=lambda inputs: {**shapes, "y": inputs["x"]})
    close(jax.jit(jax.grad(lambda x: by_inputs(x, S).sum()))(X[0]), jax.grad(lambda x: twin(x, S).sum())(X[0]))


def test_10_or_the_schema_does(fixed):
    weights = jnp.arange(6.0, dtype="float32").reshape(2, 3)
    got = apply_tesseract(fixed.url, {"x": S, "weights": weights})
    close(got, {"norm": jnp.linalg.norm(weights.astype("float64") @ S), "y": weights.astype("float64") @ S})


def test_10_or_an_error_says_what_to_do(servers):
    with pytest.raises(ValueError, match=r"'y'.*result_shape="):
        call(servers("recipe", "abstract_eval").url)(X[0], S)


def test_10_a_hessian_is_a_readable_error(recipe):
    with pytest.raises(TypeError, match=r"second|derivative"):
        jax.hessian(lambda x: call(recipe.url, vmap_method="auto")(x, S).sum())(X[0])
