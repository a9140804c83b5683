#!/usr/bin/env bash
# Does training with thinking steps change the gradients of easy and hard windows, or does longer
# training? A plain model is trained, then twice as long: with thinking steps, and, as the control,
# without. About four minutes of one core for each seed; started again, it goes on.
set -euo pipefail
cd "$(dirname "$0")"
runs=${RUNS:-../../runs/gradients}
steps=${STEPS:-600}

mkdir -p "$runs"
for seed in ${SEEDS:-0 1 2}; do
  test -f "thinking-and-longer-$seed.json" && continue
  at=$runs/$seed
  archdsl train plain.yaml --steps "$steps" --seed "$seed" --out "$at/plain" >"$runs/$seed.log"
  test -d "$at/grafted" || archdsl retrofit "$at/plain/final" overlay.yaml --out "$at/grafted" >>"$runs/$seed.log"
  archdsl train "$at/grafted" --only all --steps "$steps" --seed "$((seed + 100))" --out "$at/thinking" >>"$runs/$seed.log"
  archdsl train "$at/plain/final" --only all --steps "$steps" --seed "$((seed + 100))" --out "$at/longer" >>"$runs/$seed.log"
  archdsl gradients "$at/longer/final" --before "$at/plain/final" --windows 64 --json >"$at/before.json"
  archdsl gradients "$at/thinking/final" --before "$at/longer/final" --windows 64 --json >"$at/last.json"
  mv "$at/before.json" "longer-and-plain-$seed.json"
  mv "$at/last.json" "thinking-and-longer-$seed.json"
done
