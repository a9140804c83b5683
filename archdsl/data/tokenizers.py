"""Tokenizers: bytes, a byte-level BPE trained on the spot, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from archdsl.data.types import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = NDArray[np.unsignedinteger]

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
SMALLEST_BPE, LARGEST_BPE = 257, 1_000_000  # every byte and the end of a document have a place
DOCUMENTS_AT_ONCE = 64  # bounds the memory that encoding takes


def byte_level() -> Tokenizer:
    """Token i is byte i; token 256 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # byte-level pre-tokenizing writes unprintable bytes as the letters from U+0100 on, in order
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    vocab = {chr(b if b in printable else next(stand_ins)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _ready(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """GPT-2's scheme; smaller than asked where the texts have too little to merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _ready(tokenizer)


def read_tokenizer(path: Path) -> Tokenizer:
    """Any tokenizer.json, so that text never turns into its special tokens; raises DataError."""
    from tokenizers import Tokenizer

    content = _read(path)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"tokenizer {str(path)!r} is not a tokenizer.json: {error}") from None
    return _ready(tokenizer)


def tokenizer_key(choice: str) -> str:
    """What a cache needs to know of a choice; raises DataError before any work is done."""
    if choice == "bytes":
        return choice
    if match := re.fullmatch(r"bpe:(\d{1,9})", choice):
        size = int(match[1])
        if not SMALLEST_BPE <= size <= LARGEST_BPE:
            raise DataError(
                f"tokenizer {choice!r}: the size must be from {SMALLEST_BPE} to {LARGEST_BPE}"
            )
        return f"bpe:{size}"
    return hashlib.sha256(_read(Path(choice))).hexdigest()


def make_tokenizer(choice: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that ``choice`` names; ``texts`` is what a BPE is trained on."""
    key = tokenizer_key(choice)
    if key == "bytes":
        return byte_level()
    if key.startswith("bpe:"):
        return train_bpe(texts, int(key.removeprefix("bpe:")))
    return read_tokenizer(Path(choice))


def end_of_document(tokenizer: Tokenizer) -> int:
    special = _special_tokens(tokenizer)
    return next(special[end] for end in KNOWN_ENDS if end in special)


def beginning_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands before every text that a pretrained model reads, such as LLaMA's <s>."""
    return list(tokenizer.encode("").ids)


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token: a vocabulary may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[Tokens, int]]:
    """The tokens of each text, without an end, and how many bytes the text has."""
    if tokenizer.to_str() == byte_level().to_str():
        for text in texts:
            content = np.frombuffer(text.encode(), np.uint8)
            yield content, len(content)
        return
    remaining = iter(texts)
    while some := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        for text, encoding in zip(some, encodings, strict=True):
            yield np.array(encoding.ids, np.uint32), len(text.encode())


def _ready(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # the letters "</s>" in a text are letters
    if not _special_tokens(tokenizer).keys() & set(KNOWN_ENDS):
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Without those that are words of the vocabulary and no more."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(
            f"tokenizer {str(path)!r}: no such file; expected 'bytes', 'bpe:SIZE' such as "
            "bpe:4096, or the path of a tokenizer.json"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}") from None
