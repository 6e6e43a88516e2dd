"""Collects demonstrations of a world's scripted expert as a data set.

    python -m wamjax.collect --out=DIR --episodes=600 --tasks=pick_red,reach_red --noise=0.1

The same settings give an identical data set. An interrupted collection leaves nothing behind.
"""

from __future__ import annotations

from collections import Counter

from absl import flags

from wamjax import cli
from wamjax.data.records import Reader
from wamjax.envs.collection import Settings, collect


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("out", None, "folder of the data set; must not exist")
    flags.DEFINE_alias("workdir", "out")
    flags.DEFINE_string("env", "tabletop", "world, by name or as module:attribute")
    flags.DEFINE_list("tasks", [], "tasks of the world; all by default")
    flags.DEFINE_integer("episodes", 600, "total number of episodes, the same number for each task")
    flags.DEFINE_float("noise", 0.0, "standard deviation of the noise on the expert's actions")
    flags.DEFINE_integer("seed", 0, "seed; the same seed gives an identical data set")
    flags.DEFINE_bool(
        "intended", False, "label steps with the expert's intended action, not the noisy one"
    )
    flags.DEFINE_bool("action_free", False, "store video and proprio, but no actions")
    flags.DEFINE_bool("keep_failures", False, "also keep failed episodes")
    flags.DEFINE_float(
        "confusion", 0.0, "share of episodes in which the expert confuses look-alike targets"
    )
    flags.mark_flag_as_required("out")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    values = flags.FLAGS
    settings = Settings(
        env=values.env,
        tasks=tuple(values.tasks),
        episodes=values.episodes,
        noise=values.noise,
        seed=values.seed,
        action_free=values.action_free,
        keep_failures=values.keep_failures,
        intended=values.intended,
        confusion=values.confusion,
    )
    summary = collect(values.out, settings)
    index = Reader(values.out).index
    for task, count in sorted(Counter(index["tasks"]).items()):
        print(f"  {task:32} {count:6} episodes")
    print(", ".join(f"{k} {v}" for k, v in summary.items()))
    print(f"wrote {values.out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
