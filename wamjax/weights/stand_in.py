"""Writes small random weights in the published formats, to test code that reads published files.

They have the published names (`downloads`) and are processed exactly like real ones: converted,
loaded, sharded. They are not trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax import files as storage
from wamjax.models.tokenizer import EOS, PAD
from wamjax.weights import downloads, families, files, tensor

VAE = dict(width=8, decoder_width=8, blocks=1)
TEXT = dict(ffn=24, layers=2, heads=2, head_dim=8, buckets=8)
_UNKNOWN = "<unk>"


def write(
    checkpoint: storage.Path, family: str, sizes: Mapping[str, Any], texts: Sequence[str] = ()
) -> None:
    """Writes the files of a family, and the file that states its sizes.

    Args:
      checkpoint: parent folder.
      sizes: sizes of the network, as in a config of `wamjax.convert`; the sizes of `VAE` for an
        autoencoder and of `TEXT` for a text encoder are added.
      texts: for a text encoder: prompts whose words its tokenizer knows.
    """
    place = downloads.PLACES[family]
    if place.tokenizer:
        count = _write_tokenizer(checkpoint / place.tokenizer, texts)
        sizes = {**TEXT, "vocabulary": count, **sizes}
    if family.endswith("_vae"):
        sizes = {**VAE, **sizes}
    plan = next(iter(families.plans(family, sizes).values()))
    rng, arrays = np.random.default_rng(0), {}
    for key, shape in plan.published.items():
        fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 0.0
        noise = rng.standard_normal(shape) * (fan_in**-0.5 if fan_in else 0.02)
        scale = len(shape) == 1 and key.endswith(("weight", "gamma"))
        arrays[key] = (noise + scale).astype(np.float32)
    for piece in plan.pieces:
        arrays |= {copy: arrays[piece.theirs] for copy in piece.copies}
    _write_sizes(checkpoint, family, sizes)
    files.write(_file(checkpoint, place), {k: tensor.of(x) for k, x in arrays.items()})


def _file(checkpoint: storage.Path, place: downloads.Place) -> storage.Path:
    if not place.weights:
        return checkpoint / "diffusion_pytorch_model.safetensors"
    out = checkpoint / place.weights.replace("*", "stand_in")
    if not out.suffix:
        out = out / "pytorch_model.bin"
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _write_sizes(checkpoint: storage.Path, family: str, sizes: Mapping[str, Any]) -> None:
    storage.write_text(checkpoint / f"{family}.json", json.dumps(dict(sizes), indent=2) + "\n")


def _write_tokenizer(folder: storage.Path, texts: Sequence[str]) -> int:
    """Writes a ``tokenizer.json`` whose pieces are words; returns the number of pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [PAD, EOS, _UNKNOWN]
    pieces = special + sorted({word for text in texts for word in text.split()})
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(special)
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": {p: i for i, p in enumerate(pieces)},
             "unk_token": _UNKNOWN}  # fmt: skip
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole = {"version": "1.0", **rest, "added_tokens": added,
             "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}  # fmt: skip
    storage.write_text(folder / "tokenizer.json", json.dumps(whole))
    return len(pieces)
