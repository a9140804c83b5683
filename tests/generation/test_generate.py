"""Tests of generation: caches and batches change no token, and the figures can be recomputed.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch._dynamo.utils import counters

import archdsl
from archdsl.data.tokenizers import byte_level, train_bpe
from archdsl.generation import generate as generate_module
from archdsl.generation.generate import GenerateError, Generation, generation_runs
from archdsl.generation.sampling import probabilities
from archdsl.generation.sampling_config import Sampling
from archdsl.model.checkpoint import WEIGHTS, save_checkpoint
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel

BYTES = byte_level()
END = 256
ROUTER = "blocks.1.router.kind"
PROMPTS = [[72, 105], [END], [1, 2, 3, 4, 5, 6, 7], [200]]


def tiny(*overrides: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    spec = archdsl.load("tiny", overrides=["dim=32", "context=24", *overrides])
    return archdsl.build(spec, dtype=dtype)


TINY = tiny()


def without_cache(model: LanguageModel, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """Generate with one full forward pass per token."""
    tokens, rng = list(prompt), torch.Generator().manual_seed(sampling.seed)
    for _ in range(min(sampling.max_tokens, model.spec.context - len(prompt))):
        with model.causal_routing(), torch.no_grad():
            logits_V = model.eval()(torch.tensor([tokens]))[0, -1]
        share_V = probabilities(logits_V[None], sampling)[0]
        at = torch.rand((), generator=rng, dtype=torch.float64)
        token = (
            int((share_V.cumsum(0) <= at).sum()) if sampling.temperature else int(share_V.argmax())
        )
        if token == END:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def continued(
    model: LanguageModel, prompts: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    found = archdsl.generate(model, prompts, sampling, tokenizer=BYTES)
    return [row.tokens for row in found]


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 8),
    temperature=st.sampled_from([0, 0.7, 1.5]),
    top_k=st.none() | st.integers(1, 300),
    top_p=st.none() | st.floats(0.1, 1),
    seed=st.integers(0, 2**63 - 1),
)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{ROUTER}=top_k"],
        [f"{ROUTER}=threshold"],
        [f"{ROUTER}=predictor"],
        [f"{ROUTER}=random"],
        ["blocks.1.kv=shared"],
        ["blocks.1.kv=last"],
        ["blocks.1.kv=all"],
        ["blocks=[{kind: layer, attention: {head_size: 8}}]"],
    ],
    ids=["prefix", "top_k", "threshold", "predictor", "random", "shared", "last", "all", "plain"],
)
def test_a_cache_changes_no_token(overrides: list[str]) -> None:
    model = tiny(*overrides)
    for seed, temperature in ((0, 0), (1, 1.0)):
        sampling = Sampling(temperature=temperature, seed=seed, max_tokens=12)
        alone = [without_cache(model, prompt, sampling) for prompt in PROMPTS]
        assert continued(model, PROMPTS, sampling) == alone


@settings(max_examples=10)
@given(st.permutations(PROMPTS).map(lambda prompts: prompts[:3]), SAMPLINGS)
def test_a_row_of_a_batch_is_what_it_is_alone(prompts: list[list[int]], sampling: Sampling) -> None:
    alone = [continued(TINY, [prompt], sampling)[0] for prompt in prompts]
    assert continued(TINY, prompts, sampling) == alone


def test_long_prompts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = continued(TINY, PROMPTS, Sampling())
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 8)  # two tokens of each prompt
    assert continued(TINY, PROMPTS, Sampling()) == whole
    lengths: list[int] = []
    with TINY.embedding.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].size(1))
    ):
        continued(TINY, PROMPTS, Sampling(max_tokens=1))
    assert lengths == [2, 2, 2, 1]


def test_the_same_seed_writes_the_same_text_and_another_one_another() -> None:
    texts = [continued(TINY, PROMPTS, Sampling(seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_steps_are_those_of_one_pass_over_the_whole_text() -> None:
    for row in archdsl.generate(TINY, PROMPTS):
        tokens = (row.prompt + row.tokens)[:-1]  # the model did not read the last token
        with torch.no_grad():
            TINY(torch.tensor([tokens]))
        assert TINY.trace.steps_BT is not None
        assert row.steps == TINY.trace.steps_BT[0].tolist()
        assert row.thinking_steps == pytest.approx(sum(row.steps) / len(tokens))


def test_the_throughput_counts_what_was_read_and_how_much_was_thought() -> None:
    [run] = generation_runs(TINY, PROMPTS, Sampling(max_tokens=5))
    assert len(list(run)) == 5 * len(PROMPTS)
    prompts = sum(map(len, PROMPTS))
    assert run.prefill.tokens == prompts
    assert run.decode.tokens == 4 * len(PROMPTS)  # the last of each is not read
    of_prompts = sum(sum(row.steps[: len(row.prompt)]) for row in run.rows)
    of_texts = sum(sum(row.steps[len(row.prompt) :]) for row in run.rows)
    assert run.prefill.thinking_steps == pytest.approx(of_prompts / prompts)
    assert run.decode.thinking_steps == pytest.approx(of_texts / run.decode.tokens)
    # All further steps of this model are its two routed steps.
    for throughput in (run.prefill, run.decode):
        assert set(throughput.router_shares) == {"blocks.1.0", "blocks.1.1"}
        assert sum(throughput.router_shares.values()) == pytest.approx(throughput.thinking_steps)
        assert throughput.tokens_per_s is not None
        assert throughput.tokens_per_s > 0


def test_the_dial_sets_how_much_is_thought() -> None:
    model = tiny()
    model.dial(capacity=0)
    assert sum(archdsl.generate(model, PROMPTS)[0].steps) == 0
    model.dial(capacity=1, steps=3)
    assert set(archdsl.generate(model, PROMPTS)[0].steps) == {2}


class Scripted:
    """Make a model generate the given tokens, one after the other."""

    def __init__(self, model: LanguageModel, *said: int) -> None:
        self.said = iter(said)
        model.head.register_forward_hook(self)

    def __call__(self, _: object, __: object, logits_BTV: torch.Tensor) -> torch.Tensor:
        logits_BTV = torch.zeros_like(logits_BTV)
        logits_BTV[..., next(self.said)] = 1
        return logits_BTV


def told(said: bytes | list[int], *, stop: Sequence[str] = (), max_tokens: int = 50) -> Generation:
    model = tiny()
    Scripted(model, *said)
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    [found] = archdsl.generate(model, ["Hi"], sampling, tokenizer=BYTES, stop=stop)
    return found


def test_a_text_stops_for_one_of_four_reasons() -> None:
    ended = told([*b"one", END, *b"two"])
    assert (ended.text, ended.stopped, ended.tokens) == ("one", "end", list(b"one"))
    stopped = told(b"one. two", stop=["two", ". "])
    assert (stopped.text, stopped.stopped, stopped.tokens) == ("one", "stop", list(b"one. "))
    long = told(b"one two", max_tokens=5)
    assert (long.text, long.stopped) == ("one t", "length")
    full = told(b"x" * 30)
    assert (full.text, full.stopped) == ("x" * 22, "context")
    assert len(full.prompt) + len(full.tokens) == 24  # the context


def test_a_text_that_stops_in_a_batch_leaves_the_others_alone() -> None:
    model = tiny()
    with torch.no_grad():
        model.head.weight[END] *= 3
    rows = archdsl.generate(model, [[i] for i in range(40)], tokenizer=BYTES)
    assert {"end", "context"} <= {
        row.stopped for row in rows
    }  # otherwise the test would prove little
    for row in rows[::8]:
        assert archdsl.generate(model, [row.prompt], tokenizer=BYTES) == [row]


@pytest.mark.parametrize("router", ["prefix", "top_k"])
def test_at_fixed_shapes_as_on_cuda_all_is_the_same(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(f"{ROUTER}={router}")
    with torch.no_grad():
        model.head.weight[END] *= 3
    prompts, sampling = [[i, *[7] * (i % 5)] for i in range(20)], Sampling(seed=1)
    found = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(generate_module, "FIXED_SHAPE_DEVICES", devices)
        [run] = generation_runs(model, prompts, sampling, tokenizer=BYTES)
        found.append((list(run), run.rows, run.decode.routers, run.decode.tokens))
    assert {"end", "context"} <= {row.stopped for row in found[0][1]}
    assert found[0] == found[1]


@pytest.mark.filterwarnings("default")  # torch's compiler may warn
def test_a_compiled_step_generates_the_same_and_serves_all_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(f"{ROUTER}=prefix")
    prompts, sampling = [[i, *[7] * (i % 5)] for i in range(6)], Sampling(seed=1)
    want = archdsl.generate(model, prompts, sampling, tokenizer=BYTES, batch_size=2)
    step = partial(TokenStep, backend="aot_eager")
    monkeypatch.setattr(generate_module, "TokenStep", step)
    compiled = counters["stats"]["unique_graphs"]
    runs = generation_runs(model, prompts, sampling, tokenizer=BYTES, batch_size=2, compiled=True)
    found = []
    for run in runs:
        list(run)
        found.append(counters["stats"]["unique_graphs"] - compiled)
    assert [row for run in runs for row in run.rows] == want
    assert found[0] > 0
    assert found == found[:1] * 3
    assert all(run.preparation > 0 for run in runs)
    torch.compiler.reset()


def test_pieces_are_the_text_as_it_comes() -> None:
    model = tiny()
    Scripted(model, *"né€".encode(), END)
    [run] = generation_runs(model, ["Hi"], Sampling(temperature=0), tokenizer=BYTES)
    assert [(piece.row, piece.text) for piece in run] == [
        (0, text) for text in ("n", "", "é", "", "", "€", "")
    ]
    assert run.rows[0].text == "né€"


def test_what_was_held_back_comes_with_the_last_piece() -> None:
    model = tiny()
    Scripted(model, *b"a\n\xe2", END)
    [run] = generation_runs(model, ["Hi"], Sampling(temperature=0), tokenizer=BYTES, stop=["\n\n"])
    assert [piece.text for piece in run] == ["a", "", "", "\n\ufffd"]


def test_an_empty_prompt_begins_a_document() -> None:
    texts = archdsl.generate(TINY, ["", "a"], tokenizer=BYTES)
    assert [row.prompt for row in texts] == [[END], [97]]


def test_a_text_begins_as_the_tokenizer_of_a_pretrained_model_begins_it() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    model = tiny("vocab_size=258")
    texts = archdsl.generate(model, ["", "a"], tokenizer=tokenizer)
    assert [row.prompt for row in texts] == [[257], [257, 97]]


def test_a_model_laid_out_for_decoding_is_the_same_and_is_saved_as_before(tmp_path: Path) -> None:
    model = tiny("tie_embeddings=true")
    want = continued(model, PROMPTS, Sampling(temperature=0))
    assert model.for_decoding() is model
    assert continued(model, PROMPTS, Sampling(temperature=0)) == want
    assert model.head.weight is model.embedding.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, one in (("before", tiny("tie_embeddings=true")), ("after", model)):
        save_checkpoint(tmp_path / name, one, tokenizer_from=None, provenance={})
    before, after = (tmp_path / name / WEIGHTS for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_batches_change_nothing_but_the_time() -> None:
    whole = archdsl.generate(TINY, PROMPTS)
    assert archdsl.generate(TINY, PROMPTS, batch_size=3) == whole


def test_generating_leaves_no_trace_in_the_model() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    archdsl.generate(model, PROMPTS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(
        torch.tensor([[1, 2, 3]])
    ).sum().backward()  # fails if an inference tensor was kept in the model


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompt was given"),
        ([[1], []], "prompt 2 has no tokens"),
        ([[1, 257]], r"the prompt has tokens outside the range 0 to 256"),
        ([[-1]], r"the prompt has tokens outside the range 0 to 256"),
        (
            [[1] * 24],
            "the prompt has 24 tokens and the context of tiny is 24, .*: shorten the prompt",
        ),
        (["text"], "texts need a tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_in_words(
    prompts: list[list[int]], said: str
) -> None:
    with pytest.raises(GenerateError, match=said):
        archdsl.generate(TINY, prompts)


def test_what_else_does_not_fit_is_refused_before_anything_is_computed() -> None:
    bpe = train_bpe(["a a a a"], 258)
    with pytest.raises(
        GenerateError, match=r"has 258 tokens, but tiny has only a vocab_size of 257"
    ):
        archdsl.generate(TINY, ["a"], tokenizer=bpe)
    with pytest.raises(GenerateError, match="prompt 2 is not valid UTF-8"):
        archdsl.generate(TINY, ["a", "\ud800"], tokenizer=BYTES)
    with pytest.raises(GenerateError, match="none of them may be empty"):
        archdsl.generate(TINY, ["a"], tokenizer=BYTES, stop=[""])
    with pytest.raises(GenerateError, match="prompt 2 has 30 tokens"):
        generation_runs(TINY, [[1], [1] * 30], batch_size=1)


def test_a_model_that_diverged_is_no_silent_nonsense() -> None:
    model = tiny()
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(GenerateError, match="tiny computes logits that are not finite"):
        archdsl.generate(model, PROMPTS)
