"""How many kernels inductor makes of a routed step of a compiled loop, counted without a GPU.

python -m benchmarks.inductor [--router top_k] [--kv own] [--triton]

A routed step and a full pass are differences of loops, as in benchmarks/launches.py, forward and
backward. Inductor makes code for the CPU, by nearly the same rules of fusion as for a GPU. Nothing
of it is built: the graphs that it was made from are run instead. "fused" are the kernels that it
writes, "library" are products of matrices, attention, sorting and the like.

With ``--triton`` inductor makes code for Triton (pip install triton), and each kernel is compiled
to the machine code of an H100, which shows errors that a GPU would meet. Nothing is run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from archdsl.blocks.modules.router import higher_before
from archdsl.model.build import build
from benchmarks.launches import KEYS, LAUNCHES, ROUTERS, looped
from benchmarks.measure import arguments, bar, progress, record

H100 = ("cuda", 90, 32)
LIBRARY_CALL = re.compile(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops\.\w+)\.", re.MULTILINE)


class KernelCount:
    """A backend of torch.compile that counts kernels and calls of libraries, and runs graphs."""

    def __init__(self, triton: bool = False) -> None:
        self.fused = self.library = 0
        self.triton = triton

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
            config.patch(force_disable_caches=True, cpu_backend="triton" if self.triton else "cpp"),
            mock.patch.object(GraphLowering, "save_output_code", codes.append),
            mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *_: None),
            mock.patch.object(AsyncCompile, "triton", compiled_for_a_gpu),
            driver_of_a_gpu() if self.triton else nullcontext(),
        ):
            compile_fx_inner(graph, inputs, **more)
        self.fused += metrics.generated_kernel_count - before
        self.library += sum(len(LIBRARY_CALL.findall(code)) for code in codes)

        run: Any = lambda given: as_given(*given)  # noqa: E731  it gets an attribute
        run._boxed_call = True
        return run


class Driver:
    """What inductor asks a driver of Triton for."""

    def get_current_target(self) -> object:
        """The GPU to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*H100)


@contextmanager
def driver_of_a_gpu() -> Iterator[None]:
    """Triton takes this machine for one with an H100."""
    from triton.runtime import driver

    # `reset_active` would look for a GPU
    with mock.patch.object(driver, "_active", Driver()):
        yield


def compiled_for_a_gpu(_: object, name: str, source: str, device_str: str = "") -> object:
    """In place of inductor's own way to compile a kernel of Triton, which asks for a driver.

    Raises what Triton raises.
    """
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with mock.patch.object(triton_helpers, "set_driver_to_cpu"):
        kernel = getattr(PyCodeCache.load(source), name)
    how = kernel._create_compile_meta(kernel.configs[0])
    triton.compile(
        ASTSource(kernel.fn, how["signature"], how["constants"], how["configs"][0]),
        target=GPUTarget(*H100),
        options={"num_warps": how["num_warps"], "num_stages": how["num_stages"]},
    )
    return mock.Mock()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Layers of the CPU compute by the ways that are chosen on a GPU."""
    ranks = partial(higher_before, sorts=False)
    with (
        mock.patch("archdsl.blocks.modules.router.higher_before", ranks),
        mock.patch("archdsl.blocks.modules.attention.blocks_are_possible", _always),
        mock.patch.object(flex_attention, "flex_attention", _as_a_library),
    ):
        yield


def _always(_: Tensor) -> bool:
    return True  # not a mock, which Dynamo cannot read


@torch.library.custom_op("archdsl_benchmarks::selected", mutates_args=())
def _selected(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Attention by blocks as one call of a library; the mask is left out."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).contiguous()


@torch.library.custom_op("archdsl_benchmarks::selected_backward", mutates_args=())
def _selected_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, which are of no use."""
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@_selected.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    return q.new_empty(q.shape)


@_selected_backward.register_fake
def _(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, list[Tensor]], output: Tensor) -> None:
    q, k, v, blocks = inputs
    ctx.save_for_backward(q, k, v, *blocks)


def _gradients(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, list[None]]:
    q, k, v, *blocks = ctx.saved_tensors
    return *_selected_backward(slope, q, k, v, blocks), [None] * len(blocks)


_selected.register_autograd(_gradients, setup_context=_save)


def _as_a_library(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, enable_gqa: bool
) -> Tensor:
    lists = [
        one for name, one in vars(block_mask).items() if name.endswith(("_blocks", "_indices"))
    ]
    return cast(Tensor, _selected(q, k, v, lists))


def kernels_of_pass(
    sizes: Mapping[str, int], kv: str, router: str | None, triton: bool = False
) -> dict[str, int]:
    """The kernels that the third pass of a loop adds to those of two passes.

    Under autocast to bfloat16. ``triton``: whether for a GPU. ``sizes`` and the others: `looped`.
    """
    counts = []
    for steps in (3, 2):
        torch.compiler.reset()
        spec, count = looped(sizes, steps, kv, router), KernelCount(triton)
        model = build(spec).train()
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=count)
        x_BTD = torch.randn(sizes["batch"], spec.context, spec.dim, requires_grad=True)
        way = as_on_a_gpu() if triton else nullcontext()
        with way, torch.autocast("cpu", torch.bfloat16):
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
        triton={"action": "store_true", "help": "code for Triton, compiled for an H100"},
    )
    sizes = {"batch": 1, "tokens": 64 if args.small else 1024, "dim": 64, "head": 32, "hidden": 160}
    found: dict[str, object] = {}
    for kv in [args.kv] if args.kv else KEYS:
        full = kernels_of_pass(sizes, kv, None, args.triton)
        for router in [args.router] if args.router else ROUTERS:
            step = kernels_of_pass(sizes, kv, router, args.triton)
            ratio = sum(step.values()) / sum(full.values())
            goal = {"": ratio, "bar": bar(ratio, *LAUNCHES)}
            found[f"{router}, {kv}"] = goal | {"step": step, "pass": full}
            progress(f"{router}, {kv}: {ratio:.2f}")
    record("inductor", sizes, found, args)


if __name__ == "__main__":
    main()
