"""Transformers' own tests of its models pass for exports, but for what the documentation lists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

CASES = Path(__file__).with_name("transformers_cases.py")
# what the source distribution lacks: the tests of generation are in test_hf_export.py
ABSENT = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass",
    "tests/conftest.py": "",
}
# the reasons are in docs/how-to/export.md
LISTED = {
    "Looped": set(),
    "Itt": {"test_capture_outputs_decorator"},
}


@pytest.fixture
def tests_of_transformers(tmp_path: Path) -> Path:
    """The tests of the installed version, from its source distribution."""
    words = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    package = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", *words, "--dest", str(tmp_path), package]
    found = subprocess.run(pip, capture_output=True, text=True)
    archives = list(tmp_path.glob("*.tar.gz"))
    if not archives:
        reason = f"no source distribution of {package}: {found.stderr[-200:]}"
        if os.environ.get("ARCHDSL_CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    for name, text in ABSENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).with_name("__init__.py").touch()
    return folder


@pytest.mark.slow
def test_its_own_cases_pass(tests_of_transformers: Path) -> None:
    case = tests_of_transformers / "tests" / "test_modeling_archdsl.py"
    case.write_text(CASES.read_text(encoding="utf-8"), encoding="utf-8")
    environment = os.environ | {"ARCHDSL_CASES": "1", "HF_HUB_OFFLINE": "1"}
    words = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "-rA", "--tb=line", str(case)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tests_of_transformers,
        env=environment | {"PYTHONPATH": str(tests_of_transformers)},
        capture_output=True,
        text=True,
    )
    failed = set(re.findall(r"^(?:SUB)?FAILED.*::(\w+)::(\w+)", run.stdout, re.M))
    listed = {(model, name) for model, names in LISTED.items() for name in names}
    assert failed == listed, run.stdout[-3000:]
    passed = re.findall(r"^PASSED .*::(\w+)::(\w+)", run.stdout, re.M)
    assert len(passed) > 100, run.stdout[-3000:]
