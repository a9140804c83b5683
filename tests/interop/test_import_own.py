"""A folder that `archdsl export` wrote comes back, also after transformers saved it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from archdsl.data.loading import load_data
from archdsl.data.types import Data
from archdsl.errors import ArchdslError
from archdsl.interop.hf_export import export
from archdsl.interop.hf_model import ArchdslForCausalLM
from archdsl.interop.import_weights import import_pretrained
from archdsl.model.checkpoint import Checkpoint, load_checkpoint
from tests.interop.test_hf_export import LEAKING, RICH, TOKENS, saved

HEADS = ("model.head.weight", "lm_head.weight")  # of older and of newer exports


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text(f"some {split} words\n" * 50, encoding="utf-8")
    return load_data(str(folder), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def checkpoint(tmp_path: Path, text: Data) -> Checkpoint:
    """A checkpoint whose export is in the folder ``exported`` beside it."""
    found = saved(tmp_path / "checkpoint", text)
    export(found, tmp_path / "exported")
    return found


def back(folder: Path, **options: Any) -> Checkpoint:
    out = folder.parent / "back"
    import_pretrained(folder, out, **options)
    return load_checkpoint(out)


@pytest.mark.parametrize("overrides", [[], LEAKING, RICH], ids=["causal", "leaking", "rich"])
def test_an_export_comes_back_to_the_bit(tmp_path: Path, text: Data, overrides: list[str]) -> None:
    checkpoint = saved(tmp_path / "checkpoint", text, *overrides)
    export(checkpoint, tmp_path / "exported")
    found = back(tmp_path / "exported")
    assert found.spec == checkpoint.spec
    assert found.spec.fingerprint() == checkpoint.spec.fingerprint()
    wanted = checkpoint.model.state_dict()
    assert found.model.state_dict().keys() == wanted.keys()
    for name, tensor in found.model.state_dict().items():  # also what routers have learned
        assert torch.equal(tensor, wanted[name]), name
    assert torch.equal(found.model.eval()(TOKENS), checkpoint.model.eval()(TOKENS))
    assert found.tokenizer is not None
    assert checkpoint.tokenizer is not None
    assert found.provenance["imported"]["architecture"] == "archdsl"


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("head", HEADS)
def test_the_head_may_have_either_name(tmp_path: Path, checkpoint: Checkpoint, head: str) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        [name] = tensors.keys() & set(HEADS)
        tensors[head] = tensors.pop(name)

    changed(tmp_path / "exported/model.safetensors", rename)
    assert torch.equal(back(tmp_path / "exported").model(TOKENS), checkpoint.model(TOKENS))


@pytest.mark.parametrize("overrides", [[], LEAKING], ids=["untied", "tied"])
def test_what_transformers_saved_in_shards_with_more_tokens_comes_back(
    tmp_path: Path, text: Data, overrides: list[str]
) -> None:
    export(saved(tmp_path / "checkpoint", text, *overrides), tmp_path / "exported")
    model: Any = ArchdslForCausalLM.from_pretrained(tmp_path / "exported")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "exported" / name).read_bytes())
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    found = back(tmp_path / "again")
    assert found.spec.vocab_size == 300
    with found.model.causal_routing():
        assert torch.equal(found.model.eval()(TOKENS), model.eval()(TOKENS).logits)


def test_what_a_trainer_saved_comes_back(tmp_path: Path, checkpoint: Checkpoint) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    model: Any = ArchdslForCausalLM.from_pretrained(tmp_path / "exported")
    row = {"input_ids": TOKENS[0], "labels": TOKENS[0]}
    settings: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "report_to": []}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "runs"), save_strategy="no", **settings),
        train_dataset=[row] * 8,
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "exported"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    found = back(tmp_path / "trained")
    assert found.spec == checkpoint.spec
    assert found.tokenizer is not None
    with found.model.causal_routing():
        assert torch.equal(found.model.eval()(TOKENS), model.eval()(TOKENS).logits)
    assert not torch.equal(found.model(TOKENS), checkpoint.model.eval()(TOKENS))


def test_a_spec_from_before_its_vocabulary_grew_follows_the_config(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """Older exports did not change the spec when they were resized."""
    model: Any = ArchdslForCausalLM.from_pretrained(tmp_path / "exported")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "exported")
    path = tmp_path / "exported/config.json"
    config = json.loads(path.read_text())
    config["spec"]["vocab_size"] = 257
    path.write_text(json.dumps(config))
    assert back(tmp_path / "exported").spec.vocab_size == 300


def test_a_head_that_was_trained_apart_from_the_embedding_comes_back(
    tmp_path: Path, text: Data
) -> None:
    """An adapter that trains both matrices of a tied model unties them."""
    export(saved(tmp_path / "checkpoint", text, "tie_embeddings=true"), tmp_path / "exported")
    model: Any = ArchdslForCausalLM.from_pretrained(tmp_path / "exported")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(tmp_path / "exported")  # the config still ties them
    complaint = r"differ, but .* set tie_word_embeddings to false in .*config\.json"
    with pytest.raises(ArchdslError, match=complaint):
        back(tmp_path / "exported")
    model.config.tie_word_embeddings = False
    assert not model.config.spec["tie_embeddings"]
    model.save_pretrained(tmp_path / "exported")
    wanted = model.eval()(TOKENS).logits
    again: Any = ArchdslForCausalLM.from_pretrained(tmp_path / "exported")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.eval()(TOKENS).logits, wanted)
    path = tmp_path / "exported/config.json"
    config = json.loads(path.read_text())
    config["spec"]["tie_embeddings"] = True  # where it was edited by hand
    path.write_text(json.dumps(config))
    found = back(tmp_path / "exported")
    assert not found.spec.tie_embeddings
    with found.model.causal_routing():
        assert torch.equal(found.model.eval()(TOKENS), wanted)


def test_no_code_in_the_folder_is_run(tmp_path: Path, checkpoint: Checkpoint) -> None:
    for path in (tmp_path / "exported").glob("*.py"):
        path.write_text("raise SystemExit('this was run')")
    assert back(tmp_path / "exported").spec == checkpoint.spec


def test_a_name_and_a_shorter_context_may_be_given(tmp_path: Path, checkpoint: Checkpoint) -> None:
    found = back(tmp_path / "exported", name="other", context=64).spec
    assert (found.name, found.context) == ("other", 64)
    with pytest.raises(ArchdslError, match="has a context of 128 tokens, not 129"):
        back(tmp_path / "exported", context=129)


def test_a_model_of_no_text_needs_no_tokenizer(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", None)
    export(checkpoint, tmp_path / "exported")
    found = back(tmp_path / "exported")
    assert found.tokenizer is None
    assert found.spec == checkpoint.spec


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda t: t.update({NORM: torch.ones(32).int()}), f"{NORM} is I32, expected F32"),
        (lambda t: t.update({NORM: torch.ones(32).long()}), f"{NORM} is I64, expected F32"),
        (lambda t: t.update({NORM: torch.ones(32) * 1j}), f"{NORM} is C64, expected F32"),
        (lambda t: t.update({NORM: torch.ones(32).double()}), f"{NORM} is F64, expected F32"),
        (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM} has shape \[31\]"),
        (lambda t: t[NORM].fill_(torch.inf), f"{NORM} has values that are not finite"),
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is unexpected"),
    ],
)
def test_weights_that_cannot_be_are_named_with_their_file(
    tmp_path: Path, checkpoint: Checkpoint, damage: Any, complaint: str
) -> None:
    changed(tmp_path / "exported/model.safetensors", damage)
    with pytest.raises(ArchdslError, match=complaint) as error:
        back(tmp_path / "exported")
    assert str(tmp_path / "exported") in str(error.value)
    assert ("model.safetensors" in str(error.value)) == ("missing" not in complaint)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda c: c.pop("spec"), "config.json: spec: must be a mapping, got null"),
        (lambda c: c["spec"].update(dim=33), "dim"),
        (lambda c: c["spec"].update(blocks=[{"kind": "unheard-of"}]), "unknown kind"),
        (lambda c: c.update(vocab_size="many"), "vocab_size"),
    ],
)
def test_a_spec_that_is_none_is_refused(
    tmp_path: Path, checkpoint: Checkpoint, edit: Any, complaint: str
) -> None:
    path = tmp_path / "exported/config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ArchdslError, match=complaint) as error:
        back(tmp_path / "exported")
    assert "config.json" in str(error.value)
