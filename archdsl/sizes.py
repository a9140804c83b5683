"""Sizes written as words, such as ``162M``: tokens, steps, bytes, parameters."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from archdsl.errors import describe

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?(?:e\+?\d\d?)?) ?([a-z]*)", re.IGNORECASE | re.ASCII)


def parse_size(value: object) -> int:
    """Converts a size such as ``162M``, ``1.2B``, ``8k``, ``64KiB`` or ``2e9`` to an int.

    k, M, B (or G), T and P are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024. Upper and
    lower case are the same. Raises ValueError if the value is not a whole number of zero or more.
    """
    size = _fraction(value)
    if size is None or size < 0 or size.denominator != 1:
        wanted = "a whole number, also written as 162M, 1.2B, 8k or 64KiB"
        raise ValueError(f"must be {wanted}; got {describe(value)}")
    return int(size)


def _fraction(value: object) -> Fraction | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return Fraction(value)
    if isinstance(value, float) and math.isfinite(value):
        return Fraction(value)
    if isinstance(value, str) and (found := SIZE.fullmatch(value.strip())):
        unit = UNITS.get(found[2].casefold())
        return Fraction(found[1]) * unit if unit else None
    return None
