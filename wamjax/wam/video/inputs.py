"""Derives a picture model's sizes, and its codec, from the arrays of examples."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from wamjax.data import arrays
from wamjax.data.arrays import ArraySpec
from wamjax.data.sources import data_root
from wamjax.models import codec as codecs
from wamjax.models import dit, palette
from wamjax.models.codec import Codec, PixelCodec
from wamjax.models.palette import Palette
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.wam.codecs import codec_of, frozen


class Inputs(NamedTuple):
    """Holds the parts of a picture model that depend on the arrays of examples.

    Attributes:
      codec: with the number of colours in the data.
      video: (f, H, W, colours) of an example.
      latents: (t, h, w, c) of an example.
      classes: number of classes; 0 if the model is not conditioned on them.
      vocabulary, length, pooled: words, tokens and pooled width of the text; 0 without text.
    """

    codec: Codec
    video: tuple[int, int, int, int]
    latents: tuple[int, int, int, int]
    classes: int
    vocabulary: int
    length: int
    pooled: int


def inputs_of(config, spec: ArraySpec) -> Inputs:
    """Returns the sizes that `config` needs from the arrays of `spec`.

    Raises:
      ValueError: the arrays lack what the config needs; names key and fix.
    """
    model = config.model
    codec = codec_of(config)
    example = pictures_of(spec, codec, config)
    if codec.key == "latents":
        t, h, w, c = example
        video = 1 + (t - 1) * codec.temporal, h * codec.spatial, w * codec.spatial, 3
        if c != codec.channels:
            raise ValueError(
                f"config.model.codec.channels = {codec.channels} must be {c}, like the latents"
            )
    else:
        video = example
        if isinstance(codec, PixelCodec):
            codec = dataclasses.replace(codec, colours=video[-1])
    route = model.text.route
    text = {"tokens": "instruction", "context": "context"}[model.text.kind]
    if route != "none":
        _require(spec, text, f"config.model.text.route={route!r}, text.kind={model.text.kind!r}")
        if model.text.pooled_width:
            _require(spec, "pooled", "config.model.text.pooled_width")
    if model.label:
        _require(spec, "label", "config.model.label=True")
    return Inputs(
        codec=codec,
        video=video,
        latents=codec.shape(*video[:3]),
        classes=spec.sizes["label"] if model.label else 0,
        vocabulary=spec.sizes["instruction"] if route != "none" and text == "instruction" else 0,
        length=spec.shapes[text][0] if route != "none" else 0,
        pooled=model.text.pooled_width if route in dit.POOLED else 0,
    )


def _require(spec: ArraySpec, key: str, reader: str) -> None:
    if key not in spec.shapes:
        raise ValueError(
            f"{reader} needs {key!r} in the data, config.data.arrays has {sorted(spec.shapes)}"
        )


def pictures_of(spec: ArraySpec, codec: Codec, config) -> tuple[int, ...]:
    """Returns the shape of an example, as a codec reads it."""
    if not isinstance(spec, ArraySpec):
        name = config.objective.name
        raise ValueError(f"objective.name={name!r} trains on arrays: set config.data.kind='arrays'")
    kind = f"config.model.codec.kind={config.model.codec.kind!r}"
    _require(spec, codec.key, kind)
    example = tuple(spec.shapes[codec.key])
    if isinstance(codec, VAECodec) and example[-1] != 3:
        raise ValueError(f"{kind} needs pictures of 3 colours, the data has {example[-1]}")
    return example


def tokenizer(config) -> Palette | VAECodec:
    """Returns the discrete codec of a config: a trained one, or a palette, which is stored in the
    data root of the data to which it is fitted.

    Raises:
      ValueError: the config names another codec.
    """
    data, codec = config.data, config.model.codec
    if codec.kind in ("fsq", "vq"):
        return frozen(config, codecs.build(codec))
    if codec.kind != "palette":
        raise ValueError(
            f"tokens need config.model.codec.kind='palette', 'fsq' or 'vq', not {codec.kind!r}"
        )
    name = f"{data.arrays} {codec.patch} {codec.codes}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]

    def video():
        table = arrays.open_table(data)
        rows = np.linspace(0, table.spec.count - 1, min(table.spec.count, 512))
        return table.take(rows.astype(int))["video"]

    path = data_root(data.root) / f"palette-{digest}.npy"
    return palette.ensure(path, video, codec.patch, codec.codes)
