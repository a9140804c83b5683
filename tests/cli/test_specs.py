"""build, diff, blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given

import archdsl
from archdsl.costs.devices import devices
from archdsl.lang.source import shipped_specs
from archdsl.lang.spec import ModelSpec
from archdsl.reports.outline import OutlineNode, outline
from archdsl.reports.training_memory import training_memory
from archdsl.search.space.model_summary import model_summary
from tests.cli.command import Cli
from tests.strategies import specs


def test_the_receipt_starts_with_what_the_model_is_called_by(cli: Cli) -> None:
    first = cli("build", "itt").out.splitlines()[0]
    assert first == "itt-162m: 162.0M parameters in matrices, 162,051,072 in all"


@pytest.mark.parametrize("name", ["itt", "itt.yaml", "specs/itt.yaml"])
def test_a_shipped_spec_goes_by_several_names(cli: Cli, name: str) -> None:
    assert cli("build", name).out.startswith("itt-162m: ")


def test_the_receipt_counts_as_the_paper_does(cli: Cli) -> None:
    out = cli("build", "itt", "--convention", "paper").out
    assert "162.0M in matrices" in out
    assert "3.85 TFLOPs per 4,096 tokens" in out
    assert "2502.13842" in out


def test_the_receipt_names_its_own_convention(cli: Cli) -> None:
    out = " ".join(cli("build", "itt").out.split())
    assert "node by node: a multiply-add is 2 FLOPs" in out
    assert "693.9M FLOPs/token at the routers' capacities" in out
    assert "392.7M for a token that no router selects" in out
    assert "883.4M for one that every router selects" in out


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("name", ["itt-466m", "hybrid"])
def test_no_figure_is_cut_off(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = cli("build", name).out
    lines = [line for line in out.splitlines() if re.search(r"\d%$", line)]
    nodes = list(outline(archdsl.load(name)).walk())
    shown = [(line.split()[-3], line.split()[-1]) for line in lines]
    whole = nodes[0].cost.flops
    assert shown == [(f"{n.cost.params:,}", f"{n.cost.flops / whole:.1%}") for n in nodes]
    assert max(map(len, out.splitlines())) <= int(columns)


@pytest.mark.parametrize("name", shipped_specs())
def test_nodes_add_up(name: str) -> None:
    adds_up(outline(archdsl.load(name)))


@given(specs())
def test_nodes_of_any_spec_add_up(spec: ModelSpec) -> None:
    adds_up(outline(spec))


def adds_up(node: OutlineNode) -> None:
    if node.below:
        assert sum(child.cost.params for child in node.below) == node.cost.params
        assert sum(child.cost.flops for child in node.below) == node.cost.flops
    for child in node.below:
        adds_up(child)


def test_a_repeat_a_slot_and_a_residual_stand_in_the_tree(cli: Cli) -> None:
    out = cli("build", "itt").out
    for label in ("stack x4", "loop steps=4", "router: top_k capacity=0.7", "residual: thinking"):
        assert re.search(rf"[├└]─ {label} ", out)


def test_a_router_that_sees_the_future_is_marked(cli: Cli) -> None:
    out = cli("build", "itt").out
    assert "top_k capacity=0.7 (leaks)" in out
    assert "router.kind=prefix is causal" in " ".join(out.split())


@pytest.mark.parametrize("assignment", ["router.kind=prefix", "router.capacity=1.0"])
def test_one_that_does_not_is_not(cli: Cli, assignment: str) -> None:
    assert "leak" not in cli("build", "itt", "--set", f"blocks.0.body.1.{assignment}").out


def test_counts_at_another_length(cli: Cli) -> None:
    found = cli("build", "itt", "--tokens", "2k", "--json").json["receipt"]
    assert found["context"] == 2000
    spec = archdsl.load("itt", overrides=["context=2000"])
    assert found["flops_per_context"] == archdsl.cost(spec).flops_per_context


def test_gradients_are_said_to_be_those_at_the_peak(cli: Cli) -> None:
    assert "gradients at the peak 179.3 MB" in " ".join(cli("build", "itt").out.split())


def test_nested_capacities_are_said_to_be_shares_of_all_tokens(cli: Cli) -> None:
    found = cli("build", "hybrid", "--json").json
    (label,) = [
        router["label"]
        for block in found["tree"]["below"]
        for router in block["below"]
        if "nested" in router["label"]
    ]
    assert label == "router: prefix capacity=[0.5, 0.25] nested=true (shares of all tokens)"
    page = " ".join(cli("blocks", "prefix").out.split())
    assert "share of all tokens that a step selects" in page
    assert "capacities are shares of all tokens, not of those that are left" in page
    assert ".5/.25 of all tokens nested" in model_summary(archdsl.load("hybrid"))


def test_json_holds_the_same_facts(cli: Cli) -> None:
    found = cli("build", "itt", "--json").json
    receipt = archdsl.cost(archdsl.load("itt"))
    assert found["receipt"]["expected"] == receipt.expected
    assert found["paper"]["flops_per_context"] / 1e12 == pytest.approx(3.85, abs=0.005)
    assert found["leaks"] == ["blocks.0.body.1.router"]
    stored = found["training_memory"]["stored"]
    assert stored["gradients_at_peak"] < found["receipt"]["gradient_bytes"] == 4 * receipt.params
    memory = training_memory(archdsl.load("itt"), checkpointed=True)
    assert found["training_memory"]["checkpointed"]["peak"] == memory.peak
    assert found["tree"]["params"] == receipt.params
    assert found["tree"]["below"][1]["below"][1]["path"] == "blocks.0.body.1"


@pytest.mark.parametrize(
    ("limit", "status", "said"),
    [
        (
            ["--budget", "163M"],
            0,
            "met, 0.58% below the limit: 162,051,072 of 163,000,000 parameters",
        ),
        (["--budget", "100M"], 1, "exceeded by 62.05%: 162,051,072 of 100,000,000 parameters"),
        (["--flops", "0.5G"], 1, "exceeded by 38.78%"),
        (["--flops", "0.8G", "--budget", "1G"], 0, "of 800,000,000 FLOPs/token"),
        (
            ["--budget", "100M", "--budget-of", "non_embedding"],
            0,
            "met, 3.48% below the limit: 96,515,072 of 100,000,000 parameters without",
        ),
        (["--kv", "66KiB"], 0, "67,172 of 67,584 bytes of KV cache per token"),
        (["--kv", "32KiB", "--budget", "1G"], 1, "exceeded by 104.99%"),
    ],
)
def test_a_budget_holds_or_fails(cli: Cli, limit: list[str], status: int, said: str) -> None:
    found = cli("build", "itt", *limit)
    assert found.status == status
    assert said in " ".join(found.out.split())
    assert ("exceed the budget" in found.err) == bool(status)


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "1.5", "162 monkeys"])
def test_a_limit_is_a_number_above_zero(cli: Cli, limit: str) -> None:
    found = cli("build", "itt", "--budget", limit)
    assert (found.status, found.out) == (2, "")


def test_a_budget_of_the_spec_counts_too(cli: Cli) -> None:
    assert cli("build", "tiny", "--set", "budget={params: 1k}").status == 1
    assert cli("build", "tiny", "--set", "budget={params: 1k}", "--flops", "1G").status == 1
    assert cli("build", "tiny", "--set", "budget={params: 1k}", "--budget", "1G").status == 0


def test_each_limit_stands_in_the_json_with_what_the_model_has(cli: Cli) -> None:
    found = cli("build", "search", "--budget", "200M", "--budget-of", "non_embedding", "--json")
    kept = found.json["budget"]
    assert kept["limits"] == {"non_embedding": 200_000_000}  # no longer one of all parameters
    assert kept["spent"]["non_embedding"] == found.json["receipt"]["non_embedding"] <= 200_000_000
    assert kept["over"]["non_embedding"] == kept["spent"]["non_embedding"] / 200_000_000 - 1


def test_what_a_budget_counts_needs_a_budget(cli: Cli) -> None:
    found = cli("build", "itt", "--budget-of", "params")
    assert (found.status, found.out) == (2, "")
    assert "give --budget too" in found.err


def test_writes_a_checkpoint_that_loads(cli: Cli) -> None:
    from archdsl.model.checkpoint import load_checkpoint

    assert cli("build", "tiny", "--out", "made", "--seed", "3").status == 0
    made = load_checkpoint(Path("made"))
    expected = archdsl.build(archdsl.load("tiny"), seed=3)
    assert made.spec == archdsl.load("tiny")
    assert made.tokenizer is not None
    for one, other in zip(made.model.parameters(), expected.parameters(), strict=True):
        assert bool((one == other).all())


def test_a_checkpoint_is_replaced_only_by_force(cli: Cli) -> None:
    cli("build", "tiny", "--out", "made")
    before = Path("made/provenance.json").read_text()
    found = cli("build", "tiny", "--out", "made", "--seed", "1")
    assert (found.status, Path("made/provenance.json").read_text()) == (1, before)
    assert "--force" in found.err
    assert cli("build", "tiny", "--out", "made", "--seed", "1", "--force").status == 0
    assert json.loads(Path("made/provenance.json").read_text())["seed"] == 1


def test_force_replaces_nothing_but_checkpoints(cli: Cli) -> None:
    Path("precious").mkdir()
    Path("precious/thesis.txt").write_text("words")
    assert cli("build", "tiny", "--out", "precious", "--force").status == 1
    assert Path("precious/thesis.txt").read_text() == "words"


def test_nothing_is_written_over_budget(cli: Cli) -> None:
    assert cli("build", "tiny", "--budget", "1k", "--out", "made").status == 1
    assert not Path("made").exists()


def test_diff_shows_values_totals_and_nodes(cli: Cli) -> None:
    out = cli("diff", "loop", "itt").out
    assert re.search(r"blocks\.0\.body\.1\.router +null -> \{kind: top_k, capacity: 0\.7\}", out)
    assert re.search(r"parameters +162,022,400 +162,051,072 +\+0\.0%", out)
    assert re.search(r"FLOPs/token +883,425,280 +693,923,308 +-21\.5%", out)
    assert re.search(r"blocks\.0\.body\.1\.body +48\.2M +654\.3M -> 464\.8M", out)
    assert re.search(r"blocks\.0\.body\.1\.encoding +0 -> 16\.4k +0", out)
    assert "blocks.0.body.0" not in out


def test_diff_shows_no_node_that_costs_nothing(cli: Cli) -> None:
    change = ["--set", "blocks.1.residual=overwrite"]
    found = cli("diff", "tiny", "tiny", *change, "--json").json
    assert [change["path"] for change in found["changes"]] == ["blocks.1.residual"]
    assert found["nodes"] == []


def test_diff_knows_one_model_said_in_two_ways(cli: Cli) -> None:
    change = "blocks.0.body.0={kind: loop, steps: 1, body: {kind: layer, ffn: {hidden: 2560}}}"
    found = cli("diff", "itt", "itt", "--set", change)
    assert "the same model, written differently" in found.out
    assert cli("diff", "itt", "itt", "--set", change, "--json").json["same_model"] is True


def test_diff_stops_where_a_block_became_another(cli: Cli) -> None:
    found = cli("diff", "tiny", "tiny", "--set", "blocks.0={kind: norm}", "--json").json
    assert [node["path"] for node in found["nodes"]] == ["", "blocks.0"]


def test_blocks_lists_every_kind_and_shows_one(cli: Cli) -> None:
    from archdsl.lang.registry import families

    listed = cli("blocks").out
    for family, kinds in families().items():
        assert re.search(rf"^{family}$", listed, re.MULTILINE)
        for kind in kinds:
            assert re.search(rf"^  {kind} ", listed, re.MULTILINE)
    page = cli("blocks", "loop").out
    assert re.search(r"steps +int; default 2; passes through the body", page)
    assert "  router: {kind: prefix, capacity: [0.75, 0.5]}" in page


def test_blocks_lists_a_family_by_its_name(cli: Cli) -> None:
    listed = cli("blocks", "router").out
    assert re.search(r"^  prefix +The best-scored share", listed, re.MULTILINE)
    assert "feed_forward" not in listed
    found = cli("blocks", "router", "--json").json
    assert {entry["family"] for entry in found} == {"router"}
    assert {entry["kind"] for entry in found} >= {"prefix", "top_k"}


def test_blocks_shows_the_keys_at_the_top_of_a_spec(cli: Cli) -> None:
    from archdsl.lang.load import load
    from archdsl.lang.spec import ModelSpec

    listed, page = cli("blocks").out, cli("blocks", "spec").out
    for key in (*ModelSpec.model_fields, "extends", "set"):
        assert re.search(rf"^  {key} +\w", listed, re.MULTILINE), key
        assert re.search(rf"^  {key} +\w.*;", page, re.MULTILINE | re.DOTALL), key
    (entry,) = cli("blocks", "spec", "--json").json
    assert load(entry["example"]).vocab_size == 4000
    one = cli("blocks", "vocab_size").out
    assert "rows of the embedding" in one
    assert "dim" not in one.partition("example")[0]
    both = cli("blocks", "norm").out
    assert "norm, a kind of block" in both
    assert "the norm before the head" in both


def test_an_unknown_kind_is_met_with_a_known_one(cli: Cli) -> None:
    found = cli("blocks", "rooter")
    assert (found.status, found.out) == (2, "")
    assert "no kind 'rooter'" in found.err


def test_devices_say_what_each_needs_and_sends(cli: Cli) -> None:
    given = ["itt", "--devices", "16", "--parallel", "hsdp", "--shard-group", "8"]
    found = cli("build", *given, "--json").json["devices"]
    memory = training_memory(archdsl.load("itt"), devices=devices(16, "hsdp", 8))
    assert found["training_memory"]["stored"]["peak"] == memory.peak
    sent = found["bytes_sent_per_step"]
    shard = memory.weights
    assert sent["reduce_scatter"] == 7 * shard < sent["all_gather"] < 14 * shard
    assert sent["all_reduce"] == shard  # between two groups
    said = " ".join(cli("build", *given).out.split())
    assert "16 devices hsdp in groups of 8, each with one sequence: weights 81.0 MB" in said
    assert "each sends 1.55 GB per optimizer step: all-gather 905.2 MB" in said


def test_an_option_for_devices_needs_their_number(cli: Cli) -> None:
    found = cli("build", "itt", "--parallel", "ddp")
    assert found.status == 2
    assert "go with --devices" in found.err
