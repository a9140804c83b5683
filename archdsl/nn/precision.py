"""The data types of a pass under autocast."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The data type of products under autocast on a device; None where it is off."""
    kind = device.type
    # not torch.amp.is_autocast_available, which the compiler of torch 2.11 cannot read
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
