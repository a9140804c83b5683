"""One token of every row at a time, at shapes that never change: on CUDA as one captured graph.

Decoding otherwise asks the host at each routed step whether anybody takes it, and leaves it out if
nobody does. On a CPU that saves the step's time. On a GPU it would cost more than it saves
(estimated, not measured): a layer of the 162M spec is 24 MB of bfloat16 weights, which an H100
reads in 7 us, and a question to the host takes 10 to 20 us, in which nothing is queued. And a token
of that model takes 2,000 operations (counted), each some microseconds of the host's time; as a
graph they are one launch. So here every step is computed for every row, and a row that does not
take it keeps what it had.

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
    """Goes on from what ``cache`` holds, which belongs to this from now on.

    Without gradients, in the mode that the model is in. On CUDA the weights may change in place,
    but not move. Rows that have ended stay, as a graph is of one batch size.
    """

    def __init__(self, model: LanguageModel, cache: Cache, rows: int) -> None:
        self.model, self.cache = model, cache
        device = model.embedding.weight.device
        cache.make_static(rows, device)
        self.length_B = torch.as_tensor(cache.length).to("cpu", copy=True)  # what Python knows
        self.tokens_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.mask_B1 = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        # no row has a token yet: nothing changes, but there is memory for every step then
        self.logits_BV = self._run()
        self.graph = self._capture() if device.type == "cuda" else None
        self.trace = model.trace

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The logits after these tokens, [B, V]; -1 where a row has none. The next call overwrites
        them. Raises ContextFullError, with the cache as it was."""
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
        """Of the step, after some on another stream: so libraries are set up outside of it."""
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
