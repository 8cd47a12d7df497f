"""The drawn data set: the same bytes everywhere, and factors that say what is in the image."""

import hashlib

import numpy as np
import pytest

from pyrovae import sprites
from pyrovae.errors import InputError

PLAIN = {"hue": 0.0, "size": 0.18, "rotation": 0.0, "x": 0.5, "y": 0.5, "background": 0.5}


def _one(shape: str, image_size: int = 64, **changed: float) -> np.ndarray:
    factors = {name: np.array([value]) for name, value in {**PLAIN, **changed}.items()}
    return sprites.render(np.array([sprites.SHAPES.index(shape)]), factors, image_size)[0]


def _cover(image: np.ndarray) -> np.ndarray:
    # With ink and ground of opposite hues the red channel alone tells the proportion of ink.
    ground = image[:, 0, 0].astype(float)
    channel = np.abs(image.astype(float) - ground[:, None, None]).max((1, 2)).argmax()
    ink = np.abs(image[channel].astype(float) - ground[channel])
    return ink / ink.max()


def test_the_bytes_are_fixed() -> None:
    images = sprites.draw(96).images
    assert hashlib.sha256(images.tobytes()).hexdigest() == (
        "cabc4f3986f367ee795c72a8f129a9798c007e6bdf6a6af662e2c6d780fb6f1a"
    )


def test_a_seed_decides_and_count_does_not() -> None:
    few, many, other = sprites.draw(5, 16), sprites.draw(40, 16), sprites.draw(5, 16, seed=1)
    assert (few.images == many.images[:5]).all()
    assert (few.labels == many.labels[:5]).all()
    assert (few.images != other.images).any()


def test_render_inverts_draw() -> None:
    drawn = sprites.draw(70, 24)
    assert (sprites.render(drawn.labels, drawn.factors, 24) == drawn.images).all()


def test_factors_are_uniform_on_their_ranges() -> None:
    drawn = sprites.draw(4000, 8)
    assert set(drawn.factors) == set(sprites.RANGES)
    for name, (low, high) in sprites.RANGES.items():
        unit = (drawn.factors[name] - low) / (high - low)
        assert unit.min() >= 0 and unit.max() < 1
        assert abs(unit.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 4000)
    counts = np.bincount(drawn.labels, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts / 4000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("shape", sprites.SHAPES)
@pytest.mark.parametrize("size", [0.1, 0.15, 0.2])
def test_every_shape_covers_the_area_of_its_disc(shape: str, size: float) -> None:
    area = _cover(_one(shape, 128, size=size, rotation=0.4)).mean()
    assert area == pytest.approx(np.pi * size**2, rel=0.01)


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_the_centre_moves_with_x_and_y(shape: str) -> None:
    # Moving by a quarter of the width moves every pixel by exactly 16 of 64.
    before, after = _one(shape, x=0.375, y=0.625), _one(shape, x=0.625, y=0.375)
    assert (np.roll(before, (-16, 16), axis=(1, 2)) == after).all()
    weight = _cover(_one(shape, 128, x=0.4, y=0.6))
    middle = (np.arange(128) + 0.5) / 128
    assert (weight.sum(0) @ middle) / weight.sum() == pytest.approx(0.4, abs=1e-3)
    assert (weight.sum(1) @ middle) / weight.sum() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_a_quarter_turn_turns_the_pixels_clockwise(shape: str) -> None:
    turned = _one(shape, rotation=np.pi / 2).astype(int)
    assert np.abs(turned - np.rot90(_one(shape), k=-1, axes=(1, 2))).max() <= 1
    if shape != "square":
        assert np.abs(turned - _one(shape)).max() > 50


def test_shapes_stay_within_the_image() -> None:
    edge = {"size": 0.2, "x": 0.66, "y": 0.66}
    for shape in sprites.SHAPES:
        for rotation in np.linspace(0, 2 * np.pi, 24):
            image = _one(shape, rotation=rotation, **edge)
            assert (image[:, -1] == image[:, :1, 0]).all()
            assert (image[:, :, -1] == image[:, :1, 0]).all()


@pytest.mark.parametrize(("hue", "strongest"), [(0.0, 0), (1 / 3, 1), (2 / 3, 2)])
def test_hues_go_round_the_colour_wheel(hue: float, strongest: int) -> None:
    image = _one("ellipse", hue=hue, background=hue)
    for pixel in (image[:, 32, 32], image[:, 0, 0]):
        others = np.delete(pixel, strongest)
        assert pixel[strongest] > others.max()
        assert others[0] == others[1]
    assert image[:, 32, 32].min() < image[:, 0, 0].min(), "ink is darker than the pale ground"


@pytest.mark.parametrize(("count", "image_size"), [(0, 64), (5, 7)])
def test_too_little_is_refused(count: int, image_size: int) -> None:
    with pytest.raises(InputError, match="--image-size"):
        sprites.draw(count, image_size)
