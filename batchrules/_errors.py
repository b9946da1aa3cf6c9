"""The errors that batchrules raises under names of its own."""

from __future__ import annotations


class BatchContractError(ValueError):
    """Foreign code was given a batch and did not return one.

    A vectorised method promises that every output leads with the size of the batch. This error names the function,
    the output, the shape that was expected and the one that came.
    """


class ResultError(ValueError):
    """A foreign function returned something other than its `result_shape` promised.

    Wrong structure, wrong number of outputs, wrong shape or wrong dtype.
    """


class ReadOnlyArgumentError(ValueError):
    """A host function wrote into one of its arguments, which JAX shares with the rest of the program."""


class JaxInsideHostFunctionError(RuntimeError):
    """A host function used JAX, which can deadlock the program that called it.

    `allow_jax=True` lifts the check for functions that need it.
    """


class ExportError(ValueError):
    """A program that calls a Python function was to be exported, which cannot be done."""


class DerivativeError(TypeError):
    """A derivative was asked for that the foreign function does not have."""


class MissingEndpointError(DerivativeError, NotImplementedError):
    """A derivative was asked for that the foreign function has no endpoint for."""


class NotDifferentiableError(DerivativeError, ValueError):
    """A derivative was asked for in an argument, or of an output, that is declared non-differentiable."""


class ForeignCallError(RuntimeError):
    """Foreign code failed inside a compiled program.

    Names the function, the endpoint, the element, the shapes of its arguments, and the original error, which is its
    `__cause__`. Outside compiled programs the original error is raised, with this text as a note.
    """


class BatchContractWarning(UserWarning):
    """Foreign code did not return a batch under `method="auto"`; it is called one element at a time from now on."""


class FailedElementsWarning(UserWarning):
    """Elements of a batch failed, and are NaN because of `on_error="nan"`."""


class DispatchError(RuntimeError):
    """The executor failed, not the foreign code: a broken pool, one shut down too early, something it cannot pickle."""
