"""One HTML page in which a VAE's decoder runs in the browser, to walk through its latent space.

The page is a single file that asks the network for nothing. It holds the decoder's weights, some
test images with their q means, and three scripts that stand beside this file: the layers, the
likelihoods (each the twin of a class in Python, held to it by tests), and what the reader touches.
"""

import base64
import dataclasses
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyrovae
from pyrovae import config as cfg
from pyrovae import likelihoods, networks, priors
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.evaluation import active_units
from pyrovae.plots import is_picture
from pyrovae.runs import Run, atomic_path
from pyrovae.vae import VAE

Spec = dict[str, Any]

SCRIPTS = ("explore_networks.js", "explore_likelihoods.js", "explore.js")

# The encodings on the map: beyond this they hide each other, and cost more bytes than the decoder.
_MOST_POINTS, _LEAST_POINTS, _MOST_NUMBERS = 1000, 200, 100_000
_MOST_IMAGES = 200
_PRIOR_DRAWS = 200
_HEAVY = 10_000_000  # bytes


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
    path = _out_path(run.path / "explore.html" if out is None else out)
    say = progress or (lambda _: None)
    config = cfg.run_config(run)
    vae = cfg.load(run)
    _check_pictures(vae)
    split = _test_split(run, data_root)
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
    size = path.stat().st_size
    if size > _HEAVY:
        weights = sum(p.numel() for p in vae.decoder.parameters())
        say(f"size      {size / 1e6:.0f} MB, for the decoder has {weights:,} weights")
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
    >>> page[:15], "http" in page
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


def decoder_spec(decoder: nn.Module) -> tuple[list[Spec], Tensor]:
    """The layers of a decoder as plain values, and their weights end to end, float32 (N,).

    Raises:
        InputError: for a decoder that is not made of the layers of `pyrovae.networks`.
    """
    whole = isinstance(decoder, networks.Decoder) and (
        type(decoder).forward is networks.Decoder.forward
    )
    if not whole:
        raise InputError(
            f"the explorer runs decoders of pyrovae.networks; got {type(decoder).__name__}. "
            "Subclass networks.Decoder, and give its layers in _build"
        )
    assert isinstance(decoder, networks.Decoder)
    store: list[Tensor] = []
    layers, _ = _chain(decoder.layers, (decoder.latent_dim,), store)
    return layers, torch.cat([w.detach().float().cpu().flatten() for w in store])


def likelihood_spec(likelihood: likelihoods.Likelihood) -> Spec:
    """A likelihood as plain values: its name, and whatever is not given by the decoder.

    Raises:
        InputError: for a class that is not in `likelihoods.REGISTRY`.
    """
    names = {cls: name for name, cls in likelihoods.REGISTRY.items()}
    if type(likelihood) not in names:
        raise InputError(
            f"the explorer knows the likelihoods {', '.join(names.values())}; got "
            f"{type(likelihood).__name__}. Add it to explore_likelihoods.js and the registry"
        )
    spec: Spec = {
        "name": names[type(likelihood)],
        "elements": math.prod(likelihood.x_shape),
        "levels": likelihood.levels,
    }
    if isinstance(likelihood, likelihoods.LocationScale):
        fixed = likelihood.num_params == 1
        scale = likelihood.loc_scale(torch.zeros(1))[1] if fixed else None
        spec |= {
            "centre": likelihood.centre,
            "spread": likelihood.spread,
            "scale": None if scale is None else float(scale),
        }
    if isinstance(likelihood, likelihoods.StudentT):
        spec["df"] = float(likelihood.df)
    if isinstance(likelihood, likelihoods.DiscretizedLogisticMixture):
        spec |= {"components": likelihood.components, "coupling": likelihood.coupling}
    return spec


_ACTIVATIONS = {activation.module: name for name, activation in networks.ACTIVATIONS.items()}


def _chain(
    modules: Iterable[nn.Module], shape: tuple[int, ...], store: list[Tensor]
) -> tuple[list[Spec], tuple[int, ...]]:
    """The layers of one module after another, and the shape that comes out of them."""
    layers: list[Spec] = []
    for module in modules:
        if isinstance(module, nn.Sequential):
            inner, shape = _chain(module, shape, store)
            layers += inner
        elif isinstance(module, nn.Flatten):
            shape = (math.prod(shape),)
        elif isinstance(module, nn.Unflatten):
            shape = tuple(module.unflattened_size)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            spec = _convolution(module, shape, store)
            layers.append(spec)
            shape = (spec["outputs"], *spec["sides"][2:])
        elif isinstance(module, networks.ResidualBlock):
            inner, _ = _chain(module.layers, shape, store)
            layers.append({"kind": "residual", "size": math.prod(shape), "layers": inner})
        elif isinstance(module, networks.GatedLinear):
            value, gate = _linear(module.value, store), _linear(module.gate, store)
            layers.append({"kind": "gated", "value": value, "gate": gate})
            shape = (value["outputs"],)
        elif isinstance(module, nn.Linear):
            layers.append(_linear(module, store))
            shape = (module.out_features,)
        # Its repr tells whether it has a setting, such as the slope of a leaky ReLU.
        elif type(module) in _ACTIVATIONS and repr(module) == repr(type(module)()):
            name = _ACTIVATIONS[type(module)]
            layers.append({"kind": "activation", "size": math.prod(shape), "name": name})
        else:
            raise _unknown(module)
    return layers, shape


def _unknown(module: nn.Module) -> InputError:
    shown = " ".join(repr(module).split())
    return InputError(
        f"the explorer cannot run the decoder's layer {shown[:120]}; build the decoder from the "
        f"layers of pyrovae.networks and its activations ({', '.join(networks.ACTIVATIONS)})"
    )


def _linear(module: nn.Module, store: list[Tensor]) -> Spec:
    assert isinstance(module, nn.Linear)
    sizes = {"inputs": module.in_features, "outputs": module.out_features}
    return {"kind": "linear", **sizes, **_stored(module, module.out_features, store)}


def _stored(module: nn.Module, outputs: int, store: list[Tensor]) -> Spec:
    """Where the weight and the bias of a layer begin."""
    weight, bias = module.get_parameter("weight"), module.bias
    start = sum(w.numel() for w in store)
    store += [weight, weight.new_zeros(outputs) if bias is None else bias]  # type: ignore[list-item]
    return {"weight": start, "bias": start + weight.numel()}


def _convolution(
    module: nn.Conv2d | nn.ConvTranspose2d, shape: tuple[int, ...], store: list[Tensor]
) -> Spec:
    kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
    plain = type(module)(
        module.in_channels, module.out_channels, kernel, stride, padding, device="meta"
    )
    if repr(module).replace(", bias=False", "") != repr(plain):
        raise _unknown(module)
    _, height, width = shape
    transposed = isinstance(module, nn.ConvTranspose2d)

    def resized(side: int) -> int:
        if transposed:
            return (side - 1) * stride - 2 * padding + kernel
        return (side + 2 * padding - kernel) // stride + 1

    return {
        "kind": "convolution",
        "transposed": transposed,
        "inputs": module.in_channels,
        "outputs": module.out_channels,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "sides": [height, width, resized(height), resized(width)],
        **_stored(module, module.out_channels, store),
    }


@torch.no_grad()
def _places(vae: VAE, split: Split, num_images: int, seed: int) -> Spec:
    """What the page knows of the latent space: encodings, plane, active latents, prior."""
    device = next(vae.parameters()).device
    x = split.head(_num_points(vae, split)).tensor(torch.Generator().manual_seed(seed))
    z = torch.cat([vae.encode(part.to(device), seed=seed).cpu() for part in x.split(200)])
    labels = None if split.labels is None else split.labels[: len(x)].tolist()
    chosen = _spread_over_labels(labels, len(x))[:num_images]
    mean, axes, explained = _principal_plane(z.double())
    variance = z.var(0, correction=min(1, len(z) - 1))
    order = variance.argsort(descending=True)
    draws = None
    if not isinstance(vae.prior, priors.StandardNormal):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
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
    if not is_picture(vae.x_shape):
        raise InputError(
            f"the explorer draws x of shape (1 or 3, H, W); this run has {vae.x_shape}. Give the "
            "data as images, or use pyrovae evaluate for its numbers"
        )


def _test_split(run: Run, data_root: str | None) -> Split:
    config = cfg.run_config(run)
    if data_root is not None:
        config = dataclasses.replace(config, data_root=data_root)
    dataset = cfg.load_data(config)
    _, stored = cfg.run_data(run)
    if stored != dataset.protocol:
        reason = stored.why_not_comparable(dataset.protocol) or "the split sizes differ"
        raise InputError(
            f"the data are not those the run was trained on: {reason}; restore them, or give the "
            "right --data-root"
        )
    return dataset.test


def _out_path(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out expects a file ending in .html, got {str(out)!r}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give --out a file name")
    return path
