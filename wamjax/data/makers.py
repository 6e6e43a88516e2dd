"""Makes arrays, by the name in ``config.data.arrays``.

A maker takes the data root and a split, "train" or "test"; its keyword arguments are the
options that follow the name, ``digits:size=8``. An image is a clip of one frame: pictures are
"video" uint8 (N, f, H, W, colours), labels "label" int32 (N,), captions "instruction" int32 (N, n).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from wamjax import files
from wamjax.data import tensors
from wamjax.data.arrays import Arrays, ArraySpec, Table
from wamjax.data.sources import data_root

DIGITS_TEST = 297  # of 1797
TEST_SEED = 2**20  # added to the seed of generated data: its test split


def digits(root: str, split: str, *, size: int = 16) -> Arrays:
    """Loads the 1797 handwritten digits of scikit-learn, 8x8 grey, in ten classes: 1500 and 297.

    Args:
      size: side of the pictures; beyond 8 they have black borders.

    Raises:
      ValueError: the size is less than 8, or odd.
    """
    del root
    if size < 8 or size % 2:
        raise ValueError(f"size = {size} must be even and at least 8, the size of the digits")
    dataset = _library("sklearn.datasets", "scikit-learn").load_digits()
    pictures = np.round(dataset.images * (255 / 16)).astype(np.uint8)  # 17 greys
    pad = (size - 8) // 2
    pictures = np.pad(pictures, ((0, 0), (pad, pad), (pad, pad)))[:, None, ..., None]
    order = np.random.default_rng(0).permutation(len(pictures))
    rows = order[:-DIGITS_TEST] if split == "train" else order[-DIGITS_TEST:]
    arrays = {"video": pictures[rows], "label": dataset.target[rows].astype(np.int32)}
    return Arrays(arrays, {"label": 10})


def clips(
    root: str, split: str, *, count: int = 4096, frames: int = 9, stride: int = 2, size: int = 32,
    seed: int = 0,
) -> Arrays:  # fmt: skip
    """Generates videos of the tabletop world, see `wamjax.envs.tabletop.clips`; the label is the
    task."""
    from wamjax.envs import tabletop
    from wamjax.envs.tabletop.clips import Settings, ensure_clips

    seed += TEST_SEED * (split == "test")
    generated = ensure_clips(Settings(count, frames, stride, size, seed=seed), root)
    arrays = {"video": generated["video"], "label": generated["task"]}
    return Arrays(arrays, {"label": len(tabletop.TASKS)})


def scenes(
    root: str, split: str, *, count: int = 20000, size: int = 32, grid: int = 3, length: int = 16,
    part: str = "train", seed: int = 0,
) -> Arrays:  # fmt: skip
    """Renders scenes with captions, see `wamjax.data.scenes`; `part` selects a part of the
    captions."""
    del root
    from wamjax.data.scenes import VOCABULARY, make

    seed += TEST_SEED * (split == "test")
    rendered = make(count, seed, part, size=size, grid=grid, length=length)
    arrays = {"video": rendered.images[:, None], "instruction": rendered.tokens}
    return Arrays(arrays, {"instruction": len(VOCABULARY)})


def latents(root: str, split: str, *, path: str = "") -> Arrays:
    """Loads latents that were encoded ahead of time, with their conditions.

    Args:
      path: path below the data root: a .safetensors or .npz file or a folder of .npy files, one per
        split if it contains `{split}`; holds "latents" (N, h, w, c) of images or (N, t, h, w, c) of
        video in units of the model, and optionally "label", "instruction" or "context". All but
        .npz is memory-mapped.

    Raises:
      FileNotFoundError, ValueError: the file does not exist, or holds no latents.
    """
    if not path:
        raise ValueError("latents needs a path: set config.data.arrays = 'latents:path=FILE'")
    file = files.below(data_root(root), path.replace("{split}", split))
    if split == "test" and "{split}" not in path:
        raise ValueError(f"there is no test split of {file}; put '{{split}}' into the path")
    arrays = load(file)
    if "latents" not in arrays or arrays["latents"].ndim not in (4, 5):
        shapes = {key: x.shape for key, x in arrays.items()}
        raise ValueError(f"{file} holds no 'latents' (N, h, w, c) or (N, t, h, w, c): {shapes}")
    if arrays["latents"].ndim == 4:
        arrays["latents"] = arrays["latents"][:, None]
    sizes = {"label": int(arrays["label"].max()) + 1} if "label" in arrays else {}
    return Arrays(arrays, sizes)


def load(path: files.Path) -> dict[str, np.ndarray]:
    """Loads arrays by name from a .safetensors or .npz file or a folder of .npy files, without
    pickles.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file has another format, is damaged or holds objects.
    """
    if path.suffix == ".safetensors" and path.exists():
        return tensors.read(path)[0]
    try:
        if path.is_dir():
            arrays = files.glob(path, "*.npy")
            return {file.stem: np.load(files.fetch(file), mmap_mode="r") for file in arrays}
        if path.suffix == ".npz" and path.exists():
            with np.load(files.fetch(path)) as arrays:
                return dict(arrays)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: correct config.data.arrays or config.data.root"
        )
    raise ValueError(f"{path} must be a .safetensors file, a .npz file or a folder of .npy files")


class Pictures:
    """Serves labelled pictures, decoded, cropped square and resized on access.

    Args:
      source: random access to {"image": uint8 (h, w, 1 or 3), "label": int}.
      size: side of the squares.
      classes: number of classes.
    """

    def __init__(self, source, size: int, classes: int):
        self._source, self._size = source, size
        shapes = {"video": (1, size, size, 3), "label": ()}
        dtypes = {"video": "uint8", "label": "int32"}
        self.spec = ArraySpec(shapes, dtypes, {"label": classes}, len(source))

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns a batch of the examples with these numbers."""
        rows = [self._source[int(i)] for i in indices]
        pictures = np.stack([square(np.asarray(row["image"]), self._size) for row in rows])
        labels = np.array([row["label"] for row in rows], np.int32)
        return {"video": pictures[:, None], "label": labels}


def square(picture: np.ndarray, size: int) -> np.ndarray:
    """Crops the middle of a picture (h, w, 1 or 3): uint8 (size, size, 3).

    Source: ``center_crop_arr`` of guided diffusion and DiT: halve with a box filter while the
    picture is at least twice as large, resize bicubically, crop.
    """
    image = Image.fromarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = round(image.width * scale), round(image.height * scale)
    x = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    return x[top : top + size, left : left + size]


def tfds(root: str, split: str, *, name: str = "imagenet2012", size: int = 256) -> Table:
    """Opens labelled pictures of TensorFlow Datasets, prepared as ArrayRecord, without TensorFlow.

    Args:
      name: of the data set; its "test" is the split of that name, else "validation".
      size: side of the squares that they are cropped to.

    Raises:
      ValueError: the data set has no such split, or no pictures with labels.
    """
    library = _library("tensorflow_datasets", "tensorflow-datasets")
    where = str(data_root(root)) if root else None
    builder = library.builder(name, data_dir=where, file_format="array_record")
    names = ["train"] if split == "train" else ["test", "validation"]
    existing = [s for s in names if s in builder.info.splits]
    if not existing or not {"image", "label"} <= set(builder.info.features):
        raise ValueError(
            f"TFDS {name!r} has splits {list(builder.info.splits)} and features "
            f"{list(builder.info.features)}; it needs {names} with 'image' and 'label'"
        )
    source = builder.as_data_source(split=existing[0])
    return Pictures(source, size, builder.info.features["label"].num_classes)


def _library(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"these arrays need {package}: pip install 'wamjax[data]' (or pip install {package})"
        ) from error


MAKERS: dict[str, Callable[..., Table]] = {
    "clips": clips,
    "digits": digits,
    "latents": latents,
    "scenes": scenes,
    "tfds": tfds,
}
