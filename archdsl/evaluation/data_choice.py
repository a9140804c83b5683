"""Which data, in which tokens, go with a spec or with a checkpoint."""

from __future__ import annotations

import shlex

from archdsl.data.documents import EMBEDDED
from archdsl.data.loading import are_tokenized, load_data
from archdsl.data.types import Data
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec
from archdsl.model.checkpoint import Checkpoint

BYTES = 257  # tokens of the tokenizer `bytes`: 256, and one that ends a document


def data_of(checkpoint: Checkpoint, source: str | None) -> Data:
    """The data of ``source``, else that which the checkpoint was trained on, in its tokens.

    Whoever made a checkpoint must not decide which files or data sets are read: raises ArchdslError
    if it was trained on other data than the embedded corpus or a skill, and ``source`` is None.
    """
    trained_on = checkpoint.provenance.get("data", {}).get("name")
    if not source and trained_on and not is_embedded(trained_on):
        raise ArchdslError(
            f"{checkpoint.path} was trained on {trained_on!r}. A checkpoint does not decide which "
            f"data are read: name them, as in --data {shlex.quote(trained_on)}"
        )
    tokenizer = str(checkpoint.tokenizer) if checkpoint.tokenizer else None
    return data_for(checkpoint.spec, source or trained_on, tokenizer)


def data_for(spec: ModelSpec, source: str | None, tokenizer: str | None) -> Data:
    """The data, in tokens that fit into the vocabulary. Raises ArchdslError if they do not fit."""
    data = load_data(source, tokenizer=tokenizer_for(spec, tokenizer, source))
    if data.vocab_size > spec.vocab_size:
        fixes = [f"--set vocab_size={data.vocab_size}"]
        tokenized = source is not None and are_tokenized(source)
        if data.chance is None and not tokenized and spec.vocab_size >= BYTES:
            fixes.append(f"--tokenizer {_filling(spec.vocab_size)}")
        raise ArchdslError(
            f"{data.name} has {data.vocab_size:,} different tokens, but {spec.name} has only a "
            f"vocab_size of {spec.vocab_size:,}. Use {' or '.join(fixes)}"
        )
    return data


def is_embedded(source: str) -> bool:
    """Whether data come with archdsl: the embedded corpus, or a skill."""
    return source == EMBEDDED or source.startswith("skill:")


def _filling(vocab_size: int) -> str:
    """The choice of tokenizer that uses as much of a vocabulary as possible."""
    return f"bpe:{vocab_size}" if vocab_size >= 2 * BYTES else "bytes"


def tokenizer_for(spec: ModelSpec, choice: str | None, source: str | None) -> str | None:
    """The tokenizer that was chosen, or else the one that uses most of the vocabulary.

    None without a choice for data that are tokenized already: their tokenizer comes with them.
    """
    if choice is None and source is not None and are_tokenized(source):
        return None
    return choice or _filling(spec.vocab_size)
