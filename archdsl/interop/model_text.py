"""Find out how a pretrained model begins and ends texts, and what else belongs to its tokenizer.

The fields are those of generation_config.json, config.json and tokenizer_config.json, as
transformers writes them. Nothing is invented: a token that the tokenizer does not have is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from archdsl.data.text_format import MAX_TEMPLATE, SpecialToken, TextFormat
from archdsl.data.tokenizers import known_ends
from archdsl.errors import describe
from archdsl.files import read_json
from archdsl.interop.llama_config import PretrainedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERATION, TOKENIZER_CONFIG, TEMPLATE = (
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SPECIAL_TOKENS: tuple[SpecialToken, ...] = get_args(SpecialToken)
SAMPLING = (  # the fields of generation_config.json that are kept; none can name a file or code
    "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff num_beams "
    "num_beam_groups diversity_penalty early_stopping length_penalty repetition_penalty "
    "encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "renormalize_logits exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id sequence_bias guidance_scale max_length "
    "max_new_tokens min_length min_new_tokens stop_strings remove_invalid_values"
)
KEPT = frozenset(SAMPLING.split())


def text_format_in(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> tuple[TextFormat, list[Path]]:
    """Return the text format of the model in a folder of transformers, and the files with it.

    ``config``: the content of config.json. ``vocab_size``: of the model.

    Raises PretrainedError if a file is damaged or a token is none of the model's.
    """
    files = [path for name in (GENERATION, TOKENIZER_CONFIG) if (path := folder / name).is_file()]
    read = {path.name: read_json(path, PretrainedError) for path in files}
    generation, about = read.get(GENERATION, {}), read.get(TOKENIZER_CONFIG, {})
    numbers = {
        name: _tokens(folder / file, value, name, vocab_size)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id")
        for file, source in (("config.json", config), (GENERATION, generation))
        if (value := source.get(name)) not in (None, [], -1)  # -1 means none in older files
    }
    words, template = dict(_special_tokens(about)), _template(folder, about)
    if (folder / TEMPLATE).is_file():
        files.append(folder / TEMPLATE)
    kept = {k: v for k, v in generation.items() if k in KEPT and v is not None and _is_plain(v)}
    return text_format(tokenizer, numbers, words, template, kept), files


def text_format(
    tokenizer: Tokenizer,
    numbers: Mapping[str, tuple[int, ...]],
    words: Mapping[str, str],
    template: str | None,
    generation: Mapping[str, Any],
) -> TextFormat:
    """Return what the tokenizer and what stands beside it say together.

    ``numbers``: ``eos_token_id`` and the like. ``words``: the texts of the special tokens, which
    numbers stand for where they are missing. ``generation``: further settings.
    """
    known = {name: word for name, word in words.items() if tokenizer.token_to_id(word) is not None}
    ends = numbers.get("eos_token_id", ())
    if not ends and "eos_token" in known:
        ends = (_number(tokenizer, known["eos_token"]),)
    ends = tuple(dict.fromkeys(ends or known_ends(tokenizer)[:1]))
    added = tokenizer.get_added_tokens_decoder()
    special = {number: token.content for number, token in added.items() if token.special}
    for name, of in (("eos_token", ends), *((n[:-3], found) for n, found in numbers.items())):
        found = [special[number] for number in of if number in special]
        if name not in known and found:
            known[name] = found[0]
    kept: dict[str, Any] = {
        name: numbers[name][0] for name in ("bos_token_id", "pad_token_id") if name in numbers
    }
    kept |= generation
    return TextFormat.model_validate(
        {"ends": ends, "special_tokens": known, "chat_template": template, "generation": kept}
    )


def _number(tokenizer: Tokenizer, word: str) -> int:
    number = tokenizer.token_to_id(word)
    assert number is not None
    return number


def _tokens(file: Path, value: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    """Return a token or a list of tokens as a tuple. Raises PretrainedError if it is none."""
    listed = value if isinstance(value, list) else [value]
    for token in listed:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise PretrainedError(
                f"{file}: {name}: must be a token, from 0 to {vocab_size - 1:,}, or a list of "
                f"tokens; got {describe(token)}"
            )
    return tuple(listed)


def _is_plain(value: Any, depth: int = 2) -> bool:
    """Return whether a value is finite and at most a list of lists."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))


def _special_tokens(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and texts in a tokenizer_config.json, where each is a text or an object."""
    for name in SPECIAL_TOKENS:
        value = about.get(name)
        word = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(word, str) and word:
            yield name, word


def _template(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Return the chat template; of several that have names, the one named ``default``."""
    path = folder / TEMPLATE
    if path.is_file():
        return checked_template(path, _read(path))
    found = about.get("chat_template")
    if isinstance(found, list):
        named = {str(one.get("name")): one for one in found if isinstance(one, Mapping)}
        found = named.get("default", {}).get("template")
    return checked_template(folder / TOKENIZER_CONFIG, found)


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(MAX_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from None


def checked_template(path: Path, template: Any) -> str | None:
    """Return the chat template of a file; None if it is no text. Raises PretrainedError if it is
    too long."""
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE:
        raise PretrainedError(
            f"{path}: the chat template has more than {MAX_TEMPLATE:,} characters"
        )
    return template
