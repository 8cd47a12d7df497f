"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import pyrovae

MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyrovae.__path__, "pyrovae.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_the_vae_has_examples() -> None:
    vae = importlib.import_module("pyrovae.vae")
    found = {test.name for test in doctest.DocTestFinder().find(vae.VAE) if test.examples}
    assert found >= {f"VAE.{name}" for name in ("generate", "encode", "reconstruct", "interpolate")}
