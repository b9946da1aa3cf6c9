"""Batching rules for opaque code: make any foreign callable behave like a native JAX function.

* `host_call`: code that runs on the host, such as NumPy, SciPy, C through ctypes, HTTP or a subprocess.
* `device_call`: code that JAX traces, around an `ffi_call` or a Pallas, Triton or Warp kernel.
* `register`: a JAX primitive that exists already.
* `bmap`: `jax.vmap` in chunks.
* `finite_difference`: derivatives of a host function, out of more calls.
* `explain`, `record`, `progress`: see the calls before and while they are made.
* `batchrules.testing`: prove that a function or a rule is batched and differentiated right. Import it by itself.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from batchrules._errors import (
    BatchContractError,
    BatchContractWarning,
    DerivativeError,
    DispatchError,
    ExportError,
    FailedElementsWarning,
    ForeignCallError,
    JaxInsideHostFunctionError,
    MissingEndpointError,
    NotDifferentiableError,
    ReadOnlyArgumentError,
    ResultError,
)
from batchrules._failures import last_error, original_errors
from batchrules._host_call import HostCall, host_call
from batchrules._methods import Choice
from batchrules._schema import ArraySpec, Schema

if TYPE_CHECKING:
    from batchrules._bmap import bmap
    from batchrules._device_call import DeviceCall, device_call
    from batchrules._events import RecordedCall
    from batchrules._explain import explain
    from batchrules._explain_report import CallSite, Report
    from batchrules._ffi import ffi_update_params
    from batchrules._finite_difference import FiniteDifference, finite_difference
    from batchrules._progress import progress
    from batchrules._record import Recording, record
    from batchrules._record_report import Summary
    from batchrules._register import register, registered, unregister
    from batchrules._registration import BatchInfo, Registration

    __version__: str

# Loaded when first used, so that a program which uses one of them does not wait for all.
_LAZY = {
    "BatchInfo": "batchrules._registration",
    "CallSite": "batchrules._explain_report",
    "DeviceCall": "batchrules._device_call",
    "FiniteDifference": "batchrules._finite_difference",
    "RecordedCall": "batchrules._events",
    "Recording": "batchrules._record",
    "Registration": "batchrules._registration",
    "Report": "batchrules._explain_report",
    "Summary": "batchrules._record_report",
    "bmap": "batchrules._bmap",
    "device_call": "batchrules._device_call",
    "explain": "batchrules._explain",
    "ffi_update_params": "batchrules._ffi",
    "finite_difference": "batchrules._finite_difference",
    "progress": "batchrules._progress",
    "record": "batchrules._record",
    "register": "batchrules._register",
    "registered": "batchrules._register",
    "unregister": "batchrules._register",
}

__all__ = [
    "ArraySpec",
    "BatchContractError",
    "BatchContractWarning",
    "BatchInfo",
    "CallSite",
    "Choice",
    "DerivativeError",
    "DeviceCall",
    "DispatchError",
    "ExportError",
    "FailedElementsWarning",
    "FiniteDifference",
    "ForeignCallError",
    "HostCall",
    "JaxInsideHostFunctionError",
    "MissingEndpointError",
    "NotDifferentiableError",
    "ReadOnlyArgumentError",
    "RecordedCall",
    "Recording",
    "Registration",
    "Report",
    "ResultError",
    "Schema",
    "Summary",
    "bmap",
    "device_call",
    "explain",
    "ffi_update_params",
    "finite_difference",
    "host_call",
    "last_error",
    "original_errors",
    "progress",
    "record",
    "register",
    "registered",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _import_module("importlib.metadata").version("batchrules")
    if name in _LAZY:
        return getattr(_import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'batchrules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
