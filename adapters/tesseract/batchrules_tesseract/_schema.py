"""A Tesseract's schema as `batchrules.Schema`: every array of its inputs and outputs, differentiable or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchrules import ArraySpec, Schema
from batchrules_tesseract._document import Document, Place, is_array


@dataclass(frozen=True)
class TesseractSchema:
    """What a Tesseract says of its arrays.

    Paths are the Tesseract's own: `body.v`, `parts.[]` for the items of a list, `loads.{}` for those of a dict.

    Attributes:
        inputs: The arrays of the inputs.
        outputs: The arrays of the outputs.
    """

    inputs: Schema
    outputs: Schema


def tesseract_schema(openapi: Mapping[str, Any]) -> TesseractSchema:
    """Read every array out of a Tesseract's OpenAPI schema.

    Args:
        openapi: The schema, as `tesseract.openapi_schema` gives it.

    Returns:
        The arrays of the inputs and of the outputs, by path.

    Example:
        >>> from batchrules_tesseract import tesseract_schema
        >>> number = {"prefixItems": [{"minimum": 0}, {"enum": [1, 3]}]}
        >>> array = {"array_flags": ["DIFFERENTIABLE"], "properties": {"shape": number, "dtype": {}}}
        >>> fields = {"Apply_InputSchema": {"properties": {"x": array}}, "Apply_OutputSchema": {"properties": {}}}
        >>> print(tesseract_schema({"components": {"schemas": fields}}).inputs["x"])
        (*, 3)
    """
    document = Document(openapi)
    return TesseractSchema(Schema(dict(_arrays(document.inputs))), Schema(dict(_arrays(document.outputs))))


def _arrays(place: Place, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, ArraySpec]]:
    """Each array at or below a place; the first one where a union has several."""
    yield from ((path, spec) for spec in place.arrays[:1])
    for node in place.nodes:
        # A model may contain itself: each is looked into once on the way down.
        if is_array(node) or id(node) in above:
            continue
        for segment, inside in _inside(node):
            child = f"{path}.{segment}" if path else segment
            yield from _arrays(place.document.place(inside), child, (*above, id(node)))


def _inside(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from node.get("properties", {}).items()
    yield from ((f"[{i}]", item) for i, item in enumerate(node.get("prefixItems", ())))
    if isinstance(node.get("items"), Mapping):
        yield "[]", node["items"]
    if isinstance(node.get("additionalProperties"), Mapping):
        yield "{}", node["additionalProperties"]
