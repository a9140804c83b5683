"""Checkpoints load bit for bit what was saved, and everything else is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from archdsl.data.loading import SkillData, load_data
from archdsl.data.skills import parse_skill
from archdsl.data.types import Data
from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_training,
    load_weights,
    save_checkpoint,
)
from archdsl.model.language_model import LanguageModel
from tests.training.damage import change_json, change_tensors, forge

TOKENS = torch.arange(32).reshape(2, 16)


def tiny(*overrides: str, seed: int = 0) -> LanguageModel:
    return build(load("tiny", overrides=["dim=32", *overrides]), seed=seed)


@pytest.fixture
def text(tmp_path: Path) -> Data:
    (tmp_path / "text").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(
            f"some {split} words\n" * 50, encoding="utf-8"
        )
    return load_data(str(tmp_path / "text"), cache=tmp_path / "cache")


@pytest.fixture
def saved(tmp_path: Path, text: Data) -> Path:
    path = tmp_path / "saved"
    training = {"step": 7, "moments": torch.arange(3.0)}
    save_checkpoint(path, tiny(), tokenizer_from=text, provenance={"seed": 0}, training=training)
    return path


def test_a_model_loads_bit_for_bit_with_its_spec_and_tokenizer(saved: Path) -> None:
    found = load_checkpoint(saved)
    assert torch.equal(found.model(TOKENS), tiny()(TOKENS))
    assert found.spec == tiny().spec
    assert found.tokenizer == saved / "tokenizer.json"
    assert found.provenance["seed"] == 0
    assert found.provenance["spec"] == tiny().spec.fingerprint()
    training = load_training(saved)
    assert training["step"] == 7
    assert torch.equal(training["moments"], torch.arange(3.0))


def test_shared_weights_are_stored_once_and_are_shared_after_loading(tmp_path: Path) -> None:
    model = tiny("tie_embeddings=true")
    save_checkpoint(tmp_path / "tied", model, tokenizer_from=None, provenance={})
    found = load_checkpoint(tmp_path / "tied").model
    assert found.head.weight is found.embedding.weight
    assert torch.equal(found(TOKENS), model(TOKENS))
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())

    stored["head.weight"] = stored.pop("embedding.weight")  # the other name is as good
    save_file(stored, tmp_path / "renamed")
    forge(tmp_path / "tied", "model.safetensors", (tmp_path / "renamed").read_bytes())
    assert torch.equal(load_checkpoint(tmp_path / "tied").model(TOKENS), model(TOKENS))


def test_a_skill_has_no_tokenizer_and_a_model_without_training_no_state_to_continue(
    tmp_path: Path,
) -> None:
    skill = load_data("skill:p-hop")
    save_checkpoint(tmp_path / "new", tiny(), tokenizer_from=skill, provenance={})
    assert load_checkpoint(tmp_path / "new").tokenizer is None
    with pytest.raises(CheckpointError, match="holds a model, but not where its training stood"):
        load_training(tmp_path / "new")
    (tmp_path / "new" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not belong to this checkpoint"):
        load_checkpoint(tmp_path / "new")


FILES = ["model.safetensors", "spec.yaml", "tokenizer.json", "training.json"]
FILES += ["training.safetensors"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [(flip, "altered or cut short"), (truncate, "altered or cut short"), (Path.unlink, "missing")],
)
def test_a_damaged_file_is_refused_by_name(
    saved: Path, name: str, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(saved / name)
    with pytest.raises(CheckpointError, match=rf"saved/{name} (was|is) {complaint}"):
        (load_training if name.startswith("training") else load_checkpoint)(saved)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b" " * (2**26 + 1), "longer than 67,108,864 bytes"),
        (b"[1]", "an object was expected, got a list"),
        (b'{"format": 99}', "has checkpoint format 99; this version reads 1"),
        (b'{"format": 1}', "does not say which files belong to it"),
        (b'{"format": 1, "files": {"../../secret": ""}}', "does not say which files"),
    ],
)
def test_an_invalid_provenance_is_refused(saved: Path, content: bytes, complaint: str) -> None:
    (saved / "provenance.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(saved)


def test_errors_differ_for_a_missing_folder_and_one_that_is_not_a_checkpoint(
    saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint: .*did you mean .*saved\?"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("head.weight"), "head.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is unexpected"),
        (
            lambda t: t.update({"head.weight": torch.ones(3, 4)}),
            r"head.weight is \[3, 4\], the spec makes it \[257, 32\]",
        ),
    ],
)
def test_the_error_names_tensors_that_do_not_fit_the_spec(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "forged")
    forge(saved, "model.safetensors", (saved / "forged").read_bytes())
    with pytest.raises(CheckpointError, match=f"does not fit the spec: {complaint}"):
        load_checkpoint(saved)


def learning() -> LanguageModel:
    """A model with a buffer that training changes."""
    return tiny("blocks.1.router.kind=threshold")


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    path = tmp_path / "learned"
    training = {"step": 7, "moments": torch.arange(3.0)}
    about = {"seed": 0, "step": 7}
    save_checkpoint(path, learning(), tokenizer_from=None, provenance=about, training=training)
    return path


@pytest.mark.parametrize("name", ["head.weight", "blocks.1.router.quantiles_RQ"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "bool", "complex64", "float8_e4m3fn"])
def test_weights_of_a_type_that_would_be_cast_are_refused_by_name(
    learned: Path, name: str, dtype: str
) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(getattr(torch, dtype))

    change_tensors(learned, "model.safetensors", cast)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(learned)
    told = f"{learned}/model.safetensors: {name} is of type {dtype}, and must be of bfloat16 or "
    assert str(error.value) == told + "float16 or float32 or float64"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_other_precision_are_converted(learned: Path, dtype: str) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"] = tensors["head.weight"].to(getattr(torch, dtype))

    change_tensors(learned, "model.safetensors", cast)
    found = load_checkpoint(learned).model.head.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, learning().head.weight.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head.weight", math.nan),
        ("embedding.weight", math.inf),
        ("blocks.0.attention_norm.weight", -math.inf),
        ("blocks.1.router.quantiles_RQ", math.nan),
    ],
)
def test_weights_without_finite_values_are_refused_by_name(
    learned: Path, name: str, value: float
) -> None:
    change_tensors(
        learned, "model.safetensors", lambda tensors: tensors[name].view(-1)[:1].fill_(value)
    )
    for load_it in (load_checkpoint, lambda path: load_weights(path, learning())):
        with pytest.raises(CheckpointError) as error:
            load_it(learned)
        told = f"{learned}/model.safetensors: {name} has values that are not finite"
        assert str(error.value) == told


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("data", "text", "data: must be a mapping, got 'text'"),
        ("data", [1], "data: must be a mapping, got a list"),
        ("data", {"name": 3}, "data.name: must be text, got 3"),
        ("data", {"name": None}, "data.name: must be text, got null"),
        ("retrofit", 3, "retrofit: must be a mapping, got 3"),
        ("step", "7", "step: must be a whole number, got '7'"),
        ("seed", True, "seed: must be a whole number, got true"),
    ],
)
def test_a_provenance_of_another_shape_is_refused_by_its_field(
    learned: Path, key: str, value: object, complaint: str
) -> None:
    change_json(learned, "provenance.json", lambda about: about.update({key: value}))
    for load_it in (load_checkpoint, load_training):
        with pytest.raises(CheckpointError) as error:
            load_it(learned)
        assert str(error.value) == f"{learned}/provenance.json: {complaint}"


def test_a_state_of_training_without_its_tensors_is_refused(learned: Path) -> None:
    (learned / "training.safetensors").unlink()
    change_json(
        learned, "provenance.json", lambda about: about["files"].pop("training.safetensors")
    )
    with pytest.raises(CheckpointError, match=r"learned/training.safetensors is missing"):
        load_training(learned)


def test_a_pickle_in_place_of_the_weights_is_never_loaded(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (saved / "exploded",)

    forge(saved, "model.safetensors", pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_checkpoint(saved)
    assert not (saved / "exploded").exists()


def test_a_spec_far_larger_than_its_weights_is_refused_before_it_is_built(saved: Path) -> None:
    spec = (saved / "spec.yaml").read_text().replace("dim: 32", "dim: 65536")
    forge(saved, "spec.yaml", spec.encode())
    with pytest.raises(CheckpointError, match="does not fit the spec"):
        load_checkpoint(saved)


class Full(SkillData):
    """Simulates a disk that is full after some bytes."""

    def save_tokenizer(self, path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left on device")


def test_a_checkpoint_is_written_completely_or_the_old_one_stays(
    saved: Path, tmp_path: Path
) -> None:
    full = Full(parse_skill("p-hop"))
    for path in (saved, tmp_path / "new"):
        with pytest.raises(CheckpointError, match="could not be written: no space left"):
            save_checkpoint(path, tiny(seed=1), tokenizer_from=full, provenance={})
    assert torch.equal(load_checkpoint(saved).model(TOKENS), tiny()(TOKENS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "saved", "text"]


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    save_checkpoint(tmp_path / "made", tiny(), tokenizer_from=None, provenance={})
    assert torch.equal(load_checkpoint(tmp_path / "made").model(TOKENS), tiny()(TOKENS))


def test_an_older_checkpoint_is_replaced_but_no_other_folder(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(saved, tiny(seed=1), tokenizer_from=None, provenance={})
    assert torch.equal(load_checkpoint(saved).model(TOKENS), tiny(seed=1)(TOKENS))
    assert not (saved / "training.json").exists()
    with pytest.raises(CheckpointError, match="exists and is no checkpoint; it is left as it is"):
        save_checkpoint(tmp_path / "text", tiny(), tokenizer_from=None, provenance={})
    assert len(list((tmp_path / "text").iterdir())) == 3


def test_a_folder_may_be_a_text(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "made"), tiny(), tokenizer_from=None, provenance={})
    assert torch.equal(load_checkpoint(str(tmp_path / "made")).model(TOKENS), tiny()(TOKENS))


def test_a_spec_in_place_of_a_checkpoint_is_told_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny\n")
    for spec in (str(tmp_path / "mine.yaml"), "tiny"):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(spec)
        told = f"{spec} is a spec and no checkpoint: `archdsl train {spec}` makes one of it"
        assert str(error.value) == told
