"""Settings of all tests: one thread, fixed seeds and no network."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)
# Otherwise examples contain constants of the modules imported so far, so that they change with
# which tests ran before in the same process.
LOCAL = "hypothesis.internal.conjecture.providers.is_local_module_file"
pytest.MonkeyPatch().setattr(LOCAL, lambda path: False)
settings.register_profile(
    "archdsl",
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=set(Phase) - {Phase.explain},  # which takes minutes after each failure
)
settings.load_profile("archdsl")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plugins_end_with_a_test() -> Iterator[None]:
    """A command that loads a plugin names it in the environment, which all tests share."""
    before = os.environ.get("ARCHDSL_PLUGINS")
    yield
    if before is None:
        os.environ.pop("ARCHDSL_PLUGINS", None)
    else:
        os.environ["ARCHDSL_PLUGINS"] = before
