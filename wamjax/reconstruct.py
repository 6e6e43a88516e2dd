"""Reconstructs held-out clips by a codec that was trained, and measures its latents.

    python -m wamjax.reconstruct --workdir=runs/codec --count=512

Every training of a codec ends with it. Writes media/reconstructions.png, clips over what comes out,
and media/codec.json: psnr in dB, mean and std of the latents by channel, and of a code book the
share of codes in use and their perplexity over all of these clips.

A picture model trains on the latents of such a run: see `use`.
"""

from __future__ import annotations

from absl import flags

from wamjax import cli
from wamjax.runs import reconstruction
from wamjax.training import checkpoint


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("workdir", None, "the run of the codec", required=True)
    flags.DEFINE_integer("count", reconstruction.COUNT, "clips that are reconstructed")
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    asked = flags.FLAGS
    reconstruction.run(asked.workdir, asked.count, asked.step, checkpoint.asked_ema())


if __name__ == "__main__":
    cli.run(main, define_flags)
