#!/usr/bin/env bash
# transformers 5.23.0: a model that is saved in shards into a folder which holds an earlier save in
# one file cannot be loaded from there: the earlier weights are.
#
# save_pretrained(max_shard_size=...) removes the shards of an earlier save, but not its
# model.safetensors, and from_pretrained prefers that file to the index of the shards. Nothing is
# said. This happens when a model has grown over the limit of one shard, or when the limit changes.
#
# Seen: the norm's weights are saved as 1, changed to 2, and saved again in shards; loaded they
# are 1. This script fails if that is no longer so.
#
# Usage: findings/transformers-shards-over-one-file.sh
# PY names a python that has torch and transformers; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch transformers==5.23.0
    PY=$folder/venv/bin/python
fi
cat >"$folder/save.py" <<'PYTHON'
"""Save a model twice into one folder and print a weight, as it is and as it is loaded."""
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
model.save_pretrained(sys.argv[1])
with torch.no_grad():
    model.model.norm.weight.fill_(2)
model.save_pretrained(sys.argv[1], max_shard_size="2KB")
loaded = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(transformers.__version__, *(m.model.norm.weight[0].item() for m in (model, loaded)))
PYTHON
read -r version saved loaded < <("$PY" "$folder/save.py" "$folder/model")
echo "transformers $version: saved $saved, loaded $loaded"
[[ $saved == 2.0 && $loaded == 1.0 ]] || { echo "CHANGED"; exit 1; }
echo "as described: the weights of the earlier save are loaded"
