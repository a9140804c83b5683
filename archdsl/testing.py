"""The contract that every kind of a spec keeps, as a test for those who write one.

    from archdsl.testing import contract

    def test_my_kind() -> None:
        contract("my_kind")

The example of the kind is put into small models and tried there: a block alone and inside a routed
loop, a router, a residual or an encoding in the slot of a loop. Nothing here needs pytest.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archdsl.checks.check import check
from archdsl.costs.receipt import cost, sequence_cost
from archdsl.errors import did_you_mean
from archdsl.lang.registry import families
from archdsl.lang.source import parse
from archdsl.lang.spec import ModelSpec, Part, parse_spec, walk
from archdsl.model.build import build, meta_model
from archdsl.model.checkpoint import Checkpoint
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel
from archdsl.reports.training_memory import full_batch, saved_for_backward
from archdsl.training.depth import at_depth

DIM, VOCABULARY, CONTEXT = 16, 11, 13
LAYER = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
PREFIX = {"kind": "prefix", "capacity": [0.7, 0.4]}
LOOP = {"kind": "loop", "steps": 3, "router": PREFIX, "residual": "thinking", "body": LAYER}

Check = Callable[[ModelSpec], None]


def contract(kind: str, family: str | None = None) -> None:
    """Tries all `checks` of a kind, one after the other.

    ``family``: needed only where two families have a kind of that name. Raises AssertionError at
    the first check that fails, with what was found; ValueError for an unknown kind.
    """
    for name, one in checks(kind, family).items():
        try:
            one()
        except Exception as error:
            raise AssertionError(f"{kind}: {name}: {type(error).__name__}: {error}") from error


def checks(kind: str, family: str | None = None) -> dict[str, Callable[[], None]]:
    """The checks of a kind by name, to run each as a test of its own.

    Each raises AssertionError if it fails. Raises ValueError for an unknown kind.
    """
    spec = _spec_of(kind, family)
    found: dict[str, Callable[[], None]] = {"is documented": partial(is_documented, spec)}
    for place, model in models(spec).items():
        found |= {f"{name}, {place}": partial(one, model) for name, one in CHECKS.items()}
    return found


def models(kind: type[Part]) -> dict[str, ModelSpec]:
    """Small models that hold the example of a kind, by what the example stands in.

    Raises ValueError if archdsl has no slot for a kind of that family.
    """
    example = dict(kind.example)
    blocks: dict[str, Mapping[str, Any]]
    match kind.family:
        case "block":
            routed = {"kind": "loop", "router": {"kind": "prefix", "capacity": 0.6}}
            blocks = {"alone": example, "in a routed loop": routed | {"body": example}}
        case "router" | "residual" | "encoding" | "parameters":
            blocks = {"in a loop": LOOP | {kind.family: example}}
        case "exit":
            blocks = {"in a loop": LOOP | {"router": None, "exit": example}}
        case "rope_scaling":
            attention = {"kind": "attention", "head_size": 8, "rope_scaling": example}
            blocks = {"in attention": attention}
        case other:
            raise ValueError(f"no block of archdsl has a slot for a kind of {other}")
    return {place: small_model(block) for place, block in blocks.items()}


def small_model(*blocks: Mapping[str, Any], **fields: Any) -> ModelSpec:
    """A model of these blocks that is built and run in milliseconds."""
    sizes = {"vocab_size": VOCABULARY, "context": CONTEXT, "dim": DIM}
    tree = {"name": "example", **sizes, **fields, "blocks": [dict(block) for block in blocks]}
    return ModelSpec.model_validate(tree)


def _spec_of(kind: str, family: str | None) -> type[Part]:
    """The spec class of a kind. Raises ValueError if there is none, or more than one."""
    every = families()
    if family is not None and family not in every:
        known = ", ".join(sorted(every))
        hint = did_you_mean(str(family), every)
        raise ValueError(f"unknown family {family!r}{hint}; known families: {known}")
    searched = {family: every[family]} if family else every
    found = {name: kinds[kind] for name, kinds in searched.items() if kind in kinds}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        several = " and ".join(sorted(found))
        raise ValueError(f"{kind!r} is a kind of {several}: say which, as in family={min(found)!r}")
    names = sorted({name for kinds in searched.values() for name in kinds})
    raise ValueError(
        f"unknown kind {kind!r}{f' of {family}' if family else ''}{did_you_mean(str(kind), names)}"
        f"; known kinds: {', '.join(names)}. A kind of your own is known once its module is "
        "imported: import it in the test, or set ARCHDSL_PLUGINS to its name"
    )


# What is said of a kind


def is_documented(kind: type[Part]) -> None:
    """The class and each of its fields say what they are for; the example is of this kind."""
    name = kind.model_fields["kind"].default
    assert kind.example.get("kind") == name, f"`example` must be of kind {name!r}"
    assert kind.__doc__, f"{kind.__name__} needs a docstring: its first sentence is shown to users"
    silent = [n for n, f in kind.model_fields.items() if n != "kind" and not f.description]
    assert not silent, f"{', '.join(silent)} need a Field(description=...)"


def reads_back(spec: ModelSpec) -> None:
    """As YAML it reads back to an equal spec."""
    again = parse_spec(parse(spec.to_yaml()))
    assert again == spec, f"written as YAML and read again it is another spec:\n{spec.to_yaml()}"


def has_one_meaning(spec: ModelSpec) -> None:
    """The canonical form is its own canonical form, and the same model."""
    canonical = spec.canonical()
    assert canonical.canonical() == canonical, "canonical() of the canonical form changes it again"
    assert canonical.fingerprint() == spec.fingerprint(), "its canonical form means another model"
    tokens_BT = some_tokens(spec)
    same(built(canonical)(tokens_BT), built(spec)(tokens_BT), "logits of the canonical form", 1e-9)


# What it costs


def costs_what_is_counted(spec: ModelSpec) -> None:
    """`cost` has the parameters that the module has and the FLOPs that torch counts."""
    model = meta_model(spec).eval()
    params = sum(weight.numel() for weight in model.parameters())
    equal(sequence_cost(spec).params, params, "cost(): parameters")
    for tokens in (spec.context, 1):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
        flops = sequence_cost(spec, tokens=tokens).flops
        equal(flops, counter.get_total_flops(), f"cost(): FLOPs of {tokens} tokens")


def caches_what_is_counted(spec: ModelSpec) -> None:
    """`cost` has the bytes that a cache in bfloat16 holds after the context."""
    model, receipt = build(spec, dtype=torch.bfloat16).eval(), cost(spec)
    cache = model.new_cache()
    with torch.no_grad():
        model(some_tokens(spec, 1), cache=cache)
    counted = round(receipt.kv_bytes_per_token * spec.context) + receipt.state_bytes
    equal(counted, cache.nbytes, "cost(): bytes of the cache, `kv` and `state` together")


def keeps_what_autograd_saves(spec: ModelSpec) -> None:
    """`footprint` has the bytes that autograd keeps of a forward pass, to the byte."""
    counted, saved = saved_for_backward(spec, full_batch(spec, 3)), saved_tensors(spec, 3)
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    shapes = Counter(str(list(tensor.shape)) for tensor in saved)
    tensors = ", ".join(f"{n} x {shape}" for shape, n in sorted(shapes.items()))
    assert counted == found, (
        f"footprint(): {abs(found - counted):,} bytes too {'few' if counted < found else 'many'}; "
        f"of 3 sequences of {spec.context} tokens, autograd keeps {tensors}, of which the "
        "embedding, norm and head of the model are a part"
    )


# How it learns


def every_weight_learns(spec: ModelSpec) -> None:
    """Each parameter gets a gradient that is finite and not zero everywhere."""
    model = built(spec).train()
    loss = model.loss(*some_tokens(spec, 4).chunk(2))
    torch.stack([loss, *model.trace.losses.values()]).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, f"{name} gets no gradient"
        assert weight.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert weight.grad.any(), f"the gradient of {name} is zero"


def equal_seeds_give_equal_bits(spec: ModelSpec) -> None:
    """Equal seeds give equal weights and logits, another seed gives others."""
    one, again, other = (build(spec, seed=seed) for seed in (1, 1, 2))
    for (name, weight), twin in zip(one.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, twin), f"{name} differs between two models of one seed"
    tokens_BT = some_tokens(spec)
    assert one(tokens_BT).equal(again(tokens_BT)), "logits differ between two models of one seed"
    assert not one(tokens_BT).equal(other(tokens_BT)), "another seed gives the same model"


def every_weight_gets_an_initial_value(spec: ModelSpec) -> None:
    """`reset` fills each parameter and each buffer."""
    model = meta_model(spec).to_empty(device="cpu")
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.fill_(torch.nan if weight.is_floating_point() else 0)
        model.initialise(0)
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        assert weight.isfinite().all(), f"reset() leaves {name} as it was in memory"


def runs_in_half_precision(spec: ModelSpec) -> None:
    """In bfloat16 and under autocast, logits are bfloat16 and gradients finite."""
    for dtype in (torch.bfloat16, torch.float32):
        model = build(spec, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                logits = model(some_tokens(spec))
        assert logits.dtype == torch.bfloat16, f"logits are {logits.dtype}"
        logits.float().square().mean().backward()
        assert logits.isfinite().all(), "logits in bfloat16 are not finite"


# How it runs


def keeps_the_shape(spec: ModelSpec) -> None:
    """A stream comes out in the shape in which it went in, also of a single token."""
    model = built(spec)
    for tokens in (1, spec.context):
        x_BTD = torch.randn(2, tokens, spec.dim, dtype=torch.float64)
        equal(model.hidden(x_BTD).shape, x_BTD.shape, "the shape of the stream")


def is_sound_or_is_caught_leaking(spec: ModelSpec) -> None:
    """No later token changes an earlier output, and decoding, prefill in chunks and padding agree
    with one pass; a kind that says that it leaks is caught leaking, and fails in nothing else."""
    says_so = any(getattr(part, "leaks", False) for _, part in walk(spec))
    report = check(spec, seeds=2)
    unexpected = [f"{fault}" for fault in report.faults if not says_so or fault not in report.leaks]
    hint = "" if says_so else " (a router that must see later tokens says leaks: ClassVar = True)"
    assert not unexpected, "; ".join(unexpected) + hint
    assert report.leaks or not says_so, "it says that it leaks, and no leak was found"
    model = built(spec)
    equal(model.leaks, says_so, "whether the model says that it leaks")
    with model.causal_routing():
        assert not model.leaks, "it says that it leaks under causal_routing(), too"


def a_prefix_alone_gives_the_same(spec: ModelSpec) -> None:
    """A decoder that starts over for each token agrees with one pass."""
    model, tokens_BT = built(spec), some_tokens(spec)
    with model.causal_routing():
        last = [model(tokens_BT[:, : n + 1])[:, -1] for n in range(spec.context)]
        same(torch.stack(last, 1), model(tokens_BT), "logits after each prefix", 1e-9)


def rows_do_not_meet(spec: ModelSpec) -> None:
    """A sequence does not depend on its neighbours in the batch."""
    model, tokens_BT = built(spec), some_tokens(spec, 3)
    alone = torch.cat([model(row_T.unsqueeze(0)) for row_T in tokens_BT])
    same(alone, model(tokens_BT), "logits of each row alone", 1e-12)


def a_cache_can_be_reordered(spec: ModelSpec) -> None:
    """Rows of a cache may be swapped, doubled and left out, as beam search does."""
    model, tokens_BT = built(spec), some_tokens(spec, 3)
    cache, order_B = model.new_cache(), torch.tensor([2, 0, 0, 2])
    with torch.no_grad(), model.causal_routing():
        model(tokens_BT[:, :5], cache=cache)
        cache.reorder(order_B)
        found = model(tokens_BT[order_B, 5:], cache=cache)
        same(found, model(tokens_BT)[order_B, 5:], "logits after the rows were reordered", 1e-9)


def decodes_at_fixed_shapes(spec: ModelSpec) -> None:
    """Token by token at shapes that never change, as for a CUDA graph, while rows skip turns."""
    model, tokens_BT = built(spec), some_tokens(spec, 3)
    rng = torch.Generator().manual_seed(1)
    mask_BT = torch.rand(tokens_BT.shape, generator=rng) < 0.8
    with torch.no_grad(), model.causal_routing():
        whole_BTV, cache = model(tokens_BT, mask_BT), model.new_cache()
        model(tokens_BT[:, :4], mask_BT[:, :4], cache)
        step = TokenStep(model, cache, len(tokens_BT))
        for t in range(4, spec.context):
            real_B = mask_BT[:, t]
            found_BV = step(torch.where(real_B, tokens_BT[:, t], -1).tolist())
            same(found_BV[real_B], whole_BTV[real_B, t], "logits at fixed shapes", 1e-9)


def exports_to_transformers(spec: ModelSpec) -> None:
    """The exported folder, loaded by its own code, has the same logits.

    Warns, and tries nothing, where transformers is not installed.
    """
    if find_spec("transformers") is None:
        warnings.warn("not tried, as transformers is not installed: export", stacklevel=2)
        return
    from archdsl.interop.hf_export import export

    model = build(spec).eval()
    with tempfile.TemporaryDirectory() as folder:
        export(Checkpoint(Path(folder, "checkpoint"), model, {}), Path(folder, "exported"))


CHECKS: dict[str, Check] = {
    "reads back": reads_back,
    "has one meaning": has_one_meaning,
    "costs what is counted": costs_what_is_counted,
    "caches what is counted": caches_what_is_counted,
    "keeps what autograd saves": keeps_what_autograd_saves,
    "every weight learns": every_weight_learns,
    "every weight gets an initial value": every_weight_gets_an_initial_value,
    "equal seeds give equal bits": equal_seeds_give_equal_bits,
    "runs in half precision": runs_in_half_precision,
    "keeps the shape": keeps_the_shape,
    "is sound or is caught leaking": is_sound_or_is_caught_leaking,
    "a prefix alone gives the same": a_prefix_alone_gives_the_same,
    "rows do not meet": rows_do_not_meet,
    "a cache can be reordered": a_cache_can_be_reordered,
    "decodes at fixed shapes": decodes_at_fixed_shapes,
    "exports to transformers": exports_to_transformers,
}


# Instruments


def built(spec: ModelSpec) -> LanguageModel:
    """The model as it is used, in float64, with weights far from their initial values."""
    model = build(spec)
    randomise(model)
    return model.eval()


def randomise(module: nn.Module, seed: int = 0, std: float = 0.7) -> None:
    """Values in float64 that no initial value has, so that nothing hides behind a one or zero."""
    module.double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, std, generator=rng)


def some_tokens(spec: ModelSpec, batch: int = 2) -> Tensor:
    """Random tokens [B, context], always the same."""
    rng = torch.Generator().manual_seed(5)
    return torch.randint(spec.vocab_size, (batch, spec.context), generator=rng)


def equal(found: object, wanted: object, what: str) -> None:
    """Raises AssertionError with both values if they differ."""
    assert found == wanted, f"{what}: got {found}, expected {wanted}"


def same(found: Tensor, wanted: Tensor, what: str, tolerance: float) -> None:
    """Raises AssertionError if two tensors differ by more than ``tolerance``, which is absolute
    and relative."""
    torch.testing.assert_close(
        found, wanted, rtol=tolerance, atol=tolerance, msg=lambda said: f"{what}: {said}"
    )


def saved_tensors(
    spec: ModelSpec,
    batch_size: int,
    checkpointed: bool = False,
    depth: int | None = None,
    backprop_last: int | None = None,
) -> list[Tensor]:
    """One tensor of each piece of memory that autograd keeps of a pass over the whole context.

    Parameters and single numbers are left out. ``checkpointed``: of a pass that recomputes each
    layer. ``depth`` and ``backprop_last``: of its loops, as in `at_depth`.
    """
    model = build(spec).train()
    model.checkpoint_activations = checkpointed
    inputs: list[Tensor] = []
    if checkpointed:
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    tokens_BT = torch.randint(spec.vocab_size, (batch_size, spec.context))
    with at_depth(model, depth, backprop_last), _saved() as alive:
        logits_BTV = model(tokens_BT)
    tensors = [saved.tensor for saved in alive if saved.tensor.dim()] + inputs
    del logits_BTV
    memory = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    for weight in model.parameters():
        memory.pop(weight.untyped_storage().data_ptr(), None)
    return list(memory.values())


class _Saved:
    """Lives as long as autograd keeps the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def _saved() -> Iterator[WeakSet[_Saved]]:
    alive: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive
