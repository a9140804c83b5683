"""Exported models: in transformers they are what they are here, and behave as its own do."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from typer.testing import CliRunner

import archdsl.interop.hf_export
from archdsl.cli.app import app
from archdsl.data.loading import load_data
from archdsl.data.tokenizers import encode, read_tokenizer
from archdsl.data.types import Data
from archdsl.interop.hf_export import ExportError, export, in_transformers, loaded
from archdsl.interop.hf_model import ArchdslConfig, ArchdslForCausalLM
from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from archdsl.nn.loop import DialError
from archdsl.testing import LAYER, small_model, some_tokens

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 251 + 1
NEW: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
LEAKING = ["blocks.1.router=top_k", "blocks.1.kv=shared", "tie_embeddings=true", "norm=layer"]

RICH = [
    "blocks.0={kind: stack, repeat: 2, body: [{kind: layer, attention: {head_size: 8, window: 5, "
    "qk_norm: true, queries_per_kv: 2, rope_scaling: {kind: linear, factor: 2}}}]}",
    "blocks.1={kind: loop, steps: 3, encoding: add, residual: delta, injection: linear, "
    "start: zeros, router: {kind: threshold, capacity: [0.7, 0.4], nested: true}, norm: rms, "
    "body: {kind: loop, steps: 2, router: {kind: predictor, capacity: 0.5}, body: {kind: layer, "
    "attention: {head_size: 8}}}}",
    "final_norm=false",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text(f"some {split} words\n" * 50, encoding="utf-8")
    return load_data(str(folder), cache=tmp_path_factory.mktemp("cache"))


def saved(path: Path, text: Data | None, *overrides: str) -> Checkpoint:
    """Of a model that is no longer as it was initialised."""
    model = build(load("tiny", overrides=["dim=32", *overrides]), seed=1)
    model.train()(TOKENS)
    model.commit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_checkpoint(path, model, tokenizer_from=text, provenance={})
    return load_checkpoint(path)


@pytest.fixture(scope="module", params=["causal", "leaking", "rich"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Data
) -> Iterator[tuple[Checkpoint, Any, Path]]:
    """A checkpoint, the model its export loads by its own code, and the export."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = {"causal": [], "leaking": LEAKING, "rich": RICH}[request.param]
    checkpoint = saved(folder / "checkpoint", text, *overrides)
    checkpoint.model.eval()
    export(checkpoint, folder / "exported")
    with loaded(folder / "exported") as hub:
        assert not isinstance(hub, ArchdslForCausalLM)
        hub.config.use_cache = False  # other kernels, so other bits
        yield checkpoint, hub, folder / "exported"


@pytest.fixture
def here(pair: tuple[Checkpoint, Any, Path]) -> Checkpoint:
    return pair[0]


@pytest.fixture
def there(pair: tuple[Checkpoint, Any, Path]) -> Any:
    return pair[1].eval()


@pytest.fixture
def folder(pair: tuple[Checkpoint, Any, Path]) -> Path:
    return pair[2]


def llama(layers: int = 2) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
    ).eval()


@pytest.fixture
def leaking(there: Any) -> Iterator[Any]:
    """The exported model, whose routers see later tokens as those of the checkpoint do."""
    there.config.see_later_tokens = True
    yield there
    there.config.see_later_tokens = False


def test_the_logits_are_the_same(here: Checkpoint, leaking: Any) -> None:
    assert torch.equal(here.model(TOKENS), leaking(TOKENS).logits)
    half = TOKENS > 100
    torch.testing.assert_close(
        here.model(TOKENS, half)[half], leaking(TOKENS, attention_mask=half.long()).logits[half]
    )


def test_outside_of_training_no_router_sees_later_tokens(here: Checkpoint, there: Any) -> None:
    with here.model.causal_routing():
        assert torch.equal(here.model(TOKENS), there(TOKENS).logits)
    later = torch.cat((TOKENS[:, :6], TOKENS[:, 6:].flip(1)), 1)
    torch.testing.assert_close(there(TOKENS).logits[:, :6], there(later).logits[:, :6])
    assert not there.config.see_later_tokens


def test_the_dial_is_the_same(here: Checkpoint, there: Any) -> None:
    trained = there(TOKENS).logits
    for model in (here.model, there):
        model.dial(capacity=0.25, steps=4)
    with here.model.causal_routing():
        assert torch.equal(here.model(TOKENS), there(TOKENS).logits)
    assert not torch.equal(trained, there(TOKENS).logits)
    for model in (here.model, there):
        model.dial()
    assert torch.equal(trained, there(TOKENS).logits)


def greedy(checkpoint: Checkpoint, tokens: Tensor, steps: int) -> Tensor:
    cache, new = checkpoint.model.new_cache(), tokens
    with torch.no_grad():
        for _ in range(steps):
            new = checkpoint.model(new, None, cache)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, new), 1)
    return tokens


def test_greedy_generation_is_that_of_the_checkpoint(here: Checkpoint, there: Any) -> None:
    assert torch.equal(there.generate(TOKENS, **NEW), greedy(here, TOKENS, 10))


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams"],
)
def test_every_cache_generates_what_none_does(there: Any, how: dict[str, Any]) -> None:
    def generated(**cache: Any) -> Tensor:
        torch.manual_seed(0)
        return there.generate(TOKENS, **NEW, **how, **cache)

    without = generated(use_cache=False)
    assert torch.equal(generated(), without)
    assert torch.equal(generated(cache_implementation="static"), without)
    assert torch.equal(generated(prefill_chunk_size=5), without)
    assert len(torch.unique(without[:, 12:])) > 2


def test_without_a_cache_each_token_is_weighed_as_with_one(there: Any) -> None:
    how = NEW | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_one, without = (there.generate(TOKENS, **how, use_cache=u) for u in (True, False))
    torch.testing.assert_close(torch.stack(with_one.logits), torch.stack(without.logits))
    assert type(with_one.past_key_values).__name__ == "ArchdslCache"
    assert without.past_key_values is None


def test_padding_changes_no_real_token(there: Any) -> None:
    for mask in (torch.arange(12) >= 5, torch.arange(12) < 7):
        batch = there(TOKENS, attention_mask=torch.stack((mask, mask | True)).long()).logits
        assert torch.isfinite(batch).all()
        torch.testing.assert_close(batch[:1, mask], there(TOKENS[:1, mask]).logits)
        torch.testing.assert_close(batch[1:], there(TOKENS[1:]).logits)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_a_left_padded_batch_generates_what_each_row_does(there: Any, how: Any) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    batch = there.generate(TOKENS, attention_mask=mask, **NEW, **how)
    alone = there.generate(TOKENS[:1, 5:], **NEW, **how)
    assert torch.equal(batch[:1, 5:], alone)
    assert torch.equal(batch[1:], there.generate(TOKENS[1:], **NEW, **how))


def test_chunks_with_a_cache_are_one_pass(there: Any) -> None:
    first = there(TOKENS[:, :7], use_cache=True)
    assert first.past_key_values.get_seq_length() == 7
    second = there(TOKENS[:, 7:], past_key_values=first.past_key_values)
    assert second.past_key_values.get_seq_length() == 12
    with there.model.causal_routing():
        whole = there(TOKENS).logits
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole)


@torch.no_grad()
def test_a_copied_cache_branches_from_a_common_prompt(there: Any) -> None:
    prompt = there(TOKENS[:, :7], use_cache=True).past_key_values
    for end in (TOKENS[:, 7:], TOKENS[:, 7:].flip(1)):
        branch = copy.deepcopy(prompt)
        with there.model.causal_routing():
            whole = there(torch.cat((TOKENS[:, :7], end), 1)).logits
        torch.testing.assert_close(there(end, past_key_values=branch).logits, whole[:, 7:])


@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_and_selected(there: Any) -> None:
    cache = there(TOKENS[:, :7], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([True, False, True, True, False, False]))
    rows = torch.tensor([0, 0, 1])
    found = there(TOKENS[rows, 7:], past_key_values=cache).logits
    with there.model.causal_routing():
        torch.testing.assert_close(found, there(TOKENS[rows]).logits[:, 7:])


@torch.no_grad()
def test_a_cache_that_generate_returned_goes_on(there: Any) -> None:
    how: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    how["return_dict_in_generate"] = True
    first = there.generate(TOKENS[:, :4], max_new_tokens=3, use_cache=True, **how)
    known = torch.cat((first.sequences, TOKENS[:, :2]), 1)
    how["attention_mask"] = torch.ones_like(known)  # else a generated end would count as padding
    found = there.generate(
        known, max_new_tokens=4, past_key_values=first.past_key_values, use_cache=True, **how
    )
    wanted = there.generate(known, max_new_tokens=4, **how)
    assert torch.equal(found.sequences, wanted.sequences)


def test_outputs_have_the_shapes_of_llamas(there: Any) -> None:
    wanted: dict[str, Any] = {"output_hidden_states": True, "labels": TOKENS, "use_cache": True}
    theirs = llama(there.config.num_hidden_layers)(TOKENS, **wanted)
    ours = there(TOKENS, **wanted)
    assert list(ours) == list(theirs)
    shapes = [state.shape for state in ours.hidden_states]
    assert shapes == [state.shape for state in theirs.hidden_states]
    assert torch.equal(there.get_output_embeddings()(ours.hidden_states[-1]), ours.logits)
    assert torch.equal(there.get_input_embeddings()(TOKENS), ours.hidden_states[0])
    assert isinstance(there(TOKENS, return_dict=False), tuple)
    assert there(TOKENS).hidden_states is None


def test_the_loss_is_llamas(there: Any) -> None:
    labels = TOKENS.masked_fill(TOKENS % 3 == 0, -100)
    found = there(TOKENS, labels=labels)
    theirs = llama().loss_function(found.logits, labels, 257)
    torch.testing.assert_close(found.loss, theirs, rtol=0, atol=0)
    by_hand = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, by_hand)


def test_in_training_the_loss_is_also_the_routers(there: Any, folder: Path) -> None:
    model = type(there).from_pretrained(folder).train()
    found = model(TOKENS, labels=TOKENS)
    own = sum(model.model.trace.losses.values())
    by_hand = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(found.loss, by_hand + own)
    assert (own > 0) == ("predictor" in json.dumps(model.config.spec))


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model whose router learns by a loss of its own."""
    folder = tmp_path_factory.mktemp("predicting")
    checkpoint = saved(folder / "checkpoint", None, "blocks.1.router.kind=predictor")
    export(checkpoint, folder / "exported")
    return folder / "exported"


def trainer_loss(model: Any, rows: list[dict[str, Any]], parts: int, **settings: Any) -> float:
    """The loss of one batch as Trainer reports it; nothing is learned."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    settings |= {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "use_cpu": True}
    settings |= {"gradient_accumulation_steps": parts, "report_to": [], "save_strategy": "no"}
    with TemporaryDirectory() as folder:
        size = len(rows) // parts
        args = TrainingArguments(folder, per_device_train_batch_size=size, **settings)
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
    return float(trainer.state.log_history[0]["loss"])


CLASSIFIERS: dict[str, tuple[Any, dict[str, Any], Callable[..., Any]]] = {
    "sequence": (
        AutoModelForSequenceClassification,
        {"labels": [0, 1, 1, 1]},
        lambda found, labels: F.cross_entropy(found.logits, labels),
    ),
    "token": (
        AutoModelForTokenClassification,
        {"labels": torch.cat((TOKENS, TOKENS)) % 2},
        lambda found, labels: F.cross_entropy(found.logits.flatten(0, 1), labels.flatten()),
    ),
    "answer": (
        AutoModelForQuestionAnswering,
        {"start_positions": [0, 1, 2, 3], "end_positions": [3, 4, 5, 6]},
        lambda found, start_positions, end_positions: (
            (
                F.cross_entropy(found.start_logits, start_positions)
                + F.cross_entropy(found.end_logits, end_positions)
            )
            / 2
        ),
    ),
}


@pytest.mark.parametrize("head", CLASSIFIERS)
def test_a_classifier_has_the_losses_of_the_routers_and_the_same_loss_in_parts(
    predicting: Path, head: str
) -> None:
    cls, targets, loss_of_head = CLASSIFIERS[head]
    model = cls.from_pretrained(predicting, num_labels=2)
    model.config.pad_token_id = 0
    inputs = {"input_ids": torch.cat((TOKENS, TOKENS + 1))}
    inputs |= {name: torch.as_tensor(values) for name, values in targets.items()}
    rows = [{name: values[i] for name, values in inputs.items()} for i in range(4)]
    losses = [trainer_loss(model, rows, parts) for parts in (1, 2, 4)]
    torch.testing.assert_close(losses, losses[:1] * 3, rtol=1e-3, atol=0)
    found = model.train()(**inputs)
    own = sum(model.model.trace.losses.values())
    assert own > 0
    del inputs["input_ids"]
    torch.testing.assert_close(found.loss, loss_of_head(found, **inputs) + own)


def test_smoothed_labels_are_those_of_the_next_tokens(
    predicting: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer computes this loss itself, and shifts the labels of classes that it knows."""
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    model: Any = ArchdslForCausalLM.from_pretrained(predicting)
    smoothing = 1e-9
    found = trainer_loss(model, rows, 1, label_smoothing_factor=smoothing)
    assert "none by which the routers learn: add sum(model.model.trace.losses" in caplog.text
    logits = model(TOKENS).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert found == pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize("router", ["prefix", "threshold", "top_k", "predictor"])
def test_the_loss_of_a_batch_is_the_same_in_parts(router: str) -> None:
    """The Trainer passes the number of targets in all parts that one step accumulates."""
    spec = load("tiny", overrides=[f"blocks.1.router.kind={router}"])
    model = ArchdslForCausalLM(ArchdslConfig(spec.model_dump(mode="json"))).train()
    tokens = torch.cat((TOKENS, TOKENS.flip(1)))
    targets = torch.tensor(tokens[:, 1:].numel())
    losses = {
        parts: sum(
            model(part, labels=part, num_items_in_batch=targets).loss
            for part in tokens.chunk(parts)
        )
        for parts in (1, 2, 4)
    }
    whole = model(tokens, labels=tokens).loss
    torch.testing.assert_close(losses, dict.fromkeys(losses, whole))


def test_embeddings_may_come_in_and_few_logits_go_out(there: Any) -> None:
    embeds = there.get_input_embeddings()(TOKENS)
    whole = there(TOKENS).logits
    assert torch.equal(there(inputs_embeds=embeds).logits, whole)
    assert torch.equal(there(TOKENS, logits_to_keep=3).logits, whole[:, -3:])
    some = torch.tensor([0, 5])
    assert torch.equal(there(TOKENS, logits_to_keep=some).logits, whole[:, some])
    assert torch.equal(
        there.generate(inputs_embeds=embeds, **NEW), there.generate(TOKENS, **NEW)[:, 12:]
    )
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        there(TOKENS, inputs_embeds=embeds)


def test_checkpointing_changes_memory_and_no_gradient(there: Any, folder: Path) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = type(there).from_pretrained(folder).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(TOKENS, labels=TOKENS).loss.backward()
        assert model.is_activation_checkpointing == checkpointing
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_checkpointing_does_not_change_what_is_generated(there: Any, folder: Path) -> None:
    """Samples are drawn from models in training mode, where nothing of a pass was kept."""
    model = type(there).from_pretrained(folder)
    wanted = model.generate(TOKENS, **NEW, do_sample=False)
    model.train().activation_checkpointing_enable()
    assert torch.equal(model.generate(TOKENS, **NEW, do_sample=False), wanted)
    with pytest.raises(ValueError, match="cannot be used with a cache"):
        model(TOKENS, past_key_values=model.new_cache())


def test_weights_may_be_offloaded(there: Any, folder: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = type(there).from_pretrained(folder).eval()
    wanted = model(TOKENS).logits
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(model(TOKENS).logits, wanted)


def test_what_training_taught_the_routers_is_saved(
    there: Any, folder: Path, tmp_path: Path
) -> None:
    model = type(there).from_pretrained(folder)
    before = {name: one.clone() for name, one in model.named_buffers()}
    model.train()(TOKENS)
    model.save_pretrained(tmp_path)
    after = dict(type(there).from_pretrained(tmp_path).named_buffers())
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_saved_again_it_is_the_same_with_shared_weights_once(there: Any, tmp_path: Path) -> None:
    there.save_pretrained(tmp_path)
    again = type(there).from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS, use_cache=False).logits, there(TOKENS).logits)
    stored = load_file(tmp_path / "model.safetensors")
    held = {tensor.data_ptr(): tensor for tensor in there.state_dict().values()}
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in held.values())
    tied = there.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embedding.weight) == tied


@pytest.mark.parametrize("size", [300])
def test_a_model_of_another_vocabulary_is_saved_and_loaded(
    there: Any, folder: Path, tmp_path: Path, size: int
) -> None:
    model = type(there).from_pretrained(folder)
    before = model(TOKENS % 200).logits
    model.resize_token_embeddings(size)
    model.post_init()  # as wrappers call it
    wanted = model(TOKENS % 200).logits
    torch.testing.assert_close(wanted[..., :200], before[..., :200])
    model.save_pretrained(tmp_path)
    again = type(there).from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS % 200).logits, wanted)
    assert again.config.vocab_size == again.model.spec.vocab_size == size


@pytest.mark.parametrize("sizes", [("1GB", "20KB"), ("20KB", "1GB"), ("20KB", "40KB")])
def test_what_is_saved_last_is_what_loads(
    there: Any, folder: Path, tmp_path: Path, sizes: tuple[str, str]
) -> None:
    """In one file over shards, in shards over one file."""
    model = type(there).from_pretrained(folder)
    for size in sizes:
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.1)
        model.save_pretrained(tmp_path, max_shard_size=size)
    again = type(there).from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    whole = (tmp_path / "model.safetensors").exists()
    assert whole != (tmp_path / "model.safetensors.index.json").exists()
    assert whole == (sizes[-1] == "1GB")


def test_half_precision_is_half_precision(here: Checkpoint, there: Any, folder: Path) -> None:
    half = type(there).from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    wanted = here.model(TOKENS)
    assert (half(TOKENS).logits - wanted).abs().max() < 0.2 * wanted.abs().max()


def test_a_new_model_of_the_config_starts_as_ours_do(here: Checkpoint, there: Any) -> None:
    new = type(there)(there.config)
    assert torch.isfinite(new(TOKENS).logits).all()
    values = new.model.state_dict() | {"head.weight": new.lm_head.weight}
    for name, tensor in build(here.spec).state_dict().items():
        found = values[name]
        torch.testing.assert_close(found.mean(), tensor.mean(), rtol=0.1, atol=0.1)
        torch.testing.assert_close(
            found.square().mean(), tensor.square().mean(), rtol=0.5, atol=0.02
        )


def test_what_is_missing_is_drawn_and_the_rest_is_kept(
    there: Any, folder: Path, tmp_path: Path
) -> None:
    there.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    gone = "model.norm.weight" if there.model.spec.final_norm else "model.blocks.1.norm.weight"
    del stored[gone]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    found = type(there).from_pretrained(tmp_path).state_dict()
    assert torch.equal(found.pop(gone), torch.ones(32))
    assert all(torch.equal(found[name], there.state_dict()[name]) for name in found)


def test_a_head_with_its_earlier_name_is_not_drawn_at_random(tmp_path: Path) -> None:
    model = in_transformers(saved(tmp_path / "checkpoint", None, "tie_embeddings=false").model)
    model.save_pretrained(tmp_path / "exported")
    stored = load_file(tmp_path / "exported" / "model.safetensors")
    stored["model.head.weight"] = stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "exported" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="exported by an earlier archdsl"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def test_the_tokenizer_is_the_checkpoints(here: Checkpoint, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = "some words, täglich\n"
    assert here.tokenizer is not None
    ours = next(encode(read_tokenizer(here.tokenizer), [words]))[0].tolist()
    assert tokenizer(words).input_ids == ours
    assert tokenizer.decode(ours) == words
    assert tokenizer.eos_token_id == 256
    batch = tokenizer(["some words", "some"], padding=True, return_tensors="pt")
    assert batch.attention_mask[1].tolist() == [0] * 6 + [1] * 4
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 256
    assert generation["use_cache"]


def test_the_config_says_what_heads_there_are(there: Any) -> None:
    """Tools that know a model by its config ask for them, adapters of prompts for example."""
    heads = {(one.q.out_features, one.k.out_features) for one in attentions(there)}
    if len(heads) == 1:
        [(q_size, kv_size)] = heads
        assert there.config.num_attention_heads * there.config.head_dim == q_size
        assert there.config.num_key_value_heads * there.config.head_dim == kv_size
    else:
        assert not hasattr(there.config, "num_attention_heads")


def attentions(model: Any) -> list[Any]:
    return [one for one in model.modules() if type(one).__name__ == "Attention"]


def test_noise_at_the_start_is_that_of_the_positions_in_the_text(tmp_path: Path) -> None:
    loop = {"router": "null", "injection": "diagonal", "start": "noise"}
    model = build(load("tiny", overrides=[f"blocks.1.{key}={loop[key]}" for key in loop])).eval()
    assert export(Checkpoint(tmp_path, model, {}), tmp_path / "exported").difference < 1e-5
    hub: Any = in_transformers(model)
    assert hub.eval().model.standard
    padded_BT = torch.cat((torch.zeros(2, 3, dtype=torch.long), TOKENS), 1)
    mask_BT = (padded_BT > 0).long()
    start = hub(padded_BT[:, :8], attention_mask=mask_BT[:, :8], use_cache=True)
    rest = hub(padded_BT[:, 8:], attention_mask=mask_BT, past_key_values=start.past_key_values)
    found = torch.cat((start.logits, rest.logits), 1)[:, 3:]
    torch.testing.assert_close(found, model(TOKENS), rtol=1e-4, atol=1e-4)


def test_with_archdsl_it_loads_without_code_of_its_own(here: Checkpoint, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False)
    assert isinstance(model, ArchdslForCausalLM)
    assert model.model.spec == here.spec
    with here.model.causal_routing():
        assert torch.equal(model(TOKENS).logits, here.model(TOKENS))


STANDARD = {
    "plain": "[{kind: stack, repeat: 2, body: [{kind: layer, attention: {head_size: 8}}]}]",
    "looped": "[{kind: layer, attention: {head_size: 8, window: 6, queries_per_kv: 2}}, "
    "{kind: loop, steps: 3, residual: thinking, body: {kind: layer, "
    "attention: {head_size: 8, queries_per_kv: 2}}}]",
    "shared": "[{kind: loop, steps: 3, kv: shared, body: "
    "{kind: layer, attention: {head_size: 8}}}]",
}


@pytest.fixture(scope="module", params=STANDARD)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = saved(folder / "checkpoint", None, f"blocks={STANDARD[request.param]}")
    export(checkpoint, folder / "exported")
    with loaded(folder / "exported") as hub:
        yield hub.eval()


@pytest.fixture
def standard(exported: Any) -> Any:
    """An exported model without routers, by its own code."""
    exported.set_attn_implementation("sdpa")
    return exported


GREEDY: dict[str, Any] = NEW | {"do_sample": False, "attention_mask": torch.ones_like(TOKENS)}


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "use_cache": False},
    ],
    ids=str,
)
def test_without_routers_transformers_own_caches_serve(standard: Any, how: dict[str, Any]) -> None:
    one = GREEDY | {"attention_mask": torch.ones_like(TOKENS[:1])}
    same = {"num_beams": how["num_beams"]} if "num_beams" in how else {}
    wanted = standard.generate(TOKENS[:1], **one, **same)
    assert torch.equal(standard.generate(TOKENS[:1], **one, **how), wanted)


@torch.no_grad()
def test_an_assistant_changes_no_token(standard: Any) -> None:
    one = GREEDY | {"attention_mask": torch.ones_like(TOKENS[:1])}
    wanted = standard.generate(TOKENS[:1], **one)
    for assistant in (standard, llama()):
        found = standard.generate(TOKENS[:1], assistant_model=assistant, **one)
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_a_dynamic_cache_can_be_cropped(standard: Any) -> None:
    cache = DynamicCache(config=standard.config)
    standard(TOKENS, past_key_values=cache)
    if standard.config.sliding_window is None:  # what a window forgot is gone
        cache.crop(-5)
        found = standard(TOKENS[:, 7:], past_key_values=cache).logits
        torch.testing.assert_close(found, standard(TOKENS).logits[:, 7:])
    assert len(cache) == standard.config.num_hidden_layers


@torch.no_grad()
def test_texts_in_one_row_do_not_see_each_other(standard: Any) -> None:
    apart = standard(TOKENS, use_cache=False).logits.flatten(0, 1)
    positions = torch.arange(12).repeat(2)[None]
    packed = standard(TOKENS.reshape(1, -1), position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(packed, apart)


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_used_as_it_is(standard: Any) -> None:
    place = torch.arange(12)
    seen = place[:, None] >= place
    if standard.config.sliding_window is not None:
        pytest.skip("one mask for layers with and without a window is none of either")
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    found = standard(TOKENS, attention_mask=mask).logits
    torch.testing.assert_close(found, standard(TOKENS).logits)
    blind = mask.masked_fill(place < 3, torch.finfo(torch.float32).min)
    assert not torch.allclose(standard(TOKENS, attention_mask=blind).logits, found)


@torch.no_grad()
def test_eager_attention_returns_weights(standard: Any) -> None:
    wanted = standard(TOKENS).logits
    standard.set_attn_implementation("eager")
    found = standard(TOKENS, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, wanted)
    for weights in found.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert weights.shape == (2, 4, 12, 12)
        assert not weights.triu(1).any()
    assert len(found.hidden_states) == len(found.attentions) + 1, "one for each pass of each layer"
    assert torch.equal(found.hidden_states[0], standard.get_input_embeddings()(TOKENS))


@torch.no_grad()
def test_requests_are_batched_continuously(standard: Any) -> None:
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1].tolist(), TOKENS[0, 4:7].tolist()]
    how = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=64)
    answers = standard.generate_batch(prompts, how, small, progress_bar=False)
    for prompt, name in zip(prompts, sorted(answers), strict=True):
        given = torch.tensor([prompt])
        alone = standard.generate(
            given, **NEW | {"max_new_tokens": 6}, attention_mask=torch.ones_like(given)
        )
        assert answers[name].generated_tokens == alone[0, len(prompt) :].tolist()


def test_the_base_model_and_other_heads_load(standard: Any, tmp_path: Path) -> None:
    folder = standard.name_or_path
    states = AutoModel.from_pretrained(folder)(TOKENS).last_hidden_state
    torch.testing.assert_close(standard.lm_head(states), standard(TOKENS).logits)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.config.pad_token_id = 0
    model(TOKENS, labels=torch.tensor([0, 2])).loss.backward()
    assert model.get_input_embeddings().weight.grad.any()
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.score.weight, model.score.weight)


@torch.no_grad()
def test_steps_that_are_dialled_have_caches_of_their_own(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", None, f"blocks={STANDARD['looped']}")
    model: Any = in_transformers(checkpoint.model)
    model.eval()
    assert model.config.num_hidden_layers == 4
    model.dial(steps=5)
    assert model.config.num_hidden_layers == 6
    one = GREEDY | {"attention_mask": torch.ones_like(TOKENS[:1])}
    wanted = model.generate(TOKENS[:1], **one, use_cache=False)
    assert torch.equal(model.generate(TOKENS[:1], **one), wanted)


def test_what_cannot_be_is_said_in_one_line(there: Any) -> None:
    past = llama()(TOKENS, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"cannot use a DynamicCache: .* what its new_cache\(\) returns"
    ):
        there(TOKENS, past_key_values=past)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        there.generate(TOKENS[:1], assistant_model=llama(), **NEW)
    with pytest.raises(ValueError, match="cannot be quantized"):
        there.generate(TOKENS, cache_implementation="quantized", **NEW)
    with pytest.raises(ValueError, match="each text needs a row of its own"):
        there(TOKENS, position_ids=torch.arange(12)[None] % 6)
    with pytest.raises(ValueError, match=r"attention_mask must be .*, got \[2, 1, 12, 12\]"):
        there(TOKENS, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(Exception, match="129 tokens exceed") as error:
        there.generate(TOKENS, **NEW | {"max_new_tokens": 200})
    assert type(error.value).__name__ == "ContextFullError"
    there(TOKENS, position_ids=torch.arange(12).expand(2, -1))  # says what is so anyway


def test_the_code_is_the_same_whatever_the_spec_says(folder: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", None, 'description="import os; \\"\\"\\""')
    export(other, tmp_path / "exported")
    name = "modeling_archdsl.py"
    assert (tmp_path / "exported" / name).read_text() == (folder / name).read_text()
    assert not (tmp_path / "exported" / "tokenizer.json").exists()


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="mine exists and is no export; it is left as it is"):
        export(checkpoint, tmp_path / "mine")
    with pytest.raises(ExportError, match="is no export"):
        export(checkpoint, tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "exported")
    (tmp_path / "exported" / "old").touch()
    export(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported" / "old").exists()


def test_what_is_not_the_checkpoint_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(tmp_path / "checkpoint", None)
    wrong = archdsl.interop.hf_export.code().replace("self.norm(hidden_BTD)", "hidden_BTD")
    monkeypatch.setattr(archdsl.interop.hf_export, "code", lambda: wrong)
    with pytest.raises(ExportError, match=r"logits differ by .*; nothing was written"):
        export(checkpoint, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_command_says_that_a_router_sees_later_tokens(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint", None, *LEAKING)
    words = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported")]
    said = CliRunner().invoke(app, words).stdout
    assert "note: in training its router sees later tokens" in said
    assert json.loads((tmp_path / "exported/config.json").read_text())["see_later_tokens"] is False


def test_the_command_says_the_difference_it_measured(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint", None)
    words = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["largest_difference"] <= 1e-5
    assert facts["compared_tokens"] == 256
    assert not facts["sees_later_tokens_in_training"]
    assert "differ from the checkpoint's by at most" in CliRunner().invoke(app, words).stdout


def test_without_transformers_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "archdsl.interop.hf_export")
    done = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / "exported")])
    assert done.exit_code == 1
    assert done.stderr == "exporting needs transformers: pip install 'archdsl[transformers]'\n"


ALONE = """
import json, sys
from pathlib import Path

BLOCKED = {"archdsl", "pydantic", "einops", "optuna"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)


sys.meta_path.insert(0, Blocker())

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    wanted = load_file(folder.with_suffix(".safetensors"))
    tokens, mask = wanted["tokens"], wanted["mask"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    assert not {name.partition(".")[0] for name in sys.modules} & BLOCKED
    with torch.no_grad():
        print(json.dumps({
            "logits": (model(tokens).logits - wanted["logits"]).abs().max().item(),
            "padded": (
                model(tokens, attention_mask=mask).logits - wanted["padded"]
            )[mask.bool()].abs().max().item(),
            "again": (again(tokens).logits - model(tokens).logits).abs().max().item(),
            "greedy": model.generate(tokens, max_new_tokens=10, eos_token_id=None).tolist(),
            "text": tokenizer("some words").input_ids,
            "files": sorted(path.name for path in (folder / "again").iterdir()),
        }))
"""


@pytest.mark.slow
def test_the_folders_need_torch_and_transformers_alone(tmp_path: Path, text: Data) -> None:
    """All folders are loaded in one process, which imports transformers once."""
    models = {"leaking": LEAKING, "rich": RICH}
    here = {name: saved(tmp_path / f"{name}-own", text, *models[name]) for name in models}
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = mask[1, 9:] = 0
    for name, checkpoint in here.items():
        export(checkpoint, tmp_path / name)
        model = checkpoint.model.eval()
        with torch.no_grad(), model.causal_routing():
            logits, padded = model(TOKENS), model(TOKENS, mask.bool())
        wanted = {"tokens": TOKENS, "mask": mask, "logits": logits, "padded": padded}
        save_file(wanted, tmp_path / f"{name}.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *(str(tmp_path / name) for name in here)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    for line, (name, checkpoint) in zip(lines, here.items(), strict=True):
        found = json.loads(line)
        assert max(found["logits"], found["padded"]) <= 1e-5, name
        assert found["again"] == 0, name
        assert found["greedy"] == greedy(checkpoint, TOKENS, 10).tolist(), name
        assert found["text"] == list(b"some words"), name
        assert "modeling_archdsl.py" in found["files"], name


@torch.no_grad()
def test_what_is_saved_of_a_dialled_model_says_what_it_was_trained_with(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", None, f"blocks={STANDARD['looped']}")
    model: Any = in_transformers(checkpoint.model)
    model.dial(steps=5)
    model.save_pretrained(tmp_path / "saved")
    assert model.config.num_hidden_layers == len(model.model.calls) == 6
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["looped", "shared"])
def test_no_cache_goes_on_at_another_setting_of_the_dial(kind: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", None, f"blocks={STANDARD[kind]}")
    model: Any = in_transformers(checkpoint.model)
    for steps in (2, 5):
        model.dial()
        cache = model(TOKENS, use_cache=True).past_key_values
        model.dial(steps=steps)
        with pytest.raises(DialError, match="begin with a new one"):
            model(TOKENS, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["last", "all"])
def test_where_passes_attend_to_passes_before_the_cache_is_archdsls_own(kv: str) -> None:
    overrides = [f"blocks.1.kv={kv}", *(["blocks.1.router=null"] if kv == "all" else [])]
    model: Any = in_transformers(build(load("tiny", overrides=overrides), seed=1).eval())
    assert not model.model.standard
    whole, cache = model(TOKENS, use_cache=False).logits, model.new_cache()
    for part in (slice(0, 7), slice(7, 8), slice(8, None)):
        found = model(TOKENS[:, part], past_key_values=cache).logits
        torch.testing.assert_close(found, whole[:, part])


@torch.no_grad()
def test_a_mask_may_have_more_tokens_but_not_fewer(standard: Any) -> None:
    wanted = standard(TOKENS).logits
    long = torch.ones(2, 20)
    cache = StaticCache(config=standard.config, max_cache_len=20)
    for part in (slice(0, 8), slice(8, 12)):
        found = standard(TOKENS[:, part], attention_mask=long, past_key_values=cache).logits
        torch.testing.assert_close(found, wanted[:, part])
    cache = standard(TOKENS[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"tokens so far\], here \[.., 12\], got \[2, 4\]"):
        standard(TOKENS[:, 8:], attention_mask=long[:, :4], past_key_values=cache)


def test_it_is_exported_by_torch_for_any_number_of_tokens(standard: Any) -> None:
    length = {1: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "use_cache": False}
    shapes = {"input_ids": length, "attention_mask": length, "use_cache": None}
    program = torch.export.export(standard, (), inputs, dynamic_shapes=shapes).module()
    short = TOKENS[:, :7]
    found = program(input_ids=short, attention_mask=torch.ones_like(short), use_cache=False)
    torch.testing.assert_close(found.logits, standard(short).logits)


def test_in_threads_no_router_is_left_as_another_thread_found_it() -> None:
    model: Any = in_transformers(build(load("tiny", overrides=LEAKING), seed=1))
    first, second = model.model.causal_routing(), model.model.causal_routing()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model.model.leaks, "the second block still runs"
    second.__exit__(None, None, None)
    assert model.model.leaks


def test_what_the_installed_class_saves_has_the_code(folder: Path, tmp_path: Path) -> None:
    ArchdslForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    code = "modeling_archdsl.py"
    assert (tmp_path / code).read_bytes() == (folder / code).read_bytes()


def test_a_setting_given_at_loading_is_also_of_what_is_saved(tmp_path: Path) -> None:
    model: Any = in_transformers(build(load("tiny", overrides=LEAKING), seed=1))
    model.save_pretrained(tmp_path / "tied")
    changed = {"tie_word_embeddings": False, "max_position_embeddings": 64, "pad_token_id": 3}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", **changed)
    model.save_pretrained(tmp_path / "untied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not again.model.spec.tie_embeddings
    assert again.model.spec.context == 64
    assert again.config.pad_token_id == 3


EXPERTS = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8}


@pytest.mark.parametrize(
    "loop",
    [{"exit": "gate"}, {"body": {**LAYER, "ffn": EXPERTS}}],
    ids=["gate", "experts"],
)
def test_padding_teaches_exits_and_experts_nothing(loop: dict[str, Any]) -> None:
    spec = small_model({"kind": "loop", "steps": 3, "body": LAYER} | loop)
    model = ArchdslForCausalLM(ArchdslConfig(spec=spec.model_dump(mode="json"))).train()
    tokens_BT = some_tokens(spec)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[:, 8:] = 0
    alone = model(tokens_BT[:, :8], labels=tokens_BT[:, :8]).loss
    labels_BT = tokens_BT.masked_fill(mask_BT == 0, -100)
    padded = model(tokens_BT, attention_mask=mask_BT, labels=labels_BT).loss
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    for one in model.model.counting:
        assert [int(load.sum()) for load in one.pending.values()] == [2 * 2 * 8] * 3
