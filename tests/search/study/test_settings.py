"""The folder of a search: which settings share one, and which do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from archdsl.errors import ArchdslError
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget
from archdsl.search.study.settings import Settings, claim_folder
from archdsl.search.trials.proxy import Proxy, Task
from tests.search.study.test_sampler import SPACE

TASK = Task(data="skill:p-hop,hops=1,length=12", context=12, rungs=(2, 4))
SETTINGS = Settings(
    parse(SPACE, "small.yaml"), Budget(params=60_000), Proxy(dim=16, tasks={"skill": TASK})
)
OTHER = TASK.model_copy(update={"data": "skill:p-hop,hops=2,length=12"})


@pytest.mark.parametrize(
    "other",
    [
        replace(SETTINGS, seed=1),
        replace(SETTINGS, window=4),
        replace(SETTINGS, axes=("loss",)),
        replace(SETTINGS, budget=Budget(params=60_001)),
        replace(SETTINGS, strategy="shared"),
        replace(SETTINGS, proxy=Proxy(dim=16, tasks={"skill": OTHER})),
        replace(SETTINGS, proxy=Proxy(dim=32, tasks={"skill": TASK})),
    ],
)
def test_other_settings_have_another_name_and_another_folder(
    tmp_path: Path, other: Settings
) -> None:
    claim_folder(tmp_path, SETTINGS)
    claim_folder(tmp_path, SETTINGS)
    assert other.name != SETTINGS.name
    with pytest.raises(ArchdslError, match="other settings"):
        claim_folder(tmp_path, other)


def test_the_same_description_of_other_data_is_another_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = SETTINGS.name
    data = TASK.load()
    monkeypatch.setattr(type(data), "fingerprint", "of a file that has changed", raising=True)
    assert SETTINGS.name != name


def test_a_limit_of_training_may_change(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    claim_folder(tmp_path, replace(SETTINGS, budget=Budget(params=60_000, train_flops=10**12)))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1"])
def test_a_folder_whose_settings_are_something_else_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    claim_folder(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(ArchdslError, match=rf"other settings \(see {tmp_path}/settings.json\)"):
        claim_folder(tmp_path, SETTINGS)
