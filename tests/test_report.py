"""The report: a page that parses, loads nothing, describes its pictures, and tells the truth."""

import dataclasses
import json
import math
import re
from html import escape
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch

from pyrovae import cli
from pyrovae import config as cfg
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.page import number, paragraph, plural, shrunk
from pyrovae.report import SECTIONS, train_flags, write_report
from pyrovae.runs import Run

K = 30
ALL = [
    "training",
    "curves",
    "likelihood",
    "samples",
    "reconstructions",
    "extremes",
    "latents",
    "plane",
    "interpolations",
    "traversals",
    "reproduce",
    "words",
]
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Every element of a document with its attributes, and the text of the whole and of some."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.text, self.parts = [], [], "", {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        for _, ident in self.open:
            if ident:
                self.parts[ident] = self.parts.get(ident, "") + data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def images(kind, n=40, seed=0):
    """Eight-bit images with labels (grey), without (colour), vectors, or large noise."""
    rng = np.random.default_rng(seed)
    shape = {"grey": (6, 6), "colour": (6, 6, 3), "vector": (5,), "large": (96, 96, 3)}[kind]
    arrays = {"images": rng.integers(0, 256, (n, *shape)).astype(np.uint8)}
    if kind == "grey":
        arrays["labels"] = np.arange(n) % 3
    return arrays


# Name of the run -> what it is trained on, and with.
RUNS = {
    "grey": ("grey", ["--latent-dim", "3"]),
    "<script>alert(1)<b>": ("colour", ["--latent-dim", "2", "--likelihood", "gaussian"]),
    "vector": ("vector", ["--latent-dim", "1", "--likelihood", "gaussian"]),
    "flow": ("grey", ["--posterior", "flow", "--prior", "vamp", "--prior-args", "components=3"]),
    "large": ("large", ["--likelihood", "gaussian", "--epochs", "1"]),
}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A function from a name to its trained run and the report of it."""
    made = {}

    def make(name):
        if name not in made:
            kind, flags = RUNS[name]
            folder = tmp_path_factory.mktemp("runs")
            np.savez(folder / "data.npz", **images(kind))
            run = Run(folder / name)
            common = [
                "train",
                "--quiet",
                "--hidden",
                "8",
                "--latent-dim",
                "4",
                "--epochs",
                "2",
                "--final-particles",
                "0",
            ]
            where = ["--data", str(folder / "data.npz"), "--out", str(run.path)]
            assert cli.main([*common, *where, *flags]) == 0
            path = write_report(run, num_particles=K)
            assert path == run.path / "report.html"
            made[name] = run, path.read_text(encoding="utf-8")
        return made[name]

    return make


@pytest.fixture(scope="module", params=RUNS)
def report(request, make_run):
    run, source = make_run(request.param)
    return run, source, Page(source)


def test_it_is_whole_and_named(report):
    run, source, page = report
    assert source.startswith("<!DOCTYPE html>")
    assert [a["id"] for a in page.all("section")] == ALL
    assert len(SECTIONS) == len(ALL)
    (html,) = page.all("html")
    assert html["lang"] == "en"
    for landmark in ("main", "nav", "header", "footer", "h1", "title"):
        assert len(page.all(landmark)) == 1
    assert len(page.all("h2")) == len(ALL)
    assert f"<h1>Report of {escape(run.path.name)}</h1>" in source
    assert len(source.encode()) < 5e6


def test_it_loads_nothing(report):
    _, source, page = report
    for tag, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert re.findall(r"https?:", source) == []
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    (script,) = page.all("script")  # data, which no browser runs
    assert script["type"] == "application/json"
    policy = next(a for a in page.all("meta") if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")


def test_everybody_can_read_it(report):
    _, _, page = report
    for image in page.all("img"):
        assert len(image["alt"]) > 10
        assert int(image["width"]) > 0 and int(image["height"]) > 0
    for svg in page.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"]) > 20
    for tag, attrs in page.elements:
        if tag == "th":
            assert attrs["scope"] == "col"


def test_every_reference_leads_somewhere(report):
    _, source, page = report
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")}
    wanted |= {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", source))
    assert wanted <= set(ids)
    links = {a["href"] for a in page.all("a")}
    assert {f"#{name}" for name in ALL} <= links


def test_its_colours_are_those_of_the_page(report):
    _, source, page = report
    defined = set(re.findall(r"(--[a-z0-9]+):", source.split("</style>")[0]))
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", source))
    assert used <= defined
    drawn = [attrs.get("style", "") for _, attrs in page.elements]
    assert not any(re.search(r"#[0-9a-f]{6}|font-family", style) for style in drawn)


def test_its_numbers_are_those_of_the_evaluation(report):
    run, _, page = report
    vae = cfg.load(run)
    test = cfg.load_data(cfg.run_config(run)).test
    result = evaluate(vae, test, K)
    stored = json.loads(page.parts["evaluation"])
    expected = json.loads(json.dumps(result.to_dict()))
    del expected["seconds"]
    assert stored == expected
    text = page.parts["likelihood"]
    for value, digits, error in (
        (result.log_likelihood, 3, result.log_likelihood_se),
        (result.elbo, 3, result.elbo_se),
        (result.rate, 3, None),
        (result.distortion, 3, None),
        (result.bits_per_dim, 4, None),
        *((bound, 3, None) for _, bound, _ in result.curve),
    ):
        assert number(value, digits, error) in text
    assert number(result.log_likelihood, 2, result.log_likelihood_se) in page.parts["main"]
    assert f"{result.active_units} of {vae.latent_dim} are active" in page.parts["latents"]
    scores = result.per_image.log_likelihood.sort().values
    shown = page.parts["extremes"]
    for value in (scores[0], scores[1], scores[-1], scores[-2]):
        assert number(float(value)) in shown
    assert shown.index(number(float(scores[-1]))) < shown.index(number(float(scores[0])))
    last = run.read_metrics()[-1]
    for name in ("valid_elbo", "valid_rate", "valid_distortion"):
        assert number(last[name]) in page.parts["curves"]
    assert str(test.protocol) in page.parts["training"]


def test_pictures_or_the_reason_why_not(report):
    run, _, page = report
    drawn = run.path.name != "vector"
    for name in ("samples", "reconstructions", "interpolations", "traversals"):
        assert ("5 numbers, which are no picture" in page.parts[name]) is not drawn
    # two sheets, two pairs of rows at most, both ends of the scale, walks, strips
    assert len(page.all("img")) >= 10 if drawn else page.all("img") == []
    if "script" in run.path.name:
        assert "every place of this plane" in page.parts["plane"]
    if run.path.name == "flow":
        assert "cannot be told by dimension" in page.parts["latents"]


def test_the_same_report_twice_and_nothing_else_moved(make_run, tmp_path):
    run, source = make_run("grey")
    before, state = dict(matplotlib.rcParams), torch.get_rng_state()
    files = sorted(p.name for p in run.path.iterdir())
    calls = []
    again = write_report(
        run.path, tmp_path / "a.html", num_particles=K, progress=lambda *a: calls.append(a)
    )
    assert again.read_text(encoding="utf-8") == source
    assert calls[-1] == (4, 4)
    assert dict(matplotlib.rcParams) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(p.name for p in run.path.iterdir()) == files
    other = write_report(run, tmp_path / "b.html", num_particles=K, seed=1)
    assert other.read_text(encoding="utf-8") != source


@pytest.mark.parametrize(("particles", "count"), [(1, 4), (3, 4), (K, 1), (1, 1)])
def test_few_draws_and_few_images(make_run, tmp_path, particles, count):
    run, _ = make_run("flow")
    path = write_report(run, tmp_path / "a.html", num_particles=particles, num_images=count)
    page = Page(path.read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("section")] == ALL
    assert not re.search(r"\bnan\b|\binf\b", page.text)
    if particles < 25:
        assert "25 draws" in page.parts["likelihood"]
    assert ("--limit 1" in page.parts["reproduce"]) is (count == 1)


def test_a_run_without_metrics(make_run, tmp_path):
    run, _ = make_run("grey")
    metrics = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").unlink()
    try:
        path = write_report(run, tmp_path / "a.html", num_particles=2)
        assert "no curves to show" in Page(path.read_text(encoding="utf-8")).parts["curves"]
    finally:
        (run.path / "metrics.jsonl").write_bytes(metrics)


CONFIGS = {
    "defaults": {},
    "options": {
        "data": "my images.npz",
        "likelihood": "gaussian",
        "likelihood_args": {"scale": "learned"},
        "prior": "mixture",
        "prior_args": {"components": 7},
        "posterior": "flow",
        "posterior_args": {"hidden": [32, 16], "transforms": 2},
        "hidden": (64, 32),
        "lr": 3e-5,
        "clip_norm": 1.5,
        "download": True,
        "seed": 3,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_its_command_gives_the_same_configuration(name):
    import shlex

    config = cfg.resolve(cfg.make(cfg.TrainConfig, CONFIGS[name]))
    argv = shlex.split(f"train {train_flags(config)} --out x")
    again = cfg.make(cfg.TrainConfig, cli.settings(cli.parse(argv), cfg.TrainConfig))
    mine, theirs = (
        json.loads(json.dumps(dataclasses.asdict(c))) for c in (config, cfg.resolve(again))
    )
    assert mine == theirs


def test_pieces_of_text():
    assert paragraph("<b> & --num-particles 5, x--y") == (
        "<p>&lt;b&gt; &amp; <code>--num-particles</code> 5, x--y</p>"
    )
    assert number(-1234.567, 1, 0.25) == "\N{MINUS SIGN}1,234.6\xa0±\xa00.2"
    assert number(None) == number(math.nan) == "–"
    assert number(2.0, 0, math.nan) == "2"
    assert (plural(1, "draw"), plural(2000, "draw")) == ("1 draw", "2,000 draws")


def test_large_images_are_averaged_down():
    x = torch.rand(2, 3, 256, 192)
    small = shrunk(x)
    assert small[0].numel() <= 3 * 64 * 64
    assert small.shape[2] / small.shape[3] == pytest.approx(256 / 192, rel=0.02)
    torch.testing.assert_close(small.mean((2, 3)), x.mean((2, 3)), rtol=0.02, atol=0.0)
    assert shrunk(x[..., :64, :64]) is not None and shrunk(x[..., :64, :64]).shape[2:] == (64, 64)


MISTAKES = {
    "no run": (lambda run, to: (to, to / "a.html"), {}, "config.json"),
    "folder": (lambda run, to: (run, to / "none" / "a.html"), {}, "folder must exist"),
    "ending": (lambda run, to: (run, to / "a.pdf"), {}, "ending in .html"),
    "K": (lambda run, to: (run, to / "a.html"), {"num_particles": 0}, "num_particles"),
    "images": (lambda run, to: (run, to / "a.html"), {"num_images": 0}, "at least 1 image"),
    "device": (lambda run, to: (run, to / "a.html"), {"device": "abacus"}, "abacus"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(name, make_run, tmp_path):
    where, options, remedy = MISTAKES[name]
    run, out = where(make_run("grey")[0], tmp_path)
    with pytest.raises(InputError) as caught:
        write_report(run, out, **options)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [("metrics.jsonl", '{"epoch": 1}\n'), ("environment.json", '{"pyrovae": "0"}')],
)
def test_damaged_records_are_named(file, line, make_run, tmp_path):
    run, _ = make_run("grey")
    whole = (run.path / file).read_bytes()
    (run.path / file).write_text(line)
    try:
        with pytest.raises(InputError, match=re.escape(file)):
            write_report(run, tmp_path / "a.html", num_particles=2)
    finally:
        (run.path / file).write_bytes(whole)


def test_other_data_are_refused(make_run, tmp_path):
    run, _ = make_run("vector")
    path = cfg.run_config(run).data
    with np.load(path) as stored:
        whole = dict(stored)
    np.savez(path, **images("vector", seed=1))
    try:
        with pytest.raises(InputError, match="was trained on: they saw different images"):
            write_report(run, tmp_path / "a.html", num_particles=2)
    finally:
        np.savez(path, **whole)
