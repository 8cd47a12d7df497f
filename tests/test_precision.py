"""Products and convolutions are in the precision that was asked for, whatever torch was told."""

import contextlib

import pytest
import torch
from tiny import tiny_vae, traced_svi

from pyrovae.evaluation import evaluate
from pyrovae.optimizers import WholeModelOptimizer
from pyrovae.precision import networks_in, stands

pytestmark = pytest.mark.usefixtures("soon_started")

SWITCHES = {
    "all": torch.backends,
    "all of CUDA": torch.backends.cudnn,
    "all of oneDNN": torch.backends.mkldnn,
    "matmul": torch.backends.cuda.matmul,
    "matmul by oneDNN": torch.backends.mkldnn.matmul,
    "conv": torch.backends.cudnn.conv,
    "conv by oneDNN": torch.backends.mkldnn.conv,
    "rnn": torch.backends.cudnn.rnn,
}


@pytest.fixture
def switches():
    """Torch's newer switches of precision, put back as the older ones would have them."""
    for switch in SWITCHES.values():  # as of a process that has turned none
        switch.fp32_precision = "none"
    yield SWITCHES
    for switch in SWITCHES.values():
        switch.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def told(switches):
    """What each says; and the older ones, where they are not refused."""
    said = {name: switch.fp32_precision for name, switch in switches.items()}
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        with contextlib.suppress(RuntimeError):
            said[len(said)] = read()
    return said


@pytest.mark.parametrize("which", SWITCHES)
@pytest.mark.parametrize("value", ["tf32", "bf16", "ieee"])
def test_whichever_switch_was_turned_products_are_as_they_are_said_to_be(switches, which, value):
    """Torch has two sets of them, and refuses to read one where the other has been written."""
    if value == "bf16" and "oneDNN" not in which and which != "all":  # nor for all of CUDA
        pytest.skip("torch knows it for a CPU alone")
    switches[which].fp32_precision = value
    before = told(switches)
    vae, data = tiny_vae()
    svi = traced_svi(vae, WholeModelOptimizer(vae.named_parameters()), split=data.train)
    seen = []
    vae.decoder.register_forward_hook(lambda *_: seen.append(told(switches)))
    step = svi.prepare(torch.arange(4))
    call = step._call
    step._call = lambda *args: seen.append(told(switches)) or call(*args)
    svi.step(torch.arange(4))
    taken = seen.pop()  # on a CPU, where the switches of a GPU are not asked
    assert {taken[name] for name in switches if "by oneDNN" in name} <= {"ieee", "none"}
    traced = len(seen)
    evaluate(vae, data.test, 2, information_images=0)
    assert len(seen) > traced > 0
    for said in seen:
        assert {said[name] for name in switches if not name.startswith("all")} == {"ieee"}
    for name, was in told(switches).items():
        assert was == before.get(name, was), name
    with networks_in(None, "tf32"):
        said = told(switches)
        assert said["matmul"] == said["conv"] == said["rnn"] == "tf32"
        assert said["conv by oneDNN"] == "ieee"
    assert switches[which].fp32_precision == value


@pytest.mark.parametrize("library", ["all of CUDA", "all of oneDNN"])
def test_switches_of_three_levels_are_put_back(switches, library):
    """Of all, of one library's, and of one operation of it."""
    operations = [n for n in switches if not n.startswith("all")]
    for single in operations:
        for values in (
            ("ieee", "tf32", "ieee"),
            ("tf32", "ieee", "tf32"),
            ("tf32", "tf32", "ieee"),
        ):
            for switch in switches.values():
                switch.fp32_precision = "none"
            for name, value in zip(("all", library, single), values, strict=True):
                switches[name].fp32_precision = value
            before = told(switches)
            with networks_in(None, "fp32"):
                said = told(switches)
                assert {said[name] for name in operations} == {"ieee"}
            after = told(switches)
            assert {n: after.get(n) for n in before} == before, (single, values)


def test_a_switch_for_all_of_torch_still_is_one_afterwards(switches):
    for value in ("tf32", "ieee"):
        switches["all"].fp32_precision = value
        with networks_in(None, "fp32"):
            pass
        assert {switch.fp32_precision for switch in switches.values()} == {value}


@pytest.mark.parametrize("which", ["matmul by oneDNN", "conv by oneDNN"])
def test_a_recorded_step_asks_the_newer_switches_too(switches, which):
    assert stands("fp32", torch.device("cpu"))
    switches[which].fp32_precision = "bf16"
    assert not stands("fp32", torch.device("cpu"))
