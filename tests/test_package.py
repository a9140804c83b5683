"""The distributions contain everything and run where nothing else is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import archdsl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results"
)


def package_files() -> set[str]:
    """Returns the files below archdsl/, with links followed."""
    found = (
        Path(folder, name).relative_to(ROOT)
        for folder, _, names in os.walk(ROOT / "archdsl", followlinks=True)
        for name in names
    )
    return {path.as_posix() for path in found if path.suffix != ".pyc"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | {"ARCHDSL_CACHE": str(cwd / "cache"), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a source distribution and the wheel built from it."""
    work = tmp_path_factory.mktemp("package")
    # a copy, as building leaves things behind and picks up what earlier builds left
    shutil.copytree(ROOT, work / "source", symlinks=True, ignore=LEFT_BEHIND)
    run(sys.executable, "-m", "build", "--no-isolation", "-o", work / "dist", cwd=work / "source")
    return work / "dist"


def test_the_top_level_folders_are_parts_of_the_package() -> None:
    for name in ("blocks", "search", "specs"):
        assert os.readlink(ROOT / "archdsl" / name) == f"../{name}"


def test_the_version_of_the_module_is_that_of_the_distribution() -> None:
    assert PROJECT["project"]["version"] == archdsl.__version__


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + [
        one for extra in extras.values() for one in extra
    ]
    names = {
        one.partition(">=")[0].partition("[")[0].lower()
        for one in wanted
        if not one.startswith("archdsl[")
    }
    assert names <= pinned


@pytest.mark.slow
def test_the_wheel_contains_the_whole_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert {"archdsl/py.typed", "archdsl/specs/itt.yaml", "archdsl/blocks/loop.py"} <= names
    assert "archdsl/data/corpus/sotu.jsonl.xz" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_distribution_contains_the_package_and_its_tests(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert package_files() <= names
    assert {"LICENSE", "README.md", "constraints.txt", "tests/conftest.py"} <= names


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_with_nothing_else(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path
    )
    # the dependencies of this environment, without what is installed from a working copy in it:
    # .pth files of a folder that a .pth file names are not read
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    Path(own.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = run(python, "-c", "import archdsl; print(archdsl.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    command = tmp_path / "venv" / "bin" / "archdsl"
    assert "prefix" in run(command, "blocks", cwd=tmp_path)
    assert "162,051,072 in all" in run(command, "build", "itt", cwd=tmp_path)
    text = run(python, "-c", "import archdsl; print(archdsl.load_data().name)", cwd=tmp_path)
    assert text == "sotu\n"
