"""Loads converted autoencoders as codecs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from wamjax.models import codec as codecs
from wamjax.models.codec import Codec
from wamjax.models.vae.bottleneck import Gaussian
from wamjax.training import sharding
from wamjax.weights import api, families, networks, store

VAES = {"sd_vae": "sd", "wan21_vae": "wan2.1", "wan22_vae": "wan2.2"}  # family -> codec kind


def codec_of(about: Mapping[str, Any], where: str | os.PathLike) -> Codec:
    """Returns the codec of a folder of `wamjax.convert`, without its parameters.

    Raises:
      ValueError: the folder holds another kind of weights.
    """
    family = about["family"]
    if family not in VAES:
        raise ValueError(f"{where} holds weights of {family!r}, not of a codec: give a folder "
                         f"of {', '.join(VAES)}")  # fmt: skip
    sizes = networks.vae_sizes(families.sizes(family, about["sizes"]))
    return codecs.PUBLISHED[VAES[family]]().replace(
        sizes=sizes, bottleneck=Gaussian(sizes.channels)
    )


def load_codec(folder: str | os.PathLike, mesh: Mesh | None = None) -> Codec:
    """Loads the codec of a folder of `wamjax.convert`; every device of a mesh holds it whole."""
    about = store.about(folder)
    codec, places = codec_of(about, folder), None
    if mesh is not None:
        shapes = families.family(about["family"]).params(about["sizes"])
        places = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    return codec.bind(api.load(about["family"], folder, shardings=places))
