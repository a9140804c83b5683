"""How fast a training computes: FLOPs per second, and their share of the device's peak (MFU).

MFU (model FLOPs utilization, Chowdhery et al. 2204.02311, section 4.1) counts the FLOPs that the
model needs, here those of the passes that ran, and not those that activation checkpointing repeats.
"""

from __future__ import annotations

import re

import torch

from archdsl.costs.receipt import train_flops
from archdsl.model.executed_flops import executed
from archdsl.model.language_model import LanguageModel

# FLOPs per second of matrix products in bfloat16, dense, as the makers state them: the data sheets
# of NVIDIA (B200, H200, H100, A100, L40S, L4, A10), the white papers of the GA102 and AD102
# (RTX 3090 and 4090, with float32 accumulation) and the data sheet of AMD (MI300X). A card is known
# by the words in its name; a line with more words stands first.
PEAKS = {
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("B200",): 2250e12,
    ("H200",): 989e12,
    ("H100",): 989e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
    ("A10",): 125e12,
    ("RTX", "4090"): 165e12,
    ("RTX", "3090"): 71e12,
    ("MI300X",): 1307e12,
}


def peak_flops(device: torch.device, bfloat16: bool) -> float | None:
    """Return the FLOPs per second that the device could reach; None if they are not known.

    They are known of some cards in bfloat16 alone.
    """
    if device.type != "cuda" or not bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak in bfloat16 of the card of that name; None if it is not known.

    >>> peak_of("NVIDIA H100 80GB HBM3") == 989e12
    True
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if "Laptop" in words:  # these are slower
        return None
    return next((peak for needed, peak in PEAKS.items() if words.issuperset(needed)), None)


def train_flops_per_token(model: LanguageModel, context: int) -> float:
    """Return the FLOPs per token of training, forward and backward, on sequences of ``context``.

    Routed steps count at the shares of tokens that their routers selected last. Where training
    draws the depth of loops, it is the mean over the depths, at the capacities.
    """
    spec = model.spec
    if spec.depth_law is None:
        spec = executed(model)
        if spec.training and spec.training.capacity:  # the shares above are those of now
            training = spec.training.model_copy(update={"capacity": None})
            spec = spec.model_copy(update={"training": training})
    return train_flops(spec, tokens=context) / context


class Throughput:
    """The figures of speed of one training. ``peak``: FLOPs per second of one device, if known."""

    def __init__(
        self, model: LanguageModel, context: int, peak: float | None, devices: int = 1
    ) -> None:
        self.model, self.context, self.peak, self.devices = model, context, peak, devices

    def figures(self, tokens_per_s: float) -> dict[str, float]:
        """Return ``flops_per_s`` and, if the peak is known, ``mfu``, a share of 1."""
        flops_per_s = tokens_per_s * train_flops_per_token(self.model, self.context)
        found = {"flops_per_s": float(f"{flops_per_s:.4g}")}
        if self.peak:
            found["mfu"] = round(flops_per_s / (self.peak * self.devices), 4)
        return found
