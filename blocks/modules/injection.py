"""How the passes of a loop read the loop's input: injections with parameters.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAY = 5**-0.5  # of the state by one pass, before training


class DiagonalInjection(nn.Module):
    """A diagonal decay of the state, and a matrix that writes the loop's input to it.

    Prairie et al. 2604.12946 (Parcae), for the state h and the input e:

        h <- exp(-d * a) * h + d * (B e)        d = softplus(log_d) > 0, a = exp(log_a) > 0

    with one d and one a for each channel. The state can never grow by it, as its factor is between
    0 and 1. B starts as the identity, and a as 1. That d starts so that the factor is sqrt(1/5) was
    not checked against the paper. Like the paper's, its parameters have no weight decay.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_a_D = nn.Parameter(torch.empty(dim))
        self.log_d_D = nn.Parameter(torch.empty(dim))
        self.input_DD = nn.Parameter(torch.empty(dim, dim))

    def reset_parameters(self) -> None:
        """Sets the initial values; see the class."""
        nn.init.zeros_(self.log_a_D)
        nn.init.constant_(self.log_d_D, math.log(math.expm1(-math.log(DECAY))))
        nn.init.eye_(self.input_DD)

    def forward(self, x_BTD: Tensor, start_BTD: Tensor) -> Tensor:
        """The input of a pass [B, T, D] from the state and the loop's input."""
        d_D = F.softplus(self.log_d_D)
        factor_D = torch.exp(-(d_D * self.log_a_D.exp()))
        input_BTD = F.linear(start_BTD, self.input_DD)
        return factor_D.to(x_BTD.dtype) * x_BTD + d_D.to(x_BTD.dtype) * input_BTD


def make_injection(kind: str | None, dim: int) -> nn.Linear | DiagonalInjection | None:
    """The module of the injection ``linear`` or ``diagonal``; None for one without parameters.

    ``linear``: Geiping et al. 2502.05171 (Huginn), h <- A concat(h, e), a matrix [D, 2 D].
    """
    if kind == "linear":
        return nn.Linear(2 * dim, dim, bias=False)
    return DiagonalInjection(dim) if kind == "diagonal" else None


@torch.no_grad()
def reset_injection(module: nn.Module, state_only: bool) -> None:
    """Sets the initial values of what `make_injection` returned.

    ``state_only``: a linear injection starts as h, which is no injection; otherwise as h + e, for a
    loop whose state does not hold its input at first.
    """
    if isinstance(module, nn.Linear):
        D = module.out_features
        one_DD = torch.eye(D, device=module.weight.device)
        module.weight.copy_(torch.cat((one_DD, one_DD * (not state_only)), 1))
    elif isinstance(module, DiagonalInjection):
        module.reset_parameters()
