"""An extension for the reference pages: our docstrings write `Example:`, and Griffe's section is named `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^(?P<indent> *)Example:$", re.MULTILINE)


class SingularExample(griffe.Extension):
    """Read `Example:` as the section that it is, and not as a note."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the heading in one docstring."""
        if obj.docstring:
            obj.docstring.value = HEADING.sub(r"\g<indent>Examples:", obj.docstring.value)
