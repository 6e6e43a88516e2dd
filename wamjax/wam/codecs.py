"""The codec of a config, for a model that is trained on what it makes."""

from __future__ import annotations

from wamjax.models import codec as codecs
from wamjax.models.codec import Codec
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.training import partition


def codec_of(config) -> Codec:
    """The codec that ``config.model.codec`` names, of a model that is trained on what it makes.

    Raises:
      ValueError: the optimiser would move its parameters.
    """
    return frozen(config, codecs.build(config.model.codec))


def frozen(config, codec: Codec) -> Codec:
    """The codec; an error if the optimiser moves it."""
    if isinstance(codec, VAECodec) and partition.trained(config.optim.freeze)("codec/"):
        raise ValueError(
            f"config.model.codec.kind={config.model.codec.kind!r} has parameters, which other "
            "objectives than 'codec' keep: set config.optim.freeze=('codec/.*',)"
        )
    return codec
