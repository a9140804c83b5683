"""The source as one file: whole, alone, the same model."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from archdsl.interop.hf_export import code, plain
from archdsl.interop.hf_model import ArchdslForCausalLM
from archdsl.interop.source_bundle import BundleError, bundle
from archdsl.lang.registry import families, load_plugin
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from tests.plugins import PLUGIN, registry_of_its_own
from tests.strategies import specs

KINDS = [kind for family in families().values() for kind in family.values()]
ROOTS = [ArchdslForCausalLM, ModelSpec, *KINDS]


def module_of(text: str, name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)  # dataclasses look there
    exec(compile(text, name, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def alone() -> ModuleType:
    return module_of(code(), "alone")


def source(tmp_path: Path, name: str, text: str) -> ModuleType:
    """A module of the project that this text would be."""
    path = tmp_path / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    found = importlib.util.spec_from_file_location(f"archdsl.{name}", path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[f"archdsl.{name}"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@settings(max_examples=40)
@given(spec=specs())
def test_every_spec_gives_the_same_logits_whole_and_in_chunks(
    alone: ModuleType, spec: ModelSpec
) -> None:
    model = build(spec).eval()
    config = alone.ArchdslConfig(plain(spec), see_later_tokens=True, use_cache=False)
    other = alone.ArchdslForCausalLM(config).eval()
    names = {"head.weight": "lm_head.weight"}
    values = model.state_dict().items()
    other.load_state_dict({names.get(n, f"model.{n}"): value for n, value in values})
    tokens = torch.randint(spec.vocab_size, (2, spec.context))
    found = other(tokens).logits
    if other.model.standard:  # by other kernels
        torch.testing.assert_close(found, model(tokens), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, model(tokens))
    with model.causal_routing():
        wanted = model(tokens)
    half = spec.context // 2
    begun = other(tokens[:, :half], use_cache=True) if half else None
    rest = other(tokens[:, half:], past_key_values=begun and begun.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, wanted[:, half:], rtol=1e-4, atol=1e-4)


def test_it_needs_torch_and_transformers_alone() -> None:
    tree = ast.parse(code())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    packages = {str(name).partition(".")[0] for name in names}
    assert packages - sys.stdlib_module_names == {"torch", "transformers"}
    assert "conflicts" not in code(), "what only validates has no place in it"


def test_nothing_is_defined_twice() -> None:
    tops = [node for node in ast.parse(code()).body if isinstance(node, ast.ClassDef)]
    names = [node.name for node in tops]
    assert len(names) == len(set(names))
    assert ast.get_docstring(ast.parse(code())), "it says what it is"


def test_the_order_of_the_roots_decides_nothing() -> None:
    assert bundle(ROOTS, "") == bundle(reversed(ROOTS), "")


@pytest.mark.slow
def test_other_hashes_of_strings_give_the_same_text() -> None:
    script = "from archdsl.interop.hf_export import code; print(code(), end='')"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == code()


def test_equal_names_of_two_modules_stay_apart(tmp_path: Path) -> None:
    source(
        tmp_path, "one", "def _same(x):\n    return x + 1\n\n\ndef one(x):\n    return _same(x)\n"
    )
    two = source(
        tmp_path,
        "two",
        "from archdsl.one import one\n\n\n"
        "def _same(x):\n    return x * 10\n\n\n"
        "class Two:\n"
        "    def both(self, x):\n        return one(x), _same(x)\n\n"
        "    def local(self, _same):\n        return _same\n",
    )
    alone = module_of(bundle([two.Two], ""), "two_alone")
    assert alone.Two().both(2) == (3, 20)
    assert alone.Two().local(5) == 5


def test_annotations_that_name_what_is_not_there_are_dropped(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\n\n"
        "from pydantic import BaseModel\n\n\n"
        "class Reader:\n"
        "    def read(self, x: BaseModel, y: int) -> BaseModel:\n"
        "        z: BaseModel = y\n        return z\n"
    )
    written = bundle([source(tmp_path, "annotated", text).Reader], "")
    assert "BaseModel" not in written
    assert "y: int" in written
    assert module_of(written, "annotated_alone").Reader().read(None, 3) == 3


def test_a_package_that_others_may_lack_is_refused(tmp_path: Path) -> None:
    text = "import numpy as np\n\n\nclass Sums:\n    def sum(self, x):\n        return np.sum(x)\n"
    with pytest.raises(BundleError, match=r"Sums of archdsl\.numeric needs numpy; an exported"):
        bundle([source(tmp_path, "numeric", text).Sums], "")


def test_a_package_that_only_a_method_imports_is_refused_too(tmp_path: Path) -> None:
    text = "class Late:\n    def sum(self, x):\n        import numpy\n        return numpy.sum(x)\n"
    with pytest.raises(BundleError, match=r"Late of archdsl\.late needs numpy; an exported"):
        bundle([source(tmp_path, "late", text).Late], "")


def test_a_module_that_is_imported_whole_is_refused(tmp_path: Path) -> None:
    text = "from archdsl.nn import rope\n\n\nclass Whole:\n    table = rope.inverse_frequencies\n"
    says = r"Whole of archdsl\.whole needs archdsl\.nn\.rope; import what is used of it by name"
    with pytest.raises(BundleError, match=says):
        bundle([source(tmp_path, "whole", text).Whole], "")


def test_relative_imports_of_a_plugin_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "relative"
    package.mkdir()
    (package / "__init__.py").write_text(
        PLUGIN.format(kind="relative")
        + "\n    def build(self, dim):\n"
        + "        from .module import Nothing\n        return Nothing()\n"
    )
    (package / "module.py").write_text(
        "from archdsl.nn.block import Block\nfrom .other import same\n\n\n"
        "class Nothing(Block):\n    def forward(self, x_BTD, ctx):\n        return same(x_BTD)\n"
    )
    (package / "other.py").write_text("def same(x):\n    return x\n")
    with registry_of_its_own(monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        load_plugin("relative")
        kind = families()["block"]["relative"]
        assert "class Nothing" not in code(), "who has no such block gets none of its source"
        text = code("relative")
        node = module_of(text, "relative_alone").Node.part("block", {"kind": "relative"})
        x_BTD = torch.randn(1, 2, 3)
        assert node.build(3)(x_BTD, None) is x_BTD
        assert "blocks are also those of relative" in text
        assert kind.__module__ == "relative"


def test_plain_data_must_be_a_whole_spec(alone: ModuleType) -> None:
    whole = plain(families()["block"]["norm"]())
    assert alone.Node.part("block", whole).type == "rms"
    with pytest.raises(ValueError, match="must have exactly the keys"):
        alone.Node.part("block", {"kind": "norm"})
    with pytest.raises(ValueError, match="must have exactly the keys"):
        alone.Node.part("block", whole | {"build": "other"})
    wrong: Any
    for wrong in ("os", None, ["norm"], {}):
        with pytest.raises(ValueError, match="unknown kind"):
            alone.Node.part("block", {"kind": wrong})
