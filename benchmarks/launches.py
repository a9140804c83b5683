"""What a routed step launches and moves on a GPU, counted without one.

python -m benchmarks.launches [--router top_k] [--kv own] [--top 20]

A loop with a routed pass more is compared with itself, and so is the same loop in which every token
takes all passes. The differences are a routed step and a full pass, forward and backward:

    launches  operations of torch that launch at least one kernel (views and allocations do not)
    MB        each tensor that an operation reads or writes, once
    floor     for each operation, the longer of its bytes over 3 TB/s and its FLOPs over 780 TFLOP/s

Nothing is computed: tensors are on the meta device, and a mode answers that they are on a CUDA
device, casts as autocast does there, and counts attention and RMSNorm as the single kernels that
they are there. Attention of selected tokens to shared keys, which is compiled there, counts as the
kernels that inductor makes of it.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import FrameType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel
from archdsl.nn import selected_attention
from benchmarks.measure import arguments, bar, record

ROUTERS = ("top_k", "threshold", "predictor", "prefix", "random")
KEYS = ("own", "shared")
BYTES_PER_SECOND, FLOPS_PER_SECOND = 3e12, 780e12  # of an H100
LAUNCHES, BYTES = (1.5, 1.2), (0.6, None)  # goals: a routed step at .5 over a full pass

GPU, META = torch.device("cuda", 0), torch.device("meta")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS_IN_PLACE = {"squeeze_", "unsqueeze_", "transpose_", "t_"}
NO_KERNEL = ALLOCATIONS | VIEWS_IN_PLACE | {"detach", "alias", "lift_fresh", "_local_scalar_dense"}
TWO_KERNELS = {"constant_pad_nd"}  # one fills, one copies
GATHERS = {"index_select", "gather", "embedding", "index"}  # read as much as they write
SCATTERS = {"index_put_", "scatter_", "index_copy_"}  # write as much as they read
ADDING = {"scatter_add_", "index_add_"}  # and read what was there
FILLS = {"copy_", "fill_", "zero_"}  # do not read what was there

# what autocast does on CUDA (ATen/autocast_mode.h), as far as a model may use it
LOWER = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"}
LOWER |= {"einsum", "scaled_dot_product_attention"}
FLOAT = {"exp", "log", "pow", "__pow__", "rsqrt", "reciprocal", "softplus", "logsumexp"}
FLOAT |= {"layer_norm", "rms_norm", "binary_cross_entropy_with_logits"}
FLOAT_RESULT = {"sum", "prod", "softmax", "log_softmax", "cumsum", "cumprod"}
WIDEST = {"addcmul", "index_put", "scatter_add", "cat", "stack"}


@dataclass
class Count:
    """Launches, bytes read and written, FLOPs and the shortest possible time in seconds."""

    launches: float = 0
    bytes: float = 0
    flops: float = 0
    floor: float = 0

    def plus(self, other: Count, times: float = 1) -> Count:
        """This and ``times`` the other."""
        return Count(
            self.launches + times * other.launches,
            self.bytes + times * other.bytes,
            self.flops + times * other.flops,
            self.floor + times * other.floor,
        )


Kernel = tuple[str, str]  # the operation, and the function that called it
Counts = dict[Kernel, Count]


def total(counts: Counts) -> Count:
    """The sum over all operations."""
    added = Count()
    for one in counts.values():
        added = added.plus(one)
    return added


def size(tensor: Tensor) -> int:
    """The bytes of a tensor; elements that an expanded tensor repeats count once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(n for n, stride in pairs if stride) * tensor.element_size()


@dataclass
class Counter(TorchDispatchMode):
    """Counts the operations that are called within it, by name and by what called them."""

    counts: defaultdict[Kernel, Count] = field(default_factory=lambda: defaultdict(Count))
    callers: dict[int, str] = field(default_factory=dict)  # by the number of the autograd node

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        caller = self._caller()
        if name in NO_KERNEL or not (given or made) or _is_view(func, given, made):
            return result
        flops = flop_registry.get(func.overloadpacket)
        spent = flops(*args, **(kwargs or {}), out_val=result) if flops else 0
        self.add(name, _moved(name, given, made), spent, caller)
        return result

    def add(self, name: str, bytes: int, flops: int = 0, caller: str | None = None) -> None:
        """Counts one operation."""
        floor = max(bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND)
        key = name, caller or self._caller()
        launches = 2 if name in TWO_KERNELS else 1
        self.counts[key] = self.counts[key].plus(Count(launches, bytes, flops, floor))

    def _caller(self) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self.callers.get(node._sequence_nr(), "gradients") + ", backward"
        caller = _calling_function()
        # its own node has the last number; operations without one may follow
        self.callers.setdefault(torch._C._autograd._get_sequence_nr() - 1, caller)
        return caller


def _calling_function() -> str:
    """The innermost function of the project that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "/archdsl/" in frame.f_code.co_filename:
            return frame.f_code.co_qualname
        frame = frame.f_back
    return "?"


def _tensors(tree: object) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _is_view(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    if func._schema.is_mutable or not made:
        return False
    there = {one.untyped_storage()._cdata for one in given}
    return all(one.untyped_storage()._cdata in there for one in made)


def _moved(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """The bytes that an operation reads and writes."""
    read, written = sum(map(size, given)), sum(map(size, made))
    if name in GATHERS:
        return read - size(given[0]) + 2 * written
    if name in SCATTERS or name in ADDING:
        source = read - size(given[0])
        new = size(given[-1])
        return source + new * (2 if name in ADDING else 1)
    return read + written - (size(given[0]) if name in FILLS else 0)


ATTRIBUTES = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True}  # type: ignore[attr-defined]


class OnGpu(TorchFunctionMode):
    """Tensors of the meta device say that they are on a GPU, and autocast is on."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter
        self.cast: dict[Tensor, Tensor] = {}  # weights in bfloat16, as autocast keeps them

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return ATTRIBUTES.get(func) or func(*args)
        args, kwargs = tree_map(_to_meta, (args, kwargs or {}))
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._autocast(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name == "rms_norm" and _alike(given := _tensors((args, kwargs))):
            return _FusedNorm.apply(self.counter, *given)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _autocast(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name in LOWER:
            return tree_map(self._lower, args), tree_map(self._lower, kwargs)
        if name in FLOAT:
            return tree_map(_float, args), tree_map(_float, kwargs)
        half = [x for x in _tensors(args) if x.dtype == torch.bfloat16]
        if name in FLOAT_RESULT and half:
            return args, {"dtype": torch.float32} | kwargs
        if name in WIDEST and half and any(x.dtype == torch.float32 for x in _tensors(args)):
            return tree_map(_float, args), tree_map(_float, kwargs)
        return args, kwargs

    def _lower(self, value: object) -> object:
        if isinstance(value, nn.Parameter) and value.dtype == torch.float32:
            if value not in self.cast:
                self.cast[value] = value.to(torch.bfloat16)
            return self.cast[value]
        return _to(value, torch.bfloat16)


def _alike(given: list[Tensor]) -> bool:
    return len(given) == 2 and given[0].dtype == given[1].dtype


def _to_meta(value: object) -> object:
    return META if value == GPU or (isinstance(value, str) and value == "cuda") else value


def _to(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16):
        return value.to(dtype)
    return value


def _float(value: object) -> object:
    return _to(value, torch.float32)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    aten = torch.ops.aten
    if attn_mask is None:
        y, *_ = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)
        return cast(Tensor, y)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.size(2))
    y, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
    return cast(Tensor, y)


class _Selected(torch.autograd.Function):
    """`selected_attention` as inductor compiles it; nothing is computed.

    Six kernels make the lists of blocks, and one attends. Its FLOPs are those of the full square,
    as everywhere.
    """

    @staticmethod
    def forward(
        ctx: Any, counter: Counter, q: Tensor, k: Tensor, v: Tensor, place: Tensor
    ) -> Tensor:
        ctx.counter, ctx.shapes = counter, (q, k, v)
        B, H, T, E = q.shape
        rows = 4 * B * H * T  # of the sums of the softmax
        for _ in range(6):
            counter.add("lists of blocks", size(place))
        flops = 4 * B * H * T * k.size(2) * E
        counter.add("selected_attention", 2 * size(q) + size(k) + size(v) + rows, flops)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.shapes
        B, H, T, E = q.shape
        rows = 4 * B * H * T
        ctx.counter.add("selected_attention_backward", 2 * size(q) + rows)  # output by its slope
        moved = 3 * size(q) + 2 * size(k) + 2 * size(v) + 2 * rows
        flops = 10 * B * H * T * k.size(2) * E
        ctx.counter.add("selected_attention_backward", moved, flops)
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel forward and one backward; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, x: Tensor, weight: Tensor) -> Tensor:
        ctx.counter, ctx.shapes = counter, (torch.empty_like(x), torch.empty_like(weight))
        row = size(x[..., :1])
        counter.add("rms_norm", 2 * size(x) + size(weight) + row // x.size(-1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, Tensor]:
        x, weight = ctx.shapes
        ctx.counter.add("rms_norm_backward", 3 * size(x) + 2 * size(weight))
        return None, x, weight


@contextmanager
def selected_as_counted(counter: Counter) -> Iterator[None]:
    """Attention of selected tokens is counted, and not compiled."""

    def counted(q: Tensor, k: Tensor, v: Tensor, place: Tensor, grouped: bool) -> object:
        return _Selected.apply(counter, q, k, v, place)  # type: ignore[no-untyped-call]

    with (
        mock.patch.object(selected_attention, "TRITON", True),
        mock.patch.object(selected_attention, "_compiled", return_value=counted),
    ):
        yield


@contextmanager
def autocast() -> Iterator[None]:
    """Autocast to bfloat16 for CUDA, also where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def looped(sizes: Mapping[str, int], steps: int, kv: str, router: str | None) -> ModelSpec:
    """The spec of a single loop of ``steps`` passes, in which ``router`` selects half of the tokens
    of every pass but the first; None: every token takes it."""
    layer = {
        "kind": "layer",
        "attention": {"head_size": sizes["head"]},
        "ffn": {"hidden": sizes["hidden"]},
    }
    loop: dict[str, Any] = {"kind": "loop", "steps": steps, "residual": {"kind": "thinking"}}
    loop |= {"encoding": {"kind": "scale"}, "kv": kv, "body": layer}
    if router:
        loop["router"] = {"kind": router, "capacity": 0.5}
    return ModelSpec.model_validate(
        {
            "name": "step",
            "vocab_size": 2,
            "context": sizes["tokens"],
            "dim": sizes["dim"],
            "blocks": [loop],
        }
    )


def of_model(spec: ModelSpec, batch: int) -> Counts:
    """What a training pass of a model counts, forward and backward, without embedding and head."""
    with META:
        model = LanguageModel(spec).train()
    x_BTD = torch.empty(batch, spec.context, spec.dim, device=META, requires_grad=True)
    counter = Counter()
    with selected_as_counted(counter), autocast(), counter, OnGpu(counter):
        y_BTD = model.hidden(x_BTD)
        losses = sum(model.trace.losses.values(), start=y_BTD.new_zeros(()))
        ends = [y_BTD, losses] if losses.requires_grad else [y_BTD]
        torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
        model.commit()
    return counter.counts


def of_step(sizes: Mapping[str, int], kv: str, router: str | None) -> Counts:
    """What the third pass of a loop adds to the counts of the first two."""
    three, two = (of_model(looped(sizes, n, kv, router), sizes["batch"]) for n in (3, 2))
    none = Count()
    return {key: one.plus(two.get(key, none), -1) for key, one in three.items()}


def shown(counts: Counts, top: int) -> Iterator[str]:
    """The operations with the highest floors, one per line, then the sum of the others."""
    there = {key: one for key, one in counts.items() if one.launches or one.bytes}
    order = sorted(there, key=lambda key: -there[key].floor)
    yield f"{'launches':>8} {'MB':>8} {'GFLOP':>7} {'floor us':>8}"
    for name, caller in order[:top]:
        yield _line(there[name, caller], f"{name}  {caller}")
    if order[top:]:
        yield _line(total({key: there[key] for key in order[top:]}), "all others")
    yield _line(total(there), "all")


def _line(one: Count, name: str) -> str:
    figures = f"{one.launches:8.0f} {one.bytes / 1e6:8.1f} {one.flops / 1e9:7.1f}"
    return f"{figures} {1e6 * one.floor:8.1f}  {name}"


def figures(full: Counts, routed: Counts) -> dict[str, object]:
    """A routed step beside the full pass of the same loop."""
    a, b = total(routed), total(full)
    found: dict[str, object] = {}
    for name, goals in {"launches": LAUNCHES, "bytes": BYTES}.items():
        ratio = getattr(a, name) / getattr(b, name)
        found[name] = {"": ratio, "bar": bar(ratio, *goals)}
    found["step"] = {"launches": a.launches, "MB": a.bytes / 1e6, "floor us": 1e6 * a.floor}
    found["pass"] = {"launches": b.launches, "MB": b.bytes / 1e6, "floor us": 1e6 * b.floor}
    found["FLOPs"] = a.flops / b.flops
    return found


def main() -> None:
    """Counts, and prints what each operation contributes."""
    args = arguments(
        __doc__,
        router={"choices": ROUTERS, "help": "one router (default: all)"},
        kv={"choices": KEYS, "help": "one kind of keys (default: both)"},
        top={"type": int, "default": 0, "help": "list so many operations of each step"},
        batch={"type": int, "default": 8, "help": "number of sequences"},
        tokens={"type": int, "default": 4096, "help": "tokens per sequence"},
        dim={"type": int, "default": 1024, "help": "width"},
    )
    sizes = sizes_of(args)
    found: dict[str, object] = {}
    for kv in [args.kv] if args.kv else KEYS:
        full = of_step(sizes, kv, None)
        _print_operations(f"full pass, {kv} keys", full, args.top)
        for router in [args.router] if args.router else ROUTERS:
            routed = of_step(sizes, kv, router)
            _print_operations(f"{router} at .5, {kv} keys", routed, args.top)
            found[f"{router}, {kv}"] = figures(full, routed)
    record("launches", sizes, found, args)


def sizes_of(args: Namespace) -> dict[str, int]:
    """The sizes of the layers of the 162M spec, or those that were asked for."""
    return {
        "batch": args.batch,
        "tokens": 512 if args.small else args.tokens,
        "dim": args.dim,
        "head": 64,
        "hidden": args.dim * 5 // 2,
    }


def _print_operations(title: str, counts: Counts, top: int) -> None:
    if top:
        print(f"\n{title}", *shown(counts, top), "", sep="\n")


if __name__ == "__main__":
    main()
