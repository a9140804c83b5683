"""Decoding of one token for every row at fixed shapes; on CUDA as one captured graph.

Without this, decoding checks on the host at each routed step whether any row takes it, and skips
the step if none does. On a CPU that saves time. On a GPU it costs more than it saves (estimated,
not measured): a layer of the 162M spec has 24 MB of bfloat16 weights, which an H100 reads in 7 us,
while waiting for the host takes 10 to 20 us, in which nothing is queued. Besides, a token of that
model takes 2,000 operations (counted), each of which costs the host some microseconds; a graph is
one launch. So here every step is computed for every row, and the result is dropped for a row that
does not take the step.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archdsl.errors import ArchdslError
from archdsl.model.language_model import LanguageModel
from archdsl.nn.cache import Cache, ContextFullError


class TokenStep:
    """Decodes one token at a time after those that ``cache`` holds.

    The cache must not be used elsewhere from now on. There are no gradients, and the model stays in
    its mode. On CUDA the weights may change in place, but must not move. Rows that have ended stay
    in the batch, because a graph has a fixed batch size.
    """

    def __init__(self, model: LanguageModel, cache: Cache, rows: int) -> None:
        self.model, self.cache = model, cache
        device = model.embedding.weight.device
        cache.make_static(rows, device)
        self.length_B = torch.as_tensor(cache.length).to("cpu", copy=True)  # what Python knows
        self.tokens_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.mask_B1 = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        # without any token nothing changes, but the memory of every step is allocated
        self.logits_BV = self._run()
        self.graph = self._capture() if device.type == "cuda" else None
        self.trace = model.trace

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The logits [B, V] after one more token for each row; -1 stands for no token.

        The next call overwrites them. Raises ContextFullError, and leaves the cache unchanged, if a
        row is full; ArchdslError if the rows of the cache were reordered; DialError if the compute
        dial was turned.
        """
        tokens_B = torch.tensor(tokens)
        self._check(tokens_B)
        self.tokens_B1.copy_(tokens_B.clamp(min=0).unsqueeze(1))
        self.mask_B1.copy_((tokens_B >= 0).unsqueeze(1))
        self.length_B += tokens_B >= 0
        if self.graph is None:
            self.logits_BV, self.trace = self._run(), self.model.trace
        else:
            self.graph.replay()
            self.model.trace = self.trace
        return self.logits_BV

    def _check(self, tokens_B: Tensor) -> None:
        if not self.cache.static:
            raise ArchdslError("the rows of the cache were reordered: make another TokenStep")
        self.model.check_dial(self.cache)
        if bool((self.length_B + (tokens_B >= 0) > self.cache.max_length).any()):
            raise ContextFullError(
                f"this cache has room for {self.cache.max_length:,} tokens of a row, no more"
            )

    @torch.no_grad()
    def _run(self) -> Tensor:
        return self.model.next_logits(self.tokens_B1, self.mask_B1, self.cache)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of the step. Steps on another stream come first, to initialise libraries."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits_BV = self._run()
        return graph
