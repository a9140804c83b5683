"""Generate text with a model and a KV cache, and measure speed and thinking steps.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from archdsl.data.tokenizers import beginning_tokens, encode, ends_of, vocab_size
from archdsl.errors import ArchdslError
from archdsl.generation.detokenize import StopStringFilter, StreamingDecoder
from archdsl.generation.sampling import generators, probabilities, sample_tokens
from archdsl.generation.sampling_config import Sampling
from archdsl.model.build import require_model
from archdsl.model.compute_meter import RouterCounts
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel
from archdsl.nn.devices import require_compiler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from archdsl.nn.cache import Cache

StopReason = Literal["end", "stop", "length", "context"]
Prompts = Sequence[str] | Sequence[Sequence[int]]

PREFILL_TOKENS = 4096  # the most prompt tokens, over all rows, that one forward pass reads
# On these devices every decoding step computes all rows of the batch, also those that have ended:
# `archdsl.model.cuda_graph_step` needs shapes that do not change.
FIXED_SHAPE_DEVICES = {"cuda"}


class GenerateError(ArchdslError):
    """Prompts, tokenizer and model do not fit together, or the logits are not finite."""

    exit_status = 2


@dataclass
class Generation:
    """A prompt and its continuation.

    ``tokens``: the new tokens, without a token that ends a text.
    ``text``: the new text; None without a tokenizer.
    ``stopped``: why generation ended: ``end`` (the end of the document), ``stop`` (a stop string),
    ``length`` (the largest number of new tokens) or ``context`` (the context is full).
    ``steps``: the further thinking steps of each token that the model has read, prompt and new
    tokens. The model does not read the last new token.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    stopped: StopReason | None = None
    steps: list[int] = field(default_factory=list)

    @property
    def thinking_steps(self) -> float:
        """Further thinking steps per token, averaged over the tokens read."""
        return sum(self.steps) / max(1, len(self.steps))


@dataclass
class Throughput:
    """How many tokens were read, how fast, and with how many further thinking steps.

    ``seconds``: wall-clock time. ``steps``: further thinking steps, summed over the tokens.
    """

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    routers: RouterCounts = field(default_factory=RouterCounts)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second; None if no token was read."""
        return self.tokens / self.seconds if self.tokens else None

    @property
    def thinking_steps(self) -> float | None:
        """Further thinking steps per token; None if no token was read."""
        return self.steps / self.tokens if self.tokens else None

    @property
    def router_shares(self) -> dict[str, float]:
        """See `RouterCounts`."""
        return self.routers.shares

    def add(self, other: Throughput) -> None:
        """Add the counts and the time of another measurement."""
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.steps += other.steps
        self.routers.add(other.routers)


@dataclass(frozen=True)
class GeneratedToken:
    """A new token of one row, and the text that became complete with it (may be empty)."""

    row: int
    token: int
    text: str


def generate(
    model: LanguageModel,
    prompts: Prompts,
    sampling: Sampling | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    compiled: bool = False,
) -> list[Generation]:
    """Continue each of the prompts, which are texts or lists of tokens.

    ``sampling``: the sampling settings; default: ``Sampling()``.
    ``tokenizer``: required if the prompts are texts. Each of its tokens that end a text ends a
    generation; the first stands for an empty prompt if no token begins texts.
    ``stop``: strings that end a generation; they are not part of the text.
    ``batch_size``: prompts that are continued together; default: all.
    ``compiled``: whether the decoding step is compiled. Batches of the same size share what is
    compiled.

    Returns one `Generation` per prompt, in order. On a CPU, decoding is faster after
    ``model.for_decoding()``. Raises GenerateError, before any computation, if the prompts or the
    tokenizer do not fit the model, and during generation if the logits are not finite;
    ArchdslError if ``compiled`` and torch finds no compiler.

    >>> import archdsl
    >>> model = archdsl.build(archdsl.load("tiny"))
    >>> [found] = archdsl.generate(model, [[1, 2, 3]])
    >>> len(found.tokens), found.stopped
    (125, 'context')
    """
    batches = generation_runs(
        model,
        prompts,
        sampling,
        tokenizer=tokenizer,
        stop=stop,
        batch_size=batch_size,
        compiled=compiled,
    )
    for run in batches:
        for _ in run:
            pass
    return [row for run in batches for row in run.rows]


def generation_runs(
    model: LanguageModel,
    prompts: Prompts,
    sampling: Sampling | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    compiled: bool = False,
) -> list[GenerationRun]:
    """Return one `GenerationRun` per batch of prompts, to read the tokens while they are made.

    The parameters are those of `generate`. Raises GenerateError if the prompts or the tokenizer do
    not fit the model, and ArchdslError if torch finds no compiler.
    """
    require_model(model)
    tokens = _tokenized(prompts, tokenizer)
    _check(model, tokens, tokenizer, stop)
    if compiled:
        require_compiler(model.embedding.weight.device)
    size = batch_size or len(tokens)
    sampling = sampling or Sampling()
    return [
        GenerationRun(model, tokens[i : i + size], sampling, tokenizer, stop, compiled)
        for i in range(0, len(tokens), size)
    ]


class GenerationRun:
    """The generation of one batch. Iterate over it once to generate the tokens.

    ``rows``: the results, one per prompt, which grow during the iteration.
    ``prefill`` and ``decode``: the throughput of reading the prompts and the new tokens.
    ``preparation``: the seconds in which the decoding step was captured or compiled.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        compiled: bool,
    ) -> None:
        self.model, self.sampling, self.compiled = model, sampling, compiled
        self.rows = [Generation(tokens) for tokens in prompts]
        self.ends = frozenset(ends_of(tokenizer)) if tokenizer else frozenset()
        self.texts = [
            StopStringFilter(StreamingDecoder(tokenizer, p), stop) if tokenizer else None
            for p in prompts
        ]
        self.prefill, self.decode = Throughput(), Throughput()
        self.preparation = 0.0

    def __iter__(self) -> Iterator[GeneratedToken]:
        """Generate the tokens step by step. Raises GenerateError if logits are not finite."""
        live = list(range(len(self.rows)))
        random = generators(self.sampling, len(live))
        cache = self.model.new_cache(self._longest())
        logits_BV = self._read_prompts(cache)
        fixed, step = self.compiled or logits_BV.device.type in FIXED_SHAPE_DEVICES, None
        throughput = self.prefill
        while live:
            with _timed(throughput):
                probability_BV = probabilities(logits_BV, self.sampling)
                tokens = sample_tokens(probability_BV, [random[i] for i in live])
            for i, token in zip(live, tokens, strict=True):
                yield self._append(i, token)
            going = [place for place, i in enumerate(live) if self.rows[i].stopped is None]
            if 0 < len(going) < len(live) and not fixed:
                cache.reorder(torch.tensor(going, device=logits_BV.device))
            live, throughput = [live[place] for place in going], self.decode
            tokens = [tokens[place] for place in going]
            if live and fixed:
                step = step or self._fixed_shape_step(cache)
                logits_BV = self._step(step, dict(zip(live, tokens, strict=True)))
            elif live:
                logits_BV = self._read(cache, [[token] for token in tokens], live, throughput)

    def _longest(self) -> int:
        """Return the largest number of tokens that the cache may have to hold."""
        prompt = max(len(row.prompt) for row in self.rows)
        return min(self.model.spec.context, prompt + self.sampling.max_tokens)

    def _read_prompts(self, cache: Cache) -> Tensor:
        """Read the prompts into the cache and return the logits after each of them, [B, V]."""
        longest = max(len(row.prompt) for row in self.rows)
        # Pad on the left, so that all prompts end in the last column.
        padded = [[-1] * (longest - len(row.prompt)) + row.prompt for row in self.rows]
        size = max(1, PREFILL_TOKENS // len(padded))
        for start in range(0, longest, size):
            chunk = [tokens[start : start + size] for tokens in padded]
            logits_BV = self._read(cache, chunk, range(len(padded)), self.prefill)
        return logits_BV

    def _read(
        self, cache: Cache, tokens: list[list[int]], rows: Sequence[int], throughput: Throughput
    ) -> Tensor:
        """Read [B, T] tokens, where -1 is padding; return the logits after the last, [B, V]."""
        tokens_BT = torch.tensor(tokens, device=self.model.embedding.weight.device)
        mask_BT = tokens_BT >= 0
        padded = min(map(min, tokens)) < 0
        with _timed(throughput), _inference(self.model):
            logits_BV = self._checked(
                self.model.next_logits(tokens_BT.clamp(min=0), mask_BT if padded else None, cache)
            )
        self._record(mask_BT, rows, throughput)
        return logits_BV

    def _fixed_shape_step(self, cache: Cache) -> TokenStep:
        began = time.perf_counter()
        with _inference(self.model):
            step = TokenStep(self.model, cache, len(self.rows), self.compiled)
        self.preparation += time.perf_counter() - began
        return step

    def _step(self, step: TokenStep, tokens: dict[int, int]) -> Tensor:
        """Return the logits after a token of each live row, [B, V].

        Rows that have ended are computed too, as shapes are fixed, and left out of the result.
        """
        given = [tokens.get(i, -1) for i in range(len(self.rows))]
        with _timed(self.decode), _inference(self.model):
            logits_BV = step(given)
            if len(tokens) < len(given):
                logits_BV = logits_BV[list(tokens)]
            logits_BV = self._checked(logits_BV)
        self._record(torch.tensor(given).unsqueeze(1) >= 0, range(len(given)), self.decode)
        return logits_BV

    def _checked(self, logits_BV: Tensor) -> Tensor:
        if not logits_BV.isfinite().all():
            raise GenerateError(f"{self.model.spec.name} computes logits that are not finite")
        return logits_BV

    def _record(self, mask_BT: Tensor, rows: Sequence[int], throughput: Throughput) -> None:
        """Count what the last forward pass did.

        It copies data from the device twice, however many routed steps there are.
        """
        trace = self.model.trace
        assert trace.steps_BT is not None  # it is recorded whenever gradients are off
        taken = [
            list(compress(steps, real))
            for steps, real in zip(trace.steps_BT.tolist(), mask_BT.tolist(), strict=True)
        ]
        for i, steps in zip(rows, taken, strict=True):
            self.rows[i].steps += steps
        throughput.tokens += sum(map(len, taken))
        throughput.steps += sum(map(sum, taken))
        throughput.routers.note(self.model)

    def _append(self, i: int, token: int) -> GeneratedToken:
        """Append the token to row ``i`` and decide whether the row ends here."""
        row, text = self.rows[i], self.texts[i]
        new_text = ""
        if token in self.ends:
            row.stopped = "end"
        else:
            row.tokens.append(token)
            new_text = text.push(token) if text else ""
            if text and text.stopped_by is not None:
                row.stopped = "stop"
            elif len(row.tokens) == self.sampling.max_tokens:
                row.stopped = "length"
            elif len(row.prompt) + len(row.tokens) == self.model.spec.context:
                row.stopped = "context"
        if text:
            new_text += text.finish() if row.stopped else ""
            row.text = text.text
        return GeneratedToken(i, token, new_text)


def _tokenized(prompts: Prompts, tokenizer: Tokenizer | None) -> list[list[int]]:
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if not texts:
        return [[int(token) for token in prompt] for prompt in prompts]
    if tokenizer is None or len(texts) < len(given):
        raise GenerateError(
            "prompts that are texts need a tokenizer; without one, each prompt is a list of tokens"
        )
    for number, text in enumerate(texts, 1):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise GenerateError(f"{_which(number, texts)} is not valid UTF-8 text")
    begun, ended = beginning_tokens(tokenizer), ends_of(tokenizer)[:1]
    return [begun + tokens.tolist() or list(ended) for tokens, _ in encode(tokenizer, texts)]


def _which(number: int, prompts: Sequence[object]) -> str:
    return f"prompt {number}" if len(prompts) > 1 else "the prompt"


def _check(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer | None,
    stop: Sequence[str],
) -> None:
    spec = model.spec
    if tokenizer is not None and vocab_size(tokenizer) > spec.vocab_size:
        raise GenerateError(
            f"the tokenizer has {vocab_size(tokenizer):,} tokens, "
            f"but {spec.name} has only a vocab_size of {spec.vocab_size:,}"
        )
    if stop and (tokenizer is None or "" in stop):
        raise GenerateError("stop strings need a tokenizer, and none of them may be empty")
    if not prompts:
        raise GenerateError("no prompt was given")
    for number, tokens in enumerate(prompts, 1):
        which = _which(number, prompts)
        if not tokens:
            raise GenerateError(f"{which} has no tokens")
        if not 0 <= min(tokens) <= max(tokens) < spec.vocab_size:
            raise GenerateError(
                f"{which} has tokens outside the range 0 to {spec.vocab_size - 1:,}"
            )
        if len(tokens) >= spec.context:
            raise GenerateError(
                f"{which} has {len(tokens):,} tokens and the context of {spec.name} is "
                f"{spec.context:,}, which leaves no room for new tokens: shorten the prompt"
            )


@contextmanager
def _timed(throughput: Throughput) -> Iterator[None]:
    began = time.perf_counter()
    yield
    throughput.seconds += time.perf_counter() - began


@contextmanager
def _inference(model: LanguageModel) -> Iterator[None]:
    """Turn gradients off and evaluation mode on; restore the mode of the model afterwards."""
    training = model.training
    if training:  # otherwise save the time of visiting all modules for every token
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()
