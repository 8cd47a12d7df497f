"""pyrovae's engines, as `pyrovae.fit` drives them: one optimiser, validation off, few reads."""

import copy
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from bench import cases
from bench.measure import MissingError
from pyrovae import objectives
from pyrovae.acceleration import CompiledSVI
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.optimizers import WholeModelOptimizer
from pyrovae.vae import VAE


class Engine:
    """One engine: "svi" draws a batch and hands it over, the others are given its indices."""

    def __init__(self, name: str, start: VAE, split: Split, batch: int, precision: str = "fp32"):
        if name == "cuda-graph" and cases.device().type != "cuda":
            raise MissingError("not measured: it needs a GPU")
        self.vae = copy.deepcopy(start).to(cases.device())
        self.split = split.to(cases.device())
        self.batches = cases.Batches(self.split.raw, batch)
        self.batch = batch
        self.optimizer = WholeModelOptimizer(self.vae.named_parameters())
        self.generator = torch.Generator(cases.device()).manual_seed(0)
        arguments = self.vae.model, self.vae.guide, self.optimizer, objectives.elbo()
        self.svi = self.compiled = None
        if name == "svi":
            self.svi = SVI(*arguments)
            return
        self.compiled = CompiledSVI(
            *arguments, module=self.vae, split=self.split, mode=name, precision=precision
        )
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            try:
                self.compiled.prepare(self.batches.index())
            except InputError as error:
                raise MissingError(f"cannot run here: {error}") from None

    def run(self, steps: int) -> float:
        """Take so many steps; what the losses sum to is read once, if the engine lets us."""
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            run = self._by_svi if self.compiled is None else self._compiled
            return run(steps) / (steps * self.batch)

    def _by_svi(self, steps: int) -> float:
        assert self.svi is not None
        total: Any = 0.0
        for _ in range(steps):
            self.optimizer.begin(cases.LR, images=self.batch)
            total = total + self.svi.step(self.split.batch(self.batches.index(), self.generator))
        return float(total)

    def _compiled(self, steps: int) -> float:
        assert self.compiled is not None
        self.compiled.total.zero_()  # the step sums its losses itself
        for _ in range(steps):
            self.optimizer.begin(cases.LR, images=self.batch)
            self.compiled.queue(self.batches.index())
        self.compiled.check()
        return float(self.compiled.total)
