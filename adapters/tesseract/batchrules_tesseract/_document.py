"""Reading a Tesseract's OpenAPI schema: what may stand at a place, and what every array looks like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchrules import ArraySpec

Node = Mapping[str, Any]

_SCALARS = frozenset({"number", "integer", "boolean", "string"})
_UNIONS = ("anyOf", "oneOf", "allOf")


class Document:
    """A Tesseract's schema.

    Args:
        openapi: Its OpenAPI schema.
    """

    def __init__(self, openapi: Node) -> None:
        self._schemas = openapi["components"]["schemas"]

    @property
    def inputs(self) -> Place:
        """Where the inputs stand."""
        return self.place(self._schemas["Apply_InputSchema"])

    @property
    def outputs(self) -> Place:
        """Where the outputs stand."""
        return self.place(self._schemas["Apply_OutputSchema"])

    def place(self, node: Any) -> Place:
        """A place where this may stand."""
        return Place(self, tuple(self._alternatives(node)))

    def _alternatives(self, node: Any) -> Iterator[Node]:
        if not isinstance(node, Mapping):
            yield {}
            return
        if "$ref" in node:
            yield from self._alternatives(self._schemas[node["$ref"].rpartition("/")[2]])
            return
        unions = [node[key] for key in _UNIONS if key in node]
        if not unions:
            yield node
        for union in unions:
            for option in union:
                yield from self._alternatives(option)


@dataclass(frozen=True)
class Place:
    """A place in the inputs or outputs, and all that may stand there.

    Attributes:
        document: The schema it belongs to.
        nodes: The alternatives, references resolved.
    """

    document: Document
    nodes: tuple[Node, ...]

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that may stand here."""
        return tuple(array_spec(node) for node in self.nodes if is_array(node))

    @property
    def anything(self) -> bool:
        """Whether the schema says nothing of what stands here."""
        return not self.nodes or any(_says_nothing(node) for node in self.nodes)

    @property
    def scalar(self) -> bool:
        """Whether a number, a bool or a string may stand here as itself."""
        return any(node.get("type") in _SCALARS or "enum" in node or "const" in node for node in self.nodes)

    @property
    def optional(self) -> bool:
        """Whether nothing may stand here."""
        return any(node.get("type") == "null" for node in self.nodes)

    @property
    def sequence(self) -> bool:
        """Whether a list may stand here."""
        return any(node.get("type") == "array" for node in self.nodes)

    @property
    def words(self) -> str:
        """What may stand here, for messages."""
        names = ("an array" if is_array(node) else _name(node) for node in self.nodes)
        return " or ".join(dict.fromkeys(names)) or "anything"

    def field(self, key: str) -> Step:
        """What may stand under a key, as the field of a model or as an item of a dict."""
        models = [node for node in self.nodes if key in node.get("properties", {}) and not is_array(node)]
        if models:
            found = [n for node in models for n in self.document.place(node["properties"][key]).nodes]
            return Step(key, Place(self.document, tuple(found)))
        open_dicts = [node["additionalProperties"] for node in self.nodes if node.get("additionalProperties")]
        found = [n for items in open_dicts for n in self.document.place(items).nodes]
        return Step(item_key(key) if open_dicts else key, Place(self.document, tuple(found)))

    def item(self, index: int) -> Step:
        """What may stand at an index of a list or a tuple."""
        found: list[Node] = []
        for node in self.nodes:
            if node.get("type") == "array":
                fixed = node.get("prefixItems", ())
                inside = fixed[index] if index < len(fixed) else node.get("items", {})
                found.extend(self.document.place(inside).nodes)
        return Step(f"[{index}]", Place(self.document, tuple(found)))


@dataclass(frozen=True)
class Step:
    """One step down: its part of the path, and where it leads."""

    segment: str
    place: Place


def item_key(key: str) -> str:
    """An item of a dict as a part of a path: `{key}`, with braces and backslashes inside it escaped."""
    return "{" + "".join(f"\\{c}" if c in "{}\\" else c for c in key) + "}"


def is_array(node: Node) -> bool:
    """Whether this describes an array."""
    kind = node.get("properties", {}).get("object_type", {})
    return "array_flags" in node or (isinstance(kind, Mapping) and kind.get("const") == "array")


def array_spec(node: Node) -> ArraySpec:
    """What the schema says of an array."""
    properties = node["properties"]
    return ArraySpec(
        shape=_shape(properties["shape"]),
        dtype=_dtype(properties["dtype"]),
        differentiable="DIFFERENTIABLE" in node.get("array_flags", ()),
    )


def _shape(node: Node) -> tuple[Any, ...]:
    if "prefixItems" in node:
        return tuple(_dimension(item) for item in node["prefixItems"])
    return () if node.get("maxItems") == 0 else (...,)


def _dimension(node: Node) -> int | None:
    if "const" in node:
        return int(node["const"])
    # A fixed size also takes a 1, which the Tesseract broadcasts.
    return max(node["enum"]) if "enum" in node else None


def _dtype(node: Node) -> str | None:
    example = node.get("examples", [None])[0]
    # A field of any dtype has an example as well, but lists dtypes that could not be cast to it.
    if example == "float64" and "complex128" in node.get("enum", ()):
        return None
    return example


def _says_nothing(node: Node) -> bool:
    return not {"type", "properties", "enum", "const", "items", "prefixItems", "additionalProperties"} & node.keys()


def _name(node: Node) -> str:
    if "enum" in node or "const" in node:
        return "one of " + ", ".join(map(repr, node.get("enum", [node.get("const")])))
    names = {"array": "a list", "object": "a dict", "null": "None", "number": "a number", "integer": "an int"}
    kind = node.get("type", "anything")
    return names.get(kind, f"a {kind}")
