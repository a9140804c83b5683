"""`load_data`: text that is tokenized once and then memory-mapped, or a synthetic task.

Shapes: B sequences, T tokens, W windows.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from archdsl.data.chats import renderer
from archdsl.data.documents import SPLITS, TextSource, find_source, named_column
from archdsl.data.folders import ACCEPTED
from archdsl.data.mixture import MixedData, Weighted, parse_mixture
from archdsl.data.shard_index import TOKENIZER
from archdsl.data.shards import holds_shards, open_shards
from archdsl.data.skills import Skill, parse_skill
from archdsl.data.text_data import TextData, evenly_spaced
from archdsl.data.token_cache import FORMAT, TokenCache, common_tokenizer, sha256
from archdsl.data.tokenizers import tokenizer_key
from archdsl.data.types import Batch, Data, DataError, HeldOut, Split
from archdsl.errors import blamed_on

__all__ = ["Batch", "Data", "DataError", "MixedData", "SkillData", "TextData", "load_data"]

HELD_OUT_SEQUENCES = 1024  # sequences in the validation and in the test split of a skill


def load_data(
    source: str | os.PathLike[str] | Sequence[str | tuple[str, float]] | None = None,
    *,
    tokenizer: str | None = None,
    column: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Data:
    """Loads text or a synthetic task for training and evaluation.

    ``source``: a file or folder of text, a folder that `archdsl tokenize` wrote,
    ``hf:DATASET/CONFIG`` from the Hugging Face Hub, or ``skill:NAME,option=value``. The default is
    the corpus that comes with archdsl. Several texts are mixed: ``[("a", 0.8), ("b", 0.2)]``, or
    ``"a:0.8 + b:0.2"`` as one string, trains on them in these shares; without weights the shares
    are equal. ``tokenizer``: "bytes", "bpe:SIZE" (trained on the training split) or the path of a
    tokenizer.json; skills use none. The default is "bytes", or what the text was tokenized by
    before. ``column``: the column of the text, if it is not called text, content or document; a
    source ``SOURCE::COLUMN`` means the same. ``cache``: the folder for the tokens; the default is
    $ARCHDSL_CACHE, or else $XDG_CACHE_HOME/archdsl, or else ~/.cache/archdsl. Raises DataError if
    the source or the tokenizer is wrong, or if the cache cannot be written.
    """
    known = source is None or isinstance(source, str | os.PathLike | Sequence)
    if not known or source == "" or isinstance(source, bytes):
        raise DataError(f"{reprlib.repr(source)} names no data; {ACCEPTED}")
    parts = [] if source is None else parse_mixture(source)
    if len(parts) > 1:
        return _mixed(parts, tokenizer, column, cache)
    name = None
    if parts:
        name, column = named_column(parts[0].source, column)
        if name.startswith("skill:"):
            if column:
                raise DataError(f"{name} has no column {column!r}: a skill has no columns")
            return SkillData(parse_skill(name.removeprefix("skill:")))
        if holds_shards(name):
            return open_shards(Path(name), tokenizer)
    choice = tokenizer or "bytes"
    root = _cache_folder(cache)
    tokenizer_key(choice)  # a wrong choice is told before files are read
    with _cache_errors(root):
        return _tokenized(find_source(name, root, column, renderer(Path(choice))), choice, root)


def are_tokenized(source: str) -> bool:
    """Tells whether some of the data are shards, so that their tokenizer is that of all."""
    return any(holds_shards(part.source) for part in parse_mixture(source))


def _mixed(
    parts: Sequence[Weighted],
    tokenizer: str | None,
    column: str | None,
    cache: str | os.PathLike[str] | None,
) -> MixedData:
    """Loads the texts of a mixture, all in the tokens of one tokenizer."""
    if column:
        raise DataError(
            f"--column {column} belongs to one of several data: write it as SOURCE::{column}"
        )
    for part in parts:
        if part.source.startswith("skill:"):
            raise DataError(
                f"{part.source} cannot be mixed with other data: a skill has tokens and a length "
                "of its own"
            )
    shards = [Path(part.source) for part in parts if holds_shards(part.source)]
    choice = tokenizer or (str(shards[0] / TOKENIZER) if shards else "bytes")
    tokenizer_key(choice)
    root, render = _cache_folder(cache), renderer(Path(choice))
    with _cache_errors(root):
        texts = {
            part.source: find_source(name, root, own, render)
            for part in parts
            if Path(part.source) not in shards
            for name, own in [named_column(part.source, None)]
        }
        choice = common_tokenizer([*texts.values()], choice, root / "tokens")
        loaded = tuple(
            _tokenized(texts[part.source], choice, root)
            if part.source in texts
            else open_shards(Path(part.source), choice)
            for part in parts
        )
    return MixedData(loaded, tuple(part.weight for part in parts))


def _tokenized(text: TextSource, choice: str, root: Path) -> TextData:
    """Returns the tokens of a text from the cache, where they are written if they are missing."""
    cached = TokenCache(root / "tokens", sha256(str(FORMAT), text.digest, tokenizer_key(choice)))
    data = cached.open(text.name, rules=text.rules) or cached.build(text, choice)
    return replace(data, source=text)


def _cache_folder(cache: str | os.PathLike[str] | None) -> Path:
    return Path(cache) if cache else _default_cache()


@contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cache {str(root)!r}: {error}; set $ARCHDSL_CACHE to use another folder"
        ) from None


def _default_cache() -> Path:
    if chosen := os.environ.get("ARCHDSL_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archdsl"
    except RuntimeError:  # a user of a container may be known by a number alone
        raise DataError(
            "there is no home folder for the cache of tokens: set $ARCHDSL_CACHE to a folder"
        ) from None


@dataclass(frozen=True)
class SkillData:
    """Sequences of a synthetic task. Their length is that of the skill, for every context."""

    skill: Skill

    @property
    def name(self) -> str:
        """The source of this data with all options, as in ``skill:p-hop,length=32,hops=3``."""
        options = "".join(f",{key}={value}" for key, value in self.skill.model_dump().items())
        return f"skill:{self.skill.name}{options}"

    @property
    def vocab_size(self) -> int:
        """See `Data.vocab_size`."""
        return self.skill.vocab_size

    @property
    def fingerprint(self) -> str:
        """See `Data.fingerprint`."""
        return sha256(str(FORMAT), self.name)

    @property
    def chance(self) -> float:
        """See `Data.chance`."""
        return self.skill.chance

    def bytes_per_token(self, split: Split) -> None:
        """Returns None, because a skill has no text."""

    def save_tokenizer(self, path: Path) -> None:
        """Writes nothing, because a skill has no tokenizer."""

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Returns new sequences [B, T]. Raises DataError if ``context`` is too short for them."""
        tokens_BT, targets_BT = self._generate("train", (seed, index), batch_size, context)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields the same 1024 sequences at every call, or fewer with ``limit_tokens``.

        Raises DataError if ``context`` is too short or ``limit_tokens`` is below 1.
        """
        tokens_WT, targets_WT = self._generate(split, (), HELD_OUT_SEQUENCES, context)
        selected_W = evenly_spaced(HELD_OUT_SEQUENCES, self.skill.length, limit_tokens)
        for i in range(0, len(selected_W), batch_size):
            some_B = selected_W[i : i + batch_size]
            yield Batch(torch.from_numpy(tokens_WT[some_B]), torch.from_numpy(targets_WT[some_B]))

    def _generate(
        self, split: Split, numbers: tuple[int, ...], batch_size: int, context: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if context < self.skill.length:
            message = f"{self.name} needs a context of {self.skill.length}, got {context}"
            with blamed_on("context"):
                raise DataError(message)
        # the seed begins with the split, so that the splits have different sequences
        rng = np.random.default_rng([1 + SPLITS.index(split), *numbers])
        return self.skill.generate(rng, batch_size)
