"""Chats become text by the chat template of the tokenizer, which is a stranger's program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import archdsl.data.tokenizer_limits
from archdsl.data.chats import Chat, ChatTemplate
from archdsl.data.loading import load_data
from archdsl.data.text_format import TextFormat
from archdsl.data.tokenizers import byte_level, encode
from archdsl.data.types import DataError

END = 257  # <|turn_end|>, beside the bytes and <|endoftext|>
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}]


def text_format(template: str | None = TEMPLATE) -> TextFormat:
    words = {"eos_token": "<|turn_end|>"}
    return TextFormat(ends=(END,), special_tokens=words, chat_template=template)  # type: ignore[arg-type]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer.json with a chat template beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    backend = byte_level()
    backend.add_special_tokens(["<|turn_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    text_format().write(folder)
    return folder / "tokenizer.json"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("column", ["messages", "conversations", "talk"])
def test_a_chat_is_rendered_and_its_special_tokens_are_tokens(
    tmp_path: Path, tokenizer: Path, name: str, column: str
) -> None:
    chat = SHAREGPT if column == "conversations" else MESSAGES
    key = "value" if column == "conversations" else "content"
    rows = [{"id": str(i), column: [chat[0] | {key: f"hi{i}"}, chat[1]]} for i in range(40)]
    data: Any = load_data(
        str(write(tmp_path / name, rows)),
        tokenizer=str(tokenizer),
        column="talk" if column == "talk" else None,
        cache=tmp_path / "cache",
    )
    tokens = data.tokens["train"].tolist()
    number = bytes(tokens[len("[user] hi") + 1 : tokens.index(END, 1)])  # of the first chat
    chat_tokens = [*b"[user] hi", *number, END, *b"[assistant] you", END]
    assert tokens[: len(chat_tokens) + 2] == [END, *chat_tokens, END]
    assert tokens.count(END) == 1 + 3 * 36  # two of a chat, and one that follows it


def test_a_chat_that_is_cut_for_another_split_is_still_one(tmp_path: Path, tokenizer: Path) -> None:
    """Of few documents, each is cut."""
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES * 40}])
    data: Any = load_data(str(path), tokenizer=str(tokenizer), cache=tmp_path / "cache")
    assert all(END in data.tokens[split][1:-1] for split in ("train", "validation", "test"))


def test_texts_between_chats_stay_texts() -> None:
    backend = byte_level()
    texts = ["<|endoftext|>", Chat("<|endoftext|>a"), Chat("b"), "<|endoftext|>"]
    plain = list(b"<|endoftext|>")
    found = [tokens.tolist() for tokens, _ in encode(backend, texts)]
    assert found == [plain, [256, 97], [98], plain]
    assert backend.encode_special_tokens


def test_what_a_table_fills_up_with_nulls_is_not_there() -> None:
    template = ChatTemplate(text_format("{{ messages[0] | tojson }}"))
    message = {"role": "user", "content": "é", "name": None, "tool_calls": None}
    assert template.render([message], "row 1") == '{"role": "user", "content": "é"}'


@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ([], "row 3: a chat must be a list of messages, got a list"),
        (["hi"], "row 3: message 1: expected an object such as .*, got 'hi'"),
        ([MESSAGES[0], {"content": "hi"}], "row 3: message 2: expected an object"),
        ([{"role": 3, "content": "hi"}], "row 3: message 1: expected an object"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(chat: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        ChatTemplate(text_format()).render(chat, "row 3")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for", ""),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined|not allowed"),
        ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ n.x }}",
            "MemoryError",
        ),
    ],
)
def test_a_template_that_fails_or_wants_too_much_is_an_error(template: str, reason: str) -> None:
    chat = ChatTemplate(text_format(template))
    with pytest.raises(DataError, match=f"row 1: the chat template cannot render .*({reason})"):
        chat.render(MESSAGES, "row 1")


def test_a_template_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archdsl.data.tokenizer_limits, "GRACE", 0.3)
    loops = "{% for i in range(2999) %}" * 2 + "{% endfor %}" * 2
    with pytest.raises(DataError, match="row 1: the chat template needs more than 1 s"):
        ChatTemplate(text_format(loops)).render(MESSAGES, "row 1")


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_template_utils", None)
    with pytest.raises(DataError, match=r"chats need transformers: pip install 'archdsl\[trans"):
        ChatTemplate(text_format()).render(MESSAGES, "row 1")


def test_without_a_template_chats_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    text_format(template=None).write(tokenizer.parent)
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(DataError, match=r"'messages' holds chats, .* Train a checkpoint"):
        load_data(str(path), tokenizer=str(tokenizer), cache=tmp_path / "cache")
