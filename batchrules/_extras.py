"""Packages that only some features need."""

from __future__ import annotations

import importlib
from typing import Any


def imported(module: str, extra: str, what: str) -> Any:
    """A module of an optional package.

    Args:
        module: The module's full name.
        extra: The extra of this distribution that installs it.
        what: What messages call the feature that needs it.

    Raises:
        ImportError: The package is missing; says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        text = f"{what} needs the package {package}; pip install 'batchrules[{extra}]' installs it."
        raise ImportError(text) from None
