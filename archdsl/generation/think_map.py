"""Write an HTML page that shows the number of thinking steps of each token.

The page contains no script and loads nothing.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from archdsl.data.tokenizers import byte_level
from archdsl.generation.detokenize import StreamingDecoder
from archdsl.generation.generate import Generation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Colour = tuple[int, int, int]

# The background colours of no step and of the most steps. Dark letters are readable on the first
# pair, light letters on the second.
LIGHT: tuple[Colour, Colour] = (242, 245, 248), (92, 166, 224)
DARK: tuple[Colour, Colour] = (34, 42, 51), (20, 96, 158)
HIDDEN = ("C", "Zl", "Zp")  # Unicode categories: control and format characters, separators
STAND_INS = {"\n": "↵", "\t": "⇥"}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Think map: {name}</title>
<style>
:root {{ color-scheme: light dark; --ink: #15202b; --paper: #ffffff; --soft: #52606d; }}
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.4rem; margin: 0; }}
p {{ margin: .5rem 0; }}
.soft {{ color: var(--soft); }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .15rem .8rem; text-align: right; font-weight: normal; }}
section {{ margin: 1.5rem 0; line-height: 1; }}
.t {{ display: inline-block; vertical-align: top; min-width: .6rem; max-width: 100%;
  margin: 0 1px 5px 0; padding: 2px; border-bottom: 2px solid transparent; border-radius: 3px;
  text-align: center; unicode-bidi: isolate; }}
.t b {{ display: block; font: 1rem/1.3 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
.t small {{ display: block; font-size: .65rem; }}
.p {{ border-bottom: 2px dotted var(--soft); }}
{light}
@media (prefers-color-scheme: dark) {{
:root {{ --ink: #f2f6fa; --paper: #11171d; --soft: #a6b3bf; }}
{dark}
}}
</style>
</head>
<body>
<h1>Think map: {name}</h1>
<p>{facts}</p>
<table>
<thead><tr class="soft"><th scope="col">further steps</th><th scope="col">tokens</th>\
<th scope="col">share</th></tr></thead>
<tbody>
{legend}
</tbody>
</table>
<p class="soft">Each box is a token. The number in it is the number of its further thinking
steps. The tokens of the prompt have a dotted line below. The last token of a text was not read by
the model and has no number (·).</p>
{sections}
</body>
</html>
"""


def think_map(
    rows: Sequence[Generation], tokenizer: Tokenizer, *, name: str, setting: str = "as trained"
) -> str:
    """Return one HTML page that shows all ``rows``.

    ``name``: the name of the model. ``setting``: the setting of the compute dial, in words.
    """
    counts = Counter(steps for row in rows for steps in row.steps)
    total = counts.total()
    mean = sum(steps * count for steps, count in counts.items()) / max(1, total)
    facts = (
        f"Compute dial: {setting}. Further thinking steps per token: {mean:.2f}, "
        f"averaged over {total:,} tokens."
    )
    return PAGE.format(
        name=escape(name),
        facts=escape(facts),
        light=_styles(counts, LIGHT),
        dark=_styles(counts, DARK),
        legend="\n".join(_legend(counts)),
        sections="\n".join(_section(row, tokenizer) for row in rows),
    )


def _styles(counts: Counter[int], ends: tuple[Colour, Colour]) -> str:
    most = max(counts, default=0) or 1
    return "\n".join(
        f".s{steps} {{ background: {_between(*ends, steps / most)}; }}" for steps in sorted(counts)
    )


def _between(low: Colour, high: Colour, at: float) -> str:
    mixed = [round(a + (b - a) * at) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _legend(counts: Counter[int]) -> Iterator[str]:
    for steps, count in sorted(counts.items()):
        cells = f"<td>{count:,}</td><td>{count / counts.total():.1%}</td>"
        yield f'<tr><th scope="row" class="s{steps}">{steps}</th>{cells}</tr>'


def _section(row: Generation, tokenizer: Tokenizer) -> str:
    tokens = row.prompt + row.tokens
    steps = [*row.steps, *[None] * (len(tokens) - len(row.steps))]
    boxes = [
        _box(text, count, place < len(row.prompt))
        for place, (text, count) in enumerate(zip(_texts(tokens, tokenizer), steps, strict=True))
    ]
    return f"<section>{''.join(boxes)}</section>"


def _box(text: str, steps: int | None, in_prompt: bool) -> str:
    colour, number, title = f" s{steps}", f"{steps}", f"{steps} further steps"
    if steps is None:
        colour, number, title = "", "·", "not read"
    elif steps == 1:
        title = "1 further step"
    kind = f"t{colour}{' p' if in_prompt else ''}"
    box = f'<span class="{kind}" title="{title}"><b>{escape(visible(text))}</b>'
    return f"{box}<small>{number}</small></span>" + "<br>" * text.count("\n") + "<wbr>"


def visible(text: str) -> str:
    """Replace characters that are invisible, or that change the direction of the text.

    Spaces become ␣ where the text consists of spaces alone, a newline becomes ↵, a tab ⇥, and any
    other such character its code point, for example U+202E.
    """
    if text.isspace() and set(text) == {" "}:
        return "␣" * len(text)
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in STAND_INS:
        return STAND_INS[character]
    hidden = unicodedata.category(character).startswith(HIDDEN)
    return f"U+{ord(character):04X}" if hidden else character


def _texts(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what each token adds to the text.

    The first bytes of a character are yielded in hexadecimal, a special token as its name.
    """
    decoder = StreamingDecoder(tokenizer)
    special = tokenizer.get_added_tokens_decoder()
    bytes_of = byte_level().get_vocab()
    for token in tokens:
        text = decoder.push(token)
        name = tokenizer.id_to_token(token)
        if text or name is None:
            yield text or f"[{token}]"
        elif token in special or not set(name) <= bytes_of.keys():
            yield name
        else:
            yield " ".join(f"{bytes_of[character]:02X}" for character in name)
