"""Every transformation of a served Tesseract gives what it gives for the same function in JAX."""

import jax
import pytest
from twins import COMPOSITIONS, NUMBERS, SS, XS, call, close, twin

from batchrules import BatchContractError

CONTRACT_ERRORS = ("BatchContractError", "TesseractBatchError")
METHODS = ("auto", "sequential", "expand_dims", "broadcast_all")


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_arrays_of_one_rank(recipe, composition, method):
    transform = COMPOSITIONS[composition]
    close(transform(call(recipe.url, vmap_method=method), XS, SS), transform(twin, XS, SS))


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_number_beside_a_vector(recipe, composition, method):
    transform = COMPOSITIONS[composition]
    failure = None
    try:
        got = transform(call(recipe.url, vmap_method=method), XS, NUMBERS)
    except (BatchContractError, jax.errors.JaxRuntimeError) as error:
        failure = error
    if failure is None:
        close(got, transform(twin, XS, NUMBERS))
    else:
        # A vectorised call lines the numbers up wrongly: explicit methods say so, and auto never does it.
        assert method in {"expand_dims", "broadcast_all"}
        assert isinstance(failure, BatchContractError) or any(name in str(failure) for name in CONTRACT_ERRORS)


def needs_forward_mode(composition):
    return any(word in composition for word in ("jvp", "jacfwd", "linearize"))


@pytest.mark.parametrize(
    ("composition", "without"),
    [
        (composition, without)
        for composition in COMPOSITIONS
        for without in ("jacobian", "jacobian,jacobian_vector_product", "vector_jacobian_product")
        if without != "jacobian,jacobian_vector_product" or not needs_forward_mode(composition)
    ],
)
def test_without_some_endpoints(servers, composition, without):
    transform = COMPOSITIONS[composition]
    served = servers("recipe", without)
    close(transform(call(served.url, vmap_method="auto"), XS, SS), transform(twin, XS, SS))


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("method", ["auto", "expand_dims"])
def test_in_this_process(local, composition, method):
    transform = COMPOSITIONS[composition]
    close(transform(call(local("recipe"), vmap_method=method), XS, SS), transform(twin, XS, SS))


@pytest.mark.parametrize("composition", ["vmap", "vmap grad", "jacrev", "vmap vmap"])
def test_through_tesseract_cores_own_client(recipe, composition):
    from tesseract_core import Tesseract

    transform = COMPOSITIONS[composition]
    tesseract = Tesseract.from_url(recipe.url, timeout=60.0)
    close(transform(call(tesseract, vmap_method="auto"), XS, SS), transform(twin, XS, SS))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("composition", ["vmap", "vmap vmap", "vmap grad", "grad vmap"])
def test_in_chunks(recipe, composition, batch_size):
    transform = COMPOSITIONS[composition]
    function = call(recipe.url, vmap_method="auto", batch_size=batch_size)
    close(transform(function, XS, SS), transform(twin, XS, SS))


@pytest.mark.parametrize("composition", ["vmap", "jit vmap", "vmap grad", "vmap vmap"])
def test_from_threads(recipe, composition):
    transform = COMPOSITIONS[composition]
    function = call(recipe.url, vmap_method="sequential", executor=4, max_in_flight=3)
    close(transform(function, XS, SS), transform(twin, XS, SS))
