"""Settings and servers of the adapter's tests. Each Tesseract is served once, when first asked for."""

import contextlib

import jax
import pytest
from batchrules_tesseract import close_all
from fake import fake_tesseract
from tesseracts.serving import load, serve

STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}
for _name, _value in STRICT.items():
    jax.config.update(_name, _value)

# Few, because the machines that run this are small; two for each Tesseract that is called from many threads.
WORKERS = {"solver": 3}


@pytest.fixture
def fake():
    """A server that answers as the test tells it to."""
    with fake_tesseract() as server:
        yield server


@pytest.fixture(scope="session")
def servers():
    """`servers(name, without="")` is a served Tesseract; it is stopped at the end of the run."""
    with contextlib.ExitStack() as running:
        known = {}

        def served(name, without=""):
            key = (name, without)
            if key not in known:
                known[key] = running.enter_context(serve(name, workers=WORKERS.get(name, 1), without=without))
            known[key].forget()
            return known[key]

        yield served
        close_all()


@pytest.fixture
def recipe(servers):
    return servers("recipe")


@pytest.fixture
def solver(servers):
    return servers("solver")


@pytest.fixture
def nested(servers):
    return servers("nested")


@pytest.fixture
def faulty(servers):
    return servers("faulty")


@pytest.fixture
def doomed():
    """A Tesseract of its own for a test that leaves a worker hanging, or kills one."""
    with serve("faulty", workers=2) as served:
        yield served


@pytest.fixture
def fixed(servers):
    return servers("fixed")


@pytest.fixture(scope="session")
def local():
    """`local(name, without="")` is a Tesseract in this process."""
    from tesseract_core import Tesseract

    known = {}

    def loaded(name, without=""):
        if (name, without) not in known:
            known[name, without] = Tesseract.from_tesseract_api(load(name, without=without))
        return known[name, without]

    return loaded
