"""Synthetic tasks that need depth, generated from a seed: what thinking buys, seen in minutes.

A skill draws sequences of tokens and, for some positions, the token to be predicted there. The
score is the share of those positions answered exactly. ``chance`` is the expected score of the best
constant guess; where all answers are equally likely this is also what a uniform guess gets.

Shapes: B sequences, T tokens, A alphabet, M marked tokens, R problems, N operands.
"""

from __future__ import annotations

from itertools import permutations
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archdsl.data.types import IGNORE, DataError
from archdsl.errors import did_you_mean

Ints = NDArray[np.int64]
LONGEST = 4096


class Skill(BaseModel):
    """A task and its difficulty; ``length`` counts the tokens of one sequence."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    length: int = Field(default=32, ge=2, le=LONGEST)

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def chance(self) -> float:
        raise NotImplementedError

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """tokens_BT and targets_BT; a target is IGNORE where nothing is asked."""
        raise NotImplementedError


class PHop(Skill):
    """Jump ``hops`` times to what followed the token's last earlier occurrence; say what is there.

    Sanford et al. 2024 (arXiv 2402.09268), asked at every position from which all hops exist.
    chance: renaming the alphabet changes nothing, so all answers are equally likely.
    """

    name = "p-hop"
    hops: int = Field(default=3, ge=1, le=64)
    alphabet: int = Field(default=4, ge=2, le=4096)

    @property
    def vocab_size(self) -> int:
        return self.alphabet

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        tokens_BT = rng.integers(self.alphabet, size=(batch, self.length))
        follower_BT = _after_last_occurrence(tokens_BT)
        place_BT = np.broadcast_to(np.arange(self.length), tokens_BT.shape)
        for _ in range(self.hops):
            place_BT = np.where(place_BT < 0, -1, np.take_along_axis(follower_BT, place_BT, 1))
        answer_BT = np.take_along_axis(tokens_BT, place_BT, 1)
        return tokens_BT, np.where(place_BT < 0, IGNORE, answer_BT)


def _after_last_occurrence(tokens_BT: Ints) -> Ints:
    """The place after the last earlier occurrence of the same token, or -1."""
    # a stable sort lines up the occurrences of a token, oldest first
    order_BT = tokens_BT.argsort(axis=1, kind="stable")
    sorted_BT = np.take_along_axis(tokens_BT, order_BT, 1)
    same = sorted_BT[:, 1:] == sorted_BT[:, :-1]
    follower_BT = np.full_like(tokens_BT, -1)
    np.put_along_axis(follower_BT, order_BT[:, 1:], np.where(same, order_BT[:, :-1] + 1, -1), 1)
    return follower_BT


class StateTracking(Skill):
    """The running product of permutations: each token is applied after all before it.

    chance: a product of uniform elements of a group is uniform.
    """

    name = "state-tracking"
    group: Literal["s3", "s5"] = "s3"
    length: int = Field(default=16, ge=2, le=LONGEST)

    @property
    def vocab_size(self) -> int:
        return len(self._elements)

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    @property
    def _elements(self) -> list[tuple[int, ...]]:
        return list(permutations(range(int(self.group[1]))))

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        table = _composition(self._elements)
        tokens_BT = rng.integers(len(table), size=(batch, self.length))
        targets_BT = tokens_BT.copy()
        for t in range(1, self.length):
            targets_BT[:, t] = table[tokens_BT[:, t], targets_BT[:, t - 1]]
        return tokens_BT, targets_BT


def _composition(elements: list[tuple[int, ...]]) -> Ints:
    """table[a, b] is the number of the permutation that applies b first, then a."""
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


class Arithmetic(Skill):
    """Expressions such as ``((3+1)*(2-4))=`` modulo ``modulus``, answered after each '='.

    Tokens: the digits, then + - * ( ) =. Sequences are problems with their answers, end to end,
    cut at ``length``. chance: the share of the most frequent answer (zero, for * makes it so).
    """

    name = "arithmetic"
    modulus: int = Field(default=5, ge=2, le=1000)
    operands: int = Field(default=3, ge=2, le=64)

    @model_validator(mode="after")
    def _holds_a_question(self) -> Self:
        if self.length < 4 * self.operands - 2:
            raise ValueError(f"length must be at least 4 * operands - 2 = {4 * self.operands - 2}")
        return self

    @property
    def vocab_size(self) -> int:
        return self.modulus + 6

    @property
    def chance(self) -> float:
        return float(_answer_shares(self.modulus, self.operands).max())

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        size = 4 * self.operands - 1
        each = -(-self.length // size)
        text_RT = _problems(rng, batch * each, self.operands, self.modulus)
        targets_RT = np.full_like(text_RT, IGNORE)
        targets_RT[:, -2] = text_RT[:, -1]  # asked at '='
        shape = (batch, each * size)
        return text_RT.reshape(shape)[:, : self.length], targets_RT.reshape(shape)[:, : self.length]


def _problems(rng: np.random.Generator, count: int, operands: int, modulus: int) -> Ints:
    """Expressions with '=' and answer: every pair has brackets, so all are of one length."""
    digits_RN = rng.integers(modulus, size=(count, operands))
    operators_RN = rng.integers(3, size=(count, operands - 1))
    # joining neighbours in random order draws the tree of brackets
    joins_RN = rng.random(operators_RN.shape).argsort(axis=1)
    answers_R, opens_RN, closes_RN = _evaluate(digits_RN, operators_RN, joins_RN, modulus)
    plus, left, right, equals = modulus, modulus + 3, modulus + 4, modulus + 5
    row = np.arange(count)[:, None]
    digit_RN = opens_RN.cumsum(1) + np.arange(operands) * 2 + closes_RN.cumsum(1) - closes_RN
    operator_RN = (digit_RN + closes_RN + 1)[:, :-1]
    # from a digit to the operator behind it all brackets close
    step_RT = np.zeros((count, 4 * operands - 3), np.int64)
    step_RT[row, digit_RN] = 1
    step_RT[row, operator_RN] = -1
    text_RT = np.where(step_RT.cumsum(1) > 0, right, left)
    text_RT[row, digit_RN] = digits_RN
    text_RT[row, operator_RN] = operators_RN + plus
    return np.concatenate([text_RT, np.full_like(row, equals), answers_R[:, None]], axis=1)


def _evaluate(
    digits_RN: Ints, operators_RN: Ints, joins_RN: Ints, modulus: int
) -> tuple[Ints, Ints, Ints]:
    """The answers, and how many brackets open before and close after each digit."""
    row = np.arange(len(digits_RN))
    value_RN = digits_RN.copy()  # a span's value stands at its first operand
    first_RN, last_RN = (np.tile(np.arange(digits_RN.shape[1]), (len(row), 1)) for _ in range(2))
    opens_RN, closes_RN = np.zeros_like(digits_RN), np.zeros_like(digits_RN)
    for join_R in joins_RN.T:
        begin_R, middle_R = first_RN[row, join_R], join_R + 1
        end_R = last_RN[row, middle_R]
        a, b = value_RN[row, begin_R], value_RN[row, middle_R]
        results = np.stack([a + b, a - b, a * b]) % modulus
        value_RN[row, begin_R] = results[operators_RN[row, join_R], row]
        first_RN[row, end_R], last_RN[row, begin_R] = begin_R, end_R
        opens_RN[row, begin_R] += 1
        closes_RN[row, end_R] += 1
    return value_RN[:, 0], opens_RN, closes_RN


def _answer_shares(modulus: int, operands: int) -> NDArray[np.float64]:
    """How likely each answer is: the last join is equally likely to be at any operator."""
    a, b = np.indices((modulus, modulus))
    tables = [op % modulus for op in (a + b, a - b, a * b)]
    shares: list[NDArray[np.float64]] = [np.full(modulus, 1 / modulus)]
    for _ in range(1, operands):
        pairs = [np.outer(a, b) for a, b in zip(shares, reversed(shares), strict=True)]
        pair = np.mean(pairs, axis=0).ravel()
        answers = [np.bincount(table.ravel(), pair, modulus) for table in tables]
        shares.append(np.mean(answers, axis=0))
    return shares[-1]


class SelectiveCopy(Skill):
    """Repeat the ``marked`` tokens of a noisy sequence, in order, after a separator.

    Tokens: the alphabet, the alphabet marked, the separator. Each answer is the next input.
    chance: marked tokens are drawn uniformly from the alphabet.
    """

    name = "selective-copy"
    marked: int = Field(default=6, ge=1, le=LONGEST // 2)
    alphabet: int = Field(default=8, ge=2, le=4096)

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.length < 2 * self.marked:
            raise ValueError(f"length must be at least 2 * marked = {2 * self.marked}")
        return self

    @property
    def vocab_size(self) -> int:
        return 2 * self.alphabet + 1

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        noisy = self.length - self.marked
        text_BT = rng.integers(self.alphabet, size=(batch, noisy))
        places_BM = np.sort(rng.random((batch, noisy)).argsort(axis=1)[:, : self.marked], axis=1)
        answers_BM = np.take_along_axis(text_BT, places_BM, 1)
        np.put_along_axis(text_BT, places_BM, answers_BM + self.alphabet, 1)
        separator_B1 = np.full((batch, 1), 2 * self.alphabet)
        nothing_BT = np.full((batch, noisy), IGNORE)
        tokens_BT = np.concatenate([text_BT, separator_B1, answers_BM[:, :-1]], axis=1)
        return tokens_BT, np.concatenate([nothing_BT, answers_BM], axis=1)


class Recall(Skill):
    """``pairs`` of a key and its value, then keys whose values are asked for.

    After Arora et al. 2023 (arXiv 2312.04927). Tokens: the keys, then the values. Keys differ
    within a sequence. chance: values are drawn uniformly and independently of the keys.
    """

    name = "recall"
    pairs: int = Field(default=8, ge=1, le=LONGEST // 2)
    keys: int = Field(default=16, ge=1, le=4096)
    values: int = Field(default=16, ge=2, le=4096)

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.pairs > self.keys:
            raise ValueError(f"pairs must be at most keys = {self.keys}")
        if self.length <= 2 * self.pairs:
            raise ValueError(f"length must be more than 2 * pairs = {2 * self.pairs}")
        return self

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        keys_BP = rng.random((batch, self.keys)).argsort(axis=1)[:, : self.pairs]
        values_BP = rng.integers(self.values, size=keys_BP.shape) + self.keys
        asked_BQ = rng.integers(self.pairs, size=(batch, self.length - 2 * self.pairs))
        told_BT = np.stack([keys_BP, values_BP], axis=2).reshape(batch, -1)
        tokens_BT = np.concatenate([told_BT, np.take_along_axis(keys_BP, asked_BQ, 1)], axis=1)
        answers_BQ = np.take_along_axis(values_BP, asked_BQ, 1)
        return tokens_BT, np.concatenate([np.full_like(told_BT, IGNORE), answers_BQ], axis=1)


KINDS: tuple[type[Skill], ...] = (PHop, StateTracking, Arithmetic, SelectiveCopy, Recall)
SKILLS = {kind.name: kind for kind in KINDS}


def parse_skill(text: str) -> Skill:
    """Reads ``p-hop,hops=3,length=32``; raises DataError that says what is allowed."""
    name, *options = text.split(",")
    if name not in SKILLS:
        known = ", ".join(SKILLS)
        raise DataError(f"unknown skill {name!r}{did_you_mean(name, SKILLS)}; known: {known}")
    kind = SKILLS[name]
    given: dict[str, str] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in kind.model_fields or not equals or key in given:
            allowed = ", ".join(f"{k}={f.default}" for k, f in kind.model_fields.items())
            fault = (
                "given twice" if key in given else f"unknown{did_you_mean(key, kind.model_fields)}"
            )
            fault = fault if equals else "without a value"
            raise DataError(f"skill {name}: option {key!r} is {fault}; options: {allowed}")
        given[key] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(_fault(e["loc"], e["msg"], e["input"]) for e in error.errors())
        raise DataError(f"skill {name}: {faults}") from None


def _fault(loc: tuple[int | str, ...], message: str, found: object) -> str:
    message = message.removeprefix("Value error, ")
    return f"{loc[0]}: {message}, got {str(found)[:50]!r}" if loc else message
