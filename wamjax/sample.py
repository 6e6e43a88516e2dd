"""Generates pictures or clips with a trained model.

    python -m wamjax.sample --workdir=runs/digits --count=100 --guidance=2 --output=runs/digits/two
    python -m wamjax.sample --workdir=runs/digits --label=3
    python -m wamjax.sample --workdir=runs/scenes --caption="a red circle left of a blue square"
    python -m wamjax.sample --workdir=runs/blocks --given=2 --frames=32

Writes samples.png (and samples.mp4 for clips) and samples.npz: "video" as uint8 (n, f, H, W,
colors), or "latents" if there is no decoder, with the conditions of each sample. Uses the moving
average if the run has one. Conditions that you do not set come from the run's test data: captions,
and the first frames that a video scheme needs; class labels cycle.
"""

from __future__ import annotations

from absl import flags

from wamjax import cli
from wamjax.runs import sampling
from wamjax.training import checkpoint


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run to sample from", required=True)
    flags.DEFINE_string("output", None, "folder for the samples; the run's media folder by default")
    flags.DEFINE_integer("count", sampling.COUNT, "number of samples")
    flags.DEFINE_integer("seed", 0, "seed of the samples")
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    flags.DEFINE_integer("label", None, "class of all samples")
    flags.DEFINE_string("caption", None, "caption of all samples")
    flags.DEFINE_integer("given", None, "number of first frames taken from the test data")
    flags.DEFINE_integer("frames", None, "frames per clip, if more than in training")
    flags.DEFINE_float("guidance", None, "classifier-free guidance scale; the run's by default")
    flags.DEFINE_integer("steps", None, "solver steps; the run's by default")
    flags.DEFINE_string("solver", None, "solver; the run's by default")
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    names = ("workdir", "count", "output", "seed", "step", "label", "caption", "given",
             "frames", "guidance", "steps", "solver")  # fmt: skip
    options = {name: getattr(flags.FLAGS, name) for name in names}
    options["ema"] = checkpoint.asked_ema()
    sampling.run(**{name: value for name, value in options.items() if value is not None})


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
