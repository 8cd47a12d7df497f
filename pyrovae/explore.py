"""One HTML page in which a VAE's decoder runs in the browser, to walk through its latent space.

The page is a single file that asks the network for nothing. It holds the decoder's weights, some
test images with their q means, and three scripts that stand beside this file: the layers, the
likelihoods (each the twin of a class in Python, held to it by tests), and what the reader touches.
"""

import base64
import html
import json
import os
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

import pyrovae
from pyrovae import config as cfg
from pyrovae import priors
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.evaluation import active_units
from pyrovae.explore_specs import Spec, decoder_spec, likelihood_spec
from pyrovae.importance import check_has_density
from pyrovae.plots import is_picture
from pyrovae.runs import Run, atomic_path
from pyrovae.streams import own_streams
from pyrovae.vae import VAE

SCRIPTS = (
    "explore_networks.js",
    "explore_likelihoods.js",
    "explore_map.js",
    "explore_images.js",
    "explore.js",
)

# The encodings on the map: beyond this they hide each other, and cost more bytes than the decoder.
_MOST_POINTS, _LEAST_POINTS, _MOST_NUMBERS = 1000, 200, 100_000
_MOST_IMAGES = 200
_PRIOR_DRAWS = 200
# float32 in base64; half precision would not give the picture that torch gives.
_BYTES_PER_WEIGHT = 4 * 4 / 3


def write_explorer(
    run: "Run | str | os.PathLike[str]",
    out: str | os.PathLike[str] | None = None,
    *,
    num_images: int = 24,
    seed: int = 0,
    data_root: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the explorer of a run as one HTML file, and return its path.

    Args:
        run: a run directory.
        out: the file, ending in .html; default: explore.html inside the run.
        num_images: test images offered to start from, 2 to 200.
        seed: of what is drawn while the page is made: draws from a learned prior, and the
            encodings of a posterior whose mean has no closed form.
        data_root: folder of the data, if it has moved since training.
        progress: called with a line of text now and then.

    Raises:
        InputError: if the directory is no run, its data cannot be found or drawn, or the file
            cannot be written.
    """
    run = run if isinstance(run, Run) else Run(run)
    path = run.path / "explore.html" if out is None else _checked_out(out)
    say = progress or (lambda _: None)
    config = cfg.run_config(run)
    vae = cfg.load(run)
    check_has_density(vae)
    _check_pictures(vae)
    split = cfg.data_of(run, data_root).test
    say(f"encoding  {_num_points(vae, split):,} test images")
    page = explorer_page(
        vae,
        split,
        title=run.path.resolve().name,
        description=(
            f"{config.likelihood} likelihood, {config.network} network, {config.posterior} "
            f"posterior, {config.prior} prior, {config.latent_dim} latents"
        ),
        num_images=num_images,
        seed=seed,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    weights = len(decoder_spec(vae.decoder)[1])
    share = weights * _BYTES_PER_WEIGHT / 1e6
    say(f"size      {path.stat().st_size / 1e6:.1f} MB: {weights:,} weights take {share:.1f} of it")
    return path


def explorer_page(
    vae: VAE,
    split: Split,
    *,
    title: str,
    description: str = "",
    num_images: int = 24,
    seed: int = 0,
) -> str:
    """The explorer of a VAE as HTML text.

    Args:
        vae: on any device; its x must be pictures of one or three channels.
        split: the images to place on the map and to start from, such as ``data.test``.
        title: of the page.
        description: of the model, in a few words.
        num_images: images offered to start from, 2 to 200.
        seed: of what is drawn while the page is made.

    Raises:
        InputError: for x that are no pictures, and for a decoder or a likelihood that the page
            has no JavaScript of.

    >>> from pyrovae import data, likelihoods, networks, posteriors, priors
    >>> likelihood = likelihoods.Bernoulli((1, 8, 8))
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     posterior=posteriors.MeanField(networks.MLPEncoder((1, 8, 8), hidden=(16,)), 2),
    ...     decoder=networks.MLPDecoder(2, likelihood.params_shape, hidden=(16,)),
    ...     likelihood=likelihood,
    ... )
    >>> page = explorer_page(vae, data.load("digits", binarize="dynamic").test, title="digits")
    >>> page[:15], "://" in page
    ('<!doctype html>', False)
    """
    if isinstance(num_images, bool) or not isinstance(num_images, int):
        raise InputError(f"--num-images expects a whole number, got {num_images!r}")
    if not 2 <= num_images <= _MOST_IMAGES:
        raise InputError(f"--num-images must be from 2 to {_MOST_IMAGES}, got {num_images}")
    _check_pictures(vae)
    layers, weights = decoder_spec(vae.decoder)
    content = {
        "title": title,
        "description": description,
        "protocol": str(split.protocol),
        "version": pyrovae.__version__,
        "shape": list(vae.x_shape),
        "latentDim": vae.latent_dim,
        "layers": layers,
        "weights": _base64(weights),
        "likelihood": likelihood_spec(vae.likelihood),
        **_places(vae, split, num_images, seed),
    }
    # A "<" inside the data could end the script element that holds it.
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "data": text,
        "scripts": "\n".join(_asset(name) for name in SCRIPTS),
    }
    # In one pass: what is put in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("explore.html"))


@torch.no_grad()
def _places(vae: VAE, split: Split, num_images: int, seed: int) -> Spec:
    """What the page knows of the latent space: encodings, plane, active latents, prior."""
    device = next(vae.parameters()).device
    shown = split.head(_num_points(vae, split)).to("cpu")
    x = shown.tensor(torch.Generator().manual_seed(seed))
    z = torch.cat([vae.encode(part.to(device), seed=seed).cpu() for part in x.split(200)])
    labels = None if shown.labels is None else shown.labels.tolist()
    chosen = _spread_over_labels(labels, len(x))[:num_images]
    mean, axes, explained = _principal_plane(z.double())
    variance = z.var(0, correction=min(1, len(z) - 1))
    order = variance.argsort(descending=True)
    draws = None
    if not isinstance(vae.prior, priors.StandardNormal):
        with own_streams(seed):
            draws = _base64(vae.prior().sample(torch.Size([_PRIOR_DRAWS])))
    return {
        "points": {"z": _base64(z), "labels": labels},
        "images": {
            "index": chosen,
            "pixels": _base64((x[chosen].clamp(0, 1) * 255).round().to(torch.uint8)),
        },
        "plane": {
            "mean": mean.tolist(),
            "axes": axes.tolist(),
            "explained": explained.tolist(),
        },
        "latents": {
            "order": order.tolist(),
            "variance": variance.tolist(),
            "active": int(active_units(z).sum()),
            # Where a standard normal keeps nearly all its mass, and wherever the images went.
            "low": z.min(0).values.clamp(max=-3).tolist(),
            "high": z.max(0).values.clamp(min=3).tolist(),
        },
        "prior": draws,
        "check": _base64(vae.decode(z[chosen[0]].to(device))),
    }


def _num_points(vae: VAE, split: Split) -> int:
    return min(len(split), _MOST_POINTS, max(_LEAST_POINTS, _MOST_NUMBERS // vae.latent_dim))


def _spread_over_labels(labels: list[int] | None, count: int) -> list[int]:
    """Positions ordered so that every label comes once before any comes twice."""
    if labels is None:
        return list(range(count))
    seen: dict[int, int] = {}
    turns = []
    for position, label in enumerate(labels):
        turns.append((seen.get(label, 0), label, position))
        seen[label] = seen.get(label, 0) + 1
    return [position for _, _, position in sorted(turns)]


def _principal_plane(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), the two principal axes (2, D) of z (N, D), and their shares of the variance."""
    mean = z.mean(0)
    values, vectors = torch.linalg.eigh((z - mean).T @ (z - mean))
    axes, shares = vectors.T.flip(0)[:2], (values / values.sum().clamp(min=1e-300)).flip(0)[:2]
    # An axis and its opposite are both right: the largest element is made the positive one.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    if len(axes) == 1:  # one latent makes a line: the second direction moves nothing
        axes, shares = torch.cat([axes, 0 * axes]), torch.cat([shares, 0 * shares])
    return mean, axes, shares


def _base64(values: Tensor) -> str:
    numbers = values.detach().cpu().numpy()
    if values.dtype != torch.uint8:
        numbers = numbers.astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _asset(name: str) -> str:
    return files("pyrovae").joinpath(name).read_text(encoding="utf-8")


def _check_pictures(vae: VAE) -> None:
    if type(vae) is not VAE:
        raise InputError(
            f"the explorer walks through a single layer of latents; this run has a "
            f"{type(vae).__name__}. Use pyrovae traverse or pyrovae report"
        )
    if not is_picture(vae.x_shape):
        raise InputError(
            f"the explorer draws x of shape (1 or 3, H, W); this run has {vae.x_shape}. Give the "
            "data as images, or use pyrovae evaluate for its numbers"
        )


def _checked_out(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out expects a file ending in .html, got {str(out)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder must exist; check --out")
    return path
