"""The explorer in headless Chromium: opened, clicked, dragged, timed, and checked for access."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from explorer import content_of, floats, vae_and_split

from pyrovae import cli, likelihoods, networks, posteriors, priors
from pyrovae.data import from_array
from pyrovae.explore import explorer_page
from pyrovae.report import write_report
from pyrovae.vae import VAE

HERE = Path(__file__).parent
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NODE is None or CHROMIUM is None, reason="needs Node.js and Chromium, not both installed"
    ),
]


def browse(page: Path, steps: list[list[Any]]) -> list[Any]:
    """What each step gives; no error, and no request but for the page, may occur meanwhile."""
    command = [str(NODE), HERE / "browser.mjs", str(CHROMIUM), page]
    done = subprocess.run(
        command, input=json.dumps(steps), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    asked = [address for address in report["requests"] if not address.startswith("data:")]
    assert report["errors"] == [] and asked == [page.resolve().as_uri()]
    return report["results"]


def screen(width: int, height: int, scheme: str = "light") -> list[list[Any]]:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    theme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    return [
        ["Emulation.setDeviceMetricsOverride", size],
        ["Emulation.setEmulatedMedia", theme],
        ["wait", 400],
    ]


# z and the picture, once the page has shown its next two frames.
SETTLED = """new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
  const canvas = document.getElementById("picture");
  const shown = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  done({ z: [...explorer.z], x: [...explorer.x], shown: [...shown],
         now: document.getElementById("now").textContent });
})))"""


def press(selector: str, across: float = 0.5, down: float = 0.5) -> list[list[Any]]:
    kinds = ("mousePressed", "mouseReleased")
    return [["mouse", kind, selector, across, down] for kind in kinds]


def drag(start: str, end: str) -> list[list[Any]]:
    pressed, moved, released = "mousePressed", "mouseMoved", "mouseReleased"
    places = [(pressed, start), (moved, end), (released, end)]
    return [["mouse", kind, selector, 0.5, 0.5] for kind, selector in places]


def key(name: str, modifiers: int = 0) -> list[list[Any]]:
    pressed = {"key": name, "code": name, "modifiers": modifiers}
    return [["Input.dispatchKeyEvent", {"type": kind, **pressed}] for kind in ("keyDown", "keyUp")]


def choose(name: str, value: str) -> list[list[Any]]:
    change = f'$.value = "{value}"; $.dispatchEvent(new Event("change"))'
    return [["evaluate", f'(($) => {{ {change} }})(document.getElementById("{name}"))']]


ACTIONS: dict[str, list[list[Any]]] = {
    "open": [],
    "image": press("#images li:nth-child(4) button"),
    "slider": press("#latents label:first-child input", across=0.9),
    "map": press("#map", 0.8, 0.3),
    "right": key("ArrowRight"),
    "far up": key("ArrowUp", modifiers=8),
    "home": key("Home"),
    "two latents": [*choose("plane", "pair"), *press("#map", 0.25, 0.5)],
    "prior": press("#prior"),
    "drag": [
        *drag("#images li:nth-child(2) button", "#images li:nth-child(7) button"),
        ["wait", 2900],
    ],
    "walk": press("#walk", across=0.5),
    "draw": press("#draw"),
    "again": press("#again"),
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of a page after each action, and the page with its VAE."""
    vae, split = vae_and_split(latent_dim=5)
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "page.html"
    page.write_text(explorer_page(vae, split, title="run", num_images=8))
    steps, ends = screen(1280, 900), []
    for actions in ACTIONS.values():
        steps += [*actions, ["evaluate", SETTLED]]
        ends.append(len(steps) - 1)
    steps += [["evaluate", "document.getElementById('check').textContent"]]
    steps += [["wait", 900], ["evaluate", "document.getElementById('live').textContent"]]
    steps += [["screenshot", str(folder / "page.png")]]
    results = browse(page, steps)
    states = {name: results[end] for name, end in zip(ACTIONS, ends, strict=True)}
    content = content_of(page.read_text())
    z = floats(content["points"]["z"]).reshape(-1, 5)[content["images"]["index"]].double()
    last = {"check": results[-4], "live": results[-2], "screenshot": folder / "page.png"}
    return {**last, "states": states, "vae": vae, "content": content, "images": z}


def test_every_control_moves_z_as_it_says(session: dict[str, Any]) -> None:
    states, images, content = session["states"], session["images"], session["content"]
    z = {name: torch.tensor(state["z"]).double() for name, state in states.items()}
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(z["open"], images[0], **close)
    torch.testing.assert_close(z["image"], images[3], **close)
    assert states["image"]["now"].startswith("Started from test image 4 (label")

    changed = (z["slider"] - z["image"]).abs() > 1e-6
    assert changed.nonzero().flatten().tolist() == [content["latents"]["order"][0]]

    axes = torch.tensor(content["plane"]["axes"]).double()
    mean = torch.tensor(content["plane"]["mean"]).double()
    across, up = (axes @ (z["map"] - mean)).tolist()
    assert across > 0 and up > 0 and across / up == pytest.approx(0.6 / 0.4, rel=0.05)
    for before, after in (("slider", "map"), ("map", "right"), ("far up", "home")):
        step = z[after] - z[before]
        torch.testing.assert_close(axes.T @ (axes @ step), step, **close)
    assert ((z["right"] - z["map"]) @ axes[0]) > 0
    torch.testing.assert_close(
        (z["far up"] - z["right"]) @ axes[1], 10 * (z["right"] - z["map"]) @ axes[0], **close
    )
    torch.testing.assert_close(axes @ (z["home"] - mean), torch.zeros(2).double(), **close)

    first, second = content["latents"]["order"][:2]
    moved = ((z["two latents"] - z["home"]).abs() > 1e-6).nonzero().flatten().tolist()
    assert set(moved) <= {first, second} and z["two latents"][first] < 0
    assert states["prior"]["now"] == "Draw 1 from the prior p(z)."
    assert (z["prior"] != z["two latents"]).all()
    torch.testing.assert_close(z["drag"], images[6], **close)
    halfway = z["walk"] - (images[1] + images[6]) / 2
    assert halfway.norm() < 0.05 * (images[6] - images[1]).norm()


def test_the_browser_shows_what_torch_decodes(session: dict[str, Any]) -> None:
    for name, state in session["states"].items():
        x, shown = torch.tensor(state["x"]), torch.tensor(state["shown"]).reshape(-1, 4)
        assert (shown[:, :3] - 255 * x.unsqueeze(-1)).abs().max() <= 1, name
        assert shown[:, 0].max() > shown[:, 0].min() and (shown[:, 3] == 255).all(), name
        mean = session["vae"].decode(torch.tensor(state["z"])).flatten()
        if name in ("draw", "again"):
            assert ((x == 0) | (x == 1)).all()
        else:
            torch.testing.assert_close(x, mean, rtol=0, atol=1e-5, msg=name)
    assert session["states"]["draw"]["x"] != session["states"]["again"]["x"]
    assert session["check"].startswith("Checked on opening: the decoder in this browser agrees")
    assert session["live"].startswith("A draw x from p(x | z). ")
    assert session["screenshot"].stat().st_size > 20_000


def test_the_classic_network_is_smooth(tmp_path: Path) -> None:
    torch.manual_seed(0)
    likelihood = likelihoods.Bernoulli((1, 28, 28))
    vae = VAE(
        prior=priors.StandardNormal(50),
        posterior=posteriors.MeanField(networks.MLPEncoder((1, 28, 28)), 50),
        decoder=networks.MLPDecoder(50, likelihood.params_shape),
        likelihood=likelihood,
    )
    split = from_array((torch.rand(2000, 28, 28) > 0.5).float(), test_size=1000).test
    (tmp_path / "page.html").write_text(explorer_page(vae, split, title="run"))
    frames = """new Promise((done) => {
      const times = [];
      const step = (now) => {
        explorer.z[times.length % 50] += 0.01;
        explorer.moved();
        times.push(now);
        if (times.length <= 120) return requestAnimationFrame(step);
        done(times.slice(1).map((time, i) => time - times[i]));
      };
      requestAnimationFrame(step);
    })"""
    *_, between = browse(tmp_path / "page.html", [*screen(1280, 900), ["evaluate", frames]])
    # The median: a busy machine may hold up single frames.
    assert sorted(between)[60] <= 1000 / 30


@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_phone_in_dark_mode(tmp_path: Path, latent_dim: int, labelled: bool) -> None:
    page = tmp_path / "page.html"
    vae, split = vae_and_split(latent_dim, labelled=labelled)
    page.write_text(explorer_page(vae, split, title="a-long-name-of-a-run-" * 5))
    shown = [*("legend", "coloured", "pair")]
    steps = [
        *screen(390, 844, "dark"),
        ["evaluate", "[document.documentElement.scrollWidth, innerWidth]"],
        ["touch", "touchStart", "#map", 0.5, 0.5],
        ["evaluate", SETTLED],
        ["touch", "touchMove", "#map", 0.75, 0.5],
        ["touch", "touchEnd", "#map", 0.75, 0.5],
        ["evaluate", SETTLED],
        ["evaluate", f"{json.dumps(shown)}.map((id) => document.getElementById(id).hidden)"],
        ["evaluate", "getComputedStyle(document.body).backgroundColor"],
    ]
    results = browse(page, steps)
    wide, inner = results[3]
    assert wide <= inner == 390
    before, after = (torch.tensor(results[i]["z"]) for i in (5, 8))
    assert after.isfinite().all() and (after - before).abs().max() > 0
    assert results[9] == [not labelled, not labelled, True]
    assert results[10] == "rgb(16, 19, 23)"


@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="needs AXE_CORE, the path of axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["explore", "report"])
def test_axe_finds_no_fault(tmp_path: Path, name: str, width: int, scheme: str) -> None:
    page = tmp_path / "page.html"
    if name == "explore":
        page.write_text(explorer_page(*vae_and_split(), title="run"))
    else:
        words = "train --quiet --hidden 8 --latent-dim 3 --epochs 2 --final-particles 0 --out"
        assert cli.main([*words.split(), str(tmp_path / "run")]) == 0
        write_report(tmp_path / "run", page, num_particles=20)
    axe = Path(os.environ["AXE_CORE"]).read_text()
    found = "axe.run().then((report) => report.violations.map((v) => [v.id, v.impact, v.help]))"
    *_, violations = browse(
        page, [*screen(width, 900, scheme), ["evaluate", axe + ";0"], ["evaluate", found]]
    )
    assert violations == []


def test_a_walk_ends_when_the_reader_moves_on(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(explorer_page(*vae_and_split(), title="run"))
    steps = [*screen(1280, 900), *press("#play"), ["wait", 300], ["evaluate", SETTLED]]
    steps += [*press("#prior"), ["wait", 500], ["evaluate", SETTLED]]
    walking, after = (state for state in browse(page, steps) if state and "now" in state)
    assert walking["now"].endswith("of the way from image 1 to 2.")
    assert after["now"] == "Draw 1 from the prior p(z)."
