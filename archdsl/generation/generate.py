"""Text from a model, a token at a time, and the figures of how it was made.

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

from archdsl.data.tokenizers import beginning_tokens, encode, end_of_document, vocab_size
from archdsl.errors import ArchdslError
from archdsl.generation.detokenize import StopStringFilter, StreamingDecoder
from archdsl.generation.sampling import generators, probabilities, sample_tokens
from archdsl.generation.sampling_config import Sampling
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from archdsl.nn.cache import Cache

StopReason = Literal["end", "stop", "length", "context"]
Prompts = Sequence[str] | Sequence[Sequence[int]]

PREFILL_TOKENS = 4096  # tokens of prompts
FIXED_SHAPE_DEVICES = {
    "cuda"
}  # where every step is computed for every row; `archdsl.model.cuda_graph_step` says why


class GenerateError(ArchdslError):
    """What a model cannot go on from."""

    exit_status = 2


@dataclass
class Generation:
    """A prompt and what came after it. The token that ends a document is not among ``tokens``.

    ``stopped``: by the end of the document, by a stop string, at the length asked for, or at the
    limit of the context. ``text`` is None without a tokenizer. ``steps``: the further thinking
    steps of each token of prompt and text that the model has read; it never reads the last.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    stopped: StopReason | None = None
    steps: list[int] = field(default_factory=list)

    @property
    def thinking_steps(self) -> float:
        """Mean over the tokens read."""
        return sum(self.steps) / max(1, len(self.steps))


@dataclass
class Throughput:
    """Tokens read, how fast, and how much was thought about them."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    selected_tokens: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None

    @property
    def thinking_steps(self) -> float | None:
        """Further ones than the full pass, mean over the tokens."""
        return self.steps / self.tokens if self.tokens else None

    @property
    def router_shares(self) -> dict[str, float]:
        """Of the tokens, those that each routed step selected."""
        return {name: count / self.tokens for name, count in self.selected_tokens.items()}

    def add(self, other: Throughput) -> None:
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.steps += other.steps
        for name, count in other.selected_tokens.items():
            self.selected_tokens[name] = self.selected_tokens.get(name, 0.0) + count


@dataclass(frozen=True)
class GeneratedToken:
    """What came next in a row: a token, and the text that it made certain."""

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
) -> list[Generation]:
    """What comes after each of the prompts, which are texts or lists of tokens.

    ``tokenizer``: needed for texts; its end of a document ends one, and begins an empty prompt.
    ``stop``: strings that end a text and are not part of it. ``batch_size``: prompts at a time;
    default: all. Faster on a CPU after `model.for_decoding()`. Raises GenerateError, before
    anything is computed.

    >>> import archdsl
    >>> model = archdsl.build(archdsl.load("tiny"))
    >>> [found] = archdsl.generate(model, [[1, 2, 3]])
    >>> len(found.tokens), found.stopped
    (125, 'context')
    """
    batches = generation_runs(
        model, prompts, sampling, tokenizer=tokenizer, stop=stop, batch_size=batch_size
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
) -> list[GenerationRun]:
    """What `generate` goes through, for whoever wants to see each token as it comes."""
    tokens = _tokenized(prompts, tokenizer)
    _check(model, tokens, tokenizer, stop)
    size = batch_size or len(tokens)
    return [
        GenerationRun(model, tokens[i : i + size], sampling or Sampling(), tokenizer, stop)
        for i in range(0, len(tokens), size)
    ]


class GenerationRun:
    """One batch on its way: iterate for the pieces as they come; ``rows`` fill meanwhile.

    ``prefill`` and ``decode``: the pace at which prompts and what came after them were read.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
    ) -> None:
        self.model, self.sampling = model, sampling
        self.rows = [Generation(tokens) for tokens in prompts]
        self.end = end_of_document(tokenizer) if tokenizer else None
        self.texts = [
            StopStringFilter(StreamingDecoder(tokenizer, p), stop) if tokenizer else None
            for p in prompts
        ]
        self.prefill, self.decode = Throughput(), Throughput()

    def __iter__(self) -> Iterator[GeneratedToken]:
        live = list(range(len(self.rows)))
        random = generators(self.sampling, len(live))
        cache = self.model.new_cache(self._longest())
        logits_BV = self._read_prompts(cache)
        fixed, step, pace = logits_BV.device.type in FIXED_SHAPE_DEVICES, None, self.prefill
        while live:
            with _clock(pace):
                probability_BV = probabilities(logits_BV, self.sampling)
                tokens = sample_tokens(probability_BV, [random[i] for i in live])
            for i, token in zip(live, tokens, strict=True):
                yield self._take(i, token)
            going = [place for place, i in enumerate(live) if self.rows[i].stopped is None]
            if 0 < len(going) < len(live) and not fixed:
                cache.reorder(torch.tensor(going, device=logits_BV.device))
            live, pace = [live[place] for place in going], self.decode
            tokens = [tokens[place] for place in going]
            if live and fixed:
                step = step or self._fix(cache)
                logits_BV = self._step(step, dict(zip(live, tokens, strict=True)))
            elif live:
                logits_BV = self._read(cache, [[token] for token in tokens], live, pace)

    def _longest(self) -> int:
        """Tokens that the cache may have to hold."""
        prompt = max(len(row.prompt) for row in self.rows)
        return min(self.model.spec.context, prompt + self.sampling.max_tokens)

    def _read_prompts(self, cache: Cache) -> Tensor:
        """The logits after each prompt, [B, V]."""
        longest = max(len(row.prompt) for row in self.rows)
        # filled up in front, so that all prompts end in the last column
        filled = [[-1] * (longest - len(row.prompt)) + row.prompt for row in self.rows]
        size = max(1, PREFILL_TOKENS // len(filled))
        for start in range(0, longest, size):
            chunk = [tokens[start : start + size] for tokens in filled]
            logits_BV = self._read(cache, chunk, range(len(filled)), self.prefill)
        return logits_BV

    def _read(
        self, cache: Cache, tokens: list[list[int]], rows: Sequence[int], pace: Throughput
    ) -> Tensor:
        """The logits after the last of the tokens, [B, V]; -1 among these is filling."""
        tokens_BT = torch.tensor(tokens, device=self.model.embedding.weight.device)
        mask_BT = tokens_BT >= 0
        filled = min(map(min, tokens)) < 0
        with _clock(pace), _reading(self.model):
            logits_BV = self._finite(
                self.model.next_logits(tokens_BT.clamp(min=0), mask_BT if filled else None, cache)
            )
        self._note(mask_BT, rows, pace)
        return logits_BV

    def _fix(self, cache: Cache) -> TokenStep:
        with _clock(self.decode), _reading(self.model):
            return TokenStep(self.model, cache, len(self.rows))

    def _step(self, step: TokenStep, tokens: dict[int, int]) -> Tensor:
        """The logits after a token of each live row, [B, V]; those that have ended go along."""
        given = [tokens.get(i, -1) for i in range(len(self.rows))]
        with _clock(self.decode), _reading(self.model):
            logits_BV = self._finite(step(given)[list(tokens)])
        self._note(torch.tensor(given).unsqueeze(1) >= 0, range(len(given)), self.decode)
        return logits_BV

    def _finite(self, logits_BV: Tensor) -> Tensor:
        if not logits_BV.isfinite().all():
            raise GenerateError(f"{self.model.spec.name} gives logits that are not finite")
        return logits_BV

    def _note(self, mask_BT: Tensor, rows: Sequence[int], pace: Throughput) -> None:
        """What the pass that has just been did; two questions to the device, whatever it was."""
        trace = self.model.trace
        assert trace.steps_BT is not None  # no gradients were asked for
        taken = [
            list(compress(steps, real))
            for steps, real in zip(trace.steps_BT.tolist(), mask_BT.tolist(), strict=True)
        ]
        for i, steps in zip(rows, taken, strict=True):
            self.rows[i].steps += steps
        count = sum(map(len, taken))
        selected = {name: share * count for name, share in self.model.router_shares().items()}
        pace.add(Throughput(count, 0.0, sum(map(sum, taken)), selected))

    def _take(self, i: int, token: int) -> GeneratedToken:
        """Adds the token to its row and finds out whether the row stops here."""
        row, text = self.rows[i], self.texts[i]
        piece = ""
        if token == self.end:
            row.stopped = "end"
        else:
            row.tokens.append(token)
            piece = text.push(token) if text else ""
            if text and text.stopped_by is not None:
                row.stopped = "stop"
            elif len(row.tokens) == self.sampling.max_tokens:
                row.stopped = "length"
            elif len(row.prompt) + len(row.tokens) == self.model.spec.context:
                row.stopped = "context"
        if text:
            piece += text.finish() if row.stopped else ""
            row.text = text.whole
        return GeneratedToken(i, token, piece)


def _tokenized(prompts: Prompts, tokenizer: Tokenizer | None) -> list[list[int]]:
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if not texts:
        return [[int(token) for token in prompt] for prompt in prompts]
    if tokenizer is None or len(texts) < len(given):
        raise GenerateError("texts need a tokenizer; without one, each prompt is a list of tokens")
    for number, text in enumerate(texts, 1):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise GenerateError(f"{_which(number, texts)} is not valid UTF-8 text")
    begun, ended = beginning_tokens(tokenizer), [end_of_document(tokenizer)]
    return [begun + tokens.tolist() or ended for tokens, _ in encode(tokenizer, texts)]


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
            f"but {spec.name} only a vocab_size of {spec.vocab_size:,}"
        )
    if stop and (tokenizer is None or "" in stop):
        raise GenerateError("a stop string needs a tokenizer and must not be empty")
    if not prompts:
        raise GenerateError("there is no prompt")
    for number, tokens in enumerate(prompts, 1):
        which = _which(number, prompts)
        if not tokens:
            raise GenerateError(f"{which} has no tokens")
        if not 0 <= min(tokens) <= max(tokens) < spec.vocab_size:
            raise GenerateError(f"{which} has tokens outside 0 to {spec.vocab_size - 1:,}")
        if len(tokens) >= spec.context:
            raise GenerateError(
                f"{which} has {len(tokens):,} tokens, and the context of {spec.name} is "
                f"{spec.context:,}: shorten it, so that there is room to go on"
            )


@contextmanager
def _clock(pace: Throughput) -> Iterator[None]:
    began = time.perf_counter()
    yield
    pace.seconds += time.perf_counter() - began


@contextmanager
def _reading(model: LanguageModel) -> Iterator[None]:
    """No gradients, evaluation mode; the model's own mode comes back."""
    training = model.training
    if training:  # going through all modules takes time for each token
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()
