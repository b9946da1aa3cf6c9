"""What is remembered of a Tesseract, for as long as the Tesseract lives: its schema, shapes, and call sites."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from batchrules_tesseract._document import Document

_ATTRIBUTE = "_batchrules_memory"
_MOST = 256


class Remembered:
    """Results by key, the least recently used one forgotten first. Safe to use from many threads."""

    def __init__(self) -> None:
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result for a key, made if it is new. A failure is not remembered."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        made = make()
        with self._lock:
            result = self._results.setdefault(key, made)
            if len(self._results) > _MOST:
                self._results.popitem(last=False)
        return result


class Memory:
    """What is remembered of one Tesseract.

    It lives in the Tesseract's own attributes: call sites refer to the Tesseract, and anywhere else they would keep it
    alive. A copy of a Tesseract, or one that is served anew, starts with an empty memory.
    """

    def __init__(self, tesseract: Any, openapi: Mapping[str, Any]) -> None:
        self._owner = weakref.ref(tesseract)
        self._openapi = openapi
        self.document = Document(openapi)
        self.outputs = Remembered()
        self.calls = Remembered()

    def belongs_to(self, tesseract: Any, openapi: Mapping[str, Any]) -> bool:
        """Whether this is the memory of that very object, with that very schema."""
        return self._owner() is tesseract and self._openapi is openapi

    def __reduce__(self) -> Any:
        """A copy of a Tesseract, or a pickled one, remembers nothing."""
        return type(None), ()


def memory_of(tesseract: Any) -> Memory:
    """The memory of a Tesseract."""
    openapi = tesseract.openapi_schema
    attributes = getattr(tesseract, "__dict__", {})
    found = attributes.get(_ATTRIBUTE)
    if isinstance(found, Memory) and found.belongs_to(tesseract, openapi):
        return found
    made = Memory(tesseract, openapi)
    attributes[_ATTRIBUTE] = made
    return made
