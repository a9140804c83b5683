"""The optimizer of a training: AdamW for all parameters, or Muon for the matrices of the blocks.

What an optimizer keeps of a parameter between steps is called its moments here, also for Muon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from archdsl.model.language_model import LanguageModel
from archdsl.nn.devices import BFLOAT16
from archdsl.training.config import TrainConfig

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5

ADAMW_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal, for matrices (Jordan et al. 2024, "Muon: An
    optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon).

    For a matrix W with the gradient G, at each step::

        M = mu M + (1 - mu) G
        O = orthogonal((1 - mu) G + mu M)             Nesterov momentum
        W = W - lr weight_decay W - lr 0.2 sqrt(max(rows, columns)) O

    The factor 0.2 sqrt(max(rows, columns)) gives an update the size that AdamW's usually have, so
    that both can use one learning rate (Liu et al. 2502.16982, equation 4).

    `torch.optim.Muon` has the same formulas. It is not used here, because it always computes in
    bfloat16, which takes 15 to 30 times as long as float32 on most CPUs, and because it multiplies
    the shards of a distributed matrix with each other, which gives another result for another
    number of processes. Here each process makes the whole matrix orthogonal and keeps its shard.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = MOMENTUM
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every matrix that has a gradient. ``closure``: computes the gradients before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        momentum, lr, state = group["momentum"], group["lr"], self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = orthogonal(gradient.lerp(average, momentum))
        weight.mul_(1 - lr * group["weight_decay"])
        weight.add_(direction, alpha=-lr * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U V^T for a matrix with the singular value decomposition U S V^T.

    A distributed matrix is collected first; the result is distributed as it was.
    """
    if type(matrix) is Tensor:
        return _newton_schulz(matrix)
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

    assert isinstance(matrix, DTensor)
    whole = _newton_schulz(matrix.full_tensor())
    # without a source rank nothing is sent: every process takes its shard of what it computed
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)


def _newton_schulz(matrix: Tensor) -> Tensor:
    """Return the matrix after some steps of X = a X + (b X X^T + c (X X^T)^2) X.

    Its singular values are then between 0.7 and 1.2, unless they were nearly zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x.to(torch.bfloat16) if x.device.type in BFLOAT16 else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Optimizer:
    """AdamW, or AdamW and Muon, as one optimizer that knows its parameters by name.

    AdamW has weight decay for the matrices of the blocks and the head alone. Muon, if the config
    asks for it, trains the matrices of the blocks; AdamW trains the rest.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        muon = _for_muon(model) & matrices if config.optimizer == "muon" else set()
        decayed = [p for p in trained.values() if id(p) in matrices - muon]
        others = [p for p in trained.values() if id(p) not in matrices]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        # On a CPU the fused version takes a quarter of the time of the default.
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.parts: dict[torch.optim.Optimizer, tuple[str, ...]] = {adamw: ADAMW_MOMENTS}
        if by_muon := [p for p in trained.values() if id(p) in muon]:
            self.parts[Muon(by_muon, config.lr, config.weight_decay)] = MUON_MOMENTS
        names = {id(p): name for name, p in trained.items()}
        self.parameters = {names[id(p)]: p for g in self.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters with their settings, as those of an optimizer of torch."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def moments(self) -> dict[str, tuple[str, ...]]:
        """The names of the moments that are kept of each parameter, by its name."""
        by_id = {id(p): kept for part, kept in self.parts.items() for p in _parameters(part)}
        return {name: by_id[id(p)] for name, p in self.parameters.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for part in self.parts:
            part.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments of each parameter that has had a gradient, by its name."""
        by_id = {id(p): kept for part in self.parts for p, kept in part.state.items() if kept}
        return {name: by_id[id(p)] for name, p in self.parameters.items() if id(p) in by_id}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace all moments by those of a `state`, of which a copy is made where necessary."""
        by_id = {id(self.parameters[name]): dict(kept) for name, kept in state.items()}
        for part in self.parts:
            places = enumerate(_parameters(part))
            mine = {place: by_id[id(p)] for place, p in places if id(p) in by_id}
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": mine, "param_groups": groups})


def _parameters(part: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _for_muon(model: LanguageModel) -> set[int]:
    """Return the ids of the matrices of linear layers, without the head and without vectors."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]
    return {id(m.weight) for m in linear if min(m.weight.shape) > 1}
