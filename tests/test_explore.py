"""The explorer: its JavaScript gives what torch gives, and its page does what it says."""

import base64
import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from explorer import content_of, floats, vae_and_split
from torch import Tensor, nn

from pyrovae import config as cfg
from pyrovae import explore, likelihoods, networks, posteriors, priors
from pyrovae import runs as runs_
from pyrovae.data import from_array
from pyrovae.errors import InputError
from pyrovae.explore import explorer_page, write_explorer
from pyrovae.explore_specs import decoder_spec, likelihood_spec
from pyrovae.vae import VAE

HERE = Path(__file__).parent
SCRIPTS = [Path(explore.__file__).parent / name for name in explore.SCRIPTS]
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js, which is not installed")


def node(cases: list[dict[str, Any]]) -> list[Tensor]:
    """What the page's scripts give for each case; see explore_node.mjs."""
    assert NODE is not None
    command = [NODE, HERE / "explore_node.mjs", *SCRIPTS[:2]]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.tensor(values, dtype=torch.float64) for values in json.loads(done.stdout)]


def encoded(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


# --- decoders ------------------------------------------------------------------------------------


class Net(NamedTuple):
    name: str
    out_shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012


NETS = [
    *(Net("mlp", (1, 1, 3, 4), {"activation": name}) for name in networks.ACTIVATIONS),
    Net("mlp", (1, 1, 28, 28), {"hidden": (200, 200)}),
    Net("mlp", (2, 1, 3, 4), {"hidden": ()}),
    Net("gated-mlp", (2, 3, 4, 4), {"hidden": (11, 7)}),
    Net("conv28", (1, 1, 28, 28)),
    Net("conv28", (2, 3, 28, 28), {"hidden": (4, 6, 8), "activation": "gelu"}),
    Net("conv64", (1, 3, 64, 64), {"hidden": (4, 6, 8, 10)}),
    Net("residual", (1, 1, 28, 28), {"hidden": (4, 6)}),
    Net("gated-conv", (2, 3, 8, 12), {"hidden": (4, 6)}),
    Net("residual", (30, 12, 20), {"hidden": (4, 6, 8), "activation": "leaky-relu"}),
]


def random_decoder(net: Net) -> networks.Decoder:
    torch.manual_seed(0)
    decoder = networks.REGISTRY[net.name].decoder(5, net.out_shape, **net.options)
    with torch.no_grad():
        for p in decoder.parameters():  # biases start at zero, which would hide a lost one
            p += 0.1 * torch.randn_like(p)
    return decoder


def test_every_network_has_a_row() -> None:
    assert {net.name for net in NETS} == set(networks.REGISTRY)


@needs_node
def test_decoders_give_what_torch_gives() -> None:
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = z.float().double()
    decoders = [random_decoder(net) for net in NETS]
    specs = [decoder_spec(decoder) for decoder in decoders]
    cases = [{"layers": s, "weights": encoded(w), "z": z.tolist()} for s, w in specs]
    with torch.no_grad():
        for decoder, got in zip(decoders, node(cases), strict=True):
            single = decoder(z.float()).flatten(1).double()
            assert (got - single).abs().max() <= 1e-5 * max(1, single.abs().max())
            # In float64 nothing is left but the table of erf.
            torch.testing.assert_close(got, decoder.double()(z).flatten(1), rtol=0, atol=2e-8)


# --- likelihoods ---------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    options: dict[str, Any] = {}  # noqa: RUF012
    spread: float = 2.0  # of the params for which the mean is compared


X_SHAPE = (3, 4, 5)
LIKELIHOODS = [
    Row("bernoulli", {}, 20.0),
    Row("continuous-bernoulli"),
    Row("continuous-bernoulli", {}, 0.05),
    Row("continuous-bernoulli", {}, 400.0),
    Row("gaussian"),
    Row("gaussian", {"scale": "per-pixel"}),
    Row("gaussian", {"scale": 0.2}),
    Row("laplace", {"scale": "per-pixel"}),
    Row("student-t", {"df": 3.0, "scale": 0.3}),
    Row("student-t", {"scale": "per-pixel"}),
    Row("beta"),
    Row("beta", {}, 8.0),
    Row("logit-normal"),
    Row("logit-normal", {}, 20.0),
    Row("logit-normal", {"scale": 0.8}),
    Row("discretized-logistic", {"levels": 7}),
    Row("discretized-logistic", {"levels": 255}, 6.0),
    Row("discretized-logistic", {"levels": 1, "scale": 0.1}),
    Row("discretized-logistic", {"levels": 16, "scale": "learned"}),
    Row("discretized-logistic-mixture", {"levels": 7, "components": 3}),
    Row("discretized-logistic-mixture", {"levels": 255, "components": 2}, 6.0),
    Row("discretized-logistic-mixture", {"levels": 15, "components": 3, "coupling": True}),
    Row("categorical", {"levels": 4}),
    Row("categorical", {"levels": 255}, 5.0),
]
ROW = pytest.mark.parametrize("row", LIKELIHOODS, ids=lambda r: f"{r.name}-{r.options}-{r.spread}")


def random_likelihood(row: Row, x_shape: tuple[int, ...]) -> likelihoods.Likelihood:
    torch.manual_seed(0)
    likelihood = likelihoods.REGISTRY[row.name](x_shape, **row.options)
    with torch.no_grad():
        for p in likelihood.parameters():  # a learned scale starts at zero, which would hide it
            p += 0.7
    return likelihood.double()


def test_every_likelihood_has_a_row() -> None:
    assert {row.name for row in LIKELIHOODS} == set(likelihoods.REGISTRY)


@needs_node
def test_means_are_those_of_torch() -> None:
    chosen = [random_likelihood(row, X_SHAPE) for row in LIKELIHOODS]
    params = [
        row.spread * torch.randn(p.params_shape, dtype=torch.float64)
        for row, p in zip(LIKELIHOODS, chosen, strict=True)
    ]
    cases = [
        {"likelihood": likelihood_spec(p), "params": raw.flatten().tolist()}
        for p, raw in zip(chosen, params, strict=True)
    ]
    for row, likelihood, raw, got in zip(LIKELIHOODS, chosen, params, node(cases), strict=True):
        with torch.no_grad():
            mean = likelihood(raw).mean.flatten()
        # A logit-normal and a wide logistic are means by quadrature; all else is a closed form.
        assert (got - mean).abs().max() < 2e-7, row


@needs_node
def test_draws_follow_the_distribution_of_torch() -> None:
    """Draws of an element against integrals of its density, or sums over its levels.

    The square of a Student t may have no variance, so bounded functions of x are compared: of
    each, the mean within five of its own standard errors. About 1e-6 of such tests fail by chance.
    """
    count, width = 250, 80
    rows = [row for row in LIKELIHOODS if not row.options.get("coupling")] * 2
    chosen = [random_likelihood(row, (width,)) for row in rows]
    offset = torch.linspace(-0.8, 0.7, 300, dtype=torch.float64)
    signs = [1.0] * (len(rows) // 2) + [-1.0] * (len(rows) // 2)
    params = [
        sign * offset[: math.prod(p.params_shape[:-1])].unsqueeze(-1)
        for p, sign in zip(chosen, signs, strict=True)
    ]
    cases = [
        {
            "likelihood": likelihood_spec(p),
            "params": raw.expand(-1, width).flatten().tolist(),
            "draws": count,
        }
        for p, raw in zip(chosen, params, strict=True)
    ]
    functions = (torch.tanh, lambda x: (2 * x).cos(), lambda x: (5 * x).sin())
    for row, likelihood, raw, drawn in zip(rows, chosen, params, node(cases), strict=True):
        drawn = drawn.flatten()
        # One element of the distribution, evaluated along a line of values.
        element = random_likelihood(row, (1,))
        if likelihood.levels:
            x = torch.arange(likelihood.levels + 1, dtype=torch.float64) / likelihood.levels
            weight = torch.ones_like(x)
        else:
            unit = isinstance(likelihood, likelihoods.ContinuousBernoulli)
            inside = unit or isinstance(likelihood, likelihoods._OpenInterval)
            # A line through all of R, closer where the mass is: x = loc + sinh(t).
            t = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
            x = torch.sigmoid(3 * t) if inside else 0.5 + t.sinh()
            slope = 3 * x * (1 - x) if inside else t.cosh()
            weight = slope * (t[1] - t[0])
        with torch.no_grad():
            mass = weight * element(raw.expand(-1, 1)).log_prob(x.unsqueeze(-1)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-5), row
        for function in functions:
            expected = (mass * function(x)).sum()
            values = function(drawn)
            error = values.std() / math.sqrt(values.numel())
            assert (values.mean() - expected).abs() < 5 * error + 1e-5, row


@needs_node
def test_draws_of_coupled_channels_move_together() -> None:
    row = Row("discretized-logistic-mixture", {"levels": 31, "components": 2, "coupling": True})
    likelihood = random_likelihood(row, (3, 8, 8))
    raw = torch.linspace(-1, 1.5, likelihood.num_params, dtype=torch.float64)
    params = raw[:, None, None].expand(likelihood.params_shape)
    case = {"likelihood": likelihood_spec(likelihood), "params": params.flatten().tolist()}
    (drawn,) = node([{**case, "draws": 300}])
    with torch.no_grad():
        theirs = likelihood(params).sample(torch.Size([300]))

    def products(x: Tensor) -> tuple[Tensor, Tensor]:
        red, green, blue = x.reshape(300, 3, 64).movedim(1, 0).flatten(1)
        all_products = torch.stack(
            [red, green, blue, red * green, red * blue, green * blue, red**2]
        )
        return all_products.mean(1), all_products.var(1) / all_products.shape[1]

    (ours, our_variance), (truth, their_variance) = products(drawn), products(theirs)
    assert ((ours - truth).abs() < 5 * (our_variance + their_variance).sqrt()).all()
    # They are coupled at all: independent channels would have no covariance.
    assert (ours[3] - ours[0] * ours[1]).abs() > 10 * our_variance[3].sqrt()


@needs_node
def test_a_draw_keeps_its_noise_while_z_moves() -> None:
    likelihood = random_likelihood(Row("gaussian", {"scale": 0.2}), X_SHAPE)
    spec = likelihood_spec(likelihood)
    first, second = node(
        [{"likelihood": spec, "params": [v] * 60, "draws": 2} for v in (0.0, 0.125)]
    )
    torch.testing.assert_close(second - first, torch.full_like(first, 0.125))
    assert (first[0] != first[1]).all()


# --- the page ------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_for_nothing() -> None:
    page = explorer_page(*vae_and_split(), title="run")
    for sign in ("://", " src=", "<link", "@import", "url(", "fetch(", "{{"):
        assert sign not in page, sign
    assert "default-src 'none'" in page
    assert all(path.read_text() in page for path in SCRIPTS)
    assert not any("</" in path.read_text() for path in SCRIPTS)


def test_names_cannot_end_the_element_that_holds_them() -> None:
    title = "</script><script>alert(1)</script>&\"'{{data}}<!--"
    page = explorer_page(*vae_and_split(), title=title, description=title)
    assert content_of(page)["title"] == content_of(page)["description"] == title
    plain = explorer_page(*vae_and_split(), title="run")
    assert page.count("<script") == plain.count("<script") == 2
    assert "<title>&lt;/script&gt;" in page and "alert(1)</script>" not in page


def test_the_page_holds_what_the_vae_says() -> None:
    vae, split = vae_and_split()
    content = content_of(explorer_page(vae, split, title="run", num_images=5))
    z = vae.encode(split.tensor())
    torch.testing.assert_close(floats(content["points"]["z"]).reshape(z.shape), z)
    assert split.labels is not None
    assert content["points"]["labels"] == split.labels.tolist()
    index = content["images"]["index"]
    assert len(set(split.labels[index].tolist())) == min(5, len(set(split.labels.tolist())))
    pixels = base64.b64decode(content["images"]["pixels"])
    assert list(pixels) == (255 * split.tensor()[index]).flatten().int().tolist()
    torch.testing.assert_close(floats(content["check"]), vae.decode(z[index[0]]).flatten())
    order, variance = content["latents"]["order"], content["latents"]["variance"]
    assert sorted(order, key=lambda d: -variance[d]) == order
    torch.testing.assert_close(torch.tensor(variance), z.var(0))

    mean, axes = (torch.tensor(content["plane"][name]) for name in ("mean", "axes"))
    torch.testing.assert_close(axes @ axes.T, torch.eye(2), atol=1e-5, rtol=0)
    scores = (z - mean) @ axes.T
    left = (z - mean).square().sum() - scores.square().sum()
    singular = torch.linalg.svdvals(z - mean)
    torch.testing.assert_close(left, singular[2:].square().sum(), atol=1e-5, rtol=1e-4)
    shares = (singular.square() / singular.square().sum())[:2]
    torch.testing.assert_close(torch.tensor(content["plane"]["explained"]), shares)


def test_the_page_is_the_same_every_time_and_moves_no_random_stream() -> None:
    vae, split = vae_and_split(prior="mixture")
    state = torch.get_rng_state()
    assert explorer_page(vae, split, title="a") == explorer_page(vae, split, title="a")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prior", priors.REGISTRY)
def test_a_learned_prior_leaves_draws_of_itself(prior: str) -> None:
    vae, split = vae_and_split(prior=prior)
    draws = content_of(explorer_page(vae, split, title="run", seed=3))["prior"]
    if prior == "standard-normal":
        assert draws is None
        return
    torch.manual_seed(3)
    expected = vae.prior().sample(torch.Size([200]))
    torch.testing.assert_close(floats(draws).reshape(expected.shape), expected)


def test_the_classic_network_makes_a_small_page() -> None:
    torch.manual_seed(0)
    likelihood = likelihoods.Bernoulli((1, 28, 28))
    vae = VAE(
        prior=priors.StandardNormal(50),
        posterior=posteriors.MeanField(networks.MLPEncoder((1, 28, 28)), 50),
        decoder=networks.MLPDecoder(50, likelihood.params_shape),
        likelihood=likelihood,
    )
    split = from_array((torch.rand(2000, 28, 28) > 0.5).float()).train
    assert 1_000_000 < len(explorer_page(vae, split, title="run")) < 2_000_000


class Foreign(likelihoods.Bernoulli):
    """A likelihood that the page has no JavaScript of."""


class Square(nn.Module):
    """A layer that the page has no JavaScript of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class OddDecoder(networks.Decoder):
    """A decoder with a layer of its own, or a known one with another setting."""

    summary = "odd"
    default_hidden = ()
    odd: nn.Module = Square()

    def _build(self) -> list[nn.Module]:
        return [nn.Linear(self.latent_dim, 16), self.odd]


class Leaky(OddDecoder):
    odd = nn.LeakyReLU(0.3)


class Dilated(OddDecoder):
    odd = nn.Conv2d(1, 1, 3, padding=2, dilation=2)

    def _build(self) -> list[nn.Module]:
        return [nn.Linear(self.latent_dim, 16), nn.Unflatten(1, (1, 4, 4)), self.odd]


@pytest.mark.parametrize(
    ("decoder", "likelihood", "message"),
    [
        (OddDecoder, likelihoods.Bernoulli, r"cannot run the decoder's layer Square\(\)"),
        (Leaky, likelihoods.Bernoulli, r"layer LeakyReLU\(negative_slope=0.3\)"),
        (Dilated, likelihoods.Bernoulli, r"layer Conv2d\(.*dilation"),
        (lambda d, shape: nn.Sequential(nn.Linear(d, 16), nn.Unflatten(-1, shape)),
         likelihoods.Bernoulli, "got Sequential. Subclass networks.Decoder"),
        (networks.MLPDecoder, Foreign, "got Foreign. Add it to explore_likelihoods.js"),
    ],
)  # fmt: skip
def test_what_the_page_cannot_run_is_refused(decoder: Any, likelihood: Any, message: str) -> None:
    chosen = likelihood((1, 4, 4))
    vae, split = vae_and_split()
    vae = VAE(
        prior=vae.prior,
        posterior=vae.posterior,
        decoder=decoder(3, chosen.params_shape),
        likelihood=chosen,
    )
    with pytest.raises(InputError, match=message):
        explorer_page(vae, split, title="run")


def test_convolutions_without_a_bias_and_nested_layers_are_understood() -> None:
    class Nested(OddDecoder):
        def _build(self) -> list[nn.Module]:
            inner = nn.Sequential(
                nn.Unflatten(1, (4, 2, 2)), nn.Flatten(), nn.Unflatten(1, (4, 2, 2))
            )
            up = nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False)
            return [nn.Linear(self.latent_dim, 16, bias=False), inner, up]

    torch.manual_seed(0)
    decoder = Nested(3, (1, 1, 4, 4))
    layers, weights = decoder_spec(decoder)
    assert [layer["kind"] for layer in layers] == ["linear", "convolution"]
    assert len(weights) == 3 * 16 + 16 + 4 * 16 + 1
    if NODE is not None:
        z = torch.randn(2, 3)
        (got,) = node([{"layers": layers, "weights": encoded(weights), "z": z.tolist()}])
        with torch.no_grad():
            torch.testing.assert_close(got.float(), decoder(z).flatten(1), rtol=0, atol=1e-6)


def test_x_that_are_no_pictures_are_refused() -> None:
    likelihood = likelihoods.Gaussian((5,))
    vae = VAE(
        prior=priors.StandardNormal(2),
        posterior=posteriors.MeanField(networks.MLPEncoder((5,), hidden=(8,)), 2),
        decoder=networks.MLPDecoder(2, likelihood.params_shape, hidden=(8,)),
        likelihood=likelihood,
    )
    split = from_array(torch.rand(20, 5)).test
    with pytest.raises(InputError, match=r"draws x of shape \(1 or 3, H, W\); this run has \(5,\)"):
        explorer_page(vae, split, title="run")


@pytest.mark.parametrize("count", [1, 201, 2.0, True])
def test_numbers_of_images_out_of_range_are_refused(count: Any) -> None:
    with pytest.raises(InputError, match="--num-images"):
        explorer_page(*vae_and_split(), title="run", num_images=count)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a & b <run>"
    config = cfg.resolve(cfg.make(cfg.TrainConfig, {"hidden": (16,), "latent_dim": 4}))
    data = cfg.load_data(config)
    written = runs_.Run(out)
    written.write_json("config.json", dataclasses.asdict(config))
    facts = {"x_shape": list(data.x_shape), "protocol": data.protocol.to_dict()}
    written.write_json("data.json", facts)
    runs_.save_checkpoint(written.best, {"model": cfg.build(config, data).state_dict()})
    return out


def test_a_run_is_written_as_a_page(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    written = write_explorer(run, progress=said.append)
    assert written == run / "explore.html" and said[0] == "encoding  300 test images"
    content = content_of(written.read_text())
    assert content["title"] == "a & b <run>"
    assert content["description"].startswith("bernoulli likelihood, mlp network, mean-field post")
    assert content["protocol"].startswith("digits, dynamic binarisation")
    assert len(content["images"]["index"]) == 24
    again = write_explorer(runs_.Run(run), tmp_path / "page.html")
    assert again.read_text() == written.read_text()


def test_a_page_says_how_large_it_is_and_why(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    page = write_explorer(run, tmp_path / "page.html", progress=said.append)
    told = re.fullmatch(r"size      ([\d.]+) MB: ([\d,]+) weights take ([\d.]+) of it", said[-1])
    assert told
    assert float(told[1]) == round(page.stat().st_size / 1e6, 1)
    weights = content_of(page.read_text())["weights"]
    assert told[2] == f"{len(floats(weights)):,}" == "1,168"
    assert float(told[3]) == round(len(weights) / 1e6, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.txt", "--out expects a file ending in .html"),
        ("nowhere/page.html", "its folder must exist; check --out"),
        ("folder.html", "cannot write"),
    ],
)
def test_a_bad_out_is_refused(run: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=message):
        write_explorer(run, tmp_path / name)


def test_a_directory_that_is_no_run_and_other_data_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        write_explorer(tmp_path / "nothing")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    facts = json.loads((other / "data.json").read_text())
    facts["protocol"]["fingerprint"] = "0" * 64
    (other / "data.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"the data are not those .*other was trained on"):
        write_explorer(other)
