#!/usr/bin/env bash
# torch 2.13.0: after `torchrun --max-restarts`, restarted gloo processes look for the dead ones.
#
# Two processes form a gloo group, and one of them ends with an error. torchrun starts both again, as
# --max-restarts asks. It gives them the store of the first attempt, under the same names. So if one
# of them is a little later than the other, the other reads the address of the process that ended,
# and init_process_group does not succeed. It does
# with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which makes a new store, or if the processes put
# TORCHELASTIC_RESTART_COUNT before all names by a PrefixStore (on one machine; several machines may
# count differently).
#
# Seen: by default the second attempt fails; with the variable and with the prefix it succeeds.
# This script fails if that is no longer so.
#
# Usage: findings/torchrun-restart-finds-dead-processes.sh
# PY names a python that has torch; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
    PY=$folder/venv/bin/python
fi
cat >"$folder/work.py" <<'PYTHON'
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

attempt, limit = os.environ["TORCHELASTIC_RESTART_COUNT"], timedelta(seconds=15)
store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
if attempt == "1" and rank == 1:
    time.sleep(3)  # processes never start at the same moment
if sys.argv[1] == "prefix":
    store = PrefixStore(f"attempt_{attempt}", store)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
dist.barrier()
if attempt == "0" and rank == 1:
    sys.exit(1)
dist.barrier()
PYTHON
run() {
    if OMP_NUM_THREADS=1 "$PY" -m torch.distributed.run --standalone --nproc-per-node 2 \
        --max-restarts 1 "$folder/work.py" "$1" >/dev/null 2>&1; then echo succeeds; else echo fails; fi
}
"$PY" -c 'import torch; print("torch", torch.__version__)'
seen="default: $(run plain)
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: $(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run plain)
prefix: $(run prefix)"
echo "$seen"
[[ "$seen" == "default: fails
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: succeeds
prefix: succeeds" ]]
