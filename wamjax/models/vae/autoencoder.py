"""Defines one convolutional encoder and decoder for the SD, Wan 2.1 and Wan 2.2 autoencoders.

All three have the same structure: convolution, levels of residual blocks with resampling between
them, a middle with attention, norm, convolution. `Sizes.style` lists the differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
from einops import rearrange
from jaxtyping import Array, Float

from wamjax.models.vae.blocks import Down, Middle, Residual, Up, average_down, repeat_up
from wamjax.models.vae.layers import ChannelNorm, Conv, GroupNorm

STYLES = "image", "causal", "residual"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Holds the sizes of an autoencoder.

    Attributes:
      style: "image", every frame separately, with group norms (SD); "causal", convolutions that see
        the past, with channel norms (Wan 2.1); "residual", the same with parameter-free shortcuts
        around every level (Wan 2.2).
      channels: channels of a latent.
      width, decoder_width: channels of the widest grid; the decoder's is `width` if 0.
      multipliers: factors on the width, level by level; the grid halves between levels.
      blocks: residual blocks per level; the decoder has one more.
      temporal: for each halving of the grid, whether the frames are halved too.
      patch: side of the square of pixels that is folded into channels first.
      groups: number of groups in the group norms.
    """

    style: str
    channels: int
    width: int
    decoder_width: int = 0
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    groups: int = 32

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is not one of {STYLES}")
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(
                f"temporal = {self.temporal} must have one entry less than multipliers = "
                f"{self.multipliers}: one for each halving of the grid"
            )
        if self.style == "image" and any(self.temporal):
            raise ValueError(f"temporal = {self.temporal} must be all False with style 'image', "
                             "which encodes every frame separately")  # fmt: skip

    @property
    def space_stride(self) -> int:
        """Returns the pixels along each side of a latent."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def time_stride(self) -> int:
        """Returns the frames per latent after the first."""
        return 2 ** sum(self.temporal)

    @property
    def kernel(self) -> tuple[int, ...]:
        return (3, 3) if self.style == "image" else (3, 3, 3)

    @property
    def pointwise(self) -> tuple[int, ...]:
        return (1,) * len(self.kernel)

    @property
    def norm(self) -> Callable[..., nn.Module]:
        if self.style == "image":
            return lambda name: GroupNorm(self.groups, name=name)
        return lambda name: ChannelNorm(name=name)

    def check_frames(self, frames: int, first: bool = True) -> None:
        """Raises ValueError for a clip or a chunk that does not divide into latents."""
        stride = self.time_stride
        if frames < 1 or (frames - first) % stride:
            rule = f"{stride} k + 1 frames" if first else f"{stride} k frames after the first chunk"
            raise ValueError(f"the clip has {frames} frames, the autoencoder takes {rule}: drop or "
                             "repeat frames to get such a number")  # fmt: skip

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (t, h, w, c) of a clip in pixels; raises ValueError if the clip does not
        divide."""
        self.check_frames(frames)
        side = self.space_stride
        if height % side or width % side:
            raise ValueError(f"pictures of {height}x{width} do not divide by {side}: resize them "
                             "to multiples of it")  # fmt: skip
        return 1 + (frames - 1) // self.time_stride, height // side, width // side, self.channels


class Encoder(nn.Module):
    """Encodes pixels to `features` channels on the grid of latents."""

    sizes: Sizes
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b f H W i"], first: bool) -> Float[Array, "b t h w o"]:
        s = self.sizes
        x = Conv(s.width, s.kernel, name="conv_in")(x, first)
        for level, multiplier in enumerate(s.multipliers):
            x = DownLevel(s, level, s.width * multiplier, name=f"down_{level}")(x, first)
        x = Middle(s.kernel, s.norm, name="mid")(x, first)
        x = nn.silu(s.norm(name="norm_out")(x))
        return Conv(self.features, s.kernel, name="conv_out")(x, first)


class DownLevel(nn.Module):
    """Applies residual blocks, then halves the grid, except in the last level."""

    sizes: Sizes
    level: int
    features: int

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        s, inputs = self.sizes, x
        last = self.level == len(s.multipliers) - 1
        time = not last and s.temporal[self.level]
        for i in range(s.blocks):
            x = Residual(self.features, s.kernel, s.norm, name=f"res_{i}")(x, first)
        if not last:
            x = Down(time, name="down")(x, first)
        if s.style == "residual":
            x += average_down(inputs, self.features, 1 + time, 2 - last, first)
        return x


class Decoder(nn.Module):
    """Decodes latents to pixels; not clipped."""

    sizes: Sizes
    features: int

    @nn.compact
    def __call__(self, z: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b f H W o"]:
        s = self.sizes
        widths = [(s.decoder_width or s.width) * m for m in reversed(s.multipliers)]
        x = Conv(widths[0], s.kernel, name="conv_in")(z, first)
        x = Middle(s.kernel, s.norm, name="mid")(x, first)
        for level, width in enumerate(widths):
            x = UpLevel(s, level, width, name=f"up_{level}")(x, first)
        x = nn.silu(s.norm(name="norm_out")(x))
        return Conv(self.features, s.kernel, name="conv_out")(x, first)


class UpLevel(nn.Module):
    """Applies residual blocks, then doubles the grid, except in the last level."""

    sizes: Sizes
    level: int
    features: int

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        s, inputs = self.sizes, x
        last = self.level == len(s.multipliers) - 1
        for i in range(s.blocks + 1):
            x = Residual(self.features, s.kernel, s.norm, name=f"res_{i}")(x, first)
        if last:
            return x
        time = s.temporal[-1 - self.level]
        width = self.features // 2 if s.style == "causal" else self.features
        x = Up(width, time, name="up")(x, first)
        if s.style == "residual":
            x += repeat_up(inputs, self.features, 1 + time, 2, first)
        return x


class Autoencoder(nn.Module):
    """Joins encoder and decoder, with a pointwise convolution on each side of the latents.

    Attributes:
      features: output channels of the encoder: mean and log-variance of `sizes.channels` latents,
        or whatever the bottleneck needs.
    """

    sizes: Sizes
    features: int

    def setup(self):
        s = self.sizes
        self.encoder = Encoder(s, self.features)
        self.decoder = Decoder(s, 3 * s.patch**2)
        self.quant = Conv(self.features, s.pointwise)
        self.post_quant = Conv(s.channels, s.pointwise)

    def __call__(self, x: Float[Array, "b f H W 3"]) -> Float[Array, "b f H W 3"]:
        """Uses every parameter, for `init`; the first channels of the encoding serve as latents."""
        return self.decode(self.encode(x)[..., : self.sizes.channels])

    def encode(self, x: Float[Array, "b f H W 3"], first: bool = True) -> Float[Array, "b t h w o"]:
        """Returns the encoder's output for pixels in [-1, 1]; see `wamjax.models.vae.bottleneck`.

        Raises:
          ValueError: frames or pictures do not divide into latents.
        """
        self.sizes.check_frames(x.shape[1], first)
        self.sizes.latent_shape(1, *x.shape[2:4])
        p = self.sizes.patch
        # Wan 2.2's order of channels: colour, then column, then row within the square.
        x = rearrange(x, "b f (h p) (w q) c -> b f h w (c q p)", p=p, q=p)
        return self.quant(self.encoder(x, first))

    def decode(self, z: Float[Array, "b t h w c"], first: bool = True) -> Float[Array, "b f H W 3"]:
        """Returns pixels, roughly in [-1, 1] and not clipped."""
        p = self.sizes.patch
        x = self.decoder(self.post_quant(z), first)
        return rearrange(x, "b f h w (c q p) -> b f (h p) (w q) c", p=p, q=p)
