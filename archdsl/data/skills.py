"""Skills: synthetic tasks that need depth, generated from a seed.

They show within minutes of training what additional depth brings. A skill generates sequences of
tokens and, for some positions, a target token to predict. The score is the share of these positions
that are predicted exactly. ``chance`` is the expected score of the best constant guess. It is also
that of a uniform guess if all answers are equally likely.

Shapes: B sequences, T tokens, M marked tokens, P pairs, Q queries, R problems, N operands.
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
    """The base of all skills: a task and its options. ``length``: tokens of one sequence."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    length: int = Field(default=32, ge=2, le=LONGEST)

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The expected score of the best constant guess."""
        raise NotImplementedError

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """Generates ``batch`` sequences.

        Returns tokens and targets, both int64 [B, T]; a target is IGNORE where nothing is asked.
        """
        raise NotImplementedError


class PHop(Skill):
    """Find the last earlier occurrence of the token, go to the token after it, and repeat.

    The target is the token reached after ``hops`` such jumps. It is asked at every position from
    which all jumps are possible. Source: Sanford et al. 2024 (arXiv 2402.09268). Chance: the task
    does not depend on the names of the tokens, so all answers are equally likely.
    """

    name = "p-hop"
    hops: int = Field(default=3, ge=1, le=64)
    alphabet: int = Field(default=4, ge=2, le=4096)

    @property
    def vocab_size(self) -> int:
        """See `Skill.vocab_size`."""
        return self.alphabet

    @property
    def chance(self) -> float:
        """See `Skill.chance`."""
        return 1 / self.alphabet

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """See `Skill.generate`."""
        tokens_BT = rng.integers(self.alphabet, size=(batch, self.length))
        follower_BT = _after_last_occurrence(tokens_BT)
        place_BT = np.broadcast_to(np.arange(self.length), tokens_BT.shape)
        for _ in range(self.hops):
            place_BT = np.where(place_BT < 0, -1, np.take_along_axis(follower_BT, place_BT, 1))
        answer_BT = np.take_along_axis(tokens_BT, place_BT, 1)
        return tokens_BT, np.where(place_BT < 0, IGNORE, answer_BT)


def _after_last_occurrence(tokens_BT: Ints) -> Ints:
    """Returns the position after the last earlier occurrence of the same token, or -1. [B, T]"""
    # a stable sort puts the occurrences of a token next to each other, the earliest first
    order_BT = tokens_BT.argsort(axis=1, kind="stable")
    sorted_BT = np.take_along_axis(tokens_BT, order_BT, 1)
    same = sorted_BT[:, 1:] == sorted_BT[:, :-1]
    follower_BT = np.full_like(tokens_BT, -1)
    np.put_along_axis(follower_BT, order_BT[:, 1:], np.where(same, order_BT[:, :-1] + 1, -1), 1)
    return follower_BT


class StateTracking(Skill):
    """Compose permutations: the target is the product of all tokens so far.

    ``group``: s3 or s5, the permutations of three or five elements. Each token is applied after
    all tokens before it. Chance: a product of uniform elements of a group is uniform.
    """

    name = "state-tracking"
    group: Literal["s3", "s5"] = "s3"
    length: int = Field(default=16, ge=2, le=LONGEST)

    @property
    def vocab_size(self) -> int:
        """See `Skill.vocab_size`."""
        return len(self._elements)

    @property
    def chance(self) -> float:
        """See `Skill.chance`."""
        return 1 / self.vocab_size

    @property
    def _elements(self) -> list[tuple[int, ...]]:
        return list(permutations(range(int(self.group[1]))))

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """See `Skill.generate`."""
        table = _composition(self._elements)
        tokens_BT = rng.integers(len(table), size=(batch, self.length))
        targets_BT = tokens_BT.copy()
        for t in range(1, self.length):
            targets_BT[:, t] = table[tokens_BT[:, t], targets_BT[:, t - 1]]
        return tokens_BT, targets_BT


def _composition(elements: list[tuple[int, ...]]) -> Ints:
    """Returns a table whose entry [a, b] is the number of the permutation "first b, then a"."""
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


class Arithmetic(Skill):
    """Compute expressions such as ``((3+1)*(2-4))=`` modulo ``modulus``.

    A sequence is a series of problems, each followed by its answer, cut at ``length``. The answer
    is asked at each '='. Tokens: the digits, then + - * ( ) =. Chance: the share of the most
    frequent answer, which is zero, because products are often zero.
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
        """See `Skill.vocab_size`."""
        return self.modulus + 6

    @property
    def chance(self) -> float:
        """See `Skill.chance`."""
        return float(_answer_shares(self.modulus, self.operands).max())

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """See `Skill.generate`."""
        size = 4 * self.operands - 1
        each = -(-self.length // size)
        text_RT = _problems(rng, batch * each, self.operands, self.modulus)
        targets_RT = np.full_like(text_RT, IGNORE)
        targets_RT[:, -2] = text_RT[:, -1]  # asked at '='
        shape = (batch, each * size)
        return text_RT.reshape(shape)[:, : self.length], targets_RT.reshape(shape)[:, : self.length]


def _problems(rng: np.random.Generator, count: int, operands: int, modulus: int) -> Ints:
    """Generates problems with '=' and answer, [R, T].

    Every operation has brackets, so all problems have the same length.
    """
    digits_RN = rng.integers(modulus, size=(count, operands))
    operators_RN = rng.integers(3, size=(count, operands - 1))
    # joining neighbours in a random order gives a random tree of brackets
    joins_RN = rng.random(operators_RN.shape).argsort(axis=1)
    answers_R, opens_RN, closes_RN = _evaluate(digits_RN, operators_RN, joins_RN, modulus)
    plus, left, right, equals = modulus, modulus + 3, modulus + 4, modulus + 5
    row = np.arange(count)[:, None]
    digit_RN = opens_RN.cumsum(1) + np.arange(operands) * 2 + closes_RN.cumsum(1) - closes_RN
    operator_RN = (digit_RN + closes_RN + 1)[:, :-1]
    # all brackets between a digit and the next operator are closing ones
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
    """Returns the answers [R], and how many brackets open before and close after each digit
    [R, N]."""
    row = np.arange(len(digits_RN))
    value_RN = digits_RN.copy()  # the value of a span is stored at its first operand
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
    """Returns the probability of each answer. The last join is at any operator with equal
    probability."""
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
    """Copy the ``marked`` tokens of a noisy sequence, in order, after a separator.

    Tokens: the alphabet, the marked alphabet and the separator. Each answer is also the next input.
    Chance: marked tokens are drawn uniformly from the alphabet.
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
        """See `Skill.vocab_size`."""
        return 2 * self.alphabet + 1

    @property
    def chance(self) -> float:
        """See `Skill.chance`."""
        return 1 / self.alphabet

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """See `Skill.generate`."""
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
    """Recall the values of keys (associative recall).

    A sequence begins with ``pairs`` of a key and its value; then come keys whose values are asked
    for. The keys of the pairs are different. Tokens: the keys, then the values. Source: Arora et
    al. 2023 (arXiv 2312.04927). Chance: values are drawn uniformly and independently of the keys.
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
        """See `Skill.vocab_size`."""
        return self.keys + self.values

    @property
    def chance(self) -> float:
        """See `Skill.chance`."""
        return 1 / self.values

    def generate(self, rng: np.random.Generator, batch: int) -> tuple[Ints, Ints]:
        """See `Skill.generate`."""
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
    """Reads a skill with its options, such as ``p-hop,hops=3,length=32``.

    Raises DataError if the name, an option or its value is wrong; it says what is allowed.
    """
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
            problem = (
                "given twice" if key in given else f"unknown{did_you_mean(key, kind.model_fields)}"
            )
            problem = problem if equals else "without a value"
            raise DataError(f"skill {name}: option {key!r} is {problem}; options: {allowed}")
        given[key] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(
            _describe_error(e["loc"], e["msg"], e["input"]) for e in error.errors()
        )
        raise DataError(f"skill {name}: {problems}") from None


def _describe_error(loc: tuple[int | str, ...], message: str, found: object) -> str:
    message = message.removeprefix("Value error, ")
    return f"{loc[0]}: {message}, got {str(found)[:50]!r}" if loc else message
