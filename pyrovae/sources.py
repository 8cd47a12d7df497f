"""Readers: each turns files into one ``Source``, before any split, sampling or scaling.

A reader never guesses quietly: what it cannot read exactly it refuses, saying what it expected,
what it got and what to do.
"""

import gzip
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyrovae import streaming
from pyrovae.errors import InputError

_LEAVE = "Give fewer images, or leave those of a training on disk with --stream."
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Source(NamedTuple):
    """Raw images and how they were published.

    images: ``(N, *x_shape)``; uint8 levels k in 0..L, or float32 in [0, 1] without levels; streamed
    images are not held, and come with what a look through them told.
    levels: L, the largest level, or None. labels: integers ``(N,)``. factors: ``(N,)`` each.
    num_valid, num_test: default sizes. published: which splits the publishers made; their rows lie
    in the order train, valid, test. shuffle_valid: draw the validation images from the training
    ones by the seed, because the publishers' order goes by class.
    """

    images: np.ndarray | streaming.Images
    levels: int | None
    labels: np.ndarray | None = None
    factors: dict[str, np.ndarray] | None = None
    num_valid: int | None = None
    num_test: int | None = None
    published: str = "none"  # none | test | all
    shuffle_valid: bool = False
    contents: streaming.Contents | None = None
    workers: int = 0


# ------------------------------------------------------------------------------- arrays and files


def array(
    images: Any, labels: Any = None, levels: int | None = None, what: str = "images"
) -> Source:
    """Check an array of images and bring it to ``(N, C, H, W)`` or ``(N, F)``.

    images: uint8 levels or floats in [0, 1], of shape (N, H, W), (N, H, W, C), (N, C, H, W) with C
    1 or 3, or (N, F). uint8 that never passes 1 is binary; floats that all lie on {0, 1} or on
    k/255 are kept as those levels. levels: the largest level of uint8 images, if not 255.
    Raises InputError for anything else.
    """
    images = _numpy(images, what)
    images = _channels_first(images, what)
    if images.dtype == np.bool_:
        images = images.astype(np.uint8)
    if images.dtype == np.uint8:
        levels = _largest_level(int(images.max()), levels, what)
    elif levels is not None:
        raise InputError(
            f"{what}: levels={levels} needs uint8 images; got {images.dtype}. "
            "Store the levels 0..L themselves as uint8, or leave levels out."
        )
    elif np.issubdtype(images.dtype, np.floating):
        images, levels = _floats(images, what)
    else:
        raise InputError(
            f"{what}: expected uint8 or floats in [0, 1]; got {images.dtype}. "
            'Convert with images.astype("uint8") or divide by the largest level.'
        )
    return Source(np.ascontiguousarray(images), levels, _labels(labels, len(images), what))


def _largest_level(top: int, levels: int | None, what: str) -> int:
    levels = levels if levels is not None else (1 if top <= 1 else 255)
    if not 1 <= levels <= 255 or top > levels:
        raise InputError(
            f"{what}: expected levels between {max(top, 1)} (the largest value) and 255; "
            f"got levels={levels}. Give the largest level that can occur."
        )
    return levels


def dataset(
    items: Any,
    levels: int | None = None,
    what: str = "images",
    stream: bool = False,
    workers: int = 0,
) -> Source:
    """Read a map-style torch ``Dataset`` whose items are images, or tuples that begin with one.

    An image is a PIL image, or uint8 as an array or a tensor: (H, W), (H, W, C), (C, H, W) with C 1
    or 3, or (F,). Raises InputError for another, and where two have not one shape.
    """
    if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
        raise InputError(
            f"{what}: expected a map-style data set, with __len__ and __getitem__; got "
            f"{type(items).__name__}. Give such a torch.utils.data.Dataset."
        )
    if len(items) == 0:
        raise InputError(f"{what}: expected at least one image; got none. Check the data set.")
    shape = streaming.shape_of(partial(_item, items, None, what), workers)
    images = streaming.Items(partial(_item, items, shape, what), (len(items), *shape), apart=True)
    if stream:
        return _streamed(images, levels, what, workers)
    streaming.check_memory(math.prod(images.shape), what, _LEAVE)
    return array(streaming.gather(images, np.arange(len(items)), 0), levels=levels, what=what)


def _item(items: Any, shape: tuple[int, ...] | None, what: str, row: int) -> np.ndarray:
    image = items[row]
    image = image[0] if isinstance(image, (tuple, list)) else image
    if hasattr(image, "convert"):  # a PIL image
        image = _eight_bits(image, f"{what}, item {row}")
        image = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    image = _numpy(image, f"{what}, item {row}")
    if image.dtype != np.uint8:
        raise InputError(
            f"{what}, item {row}: expected uint8 levels or a PIL image; got {image.dtype}. Leave "
            "out the transform that scales (ToTensor, say): x is levels/255 here."
        )
    image = _channels_first(image[None], f"{what}, item {row}")[0]
    if shape is not None and image.shape != shape:
        raise InputError(
            f"{what}, item {row}: expected shape {shape} like the first; got {image.shape}. Bring "
            "all to one size and to as many channels."
        )
    return image


def _streamed(images: streaming.Images, levels: int | None, what: str, workers: int) -> Source:
    """The source of images that are not held, after one look through them."""
    contents = streaming.contents(images, workers)
    levels = _largest_level(int(contents.levels[-1]), levels, what)
    return Source(images, levels, contents=contents, workers=workers)


def file(path: Path, stream: bool = False, workers: int = 0) -> Source:
    """Read .npy, or .npz with ``images`` (or a single array) and perhaps ``labels``, ``levels``.

    stream: leave a .npy of uint8 where it is.
    """
    if stream:
        return _left(path, workers)
    try:
        if path.suffix == ".npy":
            streaming.check_memory(path.stat().st_size, path.name, _LEAVE)
        with path.open("rb") as opened:  # NumPy leaves a damaged .npz open
            # allow_pickle=False: a pickle can run any program it likes when opened.
            loaded = np.load(opened, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return array(loaded, what=path.name)
            names = [n for n in loaded.files if n not in ("labels", "levels")]
            name = "images" if "images" in names else names[0] if len(names) == 1 else None
            if name is None:
                found = ", ".join(loaded.files) or "nothing"
                raise InputError(
                    f"{path.name}: expected an array named images, or a single array; got {found}. "
                    "Save with numpy.savez(path, images=..., labels=...)."
                )
            labels = loaded["labels"] if "labels" in loaded.files else None
            levels = int(loaded["levels"]) if "levels" in loaded.files else None
            return array(loaded[name], labels, levels, what=path.name)
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own kind
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path.name}: expected a NumPy file of numbers; it cannot be read "
        f"({_first_line(error)}). Save it again with numpy.savez, without objects."
    )


def _left(path: Path, workers: int) -> Source:
    """The source of a .npy that is left where it is."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise InputError(
            f"{path.name}: expected a .npy with --stream; got several arrays in one file. Save one "
            "with numpy.save, or leave --stream out."
        )
    if found.dtype != np.uint8:
        raise InputError(
            f"{path.name}: expected uint8 images with --stream; got {found.dtype}. Save their "
            "levels (of numbers in [0, 1]: (255 * images).round().astype('uint8')), or leave "
            "--stream out."
        )
    if not found.flags.c_contiguous:
        raise InputError(
            f"{path.name}: expected an array in C order with --stream, whose images lie one after "
            "the other; got Fortran order. Save numpy.ascontiguousarray(images)."
        )
    shape = _channels_first(found, path.name).shape
    images = streaming.ArrayFile(path, found.ndim == 4 and shape != found.shape)
    return _streamed(images, None, path.name, workers)


def folder(
    path: Path,
    image_size: int | None = None,
    stream: bool = False,
    workers: int = 0,
) -> Source:
    """Read every image below a folder, in the order of their paths.

    With ``image_size`` each is cut to its central square and resized; without, all must have one
    size. The set is grey when every image in it is (three equal channels count as grey), else RGB.
    stream: decode each as it is needed, and hold none.
    """
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(
            f"{path.name}: expected a folder with images ({' '.join(IMAGE_SUFFIXES)}); got none. "
            "Check the path given to --data."
        )
    height, width = open_image(paths[0], image_size).shape[:2]
    read = partial(_picture, paths, image_size, (height, width), 3)
    images = streaming.Items(read, (len(paths), 3, height, width))
    if not stream:
        streaming.check_memory(math.prod(images.shape), path.name, _LEAVE)
        stack = streaming.gather(images, np.arange(len(paths)), 0)
        if (stack == stack[:, :1]).all():
            stack = np.ascontiguousarray(stack[:, :1])
        return Source(stack, levels=255)
    source = _streamed(images, 255, path.name, workers)
    if source.contents is None or not source.contents.grey:
        return source
    read = partial(_picture, paths, image_size, (height, width), 1)
    return source._replace(
        images=streaming.Items(read, (len(paths), 1, height, width)),
        contents=source.contents._replace(fingerprint=source.contents.grey_fingerprint),
    )


def _picture(
    paths: list[Path], image_size: int | None, size: tuple[int, int], channels: int, row: int
) -> np.ndarray:
    image = open_image(paths[row], image_size)
    if image.shape[:2] != size:
        (h, w), (h0, w0) = image.shape[:2], size
        raise InputError(
            f"{paths[row].name}: expected {w0}×{h0} pixels like {paths[0].name}; got {w}×{h}. "
            "Bring all to one size with --image-size, such as --image-size 64."
        )
    if channels == 1 and (image != image[..., :1]).any():
        raise InputError(
            f"{paths[row].name}: expected a grey image, as all were when they were looked through; "
            "got a coloured one. Put it back as it was, or start again."
        )
    return image[..., :channels].transpose(2, 0, 1)


def fit_square(image: Any, image_size: int, crop: int | None = None) -> Any:
    """The central square (of ``crop`` pixels, or the largest) of a PIL image, resized."""
    from PIL import Image

    width, height = image.size
    side = crop or min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.BICUBIC)


def open_image(path: Path, image_size: int | None) -> np.ndarray:
    """The levels of one picture file, squared to ``image_size`` if given; InputError naming it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
            image = _eight_bits(image, path.name).convert("RGB")
    except InputError:
        raise
    except Exception as error:  # each format's decoder raises its own kind
        raise InputError(
            f"{path.name}: expected an image; it cannot be read ({_first_line(error)}). "
            "Repair it or move it out of the folder."
        ) from error
    return np.asarray(image if image_size is None else fit_square(image, image_size))


def _eight_bits(image: Any, what: str) -> Any:
    """A PIL image as it is, if nothing of it is lost as 8 bits a channel without transparency."""
    # 16- and 32-bit modes would lose their lower bits without a word.
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{what}: expected 8 bits a channel; got mode {image.mode}. "
            "Convert it to 8 bits, or store the images as floats in a .npz."
        )
    alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if alpha and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise InputError(
            f"{what}: expected opaque pixels; got transparent ones. "
            "Flatten the image on a background of your choice."
        )
    return image


def _numpy(images: Any, what: str) -> np.ndarray:
    if hasattr(images, "detach"):
        images = images.detach().cpu().numpy()
    if not isinstance(images, np.ndarray):
        raise InputError(
            f"{what}: expected a NumPy array or a torch tensor; got {type(images).__name__}. "
            "Convert with numpy.asarray(images)."
        )
    return images


def _channels_first(images: np.ndarray, what: str) -> np.ndarray:
    shape = images.shape
    if 0 in shape:
        raise InputError(
            f"{what}: expected at least one image; got shape {shape}. Check the array."
        )
    if images.ndim == 2:
        return images
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise InputError(
                f"{what}: shape {shape} can be read as (N, C, H, W) and as (N, H, W, C). "
                "Flatten the images to (N, F) to say that there is no grid."
            )
        if first or last:
            return images if first else images.transpose(0, 3, 1, 2)
    raise InputError(
        f"{what}: expected shape (N, H, W), (N, H, W, C), (N, C, H, W) with C 1 or 3, or (N, F); "
        f"got {shape}. Reshape the array, or keep 1 or 3 channels."
    )


def _floats(images: np.ndarray, what: str) -> tuple[np.ndarray, int | None]:
    if not np.isfinite(images).all():
        raise InputError(
            f"{what}: expected finite values; got {int((~np.isfinite(images)).sum()):,} NaN or "
            "infinite ones. Remove or repair those images."
        )
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise InputError(
            f"{what}: expected floats in [0, 1]; got values from {low:.4g} to {high:.4g}. "
            "Rescale them, or store 8-bit images as uint8."
        )
    images = images.astype(np.float32)
    for levels in (1, 255):
        grid = np.rint(images * levels)
        # Only values that are k/L to the last float32 bit or two: a near miss is not a grid.
        if np.abs(grid / levels - images).max() <= 2e-7:
            return grid.astype(np.uint8), levels
    return images, None


def _labels(labels: Any, count: int, what: str) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(_numpy(labels, f"{what}: labels") if hasattr(labels, "detach") else labels)
    if labels.dtype.kind in "US":
        labels = np.unique(labels, return_inverse=True)[1]
    if labels.shape != (count,) or labels.dtype.kind not in "iub":
        raise InputError(
            f"{what}: expected labels as {count:,} integers or names; got {labels.dtype} of shape "
            f"{labels.shape}. Give one label for each image, or none at all."
        )
    return labels.astype(np.int64)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# ------------------------------------------------------------------------------ published data sets


def digits() -> Source:
    """8×8 handwritten digits with 17 levels, shipped with scikit-learn; no published split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return Source(images, 16, bunch.target.astype(np.int64), num_valid=200, num_test=300)


def idx(root: Path, download: bool, folder_name: str, flag: str) -> Source:
    """MNIST and its look-alikes, from idx files; the last 10,000 training images validate."""
    raw = root / folder_name / "raw"
    names = [
        f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    found = [_idx_path(raw, name) for name in names]
    if None in found and download:
        _torchvision(folder_name, root, flag, download=True)
        found = [_idx_path(raw, name) for name in names]
    arrays = [_read_idx(path) for path in found if path is not None]
    if len(arrays) < len(names):
        raise _missing(flag, raw)
    images = np.concatenate([arrays[0], arrays[2]])[:, None]
    labels = np.concatenate([arrays[1], arrays[3]])
    return array(images, labels, 255, flag)._replace(
        num_valid=10_000, num_test=len(arrays[2]), published="test"
    )


def _idx_path(raw: Path, name: str) -> Path | None:
    paths = (raw / f"{name}-ubyte", raw / f"{name}-ubyte.gz")
    return next((path for path in paths if path.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    # An idx file is 0 0 type rank, then one big-endian size per axis, then the bytes; 8 is uint8.
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rank = content[3]
        shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, offset=4))
        if content[:3] != b"\x00\x00\x08" or len(content) != 4 + 4 * rank + math.prod(shape):
            raise ValueError("header and length disagree")
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise InputError(
            f"{path.name}: expected a complete idx file of bytes; it cannot be read "
            f"({_first_line(error)}). Delete it and fetch it again with --download."
        ) from error
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def binarized_mnist(root: Path, download: bool) -> Source:
    """Larochelle's static binarisation of MNIST; rows without labels, in an order of their own."""
    place = root / "BinarizedMNIST"
    paths = [place / f"binarized_mnist_{part}.amat" for part in ("train", "valid", "test")]
    if not all(path.is_file() for path in paths):
        raise InputError(
            f"binarized-mnist: expected binarized_mnist_{{train,valid,test}}.amat in {place}; not "
            "found, and --download cannot fetch them. Get them from "
            "www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist, or set --data-root."
        )
    parts = []
    for path in paths:
        text = np.fromfile(path, np.uint8)
        # One character a pixel, so dropping the white space is the whole parser.
        bits = text[text > ord(" ")] - ord("0")
        if bits.size == 0 or bits.size % 784 or bits.max() > 1:
            raise InputError(
                f"{path.name}: expected rows of 784 zeros and ones; got something else. "
                "Fetch the file again."
            )
        parts.append(bits.reshape(-1, 1, 28, 28))
    return Source(
        np.concatenate(parts), 1, num_valid=len(parts[1]), num_test=len(parts[2]), published="all"
    )


def cifar10(root: Path, download: bool) -> Source:
    """32×32 colour photographs of ten things; the last 5,000 training images validate."""
    parts = [_torchvision("CIFAR10", root, "cifar10", download, train=t) for t in (True, False)]
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    labels = np.concatenate([part.targets for part in parts])
    return array(images, labels, 255, "cifar10")._replace(
        num_valid=5_000, num_test=len(parts[1].data), published="test"
    )


def svhn(root: Path, download: bool) -> Source:
    """32×32 colour photographs of house numbers; the last 7,257 training images validate."""
    parts = [_torchvision("SVHN", root, "svhn", download, split=s) for s in ("train", "test")]
    images = np.concatenate([part.data for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return array(images, labels, 255, "svhn")._replace(
        num_valid=7_257, num_test=len(parts[1].data), published="test"
    )


def omniglot(root: Path, download: bool, image_size: int = 28) -> Source:
    """Characters, strokes 1 on 0, resized; background set trains, evaluation set tests.

    Labels are the characters. The validation images are drawn from the background set by the
    seed. The widely used 24,345 / 8,070 split is another one: numbers do not compare with it.
    """
    parts = [
        _torchvision("Omniglot", root, "omniglot", download, background=b) for b in (True, False)
    ]
    pictures, classes = zip(*(_pictures(part, "L", image_size) for part in parts), strict=True)
    labels = np.concatenate([classes[0], np.asarray(classes[1]) + max(classes[0]) + 1])
    return array(255 - np.concatenate(pictures), labels, 255, "omniglot")._replace(
        num_valid=1_280, num_test=len(parts[1]), published="test", shuffle_valid=True
    )


def celeba(root: Path, download: bool, image_size: int = 64) -> Source:
    """Faces, the central 148×148 pixels resized; published train, validation and test sets."""
    names = ("train", "valid", "test")
    parts = [_torchvision("CelebA", root, "celeba", download, split=s) for s in names]
    images = np.concatenate([_pictures(part, "RGB", image_size, crop=148)[0] for part in parts])
    return array(images.transpose(0, 3, 1, 2), None, 255, "celeba")._replace(
        num_valid=len(parts[1]), num_test=len(parts[2]), published="all"
    )


def _pictures(
    part: Any, mode: str, image_size: int, crop: int | None = None
) -> tuple[np.ndarray, list[Any]]:
    # One pass, filling one array: CelebA has 202,599 files.
    channels = (3,) if mode == "RGB" else ()
    images = np.empty((len(part), image_size, image_size, *channels), np.uint8)
    targets = []
    for i in range(len(part)):
        image, target = part[i]
        images[i] = np.asarray(fit_square(image.convert(mode), image_size, crop))
        targets.append(target)
    return images, targets


def _torchvision(name: str, root: Path, flag: str, download: bool, **options: Any) -> Any:
    try:
        from torchvision import datasets
    except Exception as error:  # beside the CPU-only torch wheel it fails with a RuntimeError
        raise InputError(
            f"{flag}: expected a torchvision that imports; it fails ({_first_line(error)}). "
            "Install the torchvision built for this torch, or give the images as a .npz."
        ) from error
    try:
        return getattr(datasets, name)(root, download=download, **options)
    except (RuntimeError, OSError) as error:
        if not download:
            raise _missing(flag, root) from error
        raise InputError(
            f"{flag}: expected to download it into {root}; that failed ({_first_line(error)}). "
            "Check the network, or put the files there by hand."
        ) from error


def _missing(flag: str, place: Path) -> InputError:
    return InputError(
        f"{flag}: expected its files in {place}; not found. "
        "Name the folder that holds them with --data-root, or fetch them with --download."
    )
