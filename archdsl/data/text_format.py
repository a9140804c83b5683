"""What a tokenizer.json does not say: which tokens end a text, the chat template, the sampling.

Pretrained models have it in generation_config.json, config.json and tokenizer_config.json. A
checkpoint has it in text_format.json, beside its tokenizer.json. Where that file is missing, as in
checkpoints of data that archdsl tokenized itself, the tokenizer alone decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from archdsl.data.types import DataError
from archdsl.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, TEXT_FORMAT = "tokenizer.json", "text_format.json"
MAX_TEMPLATE = 2**20  # characters
MAX_TOKEN = 2**31  # more than any vocabulary has

Token = Annotated[int, Field(ge=0, lt=MAX_TOKEN)]
SpecialToken = Literal[
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TextFormat(BaseModel):
    """How texts end, and what other libraries must know to use the model as intended.

    ``ends``: the tokens that end a text, any of them; the first also stands between documents.
    ``special_tokens``: their texts, by the names of transformers. ``chat_template``: a Jinja
    template. ``generation``: the fields of generation_config.json, without the tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    ends: Annotated[tuple[Token, ...], BeforeValidator(_tuple), Field(max_length=100)] = ()
    special_tokens: dict[SpecialToken, str] = Field({})
    chat_template: str | None = Field(None, max_length=MAX_TEMPLATE)
    generation: dict[str, JsonValue] = Field({})

    def write(self, folder: Path) -> None:
        """Writes the file into a folder with a tokenizer.json."""
        (folder / TEXT_FORMAT).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Returns the content of the file; equal formats have equal contents."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def text_format_beside(tokenizer: Path) -> TextFormat | None:
    """Reads what stands beside a tokenizer.json; returns None if nothing does.

    Raises DataError if the file is no text format.
    """
    path = tokenizer.with_name(TEXT_FORMAT)
    if tokenizer.name != TOKENIZER or not path.exists():
        return None
    try:
        return TextFormat.model_validate(read_json(path, DataError))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {place}: {first['msg']}") from None


def attach(tokenizer: Tokenizer, text_format: TextFormat) -> None:
    """Lets the tokenizer carry the format; its own class has no place for it."""
    tokenizer.text_format = text_format  # type: ignore[attr-defined]


def text_format_of(tokenizer: Tokenizer) -> TextFormat | None:
    """Returns what was attached, or else None."""
    return getattr(tokenizer, "text_format", None)
