"""Plots and pictures show the numbers they were given, and leave Matplotlib as they found it."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from exact import linear_gaussian
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm
from sklearn.decomposition import PCA
from tiny import tiny_vae

from pyrovae import charts, pictures, plots
from pyrovae.errors import InputError
from pyrovae.runs import Run

METRICS = [
    {
        "epoch": e,
        "train_loss": 50.0 - e,
        "valid_elbo": -52.0 + e - 0.8 * max(0, e - 4) ** 2,
        "valid_rate": 2.0 + e,
        "valid_distortion": 50.0 - 2 * e + 0.8 * max(0, e - 4) ** 2,
    }
    for e in range(1, 7)
]
CURVE = [(1, -99.0, 0.5), (10, -97.0, 0.4), (100, -96.5, math.nan)]


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def vae():
    """Two latents, 4x4 pixels."""
    return tiny_vae()[0]


@pytest.fixture
def x():
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round()


# Each function of pyrovae.plots that draws, called as a user would.
CHARTS = {
    "activity": lambda ax: plots.activity(torch.tensor([0.5, 0.001, 0.02]), ax=ax),
    "bound_against_k": lambda ax: plots.bound_against_k(CURVE, ax),
    "elbo_curves": lambda ax: plots.elbo_curves(METRICS, ax),
    "error_curves": lambda ax: plots.error_curves(METRICS, ax),
    "kl_per_dim": lambda ax: plots.kl_per_dim(torch.tensor([0.5, 0.1, 2.0]), ax),
    "latents": lambda ax: plots.latents(numbers(50, 5), torch.arange(50) % 12, ax),
    "pareto_k": lambda ax: plots.pareto_k(numbers(50), ax),
    "rate_curves": lambda ax: plots.rate_curves(METRICS, ax),
    "rate_distortion": lambda ax: plots.rate_distortion({"a": METRICS, "_b$": METRICS[:1]}, ax),
}
FIGURES = {
    "curves": lambda vae, x: plots.curves(METRICS),
    "interpolation": lambda vae, x: plots.interpolation(vae, x[:2], x[2:4]),
    "manifold": lambda vae, x: plots.manifold(vae, 5),
    "reconstructions": lambda vae, x: plots.reconstructions(x, vae.reconstruct(x, seed=0)),
    "samples": lambda vae, x: plots.samples(vae.generate(9, seed=0)),
    "traversal": lambda vae, x: plots.traversal(vae, x),
}
HELPERS = {"is_picture", "save", "sheet"}


def test_every_plot_is_in_the_tables():
    assert CHARTS.keys() | FIGURES.keys() | HELPERS == set(plots.__all__)


@pytest.mark.parametrize("name", CHARTS)
def test_charts_draw_where_they_are_told_and_are_saved(name, tmp_path):
    before = dict(matplotlib.rcParams)
    given = Figure().subplots()
    assert CHARTS[name](given) is given
    own = CHARTS[name](None)
    assert isinstance(own, Axes) and own.figure is not given.figure
    for ending in ("png", "svg", "pdf"):
        plots.save(own, tmp_path / f"{name}.{ending}", dpi=40)
        assert (tmp_path / f"{name}.{ending}").stat().st_size > 500
    pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
    assert pixels.std() > 5
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_return_a_figure(name, vae, x, tmp_path):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name](vae, x)
    assert isinstance(figure, Figure)
    plots.save(figure, tmp_path / "picture.png", dpi=40)
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 5
    assert dict(matplotlib.rcParams) == before


def test_curves_hold_the_metrics(tmp_path):
    run = Run(tmp_path / "run")
    for line in METRICS:
        run.append_metrics(line)
    for source in (METRICS, run, str(run.path), run.path):
        ax = plots.elbo_curves(source)
        objective, elbo, best = (line.get_xydata().tolist() for line in ax.lines)
        assert objective == [[m["epoch"], -m["train_loss"]] for m in METRICS]
        assert elbo == [[m["epoch"], m["valid_elbo"]] for m in METRICS]
        assert best == [[5, METRICS[4]["valid_elbo"]]]
    ax = plots.rate_curves(METRICS)
    twin = next(a for a in ax.figure.axes if a is not ax)
    assert ax.lines[0].get_ydata().tolist() == [m["valid_distortion"] for m in METRICS]
    assert twin.lines[0].get_ydata().tolist() == [m["valid_rate"] for m in METRICS]


def test_error_curves_are_positive_and_mark_the_least():
    metrics = [{"epoch": n, "train_loss": 9.0 / n, "valid_elbo": -v} for n, v in ((1, 8), (2, 5))]
    train, valid, best = (a.get_xydata().tolist() for a in plots.error_curves(metrics).lines)
    assert train == [[1, 9.0], [2, 4.5]]
    assert valid == [[1, 8.0], [2, 5.0]]
    assert best == [[2, 5.0]]


def test_rate_distortion_paths_and_lines_of_equal_elbo():
    ax = plots.rate_distortion({"one": METRICS, "_two$": METRICS[:2]})
    lines = [line.get_xydata() for line in ax.lines]
    assert lines[0].tolist() == [[m["valid_distortion"], m["valid_rate"]] for m in METRICS]
    assert lines[1].tolist() == [[METRICS[4]["valid_distortion"], METRICS[4]["valid_rate"]]]
    guides = [line for line in lines[4:] if len(line) == 2]
    assert guides
    for guide in guides:
        assert guide.sum(1) == pytest.approx(guide.sum(1)[0], abs=1e-9)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "_two$"]


def test_bound_and_its_error_bars():
    ax = plots.bound_against_k(CURVE)
    line, _, (bars,) = ax.containers[0]
    assert line.get_xydata().tolist() == [[k, bound] for k, bound, _ in CURVE]
    lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
    assert lengths == pytest.approx([1.0, 0.8, 0.0])
    assert "\N{MINUS SIGN}96.50" in [t.get_text() for t in ax.texts]


def test_pareto_k_is_counted_on_the_right_side_of_its_limit():
    k = torch.cat([numbers(400) * 0.6 + 0.5, torch.tensor([0.7, 0.7, math.nan, 40.0, -9.0])])
    ax = plots.pareto_k(k)
    known = k[~torch.isnan(k)]
    bars = ax.containers[0]
    assert sum(bar.get_height() for bar in bars) == len(known)
    doubtful = [bar for bar in bars if bar.get_hatch()]
    assert sum(bar.get_height() for bar in doubtful) == int((known > 0.7).sum())
    assert min(bar.get_x() for bar in doubtful) == pytest.approx(0.7)
    inside = known[(known > 0.2) & (known <= 0.3)]
    (bar,) = (bar for bar in bars if abs(bar.get_x() - 0.2) < 1e-9)
    assert bar.get_height() == len(inside)
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    assert ticks[0] == "≤ \N{MINUS SIGN}0.5" and ticks[-1] == "≥ 2"


def test_bars_are_sorted_and_coloured_by_activity():
    variance = torch.tensor([0.001, 0.8, 0.01, 0.009], dtype=torch.float64)
    bars = plots.activity(variance).containers[0]
    tops = [bar.get_y() + bar.get_height() for bar in bars]
    assert tops == pytest.approx([0.8, 0.01, 0.009, 0.001])
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars]
    assert colours == [charts.BLUE, charts.BLUE, charts.GREY, charts.GREY]
    ax = plots.kl_per_dim(torch.tensor([0.5, 0.1, 2.0]))
    assert [bar.get_height() for bar in ax.containers[0]] == pytest.approx([2.0, 0.5, 0.1])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["z2", "z0", "z1"]


def test_plane_is_the_principal_components():
    means = numbers(60, 5) * torch.tensor([3.0, 1.0, 0.3, 2.0, 0.1])
    points, first, _ = charts.plane(means)
    truth = PCA(2).fit(means.numpy())
    expected = truth.transform(means.numpy())
    for mine, theirs in zip(points.T.numpy(), expected.T, strict=True):
        sign = np.sign(mine @ theirs)
        assert mine == pytest.approx(sign * theirs, rel=1e-9, abs=1e-9)
    assert first == f"component 1 ({truth.explained_variance_ratio_[0]:.0%} of the variance)"
    assert torch.equal(charts.plane(means[:, :2])[0], means[:, :2])
    assert torch.equal(charts.plane(means[:, :1])[0][:, 0], means[:, 0])
    assert charts.plane(means[:1])[0].tolist() == [[0.0, 0.0]]


def test_latents_are_drawn_by_label():
    means, labels = numbers(40, 2), torch.arange(40) % 3
    ax = plots.latents(means, labels, most=30)
    for label, line in enumerate(ax.lines):
        assert np.array_equal(line.get_xydata(), means[:30][labels[:30] == label].numpy())
    assert [t.get_text() for t in ax.texts] == ["0", "1", "2"]
    assert len({line.get_color() for line in ax.lines}) == 3
    assert len(plots.latents(means).lines) == 1


def test_labels_do_not_hide_each_other():
    means, labels = numbers(400, 2), torch.arange(400) % 8
    ax = plots.latents(means, labels)
    places = np.array([t.xy for t in ax.texts])
    middles = torch.stack([means[labels == k].median(0).values for k in range(8)]).numpy()
    assert np.array_equal(places[:, 0], middles[:, 0])
    size = 0.06 * np.ptp(means.numpy(), axis=0)
    distance = np.abs(places[:, None] - places[None])
    hidden = (distance < size * (1 - 1e-6)).all(-1) & ~np.eye(8, dtype=bool)
    assert not hidden.any()
    before = np.abs(middles[:, None] - middles[None])
    assert ((before < size).all(-1) & ~np.eye(8, dtype=bool)).any()


def test_sheet_puts_every_image_in_its_place(x):
    page = plots.sheet(x, columns=4, gap=1)
    assert page.shape == (3, 11, 21)
    assert torch.equal(page[:, 6:10, 6:10], x[5].expand(3, 4, 4))
    assert (page[:, :, 0] == 1).all() and (page[:, 6:10, 11:15] == 1).all()


def test_png_is_transparent_between_images(x, tmp_path):
    (tmp_path / "a.png").write_bytes(pictures.png(x, columns=3, gap=1))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (11, 16, 2)  # grey and opacity
    assert (pixels[0, :, 1] == 0).all() and (pixels[1:5, 1:5, 1] == 255).all()
    assert np.array_equal(pixels[1:5, 6:10, 0], (x[1, 0] * 255).numpy())


def test_interpolation_is_the_straight_line():
    vae = linear_gaussian()
    a, b = numbers(4, 6), numbers(4, 6, seed=1)
    walk = vae.interpolate(a, b, steps=5)
    assert walk.shape == (4, 5, 6)
    # An affine encoder and decoder: a straight line in z is one in x.
    start, end = (vae.decode(vae.encode(v)) for v in (a, b))
    for step, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(walk[:, step], start + t * (end - start), rtol=1e-10, atol=1e-10)


def test_traversal_moves_one_dimension_through_the_prior():
    vae = linear_gaussian()
    x = numbers(50, 6)
    W, bias = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    walk = pictures.traverse(vae, x, dims=[2, 0], steps=5, span=2.0)
    for row, d in enumerate([2, 0]):
        z = vae.encode(x)[0].expand(5, 3).clone()
        z[:, d] = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
        torch.testing.assert_close(walk.x[row], z @ W.T + bias, rtol=1e-10, atol=1e-10)
        assert walk.values[row].tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    order = vae.encode(x).var(0).argsort(descending=True).tolist()
    assert pictures.traverse(vae, x).dims == order


def test_manifold_is_even_in_prior_probability():
    vae = linear_gaussian(latent_dim=2)
    W, bias = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    line = norm.ppf((np.arange(4) + 0.5) / 4)
    z = torch.tensor([[right, up] for up in line[::-1] for right in line])
    torch.testing.assert_close(pictures.manifold(vae, 4), z @ W.T + bias, rtol=1e-10, atol=1e-10)


def test_moments_of_a_prior_without_formula():
    vae, _ = tiny_vae(prior="flow", objective="elbo")
    state = torch.get_rng_state()
    mean, scale = pictures.prior_moments(vae)
    assert torch.equal(torch.get_rng_state(), state)
    z = vae.prior().sample((20000,))
    error = scale / math.sqrt(4096)
    assert ((mean - z.mean(0)).abs() < 6 * error).all()
    assert ((scale / z.std(0)).log().abs() < 0.1).all()


def test_animation_runs_there_and_back(tmp_path):
    brightness = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1)
    frames = brightness.expand(2, 5, 1, 4, 4)
    pictures.save_animation(frames, tmp_path / "walk.gif")
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.n_frames == 8
        assert gif.info["loop"] == 0
        middles = []
        for frame in range(8):
            gif.seek(frame)
            middles.append(gif.convert("L").getpixel((40, 40)))
    assert middles == pytest.approx([0, 64, 128, 191, 255, 191, 128, 64], abs=2)


MISTAKES = {
    "no metrics": (lambda v: plots.curves([]), "train for at least one epoch"),
    "no runs": (lambda v: plots.rate_distortion([]), "at least one"),
    "no bound": (lambda v: plots.bound_against_k([]), "--num-particles"),
    "no k": (lambda v: plots.pareto_k(torch.full((3,), math.nan)), "25 or more"),
    "no picture": (lambda v: plots.samples(torch.zeros(3, 5)), "got (3, 5)"),
    "one step": (lambda v: plots.interpolation(v, *torch.zeros(2, 1, 1, 4, 4), 1), "--steps"),
    "pairs": (
        lambda v: plots.interpolation(v, torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 4)),
        "two images",
    ),
    "dimension": (lambda v: pictures.traverse(v, torch.zeros(1, 1, 4, 4), [2]), "from 0 to 1"),
    "plane": (lambda v: plots.manifold(linear_gaussian()), "--latent-dim 2"),
    "gif": (lambda v: pictures.save_animation(torch.zeros(1, 2, 1, 4, 4), "a.png"), ".gif"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, vae):
    call, remedy = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        call(vae)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
