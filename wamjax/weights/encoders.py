"""Loads converted encoders as functions for `wamjax.data.precompute` and `wamjax.data.embeddings`.

    python -m wamjax.data.precompute ... --encode=wamjax.weights.encoders:video \\
        --weights=weights/wan22_vae
    python -m wamjax.data.embeddings ... --encode=wamjax.weights.encoders:text \\
        --weights=weights/umt5

``--weights`` is a folder of `wamjax.convert`; for a text encoder, one made with ``--tokenizer``.
Outputs have the dtype of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from wamjax import files
from wamjax.models import tokenizer as tokenizers
from wamjax.weights import api, families, store
from wamjax.weights.codecs import load_codec

Video = Callable[[UInt8[np.ndarray, "b f H W 3"]], Float[Array, "b t h w c"]]
Text = Callable[
    [Sequence[str]], tuple[Float[np.ndarray, "b s width"], Bool[np.ndarray, "b s"]]
]  # fmt: skip
# Family -> whether its text is cleaned as by Wan before it is tokenized.
CLEAN = {"umt5": True, "t5": False, "t5_v1_1": False}


def video(weights: str | os.PathLike) -> Video:
    """Returns a function that encodes clips as latents by a converted autoencoder, normalized as
    the published models expect.

    Raises:
      ValueError: the folder holds another kind of weights.
    """
    codec = load_codec(weights)
    run = jax.jit(lambda codec, clips: codec.encode(clips))
    return lambda clips: run(codec, clips)


def text(weights: str | os.PathLike, length: int) -> Text:
    """Returns a function that encodes texts by a converted T5: the embedding of each of `length`
    tokens, and the mask of tokens.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
      ValueError: the folder holds another kind of weights.
    """
    about, place = store.about(weights), files.path(weights) / store.TOKENIZER
    family = about["family"]
    if family not in CLEAN:
        known = ", ".join(CLEAN)
        raise ValueError(f"{weights} holds weights of {family!r}, not of a text encoder: give a "
                         f"folder of {known}")  # fmt: skip
    if not place.exists():
        raise FileNotFoundError(
            f"{place} does not exist: convert again with --tokenizer=FILE, the spiece.model or "
            "tokenizer.json that was published with the weights"
        )
    tokenize = tokenizers.load(place, CLEAN[family])
    run = jax.jit(families.functions(family, about["sizes"])["encode"])
    params = api.load(family, weights)

    def encode(texts: Sequence[str]):
        ids, mask = tokenize(texts, length)
        return np.asarray(run(params, ids, mask)), mask

    return encode
