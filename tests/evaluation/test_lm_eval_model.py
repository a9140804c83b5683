"""Tests of the model for lm-evaluation-harness: its answers are those of the model.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from archdsl.data.tokenizers import byte_level, end_of_document, train_bpe
from archdsl.evaluation import lm_eval_tasks
from archdsl.evaluation.lm_eval_model import HarnessModel, run_tasks
from archdsl.evaluation.lm_eval_tasks import TaskError, load_tasks
from archdsl.interop.import_weights import import_pretrained
from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.checkpoint import load_checkpoint
from archdsl.model.language_model import LanguageModel
from tests.examples import ARC_EASY, GSM8K, PIQA, SHIPPED, write_examples

ROUTER = "blocks.1.router.kind"
PAIRS = [
    ("The door is", " open"),
    ("The door is ", "open"),  # the space is tokenized with the continuation
    ("", "Nothing before"),
    ("naïve 😀 and then some more words, far longer than the others: ", "x"),
    ("A", " continuation that is much longer than what stands before it"),
    ("The door is", " shut"),
]


def bpe() -> Tokenizer:
    return train_bpe(["the door is open, the door is shut, and then some more words"] * 4, 300)


def llama() -> Tokenizer:
    """Return a tokenizer that puts a special token in front of texts."""
    tokenizer = bpe()
    tokenizer.add_special_tokens(["<s>"])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    return tokenizer


def tiny(*overrides: str, vocab_size: int = 300, context: int = 64) -> LanguageModel:
    sizes = ["dim=16", f"context={context}", f"vocab_size={vocab_size}"]
    model = build(load("tiny", overrides=[*sizes, *overrides]), dtype=torch.float64)
    torch.nn.init.normal_(model.head.weight)  # otherwise many answers would be ties
    return model.eval()


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def log_p(model: LanguageModel, tokens: list[int]) -> Any:
    """Compute the log-probability of each token but the first, and whether it is the likeliest."""
    with torch.no_grad(), model.causal_routing():
        logits_TV = model(torch.tensor([tokens[:-1]]))[0].numpy()
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    wanted_T = np.array(tokens[1:])
    return log_p_TV[np.arange(len(wanted_T)), wanted_T], log_p_TV.argmax(-1) == wanted_T


def by_hand(
    model: LanguageModel, tokenizer: Tokenizer, pair: tuple[str, str]
) -> tuple[float, bool]:
    """Score one request alone, without padding."""
    before, after = pair
    text = before.rstrip()
    tokens = tokenizer.encode(before + after).ids
    given = len(tokenizer.encode(text).ids)
    if not text:
        start = tokenizer.encode("").ids or [end_of_document(tokenizer)]
        tokens = start + tokenizer.encode(after, add_special_tokens=False).ids
        given = len(start)
    kept = tokens[-model.spec.context - 1 :]
    log_p_T, likeliest_T = log_p(model, kept)
    new = len(tokens) - given
    return log_p_T[-new:].sum(), likeliest_T[-new:].all()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("router", ["prefix", "top_k"])
@pytest.mark.parametrize("tokenizer", [byte_level(), bpe(), llama()], ids=["bytes", "bpe", "llama"])
def test_loglikelihoods_are_sums_of_log_softmax(
    tokenizer: Tokenizer, router: str, batch_size: int
) -> None:
    model = tiny(f"{ROUTER}={router}", "blocks.1.router.capacity=0.5")
    adapter = HarnessModel(model, tokenizer, batch_size)
    found = adapter.loglikelihood(asked("loglikelihood", *PAIRS))
    wanted = [by_hand(model, tokenizer, pair) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], rel=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("tokenizer", [byte_level(), bpe(), llama()], ids=["bytes", "bpe", "llama"])
def test_every_byte_of_an_answer_is_scored_wherever_it_begins(tokenizer: Tokenizer) -> None:
    """Also where the tokenizer merges some of it, or all, into the context."""
    model, text = tiny(), "the door is open, and then some more words"
    adapter = HarnessModel(model, tokenizer, 4)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    words = [tokenizer.decode([token]) for token in tokens]
    pairs = [(text[:at], text[at:]) for at in range(len(text))]
    found = adapter.loglikelihood(asked("loglikelihood", *pairs))
    for (before, _), (value, greedy) in zip(pairs, found, strict=True):
        known = len(before.rstrip())
        given = next(i for i in range(len(words)) if len("".join(words[: i + 1])) > known)
        begun = tokenizer.encode("").ids or [end_of_document(tokenizer)] * (given == 0)
        log_p_T, likeliest_T = log_p(model, begun + tokens)
        new = len(tokens) - given
        assert value == pytest.approx(log_p_T[-new:].sum()), before
        assert greedy == likeliest_T[-new:].all()


def test_what_is_too_long_is_cut_off_on_the_left() -> None:
    model = tiny(context=16)
    adapter = HarnessModel(model, byte_level(), 4)
    long, short = ("unseen " + "words " * 20, "to the end"), ("words words ", "to the end")
    [(cut, _), (whole, _)] = adapter.loglikelihood(asked("loglikelihood", long, short))
    tokens = list(b"words words to the end")[-17:]
    assert cut == pytest.approx(whole) == pytest.approx(log_p(model, tokens)[0][-11:].sum())


def test_what_is_longer_than_the_context_is_scored_in_windows() -> None:
    model = tiny(context=16)
    long = "x" * 20 + "y" * 20
    [found, nothing] = HarnessModel(model, byte_level(), 4).loglikelihood(
        asked("loglikelihood", ("unseen a", long), ("a", ""))
    )
    tokens = list(b"a" + long.encode())
    windows = [log_p(model, tokens[at : at + 17]) for at in (0, 16)]
    last = [part[-8:] for part in log_p(model, tokens[-17:])]
    assert found[0] == pytest.approx(sum(part.sum() for part, _ in [*windows, last]))
    assert found[1] == all(part.all() for _, part in [*windows, last])
    assert nothing == (0.0, True)


def test_a_long_text_is_scored_in_windows_and_each_token_once() -> None:
    model = tiny(context=16)
    text = "It is a long text, with more than one window."
    adapter = HarnessModel(model, byte_level(), 4)
    found = adapter.loglikelihood_rolling(
        asked("loglikelihood_rolling", (text,), ("short",), ("",))
    )
    tokens = [256, *text.encode()]
    first = log_p(model, tokens[:17])[0].sum()
    second = log_p(model, tokens[16:33])[0].sum()
    last = log_p(model, tokens[-17:])[0][-(len(tokens) - 33) :].sum()
    short = log_p(model, [256, *b"short"])[0].sum()
    assert found == pytest.approx([first + second + last, short, 0.0])


def test_greedy_answers_are_what_the_scores_call_greedy() -> None:
    model = tiny(f"{ROUTER}=top_k")
    adapter = HarnessModel(model, bpe(), 4)
    prompts = ["the door", "", "and then some more words", "is", "far too long " * 9]
    options = {"until": ["zzz"], "max_gen_toks": 8}
    answers = adapter.generate_until(asked("generate_until", *[(p, options) for p in prompts]))
    assert all(len(adapter.tok_encode(answer)) for answer in answers)
    end = end_of_document(adapter.text)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = adapter.tok_encode(prompt)[8 - 64 :] or [end]
        for _ in range(8):  # one full forward pass per token
            with torch.no_grad(), model.causal_routing():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        new = tokens[-8:]
        new = new[: new.index(end)] if end in new else new
        assert answer == adapter.text.decode(new)
        [cut] = adapter.generate_until(
            asked("generate_until", (prompt, {"until": [answer[2:4]], "max_gen_toks": 8}))
        )
        assert cut == answer.split(answer[2:4])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "requires sampled answers"),
        (
            {"max_gen_toks": 64},
            "answers of up to 64 tokens, which need a longer context than the model's 64",
        ),
    ],
)
def test_answers_that_the_model_cannot_give_are_refused(
    options: dict[str, Any], message: str
) -> None:
    adapter = HarnessModel(tiny(), byte_level(), 4)
    with pytest.raises(TaskError, match=message):
        adapter.generate_until(asked("generate_until", ("a", options)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folders = [SHIPPED / name for name in ("arc", "piqa", "gsm8k", "lambada")]
    few = TaskManager(include_defaults=False, include_path=folders)
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda names: few)
    return write_examples(tmp_path)


def test_accuracies_are_those_of_the_likeliest_choices(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = tiny(f"{ROUTER}=top_k", context=128), byte_level()
    names = [
        "arc_easy",
        "piqa",
        "lambada_openai",
    ]  # the last one prints while it computes its error by bootstrap
    found, whole = run_tasks(load_tasks(names, data_dir=folder), model, text)
    assert model.leaks  # as before
    assert capsys.readouterr().out == ""
    right = []
    for row in ARC_EASY:
        choices = [
            (f"Question: {row['question']}\nAnswer:", f" {text}") for text in row["choices"]["text"]
        ]
        scores = [by_hand(model, text, pair)[0] for pair in choices]
        right.append(np.argmax(scores) == "ABCD".index(row["answerKey"]))
    for row in PIQA:
        pairs = [
            (f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2")
        ]
        right.append(np.argmax([by_hand(model, text, pair)[0] for pair in pairs]) == row["label"])
    score = {(score.task, score.metric): score for score in found.scores}
    arc, piqa = score["arc_easy", "acc"], score["piqa", "acc"]
    assert (arc.value, piqa.value) == (np.mean(right[:8]), np.mean(right[8:]))
    assert (arc.examples, piqa.examples) == (8, 6)
    assert arc.standard_error == pytest.approx(np.std(right[:8], ddof=1) / math.sqrt(8))
    assert len(whole["samples"]["arc_easy"]) == 8
    read = [len(text.encode("".join(a)).ids) - 1 for s in _arguments(whole) for a in s]
    assert found.tokens == sum(read)  # padding is not read


def _arguments(whole: Any) -> list[Any]:
    return [sample["arguments"] for task in whole["samples"].values() for sample in task]


def test_shots_are_the_same_in_every_run_and_a_limit_bounds_the_examples(folder: Path) -> None:
    model = tiny(context=512)
    loaded = load_tasks(["gsm8k"], data_dir=folder, num_fewshot=3)
    for task in loaded["tasks"].values():
        task.set_config(key="generation_kwargs", value={"until": ["?"], "max_gen_toks": 4})
    runs = [run_tasks(loaded, model, byte_level(), limit=1) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    prompts = [whole["samples"]["gsm8k"][0]["arguments"] for _, whole in runs]
    assert prompts[0] == prompts[1]
    assert sum(row["question"] in prompts[0][0][0] for row in GSM8K) == 4
    assert {score.examples for score in runs[0][0].scores} == {1}
    assert runs[0][0].scores[0].metric == "exact_match (strict-match)"


@pytest.mark.slow
def test_the_harness_own_adapter_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # the harness's own model class needs it
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    text, end = bpe(), "<|endoftext|>"
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    text.save(str(tmp_path / "theirs" / "tokenizer.json"))
    import_pretrained(tmp_path / "theirs", tmp_path / "ours")
    ours = HarnessModel(load_checkpoint(tmp_path / "ours").model, text, 4)
    fast = PreTrainedTokenizerFast(tokenizer_object=text, eos_token=end, pad_token=end)
    own = HFLM(pretrained=theirs, tokenizer=fast, batch_size=4, max_length=64, device="cpu")

    long = " ".join(before + after for before, after in PAIRS)
    requests: dict[str, list[Any]] = {
        "loglikelihood": [*PAIRS, (long, " the end")],
        "loglikelihood_rolling": [(long,), ("short",)],
        "generate_until": [
            (long, {"until": ["the"], "max_gen_toks": 9}),
            ("A", {"until": ["e"], "max_gen_toks": 9}),
        ],
    }
    for kind, arguments in requests.items():
        found, wanted = (getattr(lm, kind)(asked(kind, *arguments)) for lm in (ours, own))
        if kind == "generate_until":
            assert found == wanted
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-5)
