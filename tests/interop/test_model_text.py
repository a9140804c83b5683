"""How texts begin and end: what a pretrained model says is kept at import, in use and at export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig

from archdsl.data.text_format import text_format_of
from archdsl.data.tokenizers import (
    beginning_tokens,
    byte_level,
    end_of_document,
    ends_of,
    read_tokenizer,
)
from archdsl.data.types import DataError
from archdsl.errors import ArchdslError
from archdsl.evaluation.data_choice import data_of
from archdsl.evaluation.lm_eval_model import HarnessModel
from archdsl.generation.generate import generate
from archdsl.generation.sampling_config import Sampling
from archdsl.interop.hf_export import export
from archdsl.interop.import_weights import import_pretrained
from archdsl.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.interop.test_import_weights import pretrained
from tests.texts import load_text, write_corpus

BEGIN, TURN, END, PAD = 257, 258, 259, 260  # beside the bytes and <|endoftext|>
WORDS = ["<|begin|>", "<|turn_end|>", "<|the_end|>", "<|pad|>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}


def chat_tokenizer(single: str = "<|begin|> $A") -> Tokenizer:
    """A tokenizer with special tokens of unusual names, one of which begins every text."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(WORDS)
    special = [(word, BEGIN + i) for i, word in enumerate(WORDS)]
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def instruct(folder: Path, **files: dict[str, Any]) -> None:
    """Save a model with two ends. ``files``: fields that its JSON files have beside the usual."""
    pretrained(folder)
    chat_tokenizer().save(str(folder / "tokenizer.json"))
    usual: dict[str, dict[str, Any]] = {
        "config": {"eos_token_id": TURN},
        "generation_config": {"eos_token_id": [TURN, END], "pad_token_id": PAD, **SAMPLING},
        "tokenizer_config": {
            "bos_token": "<|begin|>",
            "eos_token": {"__type": "AddedToken", "content": "<|turn_end|>"},
            "pad_token": "<|pad|>",
        },
    }
    for name, fields in usual.items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | fields | files.get(name, {})))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture
def chat(tmp_path: Path) -> Checkpoint:
    instruct(tmp_path / "chat")
    import_pretrained(tmp_path / "chat", tmp_path / "imported")
    return load_checkpoint(tmp_path / "imported")


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    assert checkpoint.tokenizer is not None
    return read_tokenizer(checkpoint.tokenizer)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, (TURN, END)),
        ({"generation_config": {"eos_token_id": END}}, (END,)),
        ({"generation_config": {"eos_token_id": None}}, (TURN,)),
        (
            {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [END, 10]}},
            None,
        ),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": None}}, (TURN,)),
    ],
)
def test_the_ends_are_those_that_the_model_declares(
    tmp_path: Path, files: dict[str, Any], wanted: tuple[int, ...] | None
) -> None:
    instruct(tmp_path / "chat", **files)
    import_pretrained(tmp_path / "chat", tmp_path / "imported")
    tokenizer = tokenizer_of(load_checkpoint(tmp_path / "imported"))
    assert ends_of(tokenizer) == (wanted or (END, 10))
    assert tokenizer.get_vocab_size() == 261  # nothing was added


def test_without_a_declared_end_nothing_is_invented(tmp_path: Path) -> None:
    nothing = {"eos_token_id": None}
    instruct(tmp_path / "chat", config=nothing, generation_config=nothing, tokenizer_config={})
    plain = chat_tokenizer().to_str().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "chat/tokenizer.json").write_text(plain)
    (tmp_path / "chat/tokenizer_config.json").unlink()
    import_pretrained(tmp_path / "chat", tmp_path / "imported")
    found = load_checkpoint(tmp_path / "imported")
    tokenizer = tokenizer_of(found)
    assert ends_of(tokenizer) == ()
    assert tokenizer.get_vocab_size() == 261
    assert beginning_tokens(tokenizer) == [BEGIN]
    with pytest.raises(DataError, match="no token that ends a text: name one as eos_token_id"):
        end_of_document(tokenizer)
    [row] = generate(found.model, ["a"], Sampling(max_tokens=5), tokenizer=tokenizer)
    assert row.stopped == "length"


@pytest.mark.parametrize("wrong", [300, -2, "</s>", 1.5, [TURN, None], True])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, wrong: object) -> None:
    instruct(tmp_path / "chat", generation_config={"eos_token_id": wrong})
    with pytest.raises(
        ArchdslError, match=r"generation_config.json: eos_token_id: must be a token"
    ):
        import_pretrained(tmp_path / "chat", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def always(checkpoint: Checkpoint, token: int) -> None:
    """Make the model's most likely token the same after every text."""
    bias = torch.zeros(checkpoint.spec.vocab_size)
    bias[token] = 1
    with torch.no_grad():
        checkpoint.model.head.weight.zero_()
    checkpoint.model.head._forward_hooks.clear()
    checkpoint.model.head.register_forward_hook(lambda _, __, logits: logits + bias)


@pytest.mark.parametrize("end", [TURN, END])
def test_generation_stops_at_any_end(chat: Checkpoint, end: int) -> None:
    tokenizer = tokenizer_of(chat)
    always(chat, end)
    greedy = Sampling(max_tokens=5, temperature=0)
    [row] = generate(chat.model, ["a"], greedy, tokenizer=tokenizer)
    assert (row.prompt, row.tokens, row.stopped) == ([BEGIN, 97], [], "end")
    options = {"until": ["x"], "max_gen_toks": 5}
    asked = [Instance("generate_until", {}, ("a", options), 0)]
    assert HarnessModel(chat.model, tokenizer, 1).generate_until(asked) == [""]
    always(chat, PAD)
    [row] = generate(chat.model, ["a"], greedy, tokenizer=tokenizer)
    assert row.stopped == "length"


@pytest.mark.parametrize(
    ("single", "begun"),
    [
        ("<|begin|> $A <|the_end|>", [BEGIN]),
        ("<|begin|> $A", [BEGIN]),
        ("$A <|the_end|>", []),
        ("<|the_end|> $A <|the_end|>", [END]),
        ("<|begin|> <|turn_end|> $A <|the_end|>", [BEGIN, TURN]),
        ("$A", []),
    ],
)
def test_a_text_is_begun_but_not_ended(single: str, begun: list[int]) -> None:
    assert beginning_tokens(chat_tokenizer(single)) == begun


@pytest.mark.parametrize(
    "told",
    [
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
    ],
    ids=str,
)
def test_what_is_added_to_texts_is_what_transformers_adds(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    """The tokenizer.json decides, whatever else is told."""
    instruct(tmp_path / "chat", tokenizer_config=told)
    import_pretrained(tmp_path / "chat", tmp_path / "imported")
    found = tokenizer_of(load_checkpoint(tmp_path / "imported"))
    wanted = AutoTokenizer.from_pretrained(tmp_path / "chat")("a").input_ids
    assert found.encode("a").ids == wanted
    assert beginning_tokens(found) == wanted[: wanted.index(97)]
    export(load_checkpoint(tmp_path / "imported"), tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("a").input_ids == wanted


def test_the_first_end_stands_between_documents_and_goes_on_with_the_training(
    tmp_path: Path, chat: Checkpoint
) -> None:
    corpus = write_corpus(tmp_path)
    data = load_text(corpus, tmp_path, str(chat.tokenizer))
    assert data.tokens["train"][0] == data.tokens["train"][-1] == TURN
    again = load_text(corpus, tmp_path, str(chat.tokenizer))
    assert ends_of(again.tokenizer) == (TURN, END)
    save_checkpoint(tmp_path / "trained", chat.model, tokenizer_from=again, provenance={})
    trained = tokenizer_of(load_checkpoint(tmp_path / "trained"))
    assert text_format_of(trained) == text_format_of(tokenizer_of(chat))
    byte_level().save(str(tmp_path / "plain.json"))
    plain = load_text(corpus, tmp_path, str(tmp_path / "plain.json"))
    assert plain.tokens["train"][0] == 256
    assert np.array_equal(plain.tokens["train"] == 256, data.tokens["train"] == TURN)
    assert data_of(chat, str(corpus)).fingerprint == data.fingerprint


def test_an_export_keeps_what_the_model_came_with(tmp_path: Path, chat: Checkpoint) -> None:
    export(chat, tmp_path / "exported")
    before = AutoTokenizer.from_pretrained(tmp_path / "chat")
    after = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(after, name) == getattr(before, name), name
    assert after("a").input_ids == before("a").input_ids == [BEGIN, 97]
    messages = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(messages, tokenize=False) == "hi<|turn_end|>"
    kept = GenerationConfig.from_pretrained(tmp_path / "exported")
    assert kept.eos_token_id == [TURN, END]
    assert kept.pad_token_id == PAD
    assert {name: getattr(kept, name) for name in SAMPLING} == SAMPLING


def test_settings_that_transformers_loads_but_does_not_save_are_kept(tmp_path: Path) -> None:
    odd = {"do_sample": False, "temperature": 0.6}
    instruct(tmp_path / "chat", generation_config=odd)
    import_pretrained(tmp_path / "chat", tmp_path / "imported")
    export(load_checkpoint(tmp_path / "imported"), tmp_path / "exported")
    found = json.loads((tmp_path / "exported/generation_config.json").read_text())
    assert found["temperature"] == 0.6


def test_what_could_name_a_file_or_code_is_left_out(tmp_path: Path) -> None:
    instruct(
        tmp_path / "chat",
        generation_config={"custom_generate": "evil/code", "top_k": [[[[1]]]], "min_p": None},
        tokenizer_config={"auto_map": {"AutoTokenizer": ["evil.py", None]}, "unk_token": "<none>"},
    )
    import_pretrained(tmp_path / "chat", tmp_path / "imported")
    kept = text_format_of(tokenizer_of(load_checkpoint(tmp_path / "imported")))
    assert kept is not None
    assert kept.generation == {"bos_token_id": 1, "pad_token_id": PAD} | SAMPLING
    assert set(kept.special_tokens) == {"bos_token", "eos_token", "pad_token"}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: f | {"ends": [-1]}, "ends.0: Input should be greater than or equal to 0"),
        (lambda f: f | {"ends": "</s>"}, "ends: Input should be a valid tuple"),
        (lambda f: f | {"more": 1}, "more: Extra inputs are not permitted"),
        (lambda f: [f], "an object was expected"),
    ],
)
def test_a_damaged_format_is_refused(
    tmp_path: Path, chat: Checkpoint, damage: Any, complaint: str
) -> None:
    path = tmp_path / "text_format.json"
    whole = json.loads((chat.path / "text_format.json").read_text())
    path.write_text(json.dumps(damage(whole)))
    (tmp_path / "tokenizer.json").write_bytes((chat.path / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=complaint) as error:
        read_tokenizer(tmp_path / "tokenizer.json")
    assert "text_format.json" in str(error.value)
