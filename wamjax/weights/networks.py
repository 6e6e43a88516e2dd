"""Builds the network of every family, and its plain functions of parameters and inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.models import blocks, dit
from wamjax.models.blocks import ExpertSpec
from wamjax.models.dit import DiT
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.shell import GroupSpec
from wamjax.models.t5 import T5Encoder
from wamjax.models.vae.autoencoder import Autoencoder, Sizes
from wamjax.models.visibility import bidirectional

Params = dict[str, Any]
Grid = tuple[int, int, int]  # latent frames, height, width


def picture(s: Mapping[str, Any], grid: Grid) -> DiT:
    """Builds DiT on images."""
    return DiT(
        video_spec=dit.expert(s["width"], s["ffn"]),
        classes=s["classes"],
        time_scale=1.0,
        residual="float32",
        **_common(s, grid, s["channels"], s["outputs"]),
    )


def mmdit(s: Mapping[str, Any], grid: Grid) -> DiT:
    """Builds Stable Diffusion 3."""
    return DiT(
        video_spec=dit.expert(s["width"], s["ffn"], text="joint"),
        text_spec=ExpertSpec("text", s["width"], s["ffn"], **blocks.MMDIT),
        text="joint",
        context_width=s["context_width"],
        pooled_width=s["pooled_width"],
        position_table=tuple(s["position_table"]),
        **_common(s, grid, s["channels"], s["channels"]),
    )


def wan(s: Mapping[str, Any], grid: Grid) -> DiT:
    """Builds Wan 2.1 and 2.2."""
    return DiT(
        video_spec=ExpertSpec("video", s["width"], s["ffn"], **blocks.WAN),
        text="cross",
        text_net="mlp",
        context_width=s["context_width"],
        positions="rope",
        residual="float32",
        **_common(s, grid, s["channels"], s["channels"]),
    )


def cosmos(s: Mapping[str, Any], grid: Grid) -> DiT:
    """Builds Cosmos-Predict2: two masks next to the latents, and raw levels in [0, 1]."""
    spec = ExpertSpec("video", s["width"], s["ffn"], lora_rank=s["lora_rank"], **blocks.COSMOS)
    return DiT(
        video_spec=spec,
        text="cross",
        text_net="none",
        context_width=s["context_width"],
        positions="rope",
        rope_scale=tuple(s["rope_scale"]),
        time_scale=1.0,
        **_common({**s, "freq_dim": s["width"]}, grid, s["channels"] + 2, s["channels"]),
    )


def _common(s: Mapping[str, Any], grid: Grid, inputs: int, outputs: int) -> dict[str, Any]:
    frames, height, width = grid
    return dict(
        groups=(GroupSpec("video", "video", tuple(range(frames))),),
        latent=(height, width, inputs),
        outputs=outputs,
        layers=s["layers"],
        heads=s["heads"],
        head_dim=s["width"] // s["heads"],
        patch=s["patch"],
        freq_dim=s["freq_dim"],
    )


def evaluate(
    network: DiT, params: Params, latents: Array, levels: Array, condition: Mapping[str, Array]
) -> Array:
    """Evaluates a network of pictures once, with full attention."""
    table = bidirectional("video", *(["text"] if network.text == "joint" else []))
    values, told = {"video": latents}, {"video": levels}
    inputs = values, told, dict(condition), table
    return network.apply({"params": params}, *inputs, method="evaluate")["video"]


def denoisers(build: Callable[[Mapping[str, Any], Grid], DiT], s: Mapping[str, Any]):
    """Returns {"denoise": (params, latents (b, t, h, w, c), levels (b, m), condition) -> (b, t, h,
    w, o)}.

    The condition holds those of "label" (b,), "context" (b, s, c), "pooled" (b, c) that the family
    has. There is one level per frame, or one for all; DiT counts levels from 0 to 999, the others
    to 1.
    """

    def denoise(params, latents, levels, condition):
        return evaluate(build(s, latents.shape[1:4]), params, latents, levels, condition)

    return {"denoise": denoise}


def cosmos_denoisers(s: Mapping[str, Any]):
    """Returns `denoisers` of Cosmos; "given" (b, t) in the condition says which are clean."""

    def denoise(params, latents, levels, condition):
        condition = dict(condition)
        masks = condition.pop("given")[..., None, None, None].astype(latents.dtype)
        masks = jnp.broadcast_to(masks, (*latents.shape[:-1], 1))
        latents = jnp.concatenate([latents, masks, jnp.zeros_like(masks)], axis=-1)
        return evaluate(cosmos(s, latents.shape[1:4]), params, latents, levels, condition)

    return {"denoise": denoise}


def denoiser_params(
    build: Callable[[Mapping[str, Any], Grid], DiT], s: Mapping[str, Any]
) -> Params:
    """Returns the parameter shapes of a network of pictures."""
    network = build(s, (1, s["patch"], s["patch"]))
    condition = {
        "label": jnp.zeros(1, jnp.int32),
        "context": jnp.zeros((1, 1, s.get("context_width", 0))),
        "pooled": jnp.zeros((1, s.get("pooled_width", 0))),
    }
    latents = {"video": jnp.zeros((1, 1, *network.latent))}
    table = bidirectional("video", "text")
    return _shapes(
        network, latents, {"video": jnp.zeros((1, 1))}, condition, table, method="evaluate"
    )


def mixture(s: Mapping[str, Any], grid: Grid) -> MixtureOfTransformers:
    """Builds Fast-WAM: video and action expert."""
    frames, height, width = grid
    groups = (
        GroupSpec("first", "video", (0,)),
        GroupSpec("future", "video", tuple(range(1, frames))),
        GroupSpec("action", "action", tuple(range(s["chunk"]))),
    )
    return MixtureOfTransformers(
        video_spec=ExpertSpec("video", s["width"], s["ffn"]),
        action_spec=ExpertSpec("action", s["action_width"], s["action_ffn"]),
        groups=groups,
        layers=s["layers"],
        heads=s["heads"],
        head_dim=s["head_dim"],
        latent=(height, width, s["channels"]),
        action_dim=s["action_dim"],
        context_width=s["context_width"],
        instruction_length=1,
        patch=s["patch"],
        freq_dim=s["freq_dim"],
    )


def mixture_functions(s: Mapping[str, Any]):
    """Returns {"velocities": (params, values, levels, context, proprio, visibility) -> by group}.

    Groups are first (b, 1, h, w, c), future (b, t - 1, h, w, c) and action (b, j, a), all of them
    present; levels (b, m) in [0, 1]. For acting see `wamjax.wam.fast_wam`.
    """

    def velocities(params, values, levels, context, proprio, visibility):
        _, _, height, width, _ = values["first"].shape
        frames = 1 + values["future"].shape[1]
        steps = {**s, "chunk": values["action"].shape[1]}
        network = mixture(steps, (frames, height, width))
        condition = {"context": context, "proprio": proprio}
        inputs = values, levels, condition, visibility
        return network.apply({"params": params}, *inputs, method="evaluate")

    return {"velocities": velocities}


def mixture_params(s: Mapping[str, Any]) -> Params:
    """Returns the parameter shapes of Fast-WAM."""
    network = mixture({**s, "chunk": 1}, (2, s["patch"], s["patch"]))
    latents = jnp.zeros((1, 1, *network.latent))
    actions = jnp.zeros((1, 1, s["action_dim"]))
    values = {"first": latents, "future": latents, "action": actions}
    levels = {g: jnp.zeros((1, 1)) for g in values}
    condition = {
        "context": jnp.zeros((1, 1, s["context_width"])),
        "proprio": jnp.zeros((1, s["proprio_dim"])),
    }
    return _shapes(network, values, levels, condition, bidirectional(*values), method="evaluate")


def text(s: Mapping[str, Any]) -> T5Encoder:
    """Builds T5 v1.0, v1.1 or umT5."""
    return T5Encoder(**s)


def text_functions(s: Mapping[str, Any]):
    """Returns {"encode": (params, ids (b, s), mask (b, s)) -> (b, s, d)}."""

    def encode(params, ids, mask):
        return text(s).apply({"params": params}, ids, mask)

    return {"encode": encode}


def text_params(s: Mapping[str, Any]) -> Params:
    """Returns the parameter shapes of a text encoder."""
    return _shapes(text(s), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))


def autoencoder(s: Mapping[str, Any]) -> Autoencoder:
    """Builds an autoencoder whose encoder outputs mean and log-variance."""
    sizes = vae_sizes(s)
    return Autoencoder(sizes, 2 * sizes.channels)


def vae_sizes(s: Mapping[str, Any]) -> Sizes:
    """Returns `Sizes` from a config, in which tuples are lists."""
    return Sizes(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items()})


def vae_functions(s: Mapping[str, Any]):
    """Returns an autoencoder's functions on pixels in [-1, 1] and raw latents; see `models.codec`
    for bytes.

    {"encode": (params, x (b, f, H, W, 3)) -> mean and log-variance (b, t, h, w, 2 c),
     "decode": (params, z (b, t, h, w, c)) -> (b, f, H, W, 3), not clipped}
    """

    def run(method: str, params: Params, x: Float[Array, "b f h w c"]) -> Array:
        return autoencoder(s).apply({"params": params}, x, method=method)

    return {name: functools.partial(run, name) for name in ("encode", "decode")}


def vae_params(s: Mapping[str, Any]) -> Params:
    """Returns the parameter shapes of an autoencoder."""
    network, sizes = autoencoder(s), vae_sizes(s)
    frames, side = 1 + sizes.time_stride, sizes.space_stride
    return _shapes(network, jnp.zeros((1, frames, side, side, 3)))


def _shapes(network: nn.Module, *inputs: Any, **options: Any) -> Params:
    init = functools.partial(network.init, mutable=["params"], **options)
    return jax.eval_shape(lambda: init(jax.random.key(0), *inputs))["params"]
