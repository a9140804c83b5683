#!/usr/bin/env bash
# Hypothesis 6.170.15: with derandomize=True, the examples of a test change when an unrelated local
# module is imported first.
#
# The documentation of `derandomize` promises the same examples in every run "until you update
# Hypothesis, Python, or the test function". Since Hypothesis draws constants that it finds in
# imported modules of the project, it also depends on which of them are imported when the test
# starts. With pytest-xdist the division of the tests among processes decides that, so that a
# property can fail in one run and pass in the next, with the same code, Python and Hypothesis.
#
# Seen: three runs without the import agree, three runs with it agree, and the two sets differ.
# This script fails if that is no longer so.
#
# Usage: findings/hypothesis-derandomize-and-imports.sh
# PY names a python that has hypothesis; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q hypothesis==6.170.15
    PY=$folder/venv/bin/python
fi
cd "$folder"
cat >unrelated.py <<'PYTHON'
SIZES = [40_001, 40_002, 40_003, 40_004, 40_005, 40_006, 40_007, 40_008]
PYTHON
cat >examples.py <<'PYTHON'
"""Print the SHA-256 of the examples of one test."""
import hashlib
import sys

from hypothesis import given, settings, strategies as st

if sys.argv[1:] == ["import"]:
    import unrelated  # noqa: F401

seen = []


@settings(derandomize=True, database=None, max_examples=200)
@given(st.integers())
def test(number):
    seen.append(number)


test()
print("SHA-256 of", len(seen), "examples:", hashlib.sha256(repr(seen).encode()).hexdigest()[:16])
PYTHON
"$PY" -c 'import hypothesis; print("hypothesis", hypothesis.__version__)'
for _ in 1 2 3; do "$PY" examples.py; done | sort -u | tee without
for _ in 1 2 3; do "$PY" examples.py import; done | sort -u | tee with
[[ $(wc -l <without) == 1 && $(wc -l <with) == 1 ]] || { echo "runs of one kind differ"; exit 1; }
cmp -s without with && { echo "CHANGED: the import makes no difference any more"; exit 1; }
echo "as described: importing an unrelated module changes the derandomized examples"
