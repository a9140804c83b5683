"""Rotary frequencies are bit for bit those of pretrained models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from archdsl.blocks.attention import AttentionSpec
from archdsl.nn.block import Context
from archdsl.nn.rope import inverse_frequencies
from tests import naive

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 64}
THEIRS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, {"rope_type": "default"}),
        ({"kind": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (LLAMA3, {"rope_type": "llama3", "factor": 8.0, **THEIRS}),
    ],
    ids=["plain", "linear", "llama3"],
)
def test_frequencies_have_the_bits_of_transformers(
    theta: float, ours: dict[str, Any] | None, theirs: dict[str, Any]
) -> None:
    config = LlamaConfig(head_dim=64, rope_parameters={"rope_theta": theta, **theirs})
    spec = AttentionSpec.model_validate({"rope_theta": theta, "rope_scaling": ours})
    found_F = inverse_frequencies(theta, 64, spec.rope_scaling)
    assert found_F.equal(LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize("scaling", [{"kind": "linear", "factor": 3}, LLAMA3], ids=["linear", "3"])
def test_attention_rotates_as_defined(scaling: dict[str, Any]) -> None:
    naive.agrees(
        AttentionSpec.model_validate({"head_size": 8, "rope_scaling": scaling}),
        16,
    )


def test_llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    spec = AttentionSpec.model_validate({"rope_scaling": LLAMA3})
    plain_F, found_F = (inverse_frequencies(1e4, 64, s) for s in (None, spec.rope_scaling))
    turns_F = 64 * plain_F / (2 * torch.pi)
    fast_F, slow_F = turns_F > 4, turns_F < 1
    assert fast_F.any()
    assert slow_F.any()
    assert not (fast_F | slow_F).all()
    torch.testing.assert_close(found_F[fast_F], plain_F[fast_F])
    torch.testing.assert_close(found_F[slow_F], plain_F[slow_F] / 8)
    assert (found_F[:-1] > found_F[1:]).all()


def test_two_scalings_in_one_model_are_independent() -> None:
    x_BHTE, ctx = torch.ones(1, 1, 9, 8), Context()
    linear = AttentionSpec.model_validate({"rope_scaling": {"kind": "linear", "factor": 2}})
    plain, _ = ctx.rope(x_BHTE, 1e4)
    slowed, _ = ctx.rope(x_BHTE, 1e4, linear.rope_scaling)
    assert slowed[::2].equal(slowed[::2])
    torch.testing.assert_close(slowed[::2], plain[: len(slowed[::2])])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": "yarn"}, "unknown kind 'yarn' of rope_scaling; known kinds: linear, "),
        ({"rope_scaling": {"kind": "linear"}}, "is required: how many times longer"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "must be at least 1"),
        ({"rope_scaling": {"kind": "llama3", "factor": 8}}, "is required: the context of the"),
    ],
)
def test_an_incomplete_scaling_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AttentionSpec.model_validate(fields)


def test_conflicts_between_values_are_reported() -> None:
    scaling = LLAMA3 | {"low_freq_factor": 4.0}
    spec = AttentionSpec.model_validate({"rope_theta": None, "rope_scaling": scaling})
    assert [path for path, _ in spec.conflicts(64)] == [("rope_scaling",)]
    assert spec.rope_scaling is not None
    assert [path for path, _ in spec.rope_scaling.conflicts(64)] == [("high_freq_factor",)]
