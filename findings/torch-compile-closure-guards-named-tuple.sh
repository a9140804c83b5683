#!/usr/bin/env bash
# torch 2.13.0: a closure that uses one field of a NamedTuple makes torch.compile guard all fields.
#
# Four modules differ only in the name that a NamedTuple of theirs holds. `forward` multiplies by
# another field, which is equal in all of them. Where `forward` reads that field itself, one
# compilation serves all four modules. Where a nested function or a lambda reads it from the variable
# of the method around it, the field that nobody reads is compared, too: each module is compiled.
# Reading the field into a variable before the nested function brings the one compilation back.
#
# Seen: read directly 1 compilation; by a nested function 4; by a lambda 4; read before it 1.
# This script fails if that is no longer so.
#
# Usage: findings/torch-compile-closure-guards-named-tuple.sh
# PY names a python that has torch; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
    PY=$folder/venv/bin/python
fi
cat >"$folder/count.py" <<'PYTHON'
import sys
from typing import NamedTuple

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

print("torch", torch.__version__)


class Step(NamedTuple):
    name: str
    factor: float


class Block(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.step = Step(name, 2.0)


class Directly(Block):
    def forward(self, x):
        step = self.step
        return x * step.factor


class ByNestedFunction(Block):
    def forward(self, x):
        step = self.step

        def scaled(y):
            return y * step.factor

        return call(scaled, x)


class ByLambda(Block):
    def forward(self, x):
        step = self.step
        return call(lambda y: y * step.factor, x)


class BeforeNestedFunction(Block):
    def forward(self, x):
        factor = self.step.factor
        return call(lambda y: y * factor, x)


def call(function, x):
    return function(x)


found = []
for kind in (Directly, ByNestedFunction, ByLambda, BeforeNestedFunction):
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in [kind(f"block {n}") for n in range(4)]:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
        block(torch.ones(3))
    print(f"{kind.__name__}: {counter.frame_count} compilations")
    found.append(counter.frame_count)
if found != [1, 4, 4, 1]:
    sys.exit("CHANGED: closures no longer guard fields that nobody reads")
print("as described: a closure guards every field of the tuple")
PYTHON
"$PY" "$folder/count.py"
