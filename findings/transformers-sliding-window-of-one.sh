#!/usr/bin/env bash
# transformers 5.23.0: with a sliding window of one token, generation with a cache gives other
# tokens than without one.
#
# `sliding_window: 1` is a valid value: each token sees itself alone. The layer of a dynamic cache
# with a window of n keeps the last n - 1 entries, by a slice that begins at -(n - 1). For n = 1 that
# begins at 0 and keeps everything. `generate` with its default cache then attends to tokens outside
# of the window, without an error; a chunk of several tokens after another ends in a size mismatch.
# Windows of two and more are right.
#
# Seen: window 1: chunk refused, tokens differ; window 2 and 3: chunks equal, tokens equal.
# This script fails if that is no longer so.
#
# Usage: findings/transformers-sliding-window-of-one.sh
# PY names a python that has torch and transformers; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
    PY=$folder/venv/bin/python
fi
"$PY" - <<'PYTHON'
import sys

import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
found = []
with torch.no_grad():
    for window in (1, 2, 3):
        torch.manual_seed(0)
        config = transformers.MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, sliding_window=window,
        )
        model = transformers.MistralForCausalLM(config).eval()
        tokens = torch.randint(50, (1, 8))
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with_cache = model.generate(tokens, use_cache=True, **how)
        equal = torch.equal(with_cache, model.generate(tokens, use_cache=False, **how))
        try:
            whole = model(tokens, use_cache=False).logits[:, 4:]
            begun = model(tokens[:, :4], use_cache=True).past_key_values
            rest = model(tokens[:, 4:], past_key_values=begun, use_cache=True).logits
            chunk = "equal" if torch.allclose(rest, whole, atol=1e-5) else "different"
        except RuntimeError as error:
            chunk = str(error)
        print(f"window {window}: tokens {'equal' if equal else 'DIFFERENT'}; second chunk: {chunk}")
        found.append((equal, chunk == "equal"))
if found != [(False, False), (True, True), (True, True)]:
    sys.exit("CHANGED: a window of one token is no longer an exception")
print("as described: a window of one token is kept whole by the cache")
PYTHON
