"""A data set drawn here: one coloured shape on a pale ground, every factor of variation known.

Nothing is fetched, and a seed gives the same bytes on every machine: NumPy's frozen RandomState,
float64 and IEEE arithmetic, rounded to 8 bits at the end.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pyrovae.errors import InputError

SHAPES = ("ellipse", "square", "triangle", "heart")
RANGES = {
    "hue": (0.0, 1.0),
    "size": (0.1, 0.2),
    "rotation": (0.0, 2 * np.pi),
    "x": (0.34, 0.66),
    "y": (0.34, 0.66),
    "background": (0.0, 1.0),
}


_Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Sprites(NamedTuple):
    """Images, their shapes and their factors.

    images: uint8 ``(N, 3, S, S)``. labels: ``(N,)``, positions in ``SHAPES``. factors: float64
    ``(N,)`` each: "hue" and "background" (the ground's hue) in turns of the colour wheel; "size",
    the radius of the disc of equal area, "x" and "y", the centre, in widths of the image with y
    downwards; "rotation" in radians, clockwise.
    """

    images: np.ndarray
    labels: np.ndarray
    factors: dict[str, np.ndarray]


def draw(count: int, image_size: int = 64, seed: int = 0) -> Sprites:
    """Draw ``count`` sprites, each factor independent and uniform on ``RANGES``.

    Image number i is the same whatever ``count``. Raises InputError below 1 image or 8 pixels.

    >>> draw(2).images.shape
    (2, 3, 64, 64)
    """
    if count < 1 or image_size < 8:
        raise InputError(
            f"expected at least 1 sprite of 8 pixels; got {count} of {image_size}. "
            "Set --image-size to 8 or more."
        )
    uniform = np.random.RandomState(seed).random_sample((count, 1 + len(RANGES)))
    labels = (uniform[:, 0] * len(SHAPES)).astype(np.int64)
    factors = {
        name: low + (high - low) * uniform[:, i]
        for i, (name, (low, high)) in enumerate(RANGES.items(), start=1)
    }
    return Sprites(render(labels, factors, image_size), labels, factors)


def render(labels: np.ndarray, factors: dict[str, np.ndarray], image_size: int = 64) -> np.ndarray:
    """The images of given shapes and factors, uint8 ``(N, 3, S, S)``; see ``Sprites`` for units.

    A pixel takes the shape's colour in the proportion c = clip(1/2 - d, 0, 1), where d is the
    signed distance in pixels from its centre to the outline: that smooths the edge.
    """
    images = np.empty((len(labels), 3, image_size, image_size), np.uint8)
    for label, outline in enumerate(_OUTLINES):
        rows = np.flatnonzero(labels == label)
        for some in np.array_split(rows, len(rows) // 64 + 1):  # pieces that stay in the cache
            part = {name: values[some] for name, values in factors.items()}
            images[some] = _paint(outline, part, image_size)
    return images


def _paint(outline: _Outline, factors: dict[str, np.ndarray], image_size: int) -> np.ndarray:
    column = {name: values[:, None, None] for name, values in factors.items()}
    pixel = (np.arange(image_size) + 0.5) / image_size
    dx, dy = pixel[None, None, :] - column["x"], pixel[None, :, None] - column["y"]
    cos, sin = np.cos(column["rotation"]), np.sin(column["rotation"])
    u = (cos * dx + sin * dy) / column["size"]
    v = (cos * dy - sin * dx) / column["size"]
    distance = outline(u, v) * column["size"] * image_size
    cover = np.clip(0.5 - distance, 0.0, 1.0)[:, None]
    ink = _rgb(factors["hue"], saturation=0.72, value=0.88)
    ground = _rgb(factors["background"], saturation=0.16, value=0.97)
    return np.rint(255 * (ground + (ink - ground) * cover)).astype(np.uint8)


def _rgb(hue: np.ndarray, saturation: float, value: float) -> np.ndarray:
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    rgb = value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return rgb[:, :, None, None]


# Signed distances to outlines of area pi around the origin, v downwards: negative within.


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # First order: f / |grad f|. Exact on the outline, which is all that smoothing needs.
    a, b = 1.3, 1 / 1.3
    f = np.sqrt((u / a) ** 2 + (v / b) ** 2)
    slope = np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2)
    return (f - 1) * f / np.maximum(slope, 1e-9)


def _box(u: np.ndarray, v: np.ndarray, half: float) -> np.ndarray:
    p, q = np.abs(u) - half, np.abs(v) - half
    outside = np.sqrt(np.maximum(p, 0) ** 2 + np.maximum(q, 0) ** 2)
    return outside + np.minimum(np.maximum(p, q), 0)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _box(u, v, np.sqrt(np.pi) / 2)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Equilateral, one corner up: three half-planes at the radius of the inscribed circle.
    inner = np.sqrt(np.pi / (3 * np.sqrt(3.0)))
    slanted = (np.sqrt(3.0) * np.abs(u) - v) / 2
    return np.maximum(v, slanted) - inner


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A square on its corner and a disc on each upper side: area (2h)^2 + pi h^2 = pi.
    half = np.sqrt(np.pi / (4 + np.pi))
    # The discs pull the centroid up; lowering the whole by as much brings it to the origin.
    drop = half**3 * (1 + 4 / (3 * np.pi)) / np.sqrt(2.0)
    p, q = (u + v - drop) / np.sqrt(2.0), (v - drop - u) / np.sqrt(2.0)
    left = np.sqrt((p + half) ** 2 + q**2) - half
    right = np.sqrt(p**2 + (q + half) ** 2) - half
    return np.minimum(_box(p, q, half), np.minimum(left, right))


_OUTLINES: tuple[_Outline, ...] = (_ellipse, _square, _triangle, _heart)
