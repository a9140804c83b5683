"""Tokenizers: bytes, a byte-level BPE that is trained on the data, or any tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from archdsl.data.chats import Chat
from archdsl.data.text_format import TextFormat, attach, text_format_beside, text_format_of
from archdsl.data.tokenizer_limits import MAX_BYTES, Allowance, check_content, check_parts
from archdsl.data.types import DataError
from archdsl.files import read_bytes, why_unreadable
from archdsl.sizes import SIZE, parse_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = NDArray[np.unsignedinteger]

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # without a format
PROBES = ("a", "0", " ", "\n", "\u7684")  # texts; most tokenizers have a token for each
SMALLEST_BPE, LARGEST_BPE = 257, 1_000_000  # the smallest has all bytes and the end of a document
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 64, 2**20  # limit the memory that encoding needs
WORD_END = re.compile(r"\S(?=[ \n])")


def byte_level() -> Tokenizer:
    """Returns the tokenizer whose token i is byte i; token 256 is the end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # byte-level pre-tokenizers write the unprintable bytes as the letters from U+0100 on, in order
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    vocab = {chr(b if b in printable else next(stand_ins)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _configure(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE as in GPT-2.

    It has fewer than ``vocab_size`` tokens if the texts have too few pairs to merge.
    """
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
    return _configure(tokenizer)


def read_tokenizer(path: Path, text_format: TextFormat | None = None) -> Tokenizer:
    """Reads a tokenizer.json and configures it so that text never becomes a special token.

    ``text_format``: says which tokens end a text; default: the text_format.json beside the file.
    Without either, a tokenizer that knows no end gets one. Raises DataError if a file cannot be
    read, is damaged, or is beyond the limits of `archdsl.data.tokenizer_limits`.
    """
    from tokenizers import Tokenizer

    text_format = text_format or text_format_beside(path)
    content = _read(path)
    try:
        check_content(content)
        tokenizer = Tokenizer.from_buffer(content)
        if text_format is not None:
            attach(tokenizer, text_format)
        check_parts(_configure(tokenizer))
    except DataError as error:
        raise DataError(f"tokenizer {str(path)!r}: {error}") from None
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"tokenizer {str(path)!r} is not a tokenizer.json: {error}") from None
    return tokenizer


def tokenizer_key(choice: str) -> str:
    """Returns what identifies the tokenizer ``choice`` in the cache.

    This is "bytes", "bpe:SIZE" or the SHA-256 of a tokenizer.json, with its text format if there
    is one. Raises DataError if the choice is not valid.
    """
    if choice == "bytes":
        return choice
    if choice.startswith("bpe:") and SIZE.fullmatch(choice[4:]):
        size = parse_size(choice[4:])
        if not SMALLEST_BPE <= size <= LARGEST_BPE:
            raise DataError(
                f"tokenizer {choice!r}: the size must be from {SMALLEST_BPE} to {LARGEST_BPE}"
            )
        return f"bpe:{size}"
    digest = hashlib.sha256(_read(Path(choice)))
    if text_format := text_format_beside(Path(choice)):
        digest.update(text_format.to_json().encode())
    return digest.hexdigest()


def make_tokenizer(choice: str, texts: Iterable[str]) -> Tokenizer:
    """Returns the tokenizer ``choice``; a BPE is trained on ``texts``.

    Raises DataError if the choice is not valid.
    """
    key = tokenizer_key(choice)
    if key == "bytes":
        return byte_level()
    if key.startswith("bpe:"):
        return train_bpe(texts, int(key.removeprefix("bpe:")))
    return read_tokenizer(Path(choice))


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a text; a model that makes any of them has finished.

    They are those of the text format, or else the one of KNOWN_ENDS that the tokenizer has.
    """
    if text_format := text_format_of(tokenizer):
        return text_format.ends
    return known_ends(tokenizer)[:1]


def end_of_document(tokenizer: Tokenizer) -> int:
    """Returns the token that stands between documents. Raises DataError if there is none."""
    ends = ends_of(tokenizer)
    if not ends:
        raise DataError(
            "the tokenizer has no token that ends a text: name one as eos_token_id in the "
            "generation_config.json of the model, and import the model again"
        )
    return ends[0]


def beginning_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that a pretrained model expects before every text, such as LLaMA's <s>.

    What the tokenizer adds after a text, such as </s>, is left out: the text goes on.
    """
    for probe in PROBES:
        found = tokenizer.encode(probe)
        added = [special == 1 for special in found.special_tokens_mask]
        if not all(added):
            return list(found.ids[: added.index(False)])
    return list(tokenizer.encode("").ids)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Returns one more than the largest token, because a vocabulary may have gaps."""
    return max(*tokenizer.get_vocab().values(), *ends_of(tokenizer), 0) + 1


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[Tokens, int]]:
    """Yields the tokens [T] of each text, without an end of document, and its size in bytes.

    What looks like a special token is one in a `Chat` only. Raises DataError if the tokenizer
    takes far too long.
    """
    are_bytes, allowance = is_byte_level(tokenizer), Allowance()
    for_chats, cuttable = cache(lambda: _for_chats(tokenizer)), cuts_at_words(tokenizer)
    for are_chats, some in groupby(texts, key=lambda text: isinstance(text, Chat)):
        own = for_chats() if are_chats else tokenizer
        for chunk in _chunks(some):
            contents = [text.encode() for text in chunk]
            if are_bytes and not are_chats:
                yield from ((np.frombuffer(text, np.uint8), len(text)) for text in contents)
                continue
            sizes = list(map(len, contents))
            parts = at_words(chunk[0]) if len(chunk) == 1 and cuttable and not are_chats else chunk
            found = [
                np.array(encoding.ids, np.uint32)
                for some_parts in _chunks(parts)
                for encoding in allowance.run(
                    partial(own.encode_batch_fast, some_parts, add_special_tokens=False),
                    sum(len(part.encode()) for part in some_parts),
                )
            ]
            if parts is not chunk:
                found = [np.concatenate(found)]
            yield from zip(found, sizes, strict=True)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yields texts to encode at once; a text of CHARACTERS_AT_ONCE stands alone."""
    chunk, size = list[str](), 0
    for text in texts:
        if chunk and (len(chunk) == DOCUMENTS_AT_ONCE or size + len(text) > CHARACTERS_AT_ONCE):
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk


def at_words(text: str) -> list[str]:
    """Cuts a long text between words and the spaces or ends of lines after them."""
    parts, begin = list[str](), 0
    while found := WORD_END.search(text, begin + CHARACTERS_AT_ONCE):
        parts.append(text[begin : found.start() + 1])
        begin = found.start() + 1
    return [*parts, text[begin:]]


def cuts_at_words(tokenizer: Tokenizer) -> bool:
    """Tells whether a text gives the same tokens if it is cut where `at_words` cuts it.

    It does for bytes, and for a byte-level BPE with the regular expression of GPT-2: in what that
    matches, white space is all or only a space at the beginning, so that a match ends there
    whatever stands before and after.
    """
    if is_byte_level(tokenizer):
        return True
    kind = tokenizer.pre_tokenizer and json.loads(tokenizer.pre_tokenizer.__getstate__())
    return (
        tokenizer.normalizer is None
        and kind is not None
        and (kind["type"], kind.get("add_prefix_space"), kind.get("use_regex"))
        == ("ByteLevel", False, True)
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Tells whether it is the tokenizer `byte_level`."""
    return tokenizer.to_str() == byte_level().to_str()


def _for_chats(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy that reads special tokens in texts as such."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy


def _configure(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "</s>" in a text is encoded as ordinary characters
    if text_format_of(tokenizer) is None and not known_ends(tokenizer):
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def known_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens among KNOWN_ENDS. Added tokens that are words are left out."""
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    return tuple(special[end] for end in KNOWN_ENDS if end in special)


def _read(path: Path) -> bytes:
    if why := why_unreadable(path):
        raise DataError(
            f"tokenizer {str(path)!r}: {why}; expected 'bytes', 'bpe:SIZE' such as "
            "bpe:4096, or the path of a tokenizer.json"
        )
    return read_bytes(path, DataError, MAX_BYTES)
