"""Run tasks of lm-evaluation-harness (the extra ``lm-eval``) on an archdsl model.

Texts are scored as by the harness's own model class HFLM. A continuation is tokenized together with
its context. An empty context is replaced by the token that begins texts, or else by the token that
ends documents. What is too long for the model is cut off on the left. One case is different: HFLM
refuses a continuation that is longer than the model's context, and here it is scored in several
windows, as whole texts are. Routers always route causally here, also if they did not in training.

Shapes: B requests, T tokens, N tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
)
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
)
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from archdsl.data.tokenizers import beginning_tokens, end_of_document
from archdsl.evaluation.evaluate import evaluation_mode
from archdsl.evaluation.lm_eval_tasks import SEED, TaskError, Tasks
from archdsl.files import write_text
from archdsl.generation.generate import generate
from archdsl.generation.sampling_config import Sampling
from archdsl.lang.strict import Strict
from archdsl.model.compute_meter import metered
from archdsl.model.language_model import LanguageModel

BOOTSTRAP_SAMPLES = 1000  # for the standard error of metrics that have no formula for it
MAX_NEW_TOKENS = 256  # of a generated answer, unless its task has another limit

Window = tuple[list[int], list[int]]  # the tokens given and the tokens to predict
ScoringRequest = tuple[Any, list[int], list[int]]  # the harness's key, context, continuation
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class TaskScore(Strict):
    """One metric of a task, or of a group of tasks, over a number of ``examples``.

    ``value`` is None if the metric is not a finite number, for example a perplexity that overflows.
    """

    task: str
    metric: str
    value: float | None
    standard_error: float | None
    examples: int
    higher_is_better: bool | None


class TaskScores(Strict):
    """All metrics of a run, the number of tokens read and the FLOPs executed per token."""

    scores: tuple[TaskScore, ...]
    tokens: int
    flops_per_token: float


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt (as tokens), with the stop strings and the largest length of its answer."""

    tokens: list[int]
    limits: tuple[tuple[str, ...], int]


def run_tasks(
    tasks: Tasks,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> tuple[TaskScores, dict[str, Any]]:
    """Run the tasks at the current setting of the model's compute dial.

    ``limit``: the largest number of examples of each task; default: all. ``batch_size``: requests
    per forward pass. Returns the scores and the complete results of the harness.

    Raises TaskError if the model cannot run a task, for example because its context is too short.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # the same shots in every run
    with metered(model) as meter, redirect_stdout(sys.stderr):
        adapter = HarnessModel(model, tokenizer, batch_size)
        results = evaluate(adapter, tasks, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES)
    found = TaskScores(
        scores=tuple(_scores(results)), tokens=meter.tokens, flops_per_token=meter.flops_per_token
    )
    return found, results


def write_harness_results(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the complete results of the harness as JSON, including questions and answers."""
    text = json.dumps(runs, indent=1, default=handle_non_serializable, ensure_ascii=False)
    write_text(path, text + "\n")


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, found in (results["results"] | results.get("groups", {})).items():
        better = results["higher_is_better"].get(task, {})
        for key, value in found.items():
            metric, comma, which = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                yield TaskScore(
                    task=task,
                    metric=metric if which == "none" else f"{metric} ({which})",
                    value=_number(value),
                    standard_error=_number(found.get(f"{metric}_stderr,{which}")),
                    examples=found["sample_len"],
                    higher_is_better=better.get(metric),
                )


def _number(value: Any) -> float | None:
    """Return None for 'N/A', which the harness writes, and for infinite and undefined values."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """An archdsl model with the interface that the harness expects.

    The public methods other than ``__init__`` are those of the harness's ``TemplateLM``.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.batch_size = batch_size
        self.context = model.spec.context
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return end_of_document(self.text)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        begun = beginning_tokens(self.text)
        return begun[-1] if begun else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Tokenize ``string``, by default with the tokens that begin texts."""
        begun = [] if add_special_tokens is False else beginning_tokens(self.text)
        return begun + self.text.encode(string, add_special_tokens=False).ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both, split before the first token that holds any of the answer.

        Spaces that end the context count as the answer's, as in the harness. The harness splits
        after as many tokens as the context alone has, and so leaves out what of the answer the
        tokenizer merges into the context; an answer without tokens left would be certain.
        """
        known = len(context.rstrip())
        found = self.text.encode(context + continuation, add_special_tokens=False)
        ends = (i for i, (_, end) in enumerate(found.offsets) if end > known)
        given = next(ends, len(found.ids))
        before = beginning_tokens(self.text) + found.ids[:given]
        return before or [self.prefix_token_id], found.ids[given:]

    def _loglikelihood_tokens(
        self, requests: Sequence[ScoringRequest], **_: object
    ) -> list[tuple[float, bool]]:
        """Return, per request, the log-probability in nats and whether it is the greedy answer."""
        windows, owners = [], []
        for number, (_, before, after) in enumerate(requests):
            parts = self._windows(before, after)
            windows += parts
            owners += [number] * len(parts)
        length = [len(before) + len(after) for before, after in windows]
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        scores = self._in_batches("scoring", windows, length, self._score)
        for number, (log_p, is_greedy) in zip(owners, scores, strict=True):
            totals[number] += log_p
            greedy[number] &= is_greedy
        return list(zip(totals, greedy, strict=True))

    def _windows(self, before: list[int], after: list[int]) -> list[Window]:
        """Split a request into windows; there is one unless ``after`` exceeds the context."""
        if len(after) <= self.context:
            return [(before, after)] if after else []
        rolling = get_rolling_token_windows(after, before[-1], self.context, context_len=1)
        return [make_disjoint_window(window) for window in rolling]

    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        rows = [(before + after)[-self.context - 1 :] for before, after in windows]
        logits_BTV = self._logits([row[:-1] for row in rows])
        return [
            _score(logits_TV[len(row) - 1 - len(after) : len(row) - 1], after)
            for logits_TV, row, (_, after) in zip(logits_BTV, rows, windows, strict=True)
        ]

    def _logits(self, rows: Sequence[list[int]]) -> Tensor:
        rows_T = [torch.tensor(row, device=self._device) for row in rows]
        mask_BT = pad_sequence([torch.ones_like(row_T) for row_T in rows_T], batch_first=True)
        return self.model(pad_sequence(rows_T, batch_first=True), mask_BT.bool())

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts, in nats.

        Each token is predicted once. A text longer than the context is split into windows.
        """
        texts = [request.args[0] for request in requests]
        start = [self.prefix_token_id]
        whole = [(text, start, self.tok_encode(text, add_special_tokens=False)) for text in texts]
        return [log_p for log_p, _ in self._loglikelihood_tokens(whole)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers greedily. The stop string that ends an answer is not part of it."""
        parsed = [self._generation_request(*request.args) for request in requests]
        answers: dict[int, str] = {}
        for limits in dict.fromkeys(request.limits for request in parsed):
            alike = [i for i, request in enumerate(parsed) if request.limits == limits]
            group = [parsed[i] for i in alike]
            length = [len(request.tokens) for request in group]
            found = self._in_batches("answering", group, length, self._answer)
            answers |= zip(alike, found, strict=True)
        return [answers[i] for i in range(len(parsed))]

    def _generation_request(self, prompt: str, options: Mapping[str, Any]) -> GenerationRequest:
        wanted = normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS)
        if wanted.get("do_sample"):
            raise TaskError("a task requires sampled answers; archdsl only answers greedily")
        most = int(wanted["max_gen_toks"])
        if most >= self.context:
            raise TaskError(
                f"a task requires answers of up to {most:,} tokens, which need a longer context "
                f"than the model's {self.context:,} tokens"
            )
        tokens = self.tok_encode(prompt) or [self.prefix_token_id]
        until = handle_stop_sequences(wanted.get("until"), eos=None)
        return GenerationRequest(tokens[most - self.context :], (tuple(filter(None, until)), most))

    def _answer(self, requests: Sequence[GenerationRequest]) -> list[str]:
        until, most = requests[0].limits
        found = generate(
            self.model,
            [request.tokens for request in requests],
            Sampling(temperature=0, max_tokens=most),
            tokenizer=self.text,
            stop=until,
        )
        return [row.text or "" for row in found]

    def _in_batches(
        self,
        doing: str,
        requests: Sequence[Request],
        length: Sequence[int],
        answer: Callable[[Sequence[Request]], list[Answer]],
    ) -> list[Answer]:
        """Answer the requests in batches and return the answers in the order of the requests.

        The longest requests come first, so that too little memory shows at the start.
        """
        order = sorted(range(len(requests)), key=lambda i: -length[i])
        starts = range(0, len(order), self.batch_size)
        answers: dict[int, Answer] = {}
        console = Console(stderr=True)
        with evaluation_mode(self.model), self.model.causal_routing():
            for start in track(starts, doing, console=console, disable=not requests):
                batch = order[start : start + self.batch_size]
                answers |= zip(batch, answer([requests[i] for i in batch]), strict=True)
        return [answers[i] for i in range(len(requests))]


def _score(logits_NV: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return the log-probability of a continuation in nats, and whether it is the greedy one."""
    wanted_N = torch.tensor(continuation, device=logits_NV.device)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_p_N = logits_NV.log_softmax(-1).gather(1, wanted_N.unsqueeze(1)).squeeze(1)
    return float(log_p_N.sum()), bool((logits_NV.argmax(-1) == wanted_N).all())
