"""Each skill equals its definition in plain loops, and its chance level is that of its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archdsl.data.skills import (
    SKILLS,
    Arithmetic,
    PHop,
    Recall,
    SelectiveCopy,
    Skill,
    StateTracking,
    parse_skill,
)
from archdsl.data.types import IGNORE, DataError

SEEDS = st.integers(0, 2**32)


def p_hop(skill: PHop, tokens: list[int]) -> list[int]:
    answers = []
    for place in range(len(tokens)):
        for _ in range(skill.hops):
            earlier = [j for j in range(place) if tokens[j] == tokens[place]]
            place = earlier[-1] + 1 if earlier else -1
        answers.append(tokens[place] if place >= 0 else IGNORE)
    return answers


def state_tracking(skill: StateTracking, tokens: list[int]) -> list[int]:
    elements = list(permutations(range({"s3": 3, "s5": 5}[skill.group])))
    cards, answers = list(range(len(elements[0]))), []
    for token in tokens:
        cards = [elements[token][card] for card in cards]
        answers.append(elements.index(tuple(cards)))
    return answers


def arithmetic(skill: Arithmetic, tokens: list[int]) -> list[int]:
    m, answers, text = skill.modulus, [IGNORE] * len(tokens), ""
    for place, token in enumerate(tokens):
        symbol = str(token) if token < m else "+-*()="[token - m]
        if text.endswith("="):
            assert int(symbol) == answers[place - 1]  # the answer is shown after it was asked
            text = ""
        elif symbol == "=":
            assert len([c for c in text if c in "+-*"]) == skill.operands - 1
            answers[place] = eval(text, {"__builtins__": {}}) % m  # the oracle reads digits only
            text = "="
        else:
            text += symbol
    return answers


def selective_copy(skill: SelectiveCopy, tokens: list[int]) -> list[int]:
    a, separator = skill.alphabet, tokens.index(2 * skill.alphabet)
    marked = [token - a for token in tokens[:separator] if token >= a]
    assert tokens[separator + 1 :] == marked[:-1]
    assert len(marked) == skill.marked
    return [IGNORE] * separator + marked


def recall(skill: Recall, tokens: list[int]) -> list[int]:
    told = 2 * skill.pairs
    values = dict(zip(tokens[:told:2], tokens[1:told:2], strict=True))
    assert len(values) == skill.pairs
    return [IGNORE] * told + [values[key] for key in tokens[told:]]


def agrees(skill: Skill, definition: Callable[[Any, list[int]], list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens_BT, targets_BT = skill.generate(rng, 5)
    assert tokens_BT.shape == targets_BT.shape == (5, skill.length)
    assert tokens_BT.dtype == targets_BT.dtype == np.int64
    assert tokens_BT.min() >= 0
    assert max(tokens_BT.max(), targets_BT.max()) < skill.vocab_size
    for tokens, targets in zip(tokens_BT.tolist(), targets_BT.tolist(), strict=True):
        assert targets == definition(skill, tokens)


@given(SEEDS, st.integers(1, 5), st.integers(2, 6), st.integers(2, 41))
def test_p_hop_follows_the_last_occurrence(
    seed: int, hops: int, alphabet: int, length: int
) -> None:
    agrees(PHop(hops=hops, alphabet=alphabet, length=length), p_hop, seed)


@given(SEEDS, st.sampled_from(["s3", "s5"]), st.integers(2, 17))
def test_state_tracking_applies_each_permutation_after_the_others(
    seed: int, group: Any, length: int
) -> None:
    agrees(StateTracking(group=group, length=length), state_tracking, seed)


@given(SEEDS, st.integers(2, 10), st.integers(2, 6), st.integers(0, 40))
def test_answers_of_arithmetic_are_what_python_computes(
    seed: int, modulus: int, operands: int, more: int
) -> None:
    skill = Arithmetic(modulus=modulus, operands=operands, length=4 * operands - 2 + more)
    agrees(skill, arithmetic, seed)


@given(SEEDS, st.integers(2, 9), st.integers(1, 7), st.integers(0, 9))
def test_selective_copy_repeats_the_marked_tokens_in_order(
    seed: int, alphabet: int, marked: int, noise: int
) -> None:
    skill = SelectiveCopy(alphabet=alphabet, marked=marked, length=2 * marked + noise)
    agrees(skill, selective_copy, seed)


@given(SEEDS, st.integers(1, 8), st.integers(0, 5), st.integers(2, 9), st.integers(1, 9))
def test_recall_gives_the_value_of_the_key(
    seed: int, pairs: int, more: int, values: int, asked: int
) -> None:
    skill = Recall(pairs=pairs, keys=pairs + more, values=values, length=2 * pairs + asked)
    agrees(skill, recall, seed)


def test_p_hop_equals_an_example_computed_by_hand() -> None:
    """In 'a b a c', one jump from the second a leads to the b after the first a."""
    seen = next(
        targets
        for seed in range(500)
        for tokens, targets in [PHop(hops=1, length=4).generate(np.random.default_rng(seed), 1)]
        if tokens.tolist() == [[0, 1, 0, 2]]
    )
    assert seen.tolist() == [[IGNORE, IGNORE, 1, IGNORE]]


@pytest.mark.parametrize(
    "text",
    [
        *SKILLS,
        "p-hop,alphabet=7,hops=1",
        "state-tracking,group=s5",
        "arithmetic,operands=2",
        "arithmetic,operands=5,modulus=3",
        "arithmetic,modulus=10,operands=4",
    ],
)
def test_chance_is_the_share_of_the_most_frequent_answer(text: str) -> None:
    skill = parse_skill(text)
    targets_BT = skill.generate(np.random.default_rng(0), 20_000)[1]
    counts = np.bincount(targets_BT[targets_BT != IGNORE])
    shares = counts / counts.sum()
    assert shares.max() == pytest.approx(skill.chance, abs=0.01)


def test_arithmetic_has_every_tree_of_brackets_and_every_operator() -> None:
    tokens_BT, _ = Arithmetic(modulus=5, operands=3, length=10).generate(
        np.random.default_rng(0), 500
    )
    shapes = {"".join("x+-*()="[max(0, token - 4)] for token in row) for row in tokens_BT.tolist()}
    assert shapes == {
        shape for p in "+-*" for q in "+-*" for shape in (f"((x{p}x){q}x)=", f"(x{p}(x{q}x))=")
    }


def test_options_are_read_by_name() -> None:
    skill = parse_skill("p-hop, hops=2,length=16")
    assert skill == PHop(hops=2, length=16, alphabet=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p-hpo", "unknown skill 'p-hpo' .did you mean 'p-hop'.*known: p-hop, state-tracking"),
        ("", "unknown skill ''.*known: p-hop"),
        ("p-hop,hop=3", "option 'hop' is unknown .did you mean 'hops'.*alphabet=4"),
        ("p-hop,hops", "option 'hops' is without a value"),
        ("p-hop,hops=1,hops=2", "option 'hops' is given twice"),
        ("p-hop,hops=three", "hops: .*integer.*got 'three'"),
        ("p-hop,length=1000000000", "length: .*less than or equal to 4096.*got '1000000000'"),
        ("state-tracking,group=s4", "group: .*'s3' or 's5'.*got 's4'"),
        ("arithmetic,operands=9", "length must be at least .* 34$"),
        ("selective-copy,marked=17", "length must be at least .* 34$"),
        ("recall,pairs=17", "pairs must be at most keys = 16$"),
        ("recall,pairs=16", "length must be more than .* 32$"),
    ],
)
def test_the_error_for_a_wrong_option_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_skill(text)


@pytest.mark.parametrize("name", SKILLS)
def test_generating_a_batch_takes_less_time_than_training_on_it(name: str) -> None:
    skill = SKILLS[name]()
    times = []
    for seed in range(20):
        start = time.process_time()
        skill.generate(np.random.default_rng(seed), 64)
        times.append(time.process_time() - start)
    assert min(times) < 0.003
