"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

import archdsl
from archdsl import load as load_module
from archdsl.cli.app import app
from archdsl.outline import Node, outline
from archdsl.schedule import TrainConfig
from archdsl.search.run import search
from archdsl.source import shipped_specs
from archdsl.spec import Budget, ModelSpec
from tests.strategies import specs

HEAVY = ["torch", "transformers", "datasets", "optuna", "numpy"]
SKILL = "skill:p-hop,hops=1,length=8,alphabet=3"
ROUTER = "blocks.1.router.kind"


class Output:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs a command in this process, as a shell in ``folder`` would."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> Output:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="archdsl")
        status = end.value.code or 0
        assert isinstance(status, int)
        return Output(status, *self.capsys.readouterr())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Cli(capsys)


# answers at once


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["build", "--help"], 0),
        (["search", "--help"], 0),
        (["train", "--help"], 0),
        (["buidl"], 2),
        (["build", "itt", "--bugdet", "162M"], 2),
        (["search", "--budget", "162Q"], 2),
        (["train", "tiny", "--lr", "fast"], 2),
    ],
)
def test_answers_without_importing_what_is_heavy(arguments: list[str], status: int) -> None:
    code = (
        "import sys, time\n"
        "from archdsl.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: status = end.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "print('FACTS', status or 0, round(time.process_time(), 2), heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said, seconds, heavy = done.stdout.splitlines()[-1].removeprefix("FACTS ").split(" ", 2)
    assert (int(said), heavy) == (status, "[]")
    assert float(seconds) < 0.8  # of the processor; importing torch alone takes twice that


@pytest.mark.parametrize(
    "command", ["build", "search", "train", "eval", "diff", "blocks", "schema"]
)
def test_every_help_has_an_example(cli: Cli, command: str) -> None:
    found = cli(command, "--help")
    assert found.status == 0
    assert f"    archdsl {command}" in found.out


def test_a_mistyped_option_is_met_with_the_right_one(cli: Cli) -> None:
    found = cli("build", "itt", "--bugdet", "162M")
    assert (found.status, found.out) == (2, "")
    assert "--budget" in found.err


# build


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


def adds_up(node: Node) -> None:
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


def test_json_holds_the_same_facts(cli: Cli) -> None:
    found = cli("build", "itt", "--json").json
    receipt = archdsl.cost(archdsl.load("itt"))
    assert found["receipt"]["expected"] == receipt.expected
    assert found["paper"]["flops_per_context"] / 1e12 == pytest.approx(3.85, abs=0.005)
    assert found["leaks"] == ["blocks.0.body.1.router"]
    assert found["tree"]["params"] == receipt.params
    assert found["tree"]["below"][1]["below"][1]["path"] == "blocks.0.body.1"


@pytest.mark.parametrize(
    ("limit", "status", "said"),
    [
        (["--budget", "163M"], 0, "holds, 0.58% to spare: 162,051,072 of 163,000,000 parameters"),
        (["--budget", "100M"], 1, "over by 62.05%: 162,051,072 of 100,000,000 parameters"),
        (["--flops", "0.5G"], 1, "over by 38.78%"),
        (["--flops", "0.8G", "--budget", "1G"], 0, "of 800,000,000 FLOPs/token"),
    ],
)
def test_a_budget_holds_or_fails(cli: Cli, limit: list[str], status: int, said: str) -> None:
    found = cli("build", "itt", *limit)
    assert found.status == status
    assert said in found.out
    assert ("exceed the budget" in found.err) == bool(status)


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "1.5", "162 monkeys"])
def test_a_limit_is_a_number_above_zero(cli: Cli, limit: str) -> None:
    found = cli("build", "itt", "--budget", limit)
    assert (found.status, found.out) == (2, "")


def test_a_budget_of_the_spec_counts_too(cli: Cli) -> None:
    assert cli("build", "tiny", "--set", "budget={params: 1k}").status == 1


def test_writes_a_checkpoint_that_loads(cli: Cli) -> None:
    from archdsl.checkpoint import load_checkpoint

    assert cli("build", "tiny", "--out", "made", "--seed", "3", "--tokenizer", "bytes").status == 0
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


# mistakes


def test_all_that_is_wrong_with_a_spec_comes_at_once_and_plainly(cli: Cli) -> None:
    Path("bad.yaml").write_text(
        "name: bad\nvocab_size: 10\ncontext: 8\ndim: 8\nblocks:\n"
        "  - {kind: lair}\n  - {kind: loop, stepz: 2, body: layer}\n"
    )
    found = cli("build", "bad.yaml")
    assert (found.status, found.out) == (2, "")
    first, second = found.err.splitlines()
    assert first.startswith("bad.yaml:6:12: blocks.0.kind: unknown kind 'lair'")
    assert second.startswith("bad.yaml:7:")
    assert "(did you mean 'steps'?)" in second


def test_mistaken_options_come_at_once_and_in_the_words_of_the_command(cli: Cli) -> None:
    found = cli("train", "tiny", "--lr", "1e999", "--batch-size", "0", "--betas", "3")
    assert (found.status, found.out) == (2, "")
    assert [line.partition(":")[0] for line in found.err.splitlines()] == [
        "--batch-size",
        "--betas",
        "--lr",
    ]


def test_an_interrupt_says_so_in_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("the same command goes on")

    monkeypatch.setattr(load_module, "load", interrupt)
    found = cli("build", "tiny")
    assert (found.status, found.out) == (130, "")
    assert found.err == "interrupted: the same command goes on\n"


# how it looks


@pytest.mark.parametrize("command", [["build", "itt"], ["diff", "loop", "itt"], ["blocks", "loop"]])
def test_a_pipe_gets_plain_text(cli: Cli, command: list[str]) -> None:
    out = cli(*command).out
    assert "\x1b" not in out
    assert not [line for line in out.splitlines() if line.endswith(" ")]


def test_colours_can_be_had_and_declined(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" in cli("build", "itt").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("build", "itt").out


@pytest.mark.parametrize(
    "command",
    [["build", "hybrid"], ["diff", "loop", "itt"], ["blocks"], ["blocks", "loop"], ["schema"]],
)
def test_json_is_all_that_it_prints(cli: Cli, command: list[str]) -> None:
    found = cli(*command, *([] if command == ["schema"] else ["--json"]))
    assert found.json
    assert found.err == ""


# diff and blocks


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
    assert "the same model, said in other words" in found.out
    assert cli("diff", "itt", "itt", "--set", change, "--json").json["same_model"] is True


def test_diff_stops_where_a_block_became_another(cli: Cli) -> None:
    found = cli("diff", "tiny", "tiny", "--set", "blocks.0={kind: norm}", "--json").json
    assert [node["path"] for node in found["nodes"]] == ["", "blocks.0"]


def test_blocks_lists_every_kind_and_shows_one(cli: Cli) -> None:
    from archdsl.spec import FAMILIES

    listed = cli("blocks").out
    for family, kinds in FAMILIES.items():
        assert re.search(rf"^{family}$", listed, re.MULTILINE)
        for kind in kinds:
            assert re.search(rf"^  {kind} ", listed, re.MULTILINE)
    page = cli("blocks", "loop").out
    assert re.search(r"steps +int; default 2; passes through the body", page)
    assert "  router: {kind: prefix, capacity: [0.75, 0.5]}" in page


def test_an_unknown_kind_is_met_with_a_known_one(cli: Cli) -> None:
    found = cli("blocks", "rooter")
    assert (found.status, found.out) == (2, "")
    assert "no kind 'rooter'" in found.err


# train and eval


def test_trains_goes_on_and_evaluates(cli: Cli) -> None:
    train = ["train", "tiny", "--data", SKILL, "--context", "8", "--batch-size", "2"]
    trained = cli(*train, "--steps", "2", "--out", "run", "--json")
    assert trained.status == 0, trained.err
    assert trained.json["checkpoint"] == "run/final"
    again = cli(*train, "--steps", "2", "--out", "run", "--json")
    assert again.json["validation"] == trained.json["validation"]
    assert "trained already" in again.err
    assert cli(*train, "--steps", "3", "--out", "run").status == 2

    # the data is that of the training unless said otherwise
    found = cli("eval", "run/final", "--context", "8", "--tokens", "64", "--json").json
    assert found["data"].startswith("skill:p-hop")
    assert "guessing gets 33.3%" in cli("eval", "run/final", "--context", "8").out


def test_a_leaking_model_is_scored_both_ways(cli: Cli) -> None:
    cli("build", "tiny", "--set", f"{ROUTER}=top_k", "--out", "made")
    found = cli("eval", "made", "--data", SKILL, "--context", "8")
    assert found.status == 0, found.err
    assert "with sight of later tokens" in found.out
    assert "causally" in found.out
    both = cli("eval", "made", "--data", SKILL, "--context", "8", "--json").json
    assert both["leaks"] is True
    assert both["causal"]["leaks"] is False


def test_a_run_is_not_a_checkpoint_but_knows_where_one_is(cli: Cli) -> None:
    cli("build", "tiny", "--out", "run/final")
    found = cli("eval", "run")
    assert found.status == 1
    assert "did you mean run/final?" in found.err


def test_a_vocabulary_too_small_for_the_data_is_told_the_fix(cli: Cli) -> None:
    found = cli("train", "tiny", "--set", "vocab_size=2", "--data", SKILL)
    assert found.status == 1
    assert re.search(r"and tiny only a vocab_size of 2: --set vocab_size=\d+\n", found.err)
    wanted = re.findall(r"--set (vocab_size=\d+)", found.err)[0]
    fixed = ["--set", wanted, "--data", SKILL, "--context", "8", "--steps", "1"]
    assert cli("train", "tiny", *fixed).status == 0


@pytest.mark.parametrize(("vocabulary", "choice"), [(257, "bytes"), (4096, "bpe:4096")])
def test_the_tokenizer_fills_the_vocabulary(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, vocabulary: int, choice: str
) -> None:
    asked: list[str] = []

    def load_data(source: str | None, *, tokenizer: str) -> None:
        asked.append(tokenizer)
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.data.load_data", load_data)
    cli("train", "tiny", "--set", f"vocab_size={vocabulary}")
    assert asked == [choice]


def test_every_field_of_the_training_is_an_option(cli: Cli) -> None:
    text = cli("train", "--help").out
    for name in TrainConfig.model_fields:
        assert f"  --{name.replace('_', '-')}" in text


def test_options_are_read_as_yaml(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    seen: list[TrainConfig] = []

    def train(model: Any, data: Any, config: TrainConfig, *_: Any, **__: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    from archdsl import train as train_module

    monkeypatch.setattr(train_module, "train", train)
    options = ["--lr", "1e-4", "--clip", "null", "--betas", "[0.8, 0.9]", "--compile"]
    cli("train", "tiny", "--data", SKILL, *options)
    assert seen == [TrainConfig(lr=1e-4, clip=None, betas=(0.8, 0.9), compile=True)]


# search


def asked(cli: Cli, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What the command asks of the search."""
    seen: dict[str, Any] = {}

    def note(space: str, **options: Any) -> None:
        seen.update(options, space=space)
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.search.run.search", note)
    assert cli("search", *options).status == 130
    return seen


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)]
)
def test_a_time_has_a_unit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, text: str, seconds: int
) -> None:
    assert asked(cli, monkeypatch, "--time", text)["seconds"] == seconds


@pytest.mark.parametrize("text", ["0", "-1", "3x", "m", "1e999", "ten minutes"])
def test_a_time_without_sense_is_refused(cli: Cli, text: str) -> None:
    found = cli("search", "--time", text)
    assert (found.status, found.out) == (2, "")
    assert "--time" in found.err


def test_a_search_takes_its_own_defaults(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {name: p.default for name, p in inspect.signature(search).parameters.items()}
    seen = asked(cli, monkeypatch)
    assert seen.pop("watch") is not None
    assert seen == {name: default for name, default in defaults.items() if name != "watch"}


def test_a_search_passes_on_what_was_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["mine.yaml", "--budget", "20M", "--flops", "0.1G", "--proxy", "48", "--data", SKILL]
    seen = asked(cli, monkeypatch, *options, "--trials", "3", "--out", "there")
    assert seen["space"] == "mine.yaml"
    assert seen["budget"] == Budget(params=20_000_000, flops=100_000_000)
    assert (seen["trials"], seen["out"]) == (3, Path("there"))
    assert seen["proxy"].dim == 48
    assert seen["proxy"].tasks["text"].data == SKILL
    assert asked(cli, monkeypatch, "--proxy", "none")["proxy"].dim is None


# as processes


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    # src is found wherever the process stands
    root = Path(archdsl.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "archdsl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_goes_on(tmp_path: Path) -> None:
    command = ["train", "tiny", "--data", SKILL, "--context", "8", "--steps", "100000"]
    process = start(*command, "--out", "run", cwd=tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted: stopped after step ")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", [["schema"], ["build", "hybrid"], ["--help"]])
def test_a_reader_that_leaves_is_no_fault(command: list[str], tmp_path: Path) -> None:
    process = start(*command, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)
    process.stderr.close()
