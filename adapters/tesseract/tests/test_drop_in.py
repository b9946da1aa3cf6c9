"""The same program with tesseract-jax's function and with ours gives the same results, and errors of the same kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchrules_tesseract import apply_tesseract
from twins import SS, XS

theirs = pytest.importorskip(
    "tesseract_jax", reason="tesseract-jax needs Python 3.12; it is compared where it is installed"
)


@pytest.fixture
def tesseract(recipe):
    from tesseract_core import Tesseract

    return Tesseract.from_url(recipe.url, timeout=60.0)


def total(apply, tesseract, **options):
    return lambda x, s: apply(tesseract, {"x": x, "s": s}, **options)["y"].sum()


PROGRAMS = {
    "call": lambda apply, t: apply(t, {"x": XS[0], "s": SS[0]}),
    "numbers": lambda apply, t: apply(t, {"x": 1.0, "s": 2}),
    "jit": lambda apply, t: jax.jit(lambda x: apply(t, {"x": x, "s": SS[0]}))(XS[0]),
    "grad": lambda apply, t: jax.grad(total(apply, t), (0, 1))(XS[0], SS[0]),
    "jacrev": lambda apply, t: jax.jacrev(lambda x: apply(t, {"x": x, "s": SS[0]})["y"])(XS[0]),
    "jacfwd": lambda apply, t: jax.jacfwd(lambda x: apply(t, {"x": x, "s": SS[0]})["y"])(XS[0]),
    "vmap": lambda apply, t: jax.vmap(lambda x: apply(t, {"x": x, "s": SS[0]}, vmap_method="sequential"))(XS),
    "vmap expand_dims": lambda apply, t: jax.vmap(
        lambda x: apply(t, {"x": x, "s": SS[0]}, vmap_method="expand_dims")["y"]
    )(XS),
    "vmap auto_experimental": lambda apply, t: jax.vmap(
        lambda x: apply(t, {"x": x, "s": SS[0]}, vmap_method="auto_experimental")["y"]
    )(XS),
    "vmap grad": lambda apply, t: jax.vmap(jax.grad(total(apply, t, vmap_method="broadcast_all")))(XS, SS),
}

MISTAKES = {
    "a list": (TypeError, lambda apply, t: apply(t, {"x": [1.0], "s": SS[0]})),
    "a str": (TypeError, lambda apply, t: apply(t, {"x": "1", "s": SS[0]})),
    "no Tesseract": (TypeError, lambda apply, _: apply(3, {})),
    "an unknown method": (ValueError, lambda apply, t: apply(t, {"x": XS[0], "s": SS[0]}, vmap_method="loop")),
    "a missing field": (ValueError, lambda apply, t: apply(t, {"x": XS[0]})),
    "vmap without a method": (
        NotImplementedError,
        lambda apply, t: jax.vmap(lambda x: apply(t, {"x": x, "s": SS[0]}))(XS),
    ),
    "an input without derivative": (
        ValueError,
        lambda apply, t: jax.grad(lambda o: apply(t, {"x": XS[0], "s": SS[0], "offset": o})["y"].sum())(SS[1]),
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_results(tesseract, program):
    run = PROGRAMS[program]
    got, wanted = run(apply_tesseract, tesseract), run(theirs.apply_tesseract, tesseract)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(tesseract, mistake):
    kind, run = MISTAKES[mistake]
    for apply in (theirs.apply_tesseract, apply_tesseract):
        with pytest.raises(kind):
            run(apply, tesseract)


def test_a_result_without_arrays_is_a_dict_too(tesseract):
    assert set(apply_tesseract(tesseract, {"x": jnp.ones(1), "s": jnp.ones(1)})) == {"y", "negative"}
