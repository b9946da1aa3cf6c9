"""Fixtures of the tests of bmap."""

import importlib.machinery
import sys
import types
from typing import ClassVar

import pytest


class Bar:
    """Stands in for tqdm's: counts."""

    made: ClassVar[list] = []

    def __init__(self, total, desc, unit):
        self.total, self.desc, self.unit, self.n, self.closed = total, desc, unit, 0, False
        Bar.made.append(self)

    def update(self):
        self.n += 1

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """The bars that are made, none of which is drawn."""
    package, module = types.ModuleType("tqdm"), types.ModuleType("tqdm.auto")
    package.__spec__ = importlib.machinery.ModuleSpec("tqdm", None)
    module.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm", package)
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made
