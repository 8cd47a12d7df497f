"""Shared by all tests: one thread a process keeps results repeatable and runs side by side fast."""

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))

# Their fixtures: a trained run and a folder with a copy of it; an empty folder.
pytest_plugins = ["shell", "refusal"]
