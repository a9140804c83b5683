"""How many kernels inductor makes of a routed step of a compiled loop, counted without a GPU.

python -m benchmarks.inductor [--router top_k] [--kv own]

A routed step and a full pass are differences of loops, as in benchmarks/launches.py, forward and
backward. Inductor makes code for the CPU, by nearly the same rules of fusion as for a GPU. Nothing
of it is built: the graphs that it was made from are run instead. "fused" are the kernels that it
writes, "library" are products of matrices, attention, sorting and the like.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, fx

from archdsl.model.build import build
from benchmarks.launches import KEYS, LAUNCHES, ROUTERS, looped
from benchmarks.measure import arguments, bar, progress, record

LIBRARY_CALL = re.compile(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops\.\w+)\.", re.MULTILINE)


class KernelCount:
    """A backend of torch.compile that counts kernels and calls of libraries, and runs graphs."""

    def __init__(self) -> None:
        self.fused = self.library = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> object:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=cast(Any, self._count))

    def _count(self, graph: fx.GraphModule, inputs: Sequence[Tensor], **more: Any) -> object:
        from torch._inductor import config, metrics
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.graph import GraphLowering

        as_given, before = copy.deepcopy(graph), metrics.generated_kernel_count
        codes: list[str] = []
        with (
            config.patch(force_disable_caches=True),
            mock.patch.object(GraphLowering, "save_output_code", codes.append),
            mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *_: None),
        ):
            compile_fx_inner(graph, inputs, **more)
        self.fused += metrics.generated_kernel_count - before
        self.library += sum(len(LIBRARY_CALL.findall(code)) for code in codes)

        run: Any = lambda given: as_given(*given)  # noqa: E731  it gets an attribute
        run._boxed_call = True
        return run


def kernels_of_pass(sizes: Mapping[str, int], kv: str, router: str | None) -> dict[str, int]:
    """The kernels that the third pass of a loop adds to those of two passes.

    Under autocast to bfloat16. ``sizes`` and the others: see `looped`.
    """
    counts = []
    for steps in (3, 2):
        torch.compiler.reset()
        spec, count = looped(sizes, steps, kv, router), KernelCount()
        model = build(spec).train()
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=count)
        x_BTD = torch.randn(sizes["batch"], spec.context, spec.dim, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD = model.hidden(x_BTD)
        losses = [one for one in model.trace.losses.values() if one.requires_grad]
        torch.autograd.backward([y_BTD.sum(), *losses])
        counts.append(count)
    three, two = counts
    return {"fused": three.fused - two.fused, "library": three.library - two.library}


def main() -> None:
    """Counts, and prints a routed step beside the full pass of its loop."""
    args = arguments(
        __doc__,
        router={"choices": ROUTERS, "help": "one router (default: all)"},
        kv={"choices": KEYS, "help": "one kind of keys (default: both)"},
    )
    sizes = {"batch": 1, "tokens": 64 if args.small else 1024, "dim": 64, "head": 32, "hidden": 160}
    found: dict[str, object] = {}
    for kv in [args.kv] if args.kv else KEYS:
        full = kernels_of_pass(sizes, kv, None)
        for router in [args.router] if args.router else ROUTERS:
            step = kernels_of_pass(sizes, kv, router)
            ratio = sum(step.values()) / sum(full.values())
            goal = {"": ratio, "bar": bar(ratio, *LAUNCHES)}
            found[f"{router}, {kv}"] = goal | {"step": step, "pass": full}
            progress(f"{router}, {kv}: {ratio:.2f}")
    record("inductor", sizes, found, args)


if __name__ == "__main__":
    main()
