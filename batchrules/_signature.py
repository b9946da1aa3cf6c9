"""How a call's arguments divide into arrays and static values, and how they are put together again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core

from batchrules import _trees
from batchrules._schema import Schema
from batchrules._values import Static


@dataclass(frozen=True)
class CallStructure:
    """Everything of a call but its arrays. Compares by value.

    Attributes:
        tree: The structure of `(args, kwargs)` without the static arguments.
        static_positions: Positions and values of static positional arguments.
        static_keywords: Names and values of static keyword arguments.
    """

    tree: _trees.Structure
    static_positions: tuple[tuple[int, Static], ...] = ()
    static_keywords: tuple[tuple[str, Static], ...] = ()

    def assemble(self, leaves: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The positional and keyword arguments, with these arrays."""
        args, kwargs = _trees.unflatten(self.tree, leaves)
        if self.static_positions:
            args = list(args)
            for position, static in self.static_positions:
                args.insert(position, static.value)
        for name, static in self.static_keywords:
            kwargs[name] = static.value
        return args, kwargs

    @property
    def has_keyword_arrays(self) -> bool:
        """Whether any array is a keyword argument."""
        return bool(_trees.flatten(_trees.unflatten(self.tree, range(self.tree.count))[1])[0])

    def mirror(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The positional arguments with these leaves in place of the arrays, and None for static ones."""
        args = list(_trees.unflatten(self.tree, leaves)[0])
        for position, _ in self.static_positions:
            args.insert(position, None)
        return tuple(args)


@dataclass(frozen=True)
class Call:
    """One call: its structure, its leaves, and the path of each leaf."""

    structure: CallStructure
    leaves: list[Any]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class KeywordCall:
    """A function with its keyword arguments: the mapped ones, and those that are static."""

    fun: Callable[..., Any]
    mapped: dict[str, Any]
    static: dict[str, Any]


class Parameters:
    """The parameters of a function, as far as they are known, and which of them are static.

    Args:
        function: The function whose parameters they are.
        static_argnames: The names of parameters that are values of the program and not data.
        where: The function's name for messages.

    Raises:
        TypeError: `static_argnames` is not a string or a sequence of strings.
        ValueError: A name that is no parameter of the function.
    """

    def __init__(self, function: Callable[..., Any], static_argnames: str | Sequence[str], where: str) -> None:
        self._where = where
        self._signature = _signature(function)
        self._names = _positional_names(self._signature)
        self._static = frozenset(_checked_names(static_argnames, where))
        self._known = _keyword_names(self._signature)
        self._takes_more = _takes_more(self._signature)
        unknown = sorted(self._static - self._known) if self._known is not None else []
        if unknown:
            raise ValueError(
                f"{where}: static_argnames names {unknown}, but the parameters are {sorted(self._known or ())}."
            )

    def with_statics(self, fun: Callable[..., Any], kwargs: dict[str, Any]) -> KeywordCall:
        """The function with its keyword arguments, the static ones apart."""
        static = {name: value for name, value in kwargs.items() if name in self._static}
        mapped = {name: value for name, value in kwargs.items() if name not in self._static}
        return KeywordCall(fun, mapped, static)

    def check_schema(self, schema: Schema | None) -> None:
        """Raise for a path of a schema that no argument can have."""
        if schema is None or self._known is None:
            return
        known = self._known - self._static
        unknown = [path for path in schema if path.split(".")[0] not in known and not self._is_extra(path)]
        if unknown:
            raise ValueError(
                f"{self._where}: the schema has {unknown}, but the parameters are {sorted(known)}. A path starts with "
                "the name of a parameter: 'x', 'params.w'."
            )

    def named(self, schema: Any) -> Any:
        """A schema given as a sequence, one spec for each positional parameter, by their names."""
        if isinstance(schema, str | Mapping) or not isinstance(schema, Sequence):
            return schema
        return {self._name(i): spec for i, spec in enumerate(schema)}

    def _is_extra(self, path: str) -> bool:
        parts = path.split(".")
        return self._takes_more and parts[0] == "args" and len(parts) > 1 and parts[1].isdigit()

    def divide(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Divide a call's arguments into arrays and static values; what can be positional becomes so."""
        if self._signature is not None:
            args, kwargs = self._bound(self._signature, args, kwargs)
        if self._static:
            return self._divide_static(args, kwargs)
        return self._flatten(CallStructureParts(tuple(args), kwargs), self._argument_names(range(len(args))))

    def _bound(self, signature: inspect.Signature, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._where}{signature} was called with other arguments: {error}.") from error
        return bound.args, bound.kwargs

    def _divide_static(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        static = [i for i in range(len(args)) if self._name(i) in self._static]
        dynamic = [i for i in range(len(args)) if i not in static]
        static_keywords = tuple(sorted((name, value) for name, value in kwargs.items() if name in self._static))
        for name, value in (*((self._name(i), args[i]) for i in static), *static_keywords):
            _check_static(name, value, self._where)
        parts = CallStructureParts(
            tuple(args[i] for i in dynamic),
            {name: value for name, value in kwargs.items() if name not in self._static},
            tuple((i, Static(args[i])) for i in static),
            tuple((name, Static(value)) for name, value in static_keywords),
        )
        return self._flatten(parts, self._argument_names(dynamic))

    def _flatten(self, parts: CallStructureParts, names: list[str]) -> Call:
        leaves, tree = _trees.flatten((parts.args, parts.kwargs))
        structure = CallStructure(tree, parts.static_positions, parts.static_keywords)
        leaf_paths = tuple(_leaf_paths(parts, names))
        _trees.check_arguments(leaves, leaf_paths, self._where)
        return Call(structure, leaves, leaf_paths)

    def _argument_names(self, positions: Sequence[int]) -> list[str]:
        return [self._name(i) for i in positions]

    def _name(self, position: int) -> str:
        return self._names[position] if position < len(self._names) else f"args.{position}"


@dataclass(frozen=True)
class CallStructureParts:
    """A call's arguments, the static ones apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    static_positions: tuple[tuple[int, Static], ...] = ()
    static_keywords: tuple[tuple[str, Static], ...] = ()


def _leaf_paths(parts: CallStructureParts, names: list[str]) -> list[str]:
    named = [
        *zip(names, parts.args, strict=True),
        *((name, parts.kwargs[name]) for name in sorted(parts.kwargs)),
    ]
    return [f"{name}.{path}" if path else name for name, value in named for path in _trees.paths(value)]


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        # Functions written in C often tell nothing of their parameters; they are called by position then.
        return None


def _positional_names(signature: inspect.Signature | None) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.kind in kinds] if signature else []


def _keyword_names(signature: inspect.Signature | None) -> set[str] | None:
    """The names of all parameters; None if they are not known, or any keyword is taken."""
    if signature is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return None
    return {p.name for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL}


def _takes_more(signature: inspect.Signature | None) -> bool:
    """Whether more positional arguments are taken than there are names for."""
    kinds = [p.kind for p in signature.parameters.values()] if signature else []
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _checked_names(names: str | Sequence[str], where: str) -> tuple[str, ...]:
    listed = (names,) if isinstance(names, str) else names
    if not isinstance(listed, Iterable) or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{where}: static_argnames must be a string or a sequence of strings; got {names!r}.")
    return tuple(listed)


def _check_static(name: str, value: Any, where: str) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{where}: the static argument {name!r} is a traced value, {jax.typeof(value)}. A static argument must be "
            "known when the program is built: pass a Python value, or take the name out of static_argnames."
        )
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"{where}: the static argument {name!r} has the type {type(value).__name__}, which is not hashable. "
            "Static arguments are part of what a program is cached by: pass a tuple for a list, a frozenset for a "
            "set, or take the name out of static_argnames if it is data."
        ) from error
