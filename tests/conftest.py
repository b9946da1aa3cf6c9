"""Settings and fixtures of the whole test-suite.

The settings turn into an error what JAX would let pass: a dtype promoted in silence, a rank lined up by
chance. They are made here, at import, because the number of devices is fixed as soon as JAX is first used.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Generator
from typing import ClassVar

import jax
import pytest
from hypothesis import HealthCheck, settings

NUM_DEVICES = 4
STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}
USERS_DEFAULTS = {name: getattr(jax.config, name) for name in STRICT}


def set_jax_options(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)


jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
set_jax_options(STRICT)

# No deadline, and no complaint about slow data: both depend on the machine, and a first call compiles.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples every time in CI, so that a commit is red for what it changed.
settings.register_profile("default", UNTIMED, max_examples=50, derandomize="CI" in os.environ)
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", UNTIMED, max_examples=1000, derandomize=False)
settings.load_profile("default")


class DoctestsAsUsersSeeThem:
    """Run the examples in docstrings under JAX's defaults: their output is what a user gets."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        if not isinstance(item, pytest.DoctestItem):
            return (yield)
        set_jax_options(USERS_DEFAULTS)
        try:
            return (yield)
        finally:
            set_jax_options(STRICT)


def pytest_configure(config: pytest.Config) -> None:
    # A plugin, because a conftest's own hooks see only the tests beside it, and doctests are in batchrules/.
    config.pluginmanager.register(DoctestsAsUsersSeeThem())


def make_mesh(axis_type: jax.sharding.AxisType) -> jax.sharding.Mesh:
    devices = jax.devices("cpu")[:NUM_DEVICES]
    return jax.make_mesh((NUM_DEVICES,), ("x",), axis_types=(axis_type,), devices=devices)


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs() -> Generator[None]:
    """Compiled programs, which JAX would keep for good: gigabytes of them by the end of the run."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def auto_mesh() -> jax.sharding.Mesh:
    """Four devices along the axis "x", whose shardings the compiler chooses."""
    return make_mesh(jax.sharding.AxisType.Auto)


@pytest.fixture(scope="session")
def explicit_mesh() -> jax.sharding.Mesh:
    """Four devices along the axis "x", whose shardings are part of each array's type."""
    return make_mesh(jax.sharding.AxisType.Explicit)


class CountingBar:
    """Stands in for tqdm's: counts, and draws nothing."""

    made: ClassVar[list] = []

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit, self.n, self.closed = total, desc, unit, 0, False
        CountingBar.made.append(self)

    def update(self) -> None:
        self.n += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def counting_bars(monkeypatch: pytest.MonkeyPatch) -> list[CountingBar]:
    """The bars that are made, with or without tqdm."""
    package, module = types.ModuleType("tqdm"), types.ModuleType("tqdm.auto")
    package.__spec__ = importlib.machinery.ModuleSpec("tqdm", None)
    monkeypatch.setattr(module, "tqdm", CountingBar, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", package)
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    monkeypatch.setattr(CountingBar, "made", [])
    return CountingBar.made
