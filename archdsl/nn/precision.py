"""The data types of a pass under autocast."""

from __future__ import annotations

import torch
from torch.amp.autocast_mode import is_autocast_available


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The data type of products under autocast on a device; None where it is off."""
    kind = device.type
    if not is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
