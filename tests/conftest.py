"""Shared by all tests: one thread a process keeps results repeatable and runs side by side fast."""

import sys
from pathlib import Path

import matplotlib
import pytest
import torch

from pyrovae.vae import VAE

matplotlib.use("agg")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def without_cuda(request, monkeypatch):
    """A test that does not ask for a GPU is one of the CPU, also on a machine that has one."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that it starts


@pytest.fixture
def soon_started(monkeypatch):
    """A tenth of the steps in which a VAE seeks its output bias: else most of what a tiny run does.

    For modules that ask nothing of how well a run starts; tests/test_vae.py asks that.
    """
    monkeypatch.setitem(VAE.initialize.__kwdefaults__, "steps", 10)


# Their fixtures: a trained run and a folder with a copy of it; an empty folder.
pytest_plugins = ["shell", "refusal"]
