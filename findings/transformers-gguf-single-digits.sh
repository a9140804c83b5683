#!/usr/bin/env bash
# transformers 5.23.0: the tokenizer that it reads from a GGUF file merges digits which the model has
# only seen one by one, if the file's kind of pre-tokenizer is smollm, starcoder, refact, command-r,
# codeshell, exaone or minerva-7b.
#
# llama.cpp splits the texts of these kinds at each digit before merging (src/llama-vocab.cpp), as
# the tokenizer.json of these models do. The reader of transformers knows no split for the kinds
# and splits like GPT-2, also for kinds that do not exist, without a word.
#
# Seen: with the merge "1 2", the text 12 is one token for each of the kinds, and for one that does
# not exist. This script fails if that is no longer so.
#
# Usage: findings/transformers-gguf-single-digits.sh
# PY names a python with torch, transformers and gguf; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch transformers==5.23.0 gguf==0.19.0
    PY=$folder/venv/bin/python
fi
cat >"$folder/read.py" <<'PYTHON'
"""Write a GGUF file for each kind of pre-tokenizer and print how many tokens 12 is in it."""
import sys
from pathlib import Path

import gguf
import transformers

transformers.logging.set_verbosity_error()
found = set()
for kind in "smollm starcoder refact command-r codeshell exaone minerva-7b unheard-of".split():
    path = Path(sys.argv[1]) / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(["1", "2", "12", "<|endoftext|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["1 2"])
    for name in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", 3)
    for name, value in {"block_count": 1, "context_length": 8, "embedding_length": 64}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found.add(len(reader("12", add_special_tokens=False).input_ids))
print(transformers.__version__, *found)
PYTHON
read -r version tokens < <("$PY" "$folder/read.py" "$folder")
echo "transformers $version: 12 is $tokens token(s) for every kind"
[[ $tokens == 1 ]] || { echo "CHANGED"; exit 1; }
echo "as described: the digits are merged"
