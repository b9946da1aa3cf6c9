"""The options of apply_tesseract, its errors, and what it remembers."""

import copy
import gc
import multiprocessing
import pickle
import re
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchrules_tesseract import TesseractClient, TesseractServerError, apply_tesseract, close_all
from batchrules_tesseract._memory import Remembered, memory_of
from fake import GOOD, array_field, fake_tesseract, hang_up
from tesseracts.serving import HERE, load
from twins import NUMBERS, SS, XS, call, close, twin

from batchrules import BatchContractError

# --- vmap_method=None ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f)(XS, SS),
        lambda f: jax.jit(jax.vmap(f))(XS, SS),
        lambda f: jax.vmap(jax.jit(f), (0, None))(XS, SS[0]),
        lambda f: jax.vmap(jax.grad(lambda x, s: f(x, s).sum()))(XS, SS),
    ],
)
def test_vmap_without_a_method_is_an_error_that_names_the_choices(recipe, transform):
    with pytest.raises(NotImplementedError, match=r"'sequential'.*'expand_dims'.*'broadcast_all'.*'auto'"):
        transform(call(recipe.url))


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("without", ["", "jacobian"])
def test_jacobians_need_no_method(servers, mode, without):
    function = call(servers("recipe", without).url)
    close(mode(function)(XS[0], SS[0]), mode(twin)(XS[0], SS[0]))


@pytest.mark.parametrize("method", ["legacy_vectorized", "sequential_unrolled", "loop", 3])
def test_an_unknown_method(recipe, method):
    with pytest.raises(ValueError, match="'auto'"):
        call(recipe.url, vmap_method=method)(XS[0], SS[0])


# --- derivatives that there are not ------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad, lambda f: jax.jit(jax.grad(f))])
def test_an_input_without_derivative(recipe, transform):
    def f(offset):
        return apply_tesseract(recipe.url, {"x": XS[0], "s": SS[0], "offset": offset})["y"].sum()

    with pytest.raises(ValueError, match="offset"):
        transform(f)(XS[0])


def test_it_may_be_closed_over_or_stopped(recipe):
    def f(x, offset):
        inputs = {"x": x, "s": SS[0], "offset": jax.lax.stop_gradient(offset)}
        return apply_tesseract(recipe.url, inputs)["y"].sum()

    close(jax.grad(f, (0, 1))(XS[0], XS[1]), (jnp.cos(XS[0]) * SS[0], jnp.zeros(3)))


def test_an_output_without_derivative(fake):
    fake.schema = copy.deepcopy(fake.schema)
    fields = {"y": array_field(), "z": array_field(flags=())}
    fake.schema["components"]["schemas"]["Apply_OutputSchema"]["properties"] = fields
    fake.answers["/abstract_eval"]["z"] = {"shape": [2], "dtype": "float64"}
    fake.answers["/apply"]["z"] = GOOD
    fake.answers["/vector_jacobian_product"] = {"x": GOOD}
    with TesseractClient(fake.url) as client:
        x = jnp.ones(2)
        with pytest.raises(ValueError, match="z"):
            jax.grad(lambda x: apply_tesseract(client, {"x": x})["z"].sum())(x)
        close(jax.grad(lambda x: apply_tesseract(client, {"x": x})["y"].sum())(x), jnp.asarray([1.0, 2.0]))


@pytest.mark.parametrize("jit", [False, True])
def test_a_missing_endpoint_is_named(faulty, jit):
    f = jax.grad(lambda x: apply_tesseract(faulty.url, {"x": x})["y"])
    with pytest.raises(NotImplementedError, match=r"vjp|vector_jacobian_product"):
        (jax.jit(f) if jit else f)(1.0)


OTHER = "or a jacobian endpoint, which serves both modes"
LEFT_OUT = "or leave materialize_jacobian=False out: its jacobian endpoint serves both modes"
REVERSE = "Use reverse mode (jax.grad, jax.vjp, jax.jacrev), or give the Tesseract that endpoint,"
FORWARD = "Use forward mode (jax.jvp, jax.jacfwd), or give the Tesseract that endpoint,"
GIVE = (
    "Give the Tesseract a vector_jacobian_product endpoint (reverse mode), a jacobian_vector_product endpoint (forward "
    "mode),"
)
CONSTANT = (
    "Or differentiate with respect to other arguments (argnums), or keep its inputs constant with "
    "jax.lax.stop_gradient."
)
SECOND = "A Tesseract has no endpoint for second derivatives; take differences of its first ones."
NO_METHOD = "Pass vmap_method= to apply_tesseract, one of 'sequential', 'expand_dims', 'broadcast_all', 'auto'."

# Without which endpoints, and with which options, what ends how.
ADVICE = {
    "vmap": ("", {}, lambda f: jax.vmap(f)(XS), NO_METHOD),
    "jacfwd": (
        "jacobian,jacobian_vector_product",
        {},
        lambda f: jax.jacfwd(f)(XS[0]),
        f"needs one. The Tesseract has no jacobian_vector_product endpoint. {REVERSE} {OTHER}.",
    ),
    "jacfwd, by a jacobian that is left out": (
        "jacobian_vector_product",
        {"materialize_jacobian": False},
        lambda f: jax.jit(jax.jacfwd(f))(XS[0]),
        f"needs one. The Tesseract has no jacobian_vector_product endpoint. {REVERSE} {LEFT_OUT}.",
    ),
    "jacrev": (
        "jacobian,vector_jacobian_product",
        {},
        lambda f: jax.jit(jax.jacrev(f))(XS[0]),
        f"needs one. The Tesseract has no vector_jacobian_product endpoint. {FORWARD} {OTHER}.",
    ),
    "jacrev, by a jacobian that is left out": (
        "vector_jacobian_product",
        {"materialize_jacobian": False},
        lambda f: jax.jacrev(f)(XS[0]),
        f"needs one. The Tesseract has no vector_jacobian_product endpoint. {FORWARD} {LEFT_OUT}.",
    ),
    "no endpoint": (
        "jacobian,vector_jacobian_product,jacobian_vector_product",
        {},
        lambda f: jax.jacrev(f)(XS[0]),
        f"host function. {GIVE} {OTHER}. {CONSTANT}",
    ),
    "no endpoint but a jacobian that is left out": (
        "vector_jacobian_product,jacobian_vector_product",
        {"materialize_jacobian": False},
        lambda f: jax.jacfwd(f)(XS[0]),
        f"host function. {GIVE} {LEFT_OUT}. {CONSTANT}",
    ),
    "hessian": ("", {}, lambda f: jax.jit(jax.hessian(f))(XS[0]), f"needs one. {SECOND}"),
    "hessian by a jacobian": (
        "vector_jacobian_product,jacobian_vector_product",
        {},
        lambda f: jax.hessian(f)(XS[0]),
        f"needs its jvp. {SECOND}",
    ),
    "jacrev of jacrev": ("", {}, lambda f: jax.jacrev(jax.jacrev(f))(XS[0]), f"needs one. {SECOND}"),
}


@pytest.mark.parametrize(("without", "options", "program", "end"), ADVICE.values(), ids=ADVICE)
def test_errors_say_what_a_user_of_the_tesseract_can_do(local, without, options, program, end):
    function = call(local("recipe", without), **options)
    with pytest.raises(NotImplementedError) as info:
        program(lambda x: function(x, SS[0]))
    assert str(info.value).endswith(end)
    assert not re.search(r"\b(method|jvp|vjp|jacobian)=", str(info.value))


def test_a_broken_batch_says_so_too(recipe):
    numbers = jax.vmap(call(recipe.url, vmap_method="expand_dims"))
    with pytest.raises(BatchContractError, match=r"or pass vmap_method='sequential' to apply_tesseract\.") as info:
        numbers(XS[:3], NUMBERS[:3])
    assert str(info.value).endswith("A Tesseract with random results needs verify=False.")
    assert not re.search(r"\bmethod=", str(info.value))


def test_a_jacobian_that_is_insisted_on_and_missing(servers):
    function = call(servers("recipe", "jacobian").url, vmap_method="auto", materialize_jacobian=True)
    close(jax.grad(lambda x: function(x, SS[0]).sum())(XS[0]), jnp.cos(XS[0]) * SS[0])
    with pytest.raises(RuntimeError, match="no jacobian endpoint"):
        jax.jacrev(function)(XS[0], SS[0])


# --- static outputs --------------------------------------------------------------------------------------


@pytest.fixture
def drifting(fake):
    fake.answers["/abstract_eval"]["note"] = "traced"
    fake.answers["/apply"]["note"] = "run"
    with TesseractClient(fake.url) as client:
        yield lambda **options: apply_tesseract(client, {"x": jnp.ones(2)}, **options)


def test_a_static_output_that_differs_is_warned_of(drifting):
    with pytest.warns(UserWarning, match="'note' is 'run', but was 'traced'"):
        assert drifting()["note"] == "traced"


def test_the_warning_can_be_turned_off(drifting, monkeypatch):
    assert drifting(check_static_outputs=False)["note"] == "traced"
    monkeypatch.setenv("TESSERACT_JAX_CHECK_STATIC_OUTPUTS", "off")
    assert drifting()["note"] == "traced"
    with pytest.warns(UserWarning, match="'note'"):
        drifting(check_static_outputs=True)
    monkeypatch.setenv("TESSERACT_JAX_CHECK_STATIC_OUTPUTS", "maybe")
    with pytest.raises(ValueError, match="maybe"):
        drifting()


# --- shapes ----------------------------------------------------------------------------------------------


def test_64_bit_outputs_need_x64(recipe):
    with jax.enable_x64(False), pytest.raises(ValueError, match="x64"):
        call(recipe.url)(jnp.ones(3, "float32"), jnp.ones(3, "float32"))


@pytest.mark.parametrize("shapes", [3, "y", [jax.ShapeDtypeStruct((3,), "float64")]])
def test_result_shape_of_the_wrong_kind(recipe, shapes):
    with pytest.raises(TypeError, match="result_shape must be a dict"):
        call(recipe.url, result_shape=shapes)(XS[0], SS[0])


def test_outputs_of_fixed_rank_are_never_vectorised(fake):
    number = {"shape": {"maxItems": 0}, "dtype": {"examples": ["float64"]}}
    fake.schema = copy.deepcopy(fake.schema)
    fake.schema["components"]["schemas"]["Apply_OutputSchema"]["properties"] = {"y": array_field(number)}
    fake.answers["/abstract_eval"] = {"y": {"shape": [], "dtype": "float64"}}
    fake.answers["/apply"] = {"y": {**GOOD, "shape": [], "data": {"buffer": "AAAAAAAA8D8=", "encoding": "base64"}}}
    with TesseractClient(fake.url) as client:
        got = jax.vmap(lambda x: apply_tesseract(client, {"x": x}, vmap_method="auto")["y"])(XS)
    close(got, jnp.ones(4))
    assert fake.posts() == ["/abstract_eval", *["/apply"] * 4]


# --- failures in a batch ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::batchrules.BatchContractWarning")
def test_auto_finds_the_element_that_fails_a_batch(fake):
    def answer(handler):
        handler.server.fake.status = 500
        handler.reply(b"no convergence", 500)

    fake.answers["/apply"] = answer
    with TesseractClient(fake.url) as client, pytest.raises(TesseractServerError, match="no convergence") as caught:
        jax.vmap(lambda x: apply_tesseract(client, {"x": x}, vmap_method="auto")["y"])(XS[:, :2])
    assert "(0,)" in "\n".join(caught.value.__notes__)


def test_a_server_that_dies_names_the_element(fake):
    with TesseractClient(fake.url) as client:
        f = jax.vmap(lambda x: apply_tesseract(client, {"x": x}, vmap_method="sequential")["y"])
        f(XS[:, :2])
        fake.answers["/apply"] = hang_up
        with pytest.raises(ConnectionError, match=fake.url) as caught:
            f(XS[:, :2])
    assert "(0,)" in "\n".join(caught.value.__notes__)


# --- what may be given ---------------------------------------------------------------------------------


def test_a_list_of_urls_is_replicas(fake):
    with fake_tesseract() as other:
        f = jax.vmap(lambda x: apply_tesseract([fake.url, other.url], {"x": x}, vmap_method="sequential")["y"])
        f(XS[:, :2])
        assert len(fake.posts()) + len(other.posts()) == 5
        assert fake.posts()
        assert other.posts()
        close_all()


def test_a_tesseract_from_source():
    from tesseract_core import Tesseract

    with Tesseract.from_source(HERE / "solver.py", python_executable=sys.executable) as tesseract:
        f = jax.vmap(lambda x: apply_tesseract(tesseract, {"x": x}, vmap_method="sequential", executor=4)["y"])
        close(f(XS), XS**2 + 1.0)


def test_processes_make_the_calls(solver):
    with TesseractClient(solver.url) as client, process_pool() as pool:
        f = jax.vmap(lambda x: apply_tesseract(client, {"x": x}, vmap_method="sequential", executor=pool)["y"])
        close(f(XS), XS**2 + 1.0)


def process_pool():
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def test_methods_are_looked_up_at_each_call(local, monkeypatch):
    tesseract = local("recipe")
    f = jax.jit(call(tesseract))
    close(f(XS[0], SS[0]), twin(XS[0], SS[0]))
    monkeypatch.setattr(
        tesseract, "apply", lambda _: {"y": np.full(3, 7.0), "negative": np.zeros(3, bool)}, raising=False
    )
    close(f(XS[0], SS[0]), jnp.full(3, 7.0))


def test_in_process_calls_are_made_in_order_whatever_the_executor(local):
    function = call(local("recipe"), vmap_method="sequential", executor=4, max_in_flight=2)
    close(jax.vmap(function)(XS, NUMBERS), jax.vmap(twin)(XS, NUMBERS))


# --- memory ------------------------------------------------------------------------------------------------


def test_a_tesseract_is_not_kept_alive():
    from tesseract_core import Tesseract

    tesseract = Tesseract.from_tesseract_api(load("solver"))
    apply_tesseract(tesseract, {"x": jnp.ones(2)})
    reference = weakref.ref(tesseract)
    del tesseract
    gc.collect()
    assert reference() is None


def test_a_copy_remembers_nothing_of_the_original(fake):
    with TesseractClient(fake.url) as client:
        apply_tesseract(client, {"x": jnp.ones(2)})
        assert memory_of(client) is memory_of(client)
        for other in (copy.copy(client), pickle.loads(pickle.dumps(client))):  # noqa: S301  # its own pickle
            assert memory_of(other) is not memory_of(client)
            other.close()


def test_little_used_results_are_forgotten():
    remembered = Remembered()
    for key in range(1000):
        remembered.get(key, lambda key=key: key)
    assert remembered.get(999, lambda: "new") == 999
    assert remembered.get(0, lambda: "new") == "new"


def test_results_in_use_are_not_forgotten():
    remembered = Remembered()
    for key in range(1000):
        remembered.get(key, lambda key=key: key)
        assert remembered.get(0, lambda: "new") == 0


def test_equal_calls_compile_once(fake):
    with TesseractClient(fake.url) as client:
        traces = []

        @jax.jit
        def f(x):
            traces.append(1)
            return apply_tesseract(client, {"x": x})["y"]

        f(jnp.ones(2))
        f(jnp.zeros(2))
        assert len(traces) == 1
