"""The call site of a device call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchrules._device_body import DeviceBody
from batchrules._sites import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class DeviceSite(Site):
    """A call site of a device call.

    Attributes:
        axis_names: The named axes that the body has collectives over.
    """

    body: DeviceBody
    axis_names: frozenset[Any] = frozenset()
