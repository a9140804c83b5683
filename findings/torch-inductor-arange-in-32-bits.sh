#!/usr/bin/env bash
# torch 2.13.0 with triton 3.7.1: inductor multiplies what comes from torch.arange in 32 bits.
#
# `torch.arange(n) * factor` is int64. Inductor takes the product for a part of an index, and indices
# of small tensors are int32 in its code for Triton: the product is computed as int32, and becomes
# int64 only after it has overflowed (pytorch issues 175966 and 183901 show the wrong numbers on a
# GPU). Where the factor itself does not fit into 32 bits, Triton refuses the code. An operation that
# no index can have, such as `^ 0`, after the arange makes it a value, and the product has 64 bits.
#
# No GPU is needed: the code that inductor makes for Triton is compiled for an H100, and not run. The
# options used for that are internal ones of torch.
#
# Seen: factor 3,000,000: i32; 2654435761: "out of range for type int32"; both with `^ 0`: i64.
# This script fails if that is no longer so.
#
# Usage: findings/torch-inductor-arange-in-32-bits.sh
# PY names a python that has torch and triton; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.7.1 numpy==2.4.6 setuptools
    PY=$folder/venv/bin/python
fi
cat >"$folder/product.py" <<'PYTHON'
import re
import sys
from unittest import mock

import torch
import triton
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

print("torch", torch.__version__, "triton", triton.__version__)
H100 = GPUTarget("cuda", 90, 32)


class Driver:
    def get_current_target(self):
        return H100


class Seen(BaseException):
    pass


def compiled(_, name, source, device_str=""):
    with mock.patch.object(triton_helpers, "set_driver_to_cpu"):
        kernel = getattr(PyCodeCache.load(source), name)
    how = kernel._create_compile_meta(kernel.configs[0])
    source = ASTSource(kernel.fn, how["signature"], how["constants"], how["configs"][0])
    try:
        made = triton.compile(source, target=H100, options={"num_warps": how["num_warps"]})
    except Exception as error:
        raise Seen(re.search(r"out of range for type \w+", str(error)).group()) from None
    products = re.findall(r"muli .* : tensor<\d+x(i\d+)>", made.asm["ttir"])
    raise Seen(products[-1])


def width(factor, as_value):
    """How the product is computed."""

    def function(x):
        place = torch.arange(x.numel())
        return ((place ^ 0 if as_value else place) * factor) ^ x

    torch.compiler.reset()
    settings = config.patch(cpu_backend="triton", force_disable_caches=True)
    with settings, mock.patch.object(AsyncCompile, "triton", compiled):
        try:
            torch.compile(function)(torch.zeros(100_000, dtype=torch.long))
        except Seen as seen:
            return str(seen)
    return "not seen"


driver.set_active(Driver())
found = {}
for factor in (3_000_000, 2654435761):
    for as_value in (False, True):
        found[factor, as_value] = width(factor, as_value)
        print(f"arange{' ^ 0' * as_value} times {factor}: {found[factor, as_value]}")
if list(found.values()) != ["i32", "i64", "out of range for type int32", "i64"]:
    sys.exit("CHANGED: inductor no longer multiplies an arange in 32 bits")
print("as described: the product of an arange has 32 bits")
PYTHON
"$PY" -W ignore "$folder/product.py"
