"""The functions of the package: what they accept, and how they and their results are shown."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path
from typing import Any

import pytest

import archdsl
from archdsl.data.types import DataError
from archdsl.errors import ArchdslError, SpecError
from archdsl.lang.spec import Budget
from archdsl.search.config import SearchConfig
from archdsl.search.trials.proxy import Proxy
from archdsl.training.config import TrainConfig
from tests.cli.command import Cli
from tests.search.test_search import PROXY, SPACE, go


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "80")
    return Cli(capsys)


YAML = "extends: itt\ncontext: 512\n"


@pytest.mark.parametrize("name", archdsl.__all__)
def test_functions_have_signatures_and_docstrings(name: str) -> None:
    function = getattr(archdsl, name)
    parameters = inspect.signature(function).parameters.values()
    assert parameters
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    assert all(p.annotation is not p.empty for p in parameters)
    assert name in dir(archdsl)
    assert inspect.getdoc(function)


def test_the_help_of_the_search_describes_its_arguments() -> None:
    text = pydoc.plain(pydoc.render_doc(archdsl.search))
    assert "search(space: " in text
    assert "Most forward FLOPs per token of a model." in text


def test_a_spec_is_a_path_a_name_a_text_or_a_mapping(tmp_path: Path) -> None:
    expected = archdsl.load("itt", overrides=["context=512"])
    (tmp_path / "mine.yaml").write_text(YAML)
    for spec in (tmp_path / "mine.yaml", str(tmp_path / "mine.yaml"), YAML, "extends: itt\n"):
        assert archdsl.load(spec, overrides=["context=512"]) == expected
    assert archdsl.load({"extends": "itt", "set": {"context": 512}}) == expected


NO_SPECS: list[Any] = ["", None, 3, [1], b"itt"]


@pytest.mark.parametrize("function", ["load", "cost", "build", "check", "search"])
@pytest.mark.parametrize("given", NO_SPECS, ids=repr)
def test_what_can_be_no_spec_is_told_what_a_spec_is(function: str, given: Any) -> None:
    with pytest.raises(SpecError) as error:
        getattr(archdsl, function)(given)
    assert "the path of a YAML file, the name of a shipped spec such as itt" in str(error.value)
    assert str(error.value).endswith(f"got {given!r}")


@pytest.mark.parametrize("function", ["load", "cost", "build", "check", "search"])
def test_a_mistyped_name_is_told_the_right_one(function: str) -> None:
    with pytest.raises(SpecError, match=r"tinny: no such file \(did you mean 'tiny'\?\)"):
        getattr(archdsl, function)("tinny")


def test_a_name_stands_for_a_spec_in_every_function() -> None:
    spec = archdsl.load("tiny")
    assert archdsl.load(spec) == spec
    assert archdsl.load(spec, overrides=["context=8"]).context == 8
    for given in ("tiny", {"extends": "tiny"}, spec):
        assert archdsl.cost(given) == archdsl.cost(spec)
        assert archdsl.build(given).spec == spec
    assert archdsl.check({"extends": "tiny", "context": 8}, seeds=1).passed


def test_a_training_takes_a_name_and_tells_what_else_it_needs(tmp_path: Path) -> None:
    data, config = archdsl.load_data("skill:p-hop,hops=1,length=8,alphabet=3"), TrainConfig(steps=1)
    config = config.model_copy(update={"context": 8, "batch_size": 1, "eval_tokens": 8})
    assert archdsl.train("tiny", data, config, str(tmp_path)).steps == 1
    assert (tmp_path / "final" / "spec.yaml").exists()
    wrong: list[tuple[Any, Any, Any, str]] = [
        ("tinny", data, config, "did you mean 'tiny'"),
        ("tiny", "skill:p-hop", config, r"archdsl\.load_data\(SOURCE\) returns; got 'skill:p-hop'"),
        ("tiny", data, {"steps": 1}, r"a TrainConfig is needed.*got \{'steps': 1\}"),
    ]
    for model, some_data, settings, message in wrong:
        with pytest.raises(ArchdslError, match=message):
            archdsl.train(model, some_data, settings)


@pytest.mark.parametrize("given", ["tiny", None, "spec"])
def test_what_needs_weights_takes_no_spec(given: Any) -> None:
    model: Any = archdsl.load("tiny") if given == "spec" else given
    shown = "a ModelSpec" if given == "spec" else repr(given)
    data = archdsl.load_data("skill:p-hop")
    for call in (
        lambda: archdsl.evaluate(model, data),
        lambda: archdsl.generate(model, [[1]]),
        lambda: archdsl.gradients(model, data),
    ):
        with pytest.raises(ArchdslError) as error:
            call()
        assert "a model is needed, which archdsl.build(SPEC) returns" in str(error.value)
        assert str(error.value).endswith(f"got {shown}")


@pytest.mark.parametrize("given", ["", 3, b"text.txt"])
def test_what_can_be_no_data_is_told_what_data_are(given: Any) -> None:
    with pytest.raises(DataError, match=r"names no data; expected nothing \(the embedded corpus\)"):
        archdsl.load_data(given)


def test_the_folder_of_a_checkpoint_is_no_spec_but_holds_one(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("extends: tiny\n")
    with pytest.raises(SpecError, match=r"is a directory, not a file; did you mean .*spec\.yaml\?"):
        archdsl.load(tmp_path)


def test_a_text_extends_what_the_working_directory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(YAML)
    assert archdsl.load("extends: mine.yaml").context == 512
    Path("odd: name.yaml").write_text("extends: mine.yaml\ncontext: 256\n")
    assert archdsl.load("odd: name.yaml").context == 256  # a file of that name comes first


def test_mistakes_in_a_text_or_a_mapping_have_a_place() -> None:
    with pytest.raises(SpecError, match=r"^<text>:2:10: context: must be at least 1"):
        archdsl.load("extends: itt\ncontext: 0\n")
    with pytest.raises(SpecError, match=r"^the given mapping: context: must be at least 1"):
        archdsl.load({"extends": "itt", "context": 0})


def test_a_cost_prints_as_the_command_line_prints_it(cli: Cli) -> None:
    receipt = archdsl.cost(archdsl.load("itt"))
    printed = cli("build", "itt").out
    assert f"{receipt}\n" == printed
    assert repr(receipt) == str(receipt)
    assert f"{receipt.params:,} in all" in str(receipt)
    assert receipt._asdict()["params"] == receipt.params


def test_html_is_escaped() -> None:
    spec = archdsl.load({"extends": "tiny", "description": "<script>alert(1)</script>"})
    for shown in (spec, archdsl.cost(spec)):
        html = shown._repr_html_()
        assert html.startswith("<pre")
        assert "<script>" not in html
    assert "&lt;script&gt;" in spec._repr_html_()


@pytest.mark.slow
def test_reports_and_studies_are_shown_in_notebooks(tmp_path: Path) -> None:
    from archdsl.search.studies import study

    (tmp_path / "small.yaml").write_text(SPACE)
    report = go(tmp_path / "small.yaml", tmp_path / "run", trials=2)
    for shown in (report, study(str(tmp_path / "run"))):
        html = shown._repr_html_()
        assert html.startswith("<pre")
        assert "front" in html


def called(monkeypatch: pytest.MonkeyPatch, *spaces: Any, **given: Any) -> dict[str, Any]:
    """What `archdsl.search` asks of the search that it starts."""
    seen: dict[str, Any] = {}

    def note(config: SearchConfig, **rest: Any) -> None:
        seen.update(rest, config=config)

    monkeypatch.setattr("archdsl.search.run.run_search", note)
    archdsl.search(*spaces, **given)
    return seen


def test_a_search_takes_words_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    words = called(
        monkeypatch, budget="162M", flops="0.8G", kv="64KiB", train_flops="1P", time="10m"
    )
    numbers = called(
        monkeypatch, budget=162e6, flops=800_000_000, kv=65_536, train_flops=1e15, time=600
    )
    assert words["config"] == numbers["config"]
    assert words["config"].limits == Budget(
        params=162_000_000, flops=800_000_000, kv=65_536, train_flops=10**15
    )
    assert called(monkeypatch, time=None)["config"].time is None
    assert called(monkeypatch, objective=["loss", "kv"], out="there")["config"] == SearchConfig(
        objective="loss,kv", out=Path("there")
    )


def test_a_search_takes_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"extends": "search"}
    seen = called(monkeypatch, space, budget=Budget(params=60_000), proxy=PROXY, flops="1M")
    assert (seen["space"], seen["proxy"]) == (space, PROXY)
    assert (seen["budget"], seen["config"].flops) == (Budget(params=60_000), 1_000_000)


def test_a_search_takes_the_older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, seconds=None)["config"].time is None
    assert called(monkeypatch, seconds=7.5)["config"].time == 7.5


def test_a_search_takes_a_config_and_what_replaces_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "search.yaml").write_text("space: itt\nbudget: 20M\nseeds: 5\n")
    for config in (tmp_path / "search.yaml", SearchConfig(space="itt", budget=20_000_000, seeds=5)):
        asked = called(monkeypatch, config=config, budget="10M")
        seen = asked["config"]
        assert asked["space"] is None  # the space is that of the config
        assert (seen.space, seen.budget, seen.seeds) == ("itt", 10_000_000, 5)


def test_a_search_tells_what_is_wrong_in_the_words_of_the_command_line(cli: Cli) -> None:
    with pytest.raises(SpecError) as error:
        archdsl.search(budget="162Q", time="3x", layouts=0)
    options = ["--budget", "162Q", "--time", "3x", "--layouts", "0"]
    assert cli("search", *options).err.replace("--", "") == f"{error.value}\n"


def test_the_defaults_of_the_function_are_those_of_the_config() -> None:
    given = {name: p.default for name, p in inspect.signature(archdsl.search).parameters.items()}
    fields = SearchConfig.model_fields
    assert {name: given[name] for name in fields} == {n: f.default for n, f in fields.items()}


def test_a_proxy_names_its_own_data(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="data: a Proxy object names the data of its tasks itself"):
        archdsl.search("tiny", proxy=Proxy(tasks=PROXY.tasks), data="skill:p-hop", out=tmp_path)
