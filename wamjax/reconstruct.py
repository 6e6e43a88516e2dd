"""Reconstructs held-out clips with a trained codec and measures its latents.

    python -m wamjax.reconstruct --workdir=runs/codec --count=512

Training a codec ends with this step. Writes media/reconstructions.png, clips above their
reconstructions, and media/codec.json: psnr in dB, mean and std of the latents per channel and, for
a codebook, the share of codes in use and their perplexity over these clips.

A picture model trains on the latents of such a run: see `use`.
"""

from __future__ import annotations

from absl import flags

from wamjax import cli
from wamjax.runs import reconstruction
from wamjax.training import checkpoint


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run of the codec", required=True)
    flags.DEFINE_integer("count", reconstruction.COUNT, "number of clips to reconstruct")
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    reconstruction.run(options.workdir, options.count, options.step, checkpoint.asked_ema())


if __name__ == "__main__":
    cli.run(main, define_flags)
