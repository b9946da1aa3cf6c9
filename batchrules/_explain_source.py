"""The user's line that an equation comes from."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import jax

_LIBRARY = Path(sysconfig.get_path("stdlib"))
# Whose lines are not the user's: those of JAX, of this package, and of what Python itself brings.
_NOT_THE_USERS = (
    *(f"{Path(str(module)).parent}{os.sep}" for module in (jax.__file__, __file__)),
    *(str(_LIBRARY / module) for module in ("functools", "contextlib")),
)
_ADAPTERS = "batchrules_"


def line_of(eqn: Any) -> str | None:
    """The innermost line of the user's, `"file.py:12 (function)"`; None if JAX does not know."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if _is_users(frame.file_name):
            function = frame.function_name.rpartition(".")[2]
            return f"{Path(frame.file_name).name}:{frame.line_num} ({function})"
    return None


def _is_users(file: str) -> bool:
    return not file.startswith(_NOT_THE_USERS) and not Path(file).parent.name.startswith(_ADAPTERS)
