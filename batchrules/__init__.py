"""Batching rules for opaque code: make any foreign callable behave like a native JAX function."""

from importlib.metadata import version as _version

from batchrules._device_call import DeviceCall, device_call
from batchrules._errors import (
    BatchContractError,
    DerivativeError,
    ExportError,
    JaxInsideHostFunctionError,
    ReadOnlyArgumentError,
    ResultError,
)
from batchrules._ffi import ffi_update_params
from batchrules._host_call import HostCall, host_call
from batchrules._methods import Choice
from batchrules._register import register, registered, unregister
from batchrules._registration import BatchInfo, Registration
from batchrules._schema import ArraySpec, Schema

__version__ = _version("batchrules")

__all__ = [
    "ArraySpec",
    "BatchContractError",
    "BatchInfo",
    "Choice",
    "DerivativeError",
    "DeviceCall",
    "ExportError",
    "HostCall",
    "JaxInsideHostFunctionError",
    "ReadOnlyArgumentError",
    "Registration",
    "ResultError",
    "Schema",
    "device_call",
    "ffi_update_params",
    "host_call",
    "register",
    "registered",
    "unregister",
]
