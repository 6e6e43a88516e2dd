"""Finds the files of a published model in its download folder.

One folder holds everything that a method starts from, each file under its published name: for
Fast-WAM the contents of Wan-AI/Wan2.2-TI2V-5B, plus Fast-WAM's own file if available; for Cosmos
Policy those of nvidia/Cosmos-Predict2-2B-Video2World, with google-t5/t5-11b below ``t5-11b/``. A
folder of `wamjax.convert` with the family's name can replace the file.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from wamjax import files as storage
from wamjax.console import say
from wamjax.weights import conversion, files, sizing, store


@dataclasses.dataclass(frozen=True)
class Place:
    """Describes where a family's files are.

    Attributes:
      name: name in caches that were made with it.
      weights: pattern of the file, or name of the folder; "" = the folder itself holds them.
      mark: pattern of a file that shows that they exist.
      origin: what to download, for messages.
      tokenizer: folder of a text encoder's tokenizer.
    """

    name: str
    weights: str
    mark: str
    origin: str
    tokenizer: str = ""


_WAN, _COSMOS = "Wan-AI/Wan2.2-TI2V-5B", "nvidia/Cosmos-Predict2-2B-Video2World"
PLACES: dict[str, Place] = {
    "wan22_ti2v": Place("wan2.2-ti2v", "", "diffusion_pytorch_model*", _WAN),
    "wan22_vae": Place("wan2.2", "Wan2.2_VAE.pth", "Wan2.2_VAE.pth", _WAN),
    "umt5": Place("umt5-xxl", "models_t5_umt5-xxl-*.pth", "models_t5_umt5-xxl-*.pth", _WAN,
                  "google/umt5-xxl"),
    "fast_wam": Place("fast-wam", "*_uncond_*.pt", "*_uncond_*.pt", "Fast-WAM's released policy"),
    "cosmos_predict2": Place("predict2", "model-480p-16fps.pt", "model-480p-16fps.pt", _COSMOS),
    "cosmos_policy": Place("cosmos-policy", "Cosmos-Policy-*.pt", "Cosmos-Policy-*.pt",
                           "nvidia/Cosmos-Policy-LIBERO-Predict2-2B"),
    "wan21_vae": Place("wan2.1", "tokenizer/tokenizer.pth", "tokenizer/tokenizer.pth", _COSMOS),
    "t5": Place("t5-11b", "t5-11b", "t5-11b", "google-t5/t5-11b", "t5-11b"),
}  # fmt: skip


def find(family: str, checkpoint: storage.Path) -> storage.Path | None:
    """Returns the published file or folder of a family in a checkpoint's folder, or None."""
    place = PLACES[family]
    inner = pathlib.PurePosixPath(place.mark)
    paths = storage.glob(checkpoint / inner.parent, inner.name)
    if not paths:
        return None
    return paths[0] if place.weights else checkpoint


def folder_of(family: str, checkpoint: storage.Path | None, folder: storage.Path) -> storage.Path:
    """Returns the folder for the converted weights of a family."""
    own = checkpoint / family if checkpoint is not None else None
    return own if own is not None and (own / store.ABOUT).exists() else folder / family


def require(family: str, checkpoint: storage.Path | None, folder: storage.Path) -> None:
    """Checks that converted weights exist or can be made.

    Raises:
      FileNotFoundError: neither; says what to download.
    """
    if (folder_of(family, checkpoint, folder) / store.ABOUT).exists():
        return
    place = PLACES[family]
    if checkpoint is None or find(family, checkpoint) is None:
        where = f"config.prepare.checkpoint = '{checkpoint or ''}'"
        raise FileNotFoundError(
            f"{where} has no {place.mark!r}, from which {family} is made: download {place.origin} "
            f"and set the key to its folder, or convert it into {folder / family}"
        )
    if place.tokenizer and not (checkpoint / place.tokenizer).exists():
        raise FileNotFoundError(f"{checkpoint} has no {place.tokenizer!r}, the tokenizer of "
                                f"{family}: download all of {place.origin}")  # fmt: skip


def converted(
    family: str, checkpoint: storage.Path | None, folder: storage.Path
) -> storage.Path:
    """Returns the folder of a family's converted weights, and converts them first if necessary.

    Args:
      checkpoint: folder of the published files; FAMILY.json in it has sizes that a file does not
        state, see `wamjax.convert`.
      folder: parent of the converted weights, one folder per family.

    Raises:
      FileNotFoundError: see `require`.
      ValueError: the existing folder was converted from another file.
    """
    require(family, checkpoint, folder)
    out = folder_of(family, checkpoint, folder)
    source = None if checkpoint is None else find(family, checkpoint)
    if (out / store.ABOUT).exists():
        was = store.about(out)["source"]
        if out.parent == folder and source is not None and was != str(source):
            raise ValueError(f"{out} was converted from {was}, not from {source}: remove it, or "
                             "set config.prepare.weights to another folder")  # fmt: skip
        return out
    place, sizes = PLACES[family], checkpoint / f"{family}.json"
    say(f"converting {source} into {out}, once")
    conversion.bring_in(
        family, source, out, sizes if sizes.exists() else None,
        tokenizer=checkpoint / place.tokenizer if place.tokenizer else None,
    )  # fmt: skip
    return out


def sizes(family: str, checkpoint: storage.Path | None, folder: storage.Path) -> Mapping[str, Any]:
    """Returns the sizes of a family's weights, published or converted; {} if there are none."""
    out = folder_of(family, checkpoint, folder)
    if (out / store.ABOUT).exists():
        return store.about(out)["sizes"]
    source = None if checkpoint is None else find(family, checkpoint)
    if source is None:
        return {}
    return sizing.of_file(family, files.read(source).tensors, path=os.fspath(source))
