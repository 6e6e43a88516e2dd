"""Builds the codec of a config, for a model that is trained on its latents or tokens."""

from __future__ import annotations

from wamjax.models import codec as codecs
from wamjax.models.codec import Codec
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.training import partition


def codec_of(config) -> Codec:
    """Returns the codec that ``config.model.codec`` names, for a model trained on its latents.

    Raises:
      ValueError: the optimiser would change its parameters.
    """
    return frozen(config, codecs.build(config.model.codec))


def frozen(config, codec: Codec) -> Codec:
    """Returns the codec, after checking that the optimiser does not change it."""
    if isinstance(codec, VAECodec) and partition.trained(config.optim.freeze)("codec/"):
        raise ValueError(
            f"config.model.codec.kind={config.model.codec.kind!r} has parameters, and only "
            "objective.name='codec' trains them: set config.optim.freeze=('codec/.*',)"
        )
    return codec
