"""Settings of all tests: one thread, fixed seeds and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("archdsl", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("archdsl")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
