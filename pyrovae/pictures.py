"""Pictures as tensors: sheets of x, walks through the latent space, and the files they become."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.errors import InputError
from pyrovae.runs import atomic_path
from pyrovae.streams import own_streams

if TYPE_CHECKING:
    from pyrovae.vae import VAE


def is_picture(x_shape: Sequence[int]) -> bool:
    """Whether x of this shape can be shown: (C, H, W) with one or three channels."""
    return len(x_shape) == 3 and x_shape[0] in (1, 3)


def sheet(
    x: Tensor, columns: int | None = None, gap: int | None = None, background: float = 1.0
) -> Tensor:
    """Lay images (N, C, H, W) out on one white sheet (3, height, width), row by row.

    Args:
        x: images in [0, 1]; other values are clamped.
        columns: images in a row; default: as many as make the sheet square.
        gap: pixels between images; default: a sixteenth of their height.
        background: what lies between them, from 0 (black) to 1 (white).

    Raises:
        InputError: for x that are no pictures.

    >>> sheet(torch.zeros(4, 1, 8, 8), gap=1).shape
    torch.Size([3, 19, 19])
    """
    if not is_picture(x.shape[1:]):
        raise InputError(
            f"expected images of shape (N, 1 or 3, H, W), got {tuple(x.shape)}; only such can be "
            "drawn"
        )
    n, _, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = max(1, height // 16) if gap is None else gap
    size = (rows * (height + gap) + gap, columns * (width + gap) + gap)
    page = x.new_full((3, *size), background)
    for i, image in enumerate(x.clamp(0, 1)):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        page[:, top : top + height, left : left + width] = image
    return page


class Traversal(NamedTuple):
    """What each of some latent dimensions does to an image; see `traverse`."""

    x: Tensor
    """(R, steps, *x_shape), E[x | z]."""
    dims: list[int]
    """The R dimensions, counted from 0."""
    values: Tensor
    """(R, steps), the values that z takes in that dimension."""


@torch.no_grad()
def traverse(
    vae: "VAE", x: Tensor, dims: Sequence[int] | None = None, steps: int = 9, span: float = 3.0
) -> Traversal:
    """Encode the first x, then move one latent dimension at a time through the prior.

    Dimension d takes values from ``m_d - span s_d`` to ``m_d + span s_d``, where m and s are mean
    and standard deviation of p(z); all others stay at E_q[z | x[0]]. In a hierarchy, the layers
    below the moved one follow it.

    Args:
        vae: the model.
        x: (N, *x_shape).
        dims: dimensions to move, counted from 0; default: the eight in which E_q[z | x] varies
            most over x, or the first ones for a single x.
        steps: points on each walk, at least 2.
        span: half its length, in standard deviations of the prior.
    """
    _check_steps(steps)
    means = vae.encode(x.to(_device(vae)))
    if dims is None:
        activity = means.var(0) if len(means) > 1 else torch.zeros(vae.latent_dim)
        dims = activity.argsort(descending=True, stable=True)[:8].tolist()
    for d in dims:
        if not 0 <= d < vae.latent_dim:
            raise InputError(
                f"expected latent dimensions from 0 to {vae.latent_dim - 1}, got {d}; check --dims"
            )
    centre, scale = prior_moments(vae)
    z = means[0].expand(len(dims), steps, -1).clone()
    t = torch.linspace(-span, span, steps, dtype=z.dtype, device=z.device)
    values = torch.stack([centre[d] + scale[d] * t for d in dims])
    for row, d in enumerate(dims):
        z[row, :, d] = values[row]
        z[row] = vae.follow(z[row], d)
    return Traversal(vae.decode(z), list(dims), values)


@torch.no_grad()
def manifold(vae: "VAE", size: int = 15) -> Tensor:
    """E[x | z] on a grid over a latent space of two dimensions: (size**2, *x_shape), row by row.

    The grid is even in prior probability: its lines are at the quantiles (i + 1/2) / size of a
    normal with the prior's mean and standard deviation. z_1 grows to the right, z_2 upwards.
    """
    if vae.latent_dim != 2:
        raise InputError(
            f"expected a latent space of 2 dimensions, got {vae.latent_dim}; train with "
            "--latent-dim 2, or draw a traversal"
        )
    centre, scale = prior_moments(vae)
    p = (torch.arange(size, dtype=centre.dtype, device=centre.device) + 0.5) / size
    line = torch.special.ndtri(p)
    right, up = torch.meshgrid(line, line.flip(0), indexing="xy")
    return vae.decode(centre + scale * torch.stack([right, up], -1).reshape(-1, 2))


@torch.no_grad()
def prior_moments(vae: "VAE", num_samples: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(z), (D,) each; from seeded draws if there is no formula."""
    p = vae.prior()
    if p.event_shape == (vae.latent_dim,):
        try:
            return p.mean, p.stddev
        except NotImplementedError:
            pass
    with own_streams(0):
        z = vae.draw_latents(num_samples)
    return z.mean(0), z.std(0)


def png(x: Tensor, columns: int | None = None, gap: int | None = None) -> bytes:
    """A sheet of images (N, C, H, W) as the bytes of a PNG file, transparent between them."""
    return _encode(_to_pil(x, columns, gap), optimize=True)


def save_animation(frames: Tensor, path: str | os.PathLike[str], fps: float = 12.0) -> None:
    """Write walks (N, T, C, H, W) as a GIF that runs to the end and back, without a jump.

    Args:
        frames: N images that move together over T frames.
        path: a name that ends in .gif.
        fps: frames a second.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise InputError(f"expected a file ending in .gif, got {str(path)!r}; check --out")
    from PIL import Image

    scale = max(1, 112 // frames.shape[-1])
    pages = []
    for t in [*range(frames.shape[1]), *range(frames.shape[1] - 2, 0, -1)]:
        page = (sheet(frames[:, t].detach().cpu()) * 255).round().to(torch.uint8)
        page = page.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        pages.append(Image.fromarray(page.permute(1, 2, 0).numpy()))
    with atomic_path(path) as temporary:
        milliseconds = max(20, round(1000 / fps))
        pages[0].save(
            temporary, save_all=True, append_images=pages[1:], duration=milliseconds, loop=0
        )


def _to_pil(x: Tensor, columns: int | None, gap: int | None) -> Any:
    from PIL import Image

    x = x.detach().cpu().float()
    page = sheet(x, columns, gap)[: x.shape[1]]
    opaque = sheet(torch.ones_like(x), columns, gap, background=0.0)[:1]
    pixels = (torch.cat([page, opaque]) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _encode(image: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def _device(vae: "VAE") -> torch.device:
    return next((p.device for p in vae.parameters()), torch.device("cpu"))


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise InputError(f"expected at least 2 steps, got {steps}; check --steps")
