"""Batching rules for opaque code: make any foreign callable behave like a native JAX function."""

from importlib.metadata import version as _version

from batchrules._errors import (
    BatchContractError,
    DerivativeError,
    ExportError,
    JaxInsideHostFunctionError,
    ReadOnlyArgumentError,
    ResultError,
)
from batchrules._host_call import HostCall, host_call
from batchrules._methods import Choice
from batchrules._schema import ArraySpec, Schema

__version__ = _version("batchrules")
