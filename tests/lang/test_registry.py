"""Plugins: who may bring kinds, when they are imported, and what is said if they cannot be."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import archdsl
from archdsl.errors import SpecError
from archdsl.lang import plugin_sources, registry
from archdsl.lang.plugin_sources import plugin_digests
from archdsl.lang.registry import PluginError, kinds, load_plugin, plugin_modules
from archdsl.model.checkpoint import load_checkpoint, save_checkpoint
from tests.plugins import PLUGIN, SPEC, registry_of_its_own

Plugin = Callable[..., None]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with registry_of_its_own(monkeypatch):
        yield


@pytest.fixture
def install(tmp_path: Path) -> Plugin:
    """Writes a module, and the distribution whose entry point names it."""

    def write(module: str, source: str, distribution: str | None = None) -> None:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / f"{module}.py").write_text(source)
        if str(site) not in sys.path:
            sys.path.append(str(site))
        if distribution:
            about = site / f"{distribution}-1.2.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.2\n")
            (about / "entry_points.txt").write_text(f"[archdsl.blocks]\nmine = {module}\n")

    return write


def spec(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "m.yaml"
    path.write_text(SPEC.replace("KIND", json.dumps(kind)))
    return path


def test_an_installed_package_brings_its_kinds(install: Plugin, tmp_path: Path) -> None:
    install("mine", PLUGIN.format(kind="nothing"), "my-blocks")
    assert "mine" not in sys.modules, "nobody has asked for a kind yet"
    assert archdsl.load(spec(tmp_path, "nothing")).blocks[0].__class__.__module__ == "mine"
    assert plugin_modules() == ["mine"]


def test_a_broken_package_is_named_with_what_to_do(install: Plugin) -> None:
    install("mine", "import nowhere_to_be_found", "my-blocks")
    for _ in range(2):  # the second time is no better
        with pytest.raises(PluginError) as error:
            kinds("block")
        assert str(error.value) == (
            "cannot import the plugin 'mine' of the installed package my-blocks 1.2: "
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'; "
            "update or repair that package, or remove it: pip uninstall my-blocks"
        )


def test_a_kind_that_exists_is_not_taken_over(install: Plugin) -> None:
    install("mine", PLUGIN.format(kind="attention"), "my-blocks")
    with pytest.raises(
        PluginError, match=r"block 'attention' is already defined in archdsl\.blocks"
    ):
        kinds("block")


def test_a_plugin_is_named_before_or_after_the_first_question(
    install: Plugin, tmp_path: Path
) -> None:
    install("one", PLUGIN.format(kind="one"))
    (tmp_path / "two.py").write_text(PLUGIN.format(kind="two"))  # in the working directory
    load_plugin("one")
    assert "one" not in sys.modules
    assert "one" in kinds("block")
    load_plugin("two")
    load_plugin("two")
    assert {"one", "two"} <= kinds("block").keys()
    assert os.environ[registry.VARIABLE] == "one,two"


def test_a_plugin_that_is_not_there_says_where_it_is_looked_for() -> None:
    load_plugin("nowhere_to_be_found")
    with pytest.raises(PluginError) as error:
        kinds("block")
    assert str(error.value) == (
        "cannot import the plugin 'nowhere_to_be_found' (named by --plugin or ARCHDSL_PLUGINS): "
        "ModuleNotFoundError: No module named 'nowhere_to_be_found'; "
        "it must be a module of an installed package or of the working directory, and "
        "importing it must raise no error"
    )


def test_a_plugin_that_ends_the_process_is_an_error(install: Plugin) -> None:
    install("quits", "import sys; sys.exit(3)")
    load_plugin("quits")
    with pytest.raises(PluginError, match=r"cannot import the plugin 'quits'.*SystemExit: 3"):
        kinds("block")


def test_processes_started_later_load_the_same_plugins(install: Plugin, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(kind="nothing"))
    load_plugin("mine")
    asked = "from archdsl.lang.registry import kinds; print('nothing' in kinds('block'))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_module_may_be_reloaded_and_another_may_not_take_its_kind(install: Plugin) -> None:
    install("mine", PLUGIN.format(kind="nothing"))
    install("other", PLUGIN.format(kind="nothing"))
    load_plugin("mine")
    first = kinds("block")["nothing"]
    importlib.reload(sys.modules["mine"])
    assert kinds("block")["nothing"] is not first
    with pytest.raises(PluginError, match="TypeError: block 'nothing' is already defined in mine"):
        load_plugin("other")


@pytest.mark.parametrize("kind", ["evil", "evil:EvilSpec", "evil.EvilSpec", "../evil.py"])
def test_a_spec_imports_no_code(tmp_path: Path, kind: str) -> None:
    (tmp_path / "evil.py").write_text(PLUGIN.format(kind="evil"))
    sys.path.append(str(tmp_path))
    with pytest.raises(SpecError) as error:
        archdsl.load(spec(tmp_path, kind))
    assert "evil" not in sys.modules
    assert f"unknown kind {kind!r} of block" in str(error.value)
    assert str(error.value).endswith(
        "a kind of another package needs that package installed, or --plugin PACKAGE.MODULE "
        "(plugins loaded: none)"
    )


def test_a_checkpoint_imports_no_code(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(PLUGIN.format(kind="evil"))
    sys.path.append(str(tmp_path))
    named = {"plugins": ["evil"], "plugin": "evil"}
    model = archdsl.build(archdsl.load("tiny"))
    save_checkpoint(tmp_path / "made", model, tokenizer_from=None, provenance=named)
    load_checkpoint(tmp_path / "made")
    assert "evil" not in sys.modules


def test_what_is_loaded_is_said_where_a_kind_is_unknown(install: Plugin, tmp_path: Path) -> None:
    install("mine", PLUGIN.format(kind="nothing"), "my-blocks")
    with pytest.raises(SpecError, match=r"\(plugins loaded: mine\)"):
        archdsl.load(spec(tmp_path, "unheard_of"))


def test_a_stored_result_belongs_to_the_source_of_its_blocks(
    install: Plugin, tmp_path: Path
) -> None:
    install("mine", PLUGIN.format(kind="nothing"))
    load_plugin("mine")
    before = plugin_digests(archdsl.load(spec(tmp_path, "nothing")))
    assert before.keys() == {"plugins"}
    assert before["plugins"].keys() == {"mine"}
    install("mine", PLUGIN.format(kind="nothing") + "# edited")
    plugin_sources._digest.cache_clear()  # as in another process
    assert plugin_digests(archdsl.load(spec(tmp_path, "nothing"))) != before
    assert plugin_digests(archdsl.load("tiny")) == {}


def named(module: str) -> str:
    return (
        f"the plugin {module} defines no kind of block or of another part. A plugin is a module "
        "that defines a subclass of BlockSpec with a field `kind`, or imports one: see "
        "docs/extending.md"
    )


def test_a_plugin_that_defines_no_kind_is_an_error(install: Plugin) -> None:
    install("empty", "from archdsl.lang.spec import BlockSpec\nimport json\n")
    load_plugin("empty")
    for _ in range(2):
        with pytest.raises(PluginError) as error:
            kinds("block")
        assert str(error.value) == named("'empty' (named by --plugin or ARCHDSL_PLUGINS)")
    os.environ[registry.VARIABLE] = ""
    kinds("block")
    with pytest.raises(PluginError, match=r"the plugin 'empty'.* defines no kind"):
        load_plugin("empty")  # after the first question


def test_an_installed_package_that_defines_no_kind_is_an_error(install: Plugin) -> None:
    install("empty", "", "my-blocks")
    with pytest.raises(PluginError) as error:
        kinds("block")
    assert str(error.value) == named("'mine' of the installed package my-blocks 1.2")


def test_a_plugin_may_import_the_modules_that_define_its_kinds(install: Plugin) -> None:
    install("one", PLUGIN.format(kind="one"))
    install("two", PLUGIN.format(kind="two"))
    install("both", "import one\nfrom two import NothingSpec\n")
    load_plugin("one")
    importlib.import_module("both")  # by the user's own script, before anything is asked
    load_plugin("both")
    assert {"one", "two"} <= kinds("block").keys()


@pytest.mark.parametrize("name", ["", "  ", ","])
def test_a_plugin_without_a_name_is_an_error(name: str) -> None:
    with pytest.raises(PluginError, match=r"--plugin needs the name of a Python module"):
        load_plugin(name)


def test_an_empty_variable_names_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    # as ARCHDSL_PLUGINS=$ARCHDSL_PLUGINS,mine leaves it where nothing was set before
    monkeypatch.setenv(registry.VARIABLE, " ,")
    assert "loop" in kinds("block")


def test_a_checkpoint_says_which_plugin_has_its_kinds(
    install: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("mine", PLUGIN.format(kind="atention"))  # as a typing mistake would look
    load_plugin("mine")
    monkeypatch.setattr("archdsl.model.checkpoint.save_model", lambda _, file: Path(file).touch())
    made = tmp_path / "made"
    model = archdsl.build("tiny")
    model.spec = archdsl.load(spec(tmp_path, "atention"))
    save_checkpoint(made, model, tokenizer_from=None, provenance={})
    assert json.loads((made / "provenance.json").read_text())["plugins"] == ["mine"]
    monkeypatch.delenv(registry.VARIABLE)
    registry._families["block"].pop("atention")
    sys.modules.pop("mine")
    with pytest.raises(SpecError) as error:
        load_checkpoint(made)
    assert "unknown kind 'atention' of block" in str(error.value)
    assert str(error.value).startswith(
        f"{made / 'provenance.json'}: the model has kinds of mine: if you trust that code, "
        "install its package, or name the module, as in --plugin mine\n"
    )
    assert "mine" not in sys.modules


@pytest.mark.parametrize("told", [None, "evil", ["x; rm -rf ~", 3, "\x1b[2J"], {"a": 1}, 7, [[]]])
def test_what_a_checkpoint_says_of_plugins_is_not_believed(
    install: Plugin, tmp_path: Path, told: object
) -> None:
    made = tmp_path / "made"
    save_checkpoint(made, archdsl.build("tiny"), tokenizer_from=None, provenance={"plugins": told})
    (made / "spec.yaml").write_text(SPEC.replace("KIND", "unheard_of"))
    about = json.loads((made / "provenance.json").read_text())
    digest = hashlib.sha256((made / "spec.yaml").read_bytes()).hexdigest()
    about["files"]["spec.yaml"] = digest
    (made / "provenance.json").write_text(json.dumps(about))
    with pytest.raises(SpecError) as error:
        load_checkpoint(made)
    assert "rm -rf" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert "the model has kinds that are not part of archdsl; a kind of another" in str(error.value)
