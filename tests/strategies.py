"""Random valid specs: every kind in every slot, loops in loops, lists for each step, odd sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st

from archdsl.lang.registry import kinds
from archdsl.lang.spec import ModelSpec, to_tree
from archdsl.lang.training import TrainingSpec

Tree = dict[str, Any]

HEADS, HEAD_SIZE = 6, 2
DIM = HEADS * HEAD_SIZE
EPSILONS = st.sampled_from([1e-6, 0.25])
SHARES = st.sampled_from([0.01, 0.25, 1 / 3, 0.5, 0.6000000000000001, 0.9, 1, 1.0])


def trees(kind: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Tree]:
    """Mappings of this kind in which any of the fields may be left to its default."""
    return st.fixed_dictionaries({"kind": st.just(kind)}, optional=fields)


@cache
def attentions() -> st.SearchStrategy[Tree]:
    def sized(tree: Tree) -> Tree:
        tree = {"head_size": HEAD_SIZE} | tree
        # without positions there is nothing to scale
        return tree | ({"rope_scaling": None} if tree.get("rope_theta", 100) is None else {})

    return trees(
        "attention",
        heads=st.just(HEADS),
        queries_per_kv=st.sampled_from([1, 2, 3, 6]),
        window=st.none() | st.integers(1, 20),
        qk_norm=st.booleans(),
        rope_theta=st.sampled_from([None, 100, 10_000.0, 5e5]),
        rope_scaling=st.none() | rope_scalings(),
    ).map(sized)


@cache
def rope_scalings() -> st.SearchStrategy[Tree]:
    factors, contexts = st.sampled_from([1, 2.5, 8.0]), st.sampled_from([5, 13, 8192])
    linear = {"kind": st.just("linear"), "factor": factors}
    llama3 = {"kind": st.just("llama3"), "factor": factors, "original_context": contexts}
    turns = {"low_freq_factor": st.just(0.5), "high_freq_factor": st.sampled_from([2.0, 9])}
    return st.fixed_dictionaries(linear) | st.fixed_dictionaries(llama3, optional=turns)


@cache
def feed_forwards() -> st.SearchStrategy[Tree]:
    size = st.fixed_dictionaries({}, optional={"hidden": st.integers(1, 9)}) | st.builds(
        lambda ratio: {"ratio": ratio}, st.sampled_from([0.01, 1, 2.5, 4])
    )
    kinds = trees("feed_forward", activation=st.sampled_from(["swiglu", "gelu"]))
    return st.builds(lambda one, other: one | other, kinds, size)


@cache
def moes() -> st.SearchStrategy[Tree]:
    def fitting(tree: Tree) -> Tree:
        top_k = min(tree.get("top_k", 2), tree["experts"])
        learns = top_k > 1 or tree["experts"] == 1
        return tree | {"top_k": top_k, "normalise": tree.get("normalise", False) and learns}

    experts = {"kind": st.just("moe"), "experts": st.integers(1, 5), "hidden": st.integers(1, 5)}
    more = {
        "top_k": st.integers(1, 3),
        "shared": st.integers(0, 2),
        "gate": st.sampled_from(["sigmoid", "softmax"]),
        "normalise": st.booleans(),
        "activation": st.sampled_from(["swiglu", "gelu"]),
        "balance": st.sampled_from(["bias", "loss", "none"]),
    }
    return st.fixed_dictionaries(experts, optional=more).map(fitting)


@cache
def norms() -> st.SearchStrategy[Tree]:
    return trees("norm", type=st.sampled_from(["rms", "layer"]), eps=EPSILONS)


@cache
def bare() -> st.SearchStrategy[Tree]:
    """Blocks without blocks inside; of a kind that has no strategy here, its example."""
    here = {"attention", "feed_forward", "moe", "norm", "layer", "stack", "loop"}
    others = [dict(spec.example) for kind, spec in kinds("block").items() if kind not in here]
    known = attentions() | feed_forwards() | moes() | norms()
    return known | st.sampled_from(others) if others else known


def layers(slots: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    """Layers with one of ``slots`` as attention, as feed-forward or as both."""
    places = st.sampled_from(["pre", "post", "sandwich", "pre_post"])
    kinds = st.sampled_from(["rms", "layer"])
    more = {"norm": kinds, "norm_eps": EPSILONS, "norm_place": places}
    usual = {"attention": attentions(), "ffn": feed_forwards() | moes()}

    def layer(**changed: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        given = {"kind": st.just("layer"), **usual, **changed}
        needed = {name: given.pop(name) for name in {"kind", "attention", *changed}}
        return st.fixed_dictionaries(needed, optional=given | more)

    return st.one_of(
        layer(attention=slots), layer(ffn=slots), layer(attention=slots, ffn=slots), layer()
    )


@cache
def routers(further: int, nested: bool) -> st.SearchStrategy[Any]:
    """Words and mappings; values per step are numbers or lists that are long enough."""

    def per_step(values: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
        return values | st.lists(values, min_size=max(1, further), max_size=further + 2)

    def falling(capacity: Any) -> Any:
        return sorted(capacity, reverse=True) if isinstance(capacity, list) and nested else capacity

    capacity, alpha = per_step(SHARES).map(falling), per_step(st.sampled_from([0.5, 1, 2.0]))
    more = {"nested": st.just(nested), "capacity": capacity, "alpha": alpha}
    learned = more | {"gate": st.sampled_from(["sigmoid", "tanh"])}
    return st.one_of(
        st.sampled_from(["prefix", "top_k", "threshold", "predictor", "random", "all"]),
        *(trees(kind, **learned) for kind in ("prefix", "top_k", "threshold", "predictor")),
        trees("random", **more, seed=st.integers(0, 9)),
    )


RESIDUALS = st.sampled_from(["thinking", "overwrite", "delta", "gated"]) | trees(
    "thinking", unselected=st.sampled_from(["bypass", "literal"])
)
SHARES_TO_STOP = st.sampled_from([0, 0.3, 0.7, 0.99, 1])
HALTING = trees("halting", threshold=SHARES_TO_STOP, weight=st.just(0.5))
EXITS = st.one_of(  # of the last block, which the head follows
    HALTING,
    trees("gate", threshold=SHARES_TO_STOP, prior=st.sampled_from([None, 0.3])),
    trees(
        "confidence",
        threshold=st.sampled_from([0, 0.01, 0.5, 2]),
        measure=st.sampled_from(["kl", "entropy"]),
    ),
)
ENCODINGS = st.none() | st.sampled_from(["scale", "add"]) | trees("scale", init=st.just(0.25))


@cache
def injections(full_first: bool) -> st.SearchStrategy[Tree]:
    """How passes read the loop's input; ``full_first``: whether the first takes every token."""
    kinds = ["add", "linear", "diagonal"]
    again = st.fixed_dictionaries({}, optional={"injection": st.sampled_from([None, *kinds])})
    if not full_first:
        return again
    required = {"injection": st.sampled_from(kinds), "start": st.sampled_from(["zeros", "noise"])}
    return again | st.fixed_dictionaries(required, optional={"start_std": st.just(2.5)})


@st.composite
def loops(draw: st.DrawFn, bodies: st.SearchStrategy[Tree]) -> Tree:
    body = draw(bodies)
    sharing = draw(st.booleans()) and not has_loop(body)
    steps, full_steps = draw(st.integers(1, 4)), draw(st.integers(int(sharing), 3))
    tree: Tree = {"kind": "loop", "steps": steps, "full_steps": full_steps, "body": body}
    if full_steps == 1 and draw(st.booleans()):
        tree["exit"] = draw(HALTING)
    else:
        tree["router"] = draw(st.none() | routers(max(0, steps - full_steps), draw(st.booleans())))
    slots = {
        "residual": RESIDUALS,
        "encoding": ENCODINGS,
        "norm": st.sampled_from([None, "rms", "layer"]),
        "norm_eps": EPSILONS,
    }
    tree |= draw(st.fixed_dictionaries({}, optional=slots)) | draw(injections(full_steps > 0))
    tree |= bypassing(tree)
    if sharing:
        kinds = ["shared", "last"] if "exit" in tree else ["shared", "last", "all"]
        tree["kv"] = draw(st.sampled_from(kinds))
    if tree.get("kv") == "shared":
        return tree
    words = st.sampled_from(["shared", "per_step"])
    parameters = words if has_loop(body) else words | loras(steps)
    return tree | draw(st.fixed_dictionaries({}, optional={"parameters": parameters}))


def loras(steps: int) -> st.SearchStrategy[Tree]:
    """Low-rank differences, in both notations."""
    rank = st.integers(0, 3)
    ranks = rank | st.lists(rank, min_size=steps, max_size=steps + 1)
    fields = {"rank": ranks, "alpha": st.sampled_from([1, 8.0])}
    fixed = st.fixed_dictionaries({}, optional=fields)
    return fixed.map(lambda tree: {"kind": "lora"} | tree) | fixed.map(lambda tree: {"lora": tree})


def bypassing(loop: Tree) -> Tree:
    """What to change, as a token that stopped at an exit keeps its state."""
    literal = {"kind": "thinking", "unselected": "literal"}
    return {"residual": "thinking"} if "exit" in loop and loop.get("residual") == literal else {}


def has_loop(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return tree.get("kind") == "loop" or any(has_loop(value) for value in tree.values())
    return isinstance(tree, list) and any(has_loop(value) for value in tree)


@cache
def stacks(bodies: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.fixed_dictionaries(
        {"kind": st.just("stack"), "body": st.lists(bodies, min_size=1, max_size=2)},
        optional={"repeat": st.integers(1, 3)},
    )


@cache
def blocks() -> st.SearchStrategy[Tree]:
    """Every kind in every slot: of layers, stacks and loops, in each other up to four deep."""
    leaves = layers(bare()) | bare()
    inner = leaves | stacks(leaves) | loops(leaves)
    layered = layers(inner)
    looped, stacked = loops(inner | layered), stacks(inner | layered)
    # Loops stand first and leaves count as one alternative each, as most of what can go wrong is in
    # loops; flattened, the many kinds of leaves would be drawn nine times as often.
    unlooped = (leaves.map(dict), layered.map(dict))
    return st.one_of(loops(leaves), looped, loops(looped | stacked), stacked, *unlooped)


@st.composite
def spec_trees(draw: st.DrawFn) -> Tree:
    """The plain data of a spec, as a YAML file would hold it."""
    required: Tree = {
        "name": "random",
        "vocab_size": draw(st.integers(2, 19)),
        "context": draw(st.integers(1, 13)),
        "dim": DIM,
        "blocks": draw(st.lists(blocks(), min_size=1, max_size=3)),
    }
    optional = {
        "description": st.sampled_from(["", 'two "lines":\n  # of text', "yes"]),
        "tie_embeddings": st.booleans(),
        "norm": st.sampled_from(["rms", "layer"]),
        "norm_eps": EPSILONS,
        "final_norm": st.booleans(),
        "budget": st.just({"params": "1.5M"}),
    }
    last = required["blocks"][-1]
    if last["kind"] == "loop" and last["full_steps"] == 1 and draw(st.booleans()):
        last |= {"router": None, "exit": draw(EXITS)}
        last |= bypassing(last) | ({"kv": "last"} if last.get("kv") == "all" else {})
    tree = required | draw(st.fixed_dictionaries({}, optional=optional))
    if draw(st.booleans()) and has_loop(tree["blocks"]):
        structure = ModelSpec.model_validate(tree).structure
        rule = TrainingSpec.model_validate(draw(RULES)).without_problems(structure)
        tree["training"] = to_tree(rule)
    return tree


DEPTHS = st.fixed_dictionaries(
    {"law": st.sampled_from(["uniform", "poisson_lognormal", "fixed"])},
    optional={
        "mean": st.integers(1, 4),
        "per": st.sampled_from(["batch", "sequence"]),
        "backprop_last": st.integers(1, 3),
    },
)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "depth": DEPTHS,
        "loss": st.sampled_from(["last", "every_step"]),
        "loss_weights": st.sampled_from([1.0, 0.5, [1.0, 2.0]]),
        "capacity": st.just({"warmup": 0.25}),
        "router_z_loss": st.just(0.001),
        "router_aux_loss": st.just(0.01),
    },
)


def specs() -> st.SearchStrategy[ModelSpec]:
    return spec_trees().map(ModelSpec.model_validate)
