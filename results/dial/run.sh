#!/usr/bin/env bash
# What a leaking router hides, and what the dial does afterwards: one small ITT on text with each kind
# of router, swept over the paper's capacities, beside its plain backbone and the loop that takes
# every token. A minute or two for each run; started again, it goes on.
set -euo pipefail
cd "$(dirname "$0")"
runs=${RUNS:-../../runs/dial}
think=(--set blocks.1.steps=4 --set blocks.1.router.capacity=0.7)

run() { # NAME SEED SWEEP OPTION...
  local name=$1-$2 sweep=$3
  test -f "$name/eval.json" && return
  mkdir -p "$name"
  archdsl train tiny "${@:4}" --steps 400 --seed "$2" --out "$runs/$name" >"$runs/$name.log"
  archdsl eval "$runs/$name/final" --split test --tokens 131072 --json $sweep >"$runs/$name.json"
  cp "$runs/$name/final/provenance.json" "$name"
  mv "$runs/$name.json" "$name/eval.json"
}

mkdir -p "$runs"
for seed in 0 1 2; do
  for router in top_k threshold predictor prefix random; do
    run "$router" "$seed" --sweep "${think[@]}" --set "blocks.1.router.kind=$router"
  done
  run plain "$seed" "" --set blocks.1.steps=1
  run loop "$seed" "" --set blocks.1.steps=4 --set blocks.1.router=null
done
