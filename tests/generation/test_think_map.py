"""Tests of think maps: every token has its steps, and the page is safe and readable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from archdsl.data.tokenizers import byte_level, train_bpe
from archdsl.generation.generate import Generation
from archdsl.generation.think_map import think_map, visible
from tests.texts import document

BYTES = byte_level()
BPE = train_bpe((document(seed) for seed in range(50)), 300)
TEXT = {"h1", "p", "section", "span", "b", "small", "br", "wbr"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
ALLOWED = TEXT | TABLE | {"html", "head", "meta", "title", "style", "body"}


class Page(HTMLParser):
    """Parse a page into its tags, their attributes, and the boxes with the tokens."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.boxes: list[dict[str, str]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)
        if tag == "span":
            given = dict(attrs)
            self.boxes.append({"class": given["class"] or "", "title": given["title"] or ""})

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        if tag in ("b", "small"):
            self.boxes[-1][tag] = self.boxes[-1].get(tag, "") + data
        self.texts[tag] = self.texts.get(tag, "") + data

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass


def page(prompt: Sequence[int], tokens: Sequence[int] = (), steps: Sequence[int] = ()) -> Page:
    row = Generation(list(prompt), list(tokens), steps=list(steps))
    return Page(think_map([row], BYTES, name="tiny"))


def test_every_token_read_has_its_steps_as_number_colour_and_words() -> None:
    found = page(b"ab", b"cd", [0, 2, 1])
    assert [(box["b"], box["small"], box["title"]) for box in found.boxes] == [
        ("a", "0", "0 further steps"),
        ("b", "2", "2 further steps"),
        ("c", "1", "1 further step"),
        ("d", "·", "not read"),
    ]
    assert [box["class"] for box in found.boxes] == ["t s0 p", "t s2 p", "t s1", "t"]


def test_the_header_tells_model_dial_mean_and_shares() -> None:
    row = Generation(list(b"abc"), list(b"de"), steps=[0, 3, 3, 0])
    html = think_map([row, row], BYTES, name="tiny", setting="capacity 0.5, steps 4")
    found = Page(html)
    assert found.texts["h1"] == found.texts["title"] == "Think map: tiny"
    assert "Compute dial: capacity 0.5, steps 4." in found.texts["p"]
    assert "Further thinking steps per token: 1.50, averaged over 8 tokens." in found.texts["p"]
    rows = re.findall(r'<th scope="row" class="s(\d)">\1</th><td>(.*?)</td><td>(.*?)</td>', html)
    assert rows == [("0", "4", "50.0%"), ("3", "4", "50.0%")]


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style>", "&lt;", "{x}"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_text_or_a_name_holds_is_never_markup(hostile: str) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({hostile: 0}, hostile)
    )  # the whole string must be one token
    row = Generation([0], [0], steps=[1])
    found = Page(think_map([row], tokenizer, name=hostile, setting=hostile))
    assert found.tags <= ALLOWED
    assert [box["b"].strip() for box in found.boxes] == [hostile, hostile]
    assert found.texts["h1"] == f"Think map: {hostile}"
    assert not {name for name in found.attributes if name.startswith("on")}


@given(st.text(), st.text())
def test_any_text_makes_a_page_without_script_links_or_hidden_letters(one: str, two: str) -> None:
    tokens = BPE.encode(one).ids, BPE.encode(two).ids
    steps = [i % 4 for i in range(len(tokens[0]) + len(tokens[1]))]
    html = think_map([Generation(*tokens, steps=steps)], BPE, name=one)
    found = Page(html)
    assert found.tags <= ALLOWED
    assert not found.attributes & {"src", "href", "style", "onload", "onclick"}
    assert "http" not in "".join(re.findall(r"<style>.*?</style>", html, re.DOTALL))
    assert len(found.boxes) == len(steps)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", found.texts.get("b", ""))


def test_the_browser_is_told_to_run_and_to_fetch_nothing() -> None:
    html = think_map([Generation([97])], BYTES, name="tiny")
    assert "default-src 'none'; style-src 'unsafe-inline'" in html


def test_white_space_and_bytes_of_a_character_can_be_seen() -> None:
    assert [box["b"] for box in page("a \n\t€".encode()).boxes] == [
        "a", "␣", "↵", "⇥", "E2", "82", "€",
    ]  # fmt: skip
    assert visible(" the\n") == " the↵"
    assert visible("\x1b[31m\u202e") == "U+001B[31mU+202E"


def test_a_special_token_is_shown_by_its_name_and_an_unknown_one_by_its_number() -> None:
    assert [box["b"] for box in page([256, 97, 300]).boxes] == ["<|endoftext|>", "a", "[300]"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio as defined by WCAG 2.2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_letters_can_be_read_on_every_colour_in_light_and_in_dark() -> None:
    html = think_map([Generation(list(range(64)), steps=list(range(64)))], BYTES, name="tiny")
    light, dark = html.split("prefers-color-scheme: dark")
    for style in (light, dark):
        paper = re.findall("--paper: (#.{6})", style)[0]
        colours = re.findall(r"\.s\d+ { background: (#.{6}); }", style)
        assert len(set(colours)) > 50
        for ground in (*colours, paper):
            assert contrast(re.findall("--ink: (#.{6})", style)[0], ground) >= 4.5
        assert contrast(re.findall("--soft: (#.{6})", style)[0], paper) >= 4.5
