"""The vocabulary of batching: the methods, what each gives a call, and how `auto` chooses."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batchrules._schema import ArraySpec, Schema, Signature

SEQUENTIAL = ("sequential", "sequential_unrolled")
VECTORISED = ("expand_dims", "broadcast_all", "legacy_vectorized")
METHODS = (*SEQUENTIAL, *VECTORISED, "auto")
HOST_METHODS = tuple(method for method in METHODS if method != "sequential_unrolled")


class Lead(enum.Enum):
    """What an argument of a vectorised call leads with."""

    BATCH = "the size of the batch"
    ONE = "1"
    NOTHING = "nothing: it comes as it is"


_UNMAPPED_LEAD = {"expand_dims": Lead.ONE, "broadcast_all": Lead.BATCH, "legacy_vectorized": Lead.NOTHING}


@dataclass(frozen=True)
class Argument:
    """One array argument, as a choice of method sees it. `shape` is the shape of one element.

    `follows` marks a tangent or a cotangent, whose lead follows from the others: no gate asks about it.
    """

    path: str
    shape: tuple[int, ...]
    mapped: bool
    follows: bool = False


@dataclass(frozen=True)
class Choice:
    """The method that a batch is executed with, and why.

    Attributes:
        method: The method's name; never `"auto"`.
        reason: Why, in words.
        leads: For a vectorised method, what each argument leads with.

    Example:
        >>> from batchrules import Choice
        >>> Choice("expand_dims", "asked for").vectorised
        True
    """

    method: str
    reason: str
    leads: tuple[Lead, ...] = ()

    @property
    def vectorised(self) -> bool:
        """Whether a call is given the whole batch."""
        return self.method in VECTORISED


@dataclass(frozen=True)
class MethodRequest:
    """What a user asked for: a method, and what `auto` may base its proof on.

    Attributes:
        method: A name out of `METHODS`; None refuses to be mapped.
        schema: What the foreign code takes, or None.
        signature: A gufunc signature, or None.
        where: The function or primitive, for messages.
        tied: Groups of argument positions that must lead alike; where one of a group is mapped, all are.
        batched: Argument positions that lead with the size of the batch even if they are unmapped.
        followers: How many of the last arguments are tangents or cotangents.
    """

    method: str | None
    schema: Schema | None = None
    signature: Signature | None = None
    where: str = "this call"
    tied: tuple[tuple[int, ...], ...] = ()
    batched: frozenset[int] = frozenset()
    followers: int = 0


def check_method(method: Any, where: str, allowed: Sequence[str] = METHODS) -> str:
    """Return the method if it is one; otherwise raise an error that lists those there are."""
    names = ", ".join(repr(name) for name in allowed)
    if method is None:
        raise ValueError(f"{where}: no method for jax.vmap was given (method=None). Choose one of {names}.")
    if not isinstance(method, str):
        raise TypeError(f"{where}: method must be one of {names}; got {method!r} of type {type(method).__name__}.")
    if method not in METHODS:
        raise ValueError(f"{where}: unknown method {method!r}. Choose one of {names}.")
    if method not in allowed:
        raise ValueError(
            f"{where}: method {method!r} unrolls a loop in the compiled program, which only registered primitives "
            f"and device calls have. A host call loops on the host: use 'sequential'. Choose one of {names}."
        )
    return method


def check_batch_size(batch_size: Any, where: str) -> int | None:
    """Return the batch size as an int, or None; raise for anything that is not a whole number from 1."""
    if batch_size is None:
        return None
    if not isinstance(batch_size, bool) and hasattr(batch_size, "__index__"):
        size = operator.index(batch_size)
        if size >= 1:
            return size
        raise ValueError(
            f"{where}: batch_size must be at least 1, or None for the whole batch in one call; got {batch_size!r}."
        )
    raise TypeError(
        f"{where}: batch_size must be an int of at least 1, or None for the whole batch in one call; "
        f"got {batch_size!r} of type {type(batch_size).__name__}."
    )


def choose(request: MethodRequest, arguments: Sequence[Argument]) -> Choice:
    """Settle the method for a batch, with the reason and what each argument leads with."""
    if request.method != "auto":
        return asked_for(request.method, as_if_mapped(request, [argument.mapped for argument in arguments]))
    mapped = as_if_mapped(request, [argument.mapped for argument in arguments])
    asked = [
        (argument, is_mapped) for argument, is_mapped in zip(arguments, mapped, strict=True) if not argument.follows
    ]
    obstacle = _obstacle(request, [argument for argument, _ in asked], [is_mapped for _, is_mapped in asked])
    if obstacle is not None:
        return Choice("sequential", f"auto is sequential: {obstacle}")
    return Choice("expand_dims", f"auto is expand_dims: {_proof(request)}", _auto_leads(arguments, mapped))


def asked_for(method: str | None, mapped: Sequence[bool]) -> Choice:
    """The choice where a method was named, or none."""
    if method is None:
        # The vmap rule has refused mapped arguments, so only tangents and cotangents are mapped.
        return Choice("sequential", "no method was given, and only tangents or cotangents are mapped")
    return Choice(method, f"method={method!r} was asked for", _leads(method, mapped))


def as_if_mapped(request: MethodRequest, mapped: Sequence[bool]) -> list[bool]:
    """Which arguments lead with the batch whatever the method: the mapped ones, and those that must follow them."""
    if not request.batched and not request.tied:
        return list(mapped)
    joined = [is_mapped or position in request.batched for position, is_mapped in enumerate(mapped)]
    for group in request.tied:
        together = any(joined[i] for i in group)
        for position in group:
            joined[position] = together
    return joined


def _leads(method: str, mapped: Sequence[bool]) -> tuple[Lead, ...]:
    if method in SEQUENTIAL:
        return ()
    unmapped = _UNMAPPED_LEAD[method]
    return tuple(Lead.BATCH if is_mapped else unmapped for is_mapped in mapped)


def _auto_leads(arguments: Sequence[Argument], mapped: Sequence[bool]) -> tuple[Lead, ...]:
    # An unmapped scalar lines up with everything as it is, and is what the function was written for.
    unmapped = [Lead.ONE if argument.shape else Lead.NOTHING for argument in arguments]
    return tuple(Lead.BATCH if is_mapped else lead for lead, is_mapped in zip(unmapped, mapped, strict=True))


def _proof(request: MethodRequest) -> str:
    if request.signature is not None:
        return f"the signature {request.signature.text!r} says that the function handles leading dimensions itself"
    return "the schema lets every argument take a leading dimension, and the element ranks agree"


def _obstacle(request: MethodRequest, arguments: Sequence[Argument], mapped: Sequence[bool]) -> str | None:
    """The first gate that is shut, in words; None if all are open."""
    if request.schema is None and request.signature is None:
        return "without a schema or a signature nothing proves that a call takes a leading dimension"
    shut = None if request.schema is None else _schema_obstacle(request.schema, arguments, mapped)
    return shut or _rank_obstacle(request, arguments, mapped)


def _schema_obstacle(schema: Schema, arguments: Sequence[Argument], mapped: Sequence[bool]) -> str | None:
    for argument, is_mapped in zip(arguments, mapped, strict=True):
        if not is_mapped and not argument.shape:
            continue
        kind = "mapped" if is_mapped else "unmapped"
        spec = schema.get(argument.path)
        if spec is None:
            return f"the schema does not describe the {kind} argument {argument.path!r}"
        if not _takes_a_lead(spec, argument.shape):
            return (
                f"the {kind} argument {argument.path!r} has shape {argument.shape} and takes {spec}, "
                "so the schema does not let it take a leading dimension"
            )
    return None


def _takes_a_lead(spec: ArraySpec, shape: tuple[int, ...]) -> bool:
    return spec.any_rank and spec.takes(shape)


def _rank_obstacle(request: MethodRequest, arguments: Sequence[Argument], mapped: Sequence[bool]) -> str | None:
    cores = _core_ranks(request, arguments)
    ranks = [
        (argument.path, len(argument.shape) - core)
        for argument, core, is_mapped in zip(arguments, cores, mapped, strict=True)
        if is_mapped or argument.shape
    ]
    if len({rank for _, rank in ranks}) <= 1:
        return None
    kind = "element ranks" if request.signature is None else "ranks left over by the signature"
    listed = ", ".join(f"{path!r} has {rank}" for path, rank in ranks)
    return f"the {kind} differ ({listed}), so a leading dimension would not line up under broadcasting"


def _core_ranks(request: MethodRequest, arguments: Sequence[Argument]) -> list[int]:
    if request.signature is None:
        return [0] * len(arguments)
    cores = [len(core) for core in request.signature.inputs]
    if len(cores) != len(arguments):
        paths = ", ".join(repr(argument.path) for argument in arguments)
        raise ValueError(
            f"{request.where}: the signature {request.signature.text!r} describes {len(cores)} array arguments, "
            f"but the call has {len(arguments)}: {paths}."
        )
    for argument, core in zip(arguments, cores, strict=True):
        if len(argument.shape) < core:
            raise ValueError(
                f"{request.where}: the signature {request.signature.text!r} gives {argument.path!r} {core} core "
                f"dimensions, but it has shape {argument.shape}."
            )
    return cores


def method_of(choose_name: Callable[[dict[str, Any]], str], params: dict[str, Any], where: str) -> str:
    """The method's name, where it is a function of a primitive's parameters."""
    return check_method(choose_name(_Params(params, where)), f"{where} (from method=callable(params))")


class _Params(dict[str, Any]):
    """A primitive's parameters, which say so when one is asked for that is not there."""

    def __init__(self, params: dict[str, Any], where: str) -> None:
        super().__init__(params)
        self._where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self._where}: method=callable(params) looked for the parameter {name!r}, which this call does not "
            f"have. Its parameters are {sorted(self)}."
        )
