"""Tasks of lm-evaluation-harness (the extra ``lm-eval``) on an archdsl model.

Texts are scored as its own HFLM scores them: a continuation is what tokenizing it behind its
context adds, an empty context is the token that begins texts or else the one that ends documents,
and what is too long for the model is cut off on the left. A continuation that alone is too long,
which HFLM refuses, is scored in windows, as whole texts are. Routers select causally, whatever
they did in training.

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
from archdsl.lang.spec import Strict
from archdsl.model.compute_meter import metered
from archdsl.model.language_model import LanguageModel

BOOTSTRAP_SAMPLES = 1000  # of a bootstrap, for metrics without a formula for their error
MAX_NEW_TOKENS = 256  # of an answer, unless its task says otherwise

Window = tuple[list[int], list[int]]  # what is known, what is predicted
ScoringRequest = tuple[Any, list[int], list[int]]  # what was asked, context, continuation
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class TaskScore(Strict):
    """One figure of a task or a group of tasks over ``examples``."""

    task: str
    metric: str
    value: float | None  # None: no number, as of a perplexity that overflows
    standard_error: float | None
    examples: int
    higher_is_better: bool | None


class TaskScores(Strict):
    """``tokens`` were looked at for ``scores``, at ``flops_per_token`` executed for each."""

    scores: tuple[TaskScore, ...]
    tokens: int
    flops_per_token: float


@dataclass(frozen=True)
class GenerationRequest:
    """``way``: the texts that end an answer, and how many tokens it has at most."""

    tokens: list[int]
    way: tuple[tuple[str, ...], int]


def run_tasks(
    tasks: Tasks,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> tuple[TaskScores, dict[str, Any]]:
    """Scores of the model as it is dialled, and all that the harness has to say of them.

    ``limit``: at most so many examples of each task. Raises TaskError if the model cannot take a
    task: if its context is too short.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # the same shots in every run
    with metered(model) as meter, redirect_stdout(sys.stderr):
        adapter = HarnessModel(model, tokenizer, batch_size)
        whole = evaluate(adapter, tasks, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES)
    found = TaskScores(
        scores=tuple(_scores(whole)), tokens=meter.tokens, flops_per_token=meter.flops_per_token
    )
    return found, whole


def write_harness_results(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """All that the harness has to say of runs, questions and answers included, as JSON."""
    text = json.dumps(runs, indent=1, default=handle_non_serializable, ensure_ascii=False)
    write_text(path, text + "\n")


def _scores(whole: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, found in (whole["results"] | whole.get("groups", {})).items():
        better = whole["higher_is_better"].get(task, {})
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
    """Without what is no number: the harness says 'N/A', and a perplexity may be infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model as the harness asks it."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.batch_size = batch_size
        self.context = model.spec.context
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return end_of_document(self.text)

    @property
    def prefix_token_id(self) -> int:
        return [self.eot_token_id, *beginning_tokens(self.text)][-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        begun = [] if add_special_tokens is False else beginning_tokens(self.text)
        return begun + self.text.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[ScoringRequest], **_: object
    ) -> list[tuple[float, bool]]:
        """Log-probability in nats, and whether greedy decoding would say the same."""
        windows, of = [], []
        for number, (_, before, after) in enumerate(requests):
            some = self._windows(before, after)
            windows += some
            of += [number] * len(some)
        length = [len(before) + len(after) for before, after in windows]
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        scores = self._in_batches("scoring", windows, length, self._score)
        for number, (log_p, likeliest) in zip(of, scores, strict=True):
            totals[number] += log_p
            greedy[number] &= likeliest
        return list(zip(totals, greedy, strict=True))

    def _windows(self, before: list[int], after: list[int]) -> list[Window]:
        """One, or as many as it takes to predict what is longer than the context."""
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
        """Of whole texts: every token once, behind as much as fits before it."""
        texts = [request.args[0] for request in requests]
        start = [self.prefix_token_id]
        whole = [(text, start, self.tok_encode(text, add_special_tokens=False)) for text in texts]
        return [log_p for log_p, _ in self._loglikelihood_tokens(whole)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedily, up to what ends the answer, which is left out."""
        questions = [self._question(*request.args) for request in requests]
        answers: dict[int, str] = {}
        for way in dict.fromkeys(question.way for question in questions):  # one per batch
            alike = [i for i, question in enumerate(questions) if question.way == way]
            some = [questions[i] for i in alike]
            length = [len(question.tokens) for question in some]
            found = self._in_batches("answering", some, length, self._answer)
            answers |= zip(alike, found, strict=True)
        return [answers[i] for i in range(len(questions))]

    def _question(self, prompt: str, options: Mapping[str, Any]) -> GenerationRequest:
        wanted = normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS)
        if wanted.get("do_sample"):
            raise TaskError("a task asks for sampled answers; archdsl answers greedily")
        most = int(wanted["max_gen_toks"])
        if most >= self.context:
            raise TaskError(
                f"a task asks for answers of up to {most:,} tokens and the model has a context "
                f"of {self.context:,}: it needs a longer one"
            )
        tokens = self.tok_encode(prompt) or [self.prefix_token_id]
        until = handle_stop_sequences(wanted.get("until"), eos=None)
        return GenerationRequest(tokens[most - self.context :], (tuple(filter(None, until)), most))

    def _answer(self, questions: Sequence[GenerationRequest]) -> list[str]:
        until, most = questions[0].way
        found = generate(
            self.model,
            [question.tokens for question in questions],
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
        """The answers in the order of the requests; the longest are asked first, to fail early."""
        order = sorted(range(len(requests)), key=lambda i: -length[i])
        starts = range(0, len(order), self.batch_size)
        answers: dict[int, Answer] = {}
        console = Console(stderr=True)
        with evaluation_mode(self.model), self.model.causal_routing():
            for start in track(starts, doing, console=console, disable=not requests):
                some = order[start : start + self.batch_size]
                answers |= zip(some, answer([requests[i] for i in some]), strict=True)
        return [answers[i] for i in range(len(requests))]


def _score(logits_NV: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of the tokens of a continuation: the sum in nats, and whether each is the likeliest."""
    wanted_N = torch.tensor(continuation, device=logits_NV.device)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_p_N = logits_NV.log_softmax(-1).gather(1, wanted_N.unsqueeze(1)).squeeze(1)
    return float(log_p_N.sum()), bool((logits_NV.argmax(-1) == wanted_N).all())
