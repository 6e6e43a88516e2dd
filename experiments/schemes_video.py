"""Compares the families of video models on clips of the tabletop, at one budget.

    python experiments/schemes_video.py --workdir=runs/schemes
    python experiments/schemes_video.py --workdir=runs/schemes --schemes=blocks,tokens --seeds=0,1
    python experiments/schemes_video.py --workdir=runs/schemes --table_only

Trains `configs/video_tabletop.py` in every scheme and `configs/video_tokens.py` ("tokens"),
equally long: about 10 minutes each on one core, times --budget. Then each continues held-out clips
from as many first frames as it accepts, none, one or two, with the task as its class. Measured are
the error of every frame, Frechet distance of clip features from the training data's, and network
passes, FLOPs and time per clip. Schemes that generate chunk by chunk also continue to twice the
length of their training; there the second half is scored. Scoring takes about 3 minutes per scheme.

Writes table.md, table.json, errors.png (by frame), clips.png and long.png (of the same clips).
Everything can be resumed, between runs and within each. A clip has many futures: the error punishes
a sharp one that did not happen more than a blur, so read it together with the distance. The
distances are comparable only within one table and for equal numbers of frames.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time

import jax
import numpy as np
import schemes_table
import study
from absl import flags

from wamjax import cli
from wamjax import config as configs

CONFIGS = pathlib.Path(__file__).parent / "configs"
# First frames that a scheme can be given: a chunk of "blocks" is two.
GIVEN = {
    "diffusion": (0,),
    "image_to_video": (1,),
    "forcing": (0, 1, 2),
    "forcing_causal": (0, 1, 2),
    "blocks": (0, 2),
    "tokens": (0, 1, 2),
}
LONG = {"forcing_causal": 2, "blocks": 2, "tokens": 2}  # those that can go on, and frames given
STEPS = dict.fromkeys(GIVEN, 1400) | {"tokens": 700}
BATCH, SHOWN = 32, 3  # clips of one program; clips in each picture


# ---- data and the judge ----


def clips(config, split: str, count: int, longer: int = 1) -> dict[str, np.ndarray]:
    """Returns the first clips of a split, or as many that are `longer` times as long."""
    from wamjax.data import arrays, makers

    table = arrays.open_table(config.data, split)
    if longer > 1:
        frames, size, *_ = table.spec.shapes["video"]
        options = {"count": count, "frames": longer * frames, "size": size}
        table = makers.clips(config.data.root, split, **options)
    return table.take(np.arange(min(count, table.spec.count)))


def judge(workdir: pathlib.Path, config):
    """Returns ``video -> features`` of this study's clip network, trained once on training data."""
    from wamjax import tree
    from wamjax.data import arrays
    from wamjax.scores import video

    spec = arrays.open_table(config.data).spec
    network = video.clip_network(spec.sizes["label"], spec.shapes["video"][1])
    path = workdir / "judge.npz"
    if not path.exists():
        data = clips(config, "train", spec.count)
        rng, steps = jax.random.key(0), min(600, spec.count)
        made = video.fit_clips(network, data["video"], data["label"], steps, rng)
        np.savez(path, **{k: np.asarray(v) for k, v in tree.flatten(made).items()})
    with np.load(path) as flat:
        params = tree.unflatten(dict(flat))
    return lambda some: video.clip_outputs(network, params, some).features


def score(video, truth, given: int, real, features) -> dict:
    """Returns the Frechet distance, and errors of the generated frames; for long clips, of the
    second half.

    Args:
      truth: the same clips in truth.
      given: number of leading frames of `truth` that the model saw.
      real: clips of the training data, as long as those that the judge sees.
      features: see `judge`.

    Returns:
      frechet (mean, low, high); where frames were given also mse of each frame after those, and
      psnr (mean, low, high) in dB of their mean.
    """
    from wamjax.scores import frechet
    from wamjax.scores import video as scores
    from wamjax.viz.intervals import bootstrap

    scored = real.shape[1]
    distance = frechet.interval(features(video[:, -scored:]), features(real))
    if not given:
        return {"frechet": distance}
    errors = scores.squared_error(video[:, given:], truth[:, given:])
    mean, low, high = bootstrap([errors[:, -scored:].mean(axis=1)])
    psnr = [float(scores.psnr(np.float64(x))) for x in (mean, high, low)]
    return {"frechet": distance, "mse": errors.mean(axis=0).tolist(), "psnr": psnr}


# ---- a run ----


def measure(run: pathlib.Path, scheme: str, count: int, references: int) -> dict:
    """Writes all scores of a run to scores.json, and its clips to clips.npz."""
    from wamjax import tree
    from wamjax.runs import sampling

    path = run / "scores.json"
    if path.exists():
        return json.loads(path.read_text())
    sampler, config = sampling.load(run)
    features = judge(run.parent, config)
    result = {
        "clips": count,
        "parameters": tree.count(sampler.params),
        "training": training(run, sampler, config),
    }
    made = {}
    cases = [(str(given), given, 1) for given in GIVEN[scheme]]
    cases += [("long", LONG[scheme], 2)] if scheme in LONG else []
    for name, given, longer in cases:
        held = clips(config, "test", count, longer)
        real = clips(config, "train", references, longer)["video"]
        made[name], cost = draw(sampler, held, given)
        real = real[:, -sampler.objective.frames :]
        scores = score(made[name], held["video"], given, real, features)
        result[name] = {"given": given} | cost | scores
    np.savez_compressed(run / "clips.npz", **{k: v[:SHOWN] for k, v in made.items()})
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def training(run: pathlib.Path, sampler, config) -> dict[str, float]:
    """Returns the cost of the run: model FLOPs and seconds of all steps."""
    from wamjax import doctor
    from wamjax.training import metrics

    examples = config.total_steps * config.data.batch_size
    steps = [row["step_time"] for row in metrics.read(run) if "step_time" in row]
    each = doctor.work(sampler.objective, config, sampler.params)["train"]
    return {"flops": each * examples, "seconds": float(np.mean(steps)) * config.total_steps}


def draw(sampler, held: dict[str, np.ndarray], given: int) -> tuple[np.ndarray, dict]:
    """Continues clips from their first frames; also measures the cost of a clip."""
    from wamjax import flops
    from wamjax.runs import sampling

    truth, count = held["video"], len(held["label"])
    frames = truth.shape[1] if truth.shape[1] > sampler.objective.frames else 0
    parts, times = [], []
    for start in range(0, count, BATCH):
        # The last batch is padded, so there is one program.
        rows = np.arange(start, start + BATCH) % count
        condition, first = {"label": held["label"][rows]}, truth[rows, :given] if given else None
        begin = time.perf_counter()
        parts.append(sampling.draw(sampler, condition, BATCH, start, first, BATCH, frames))
        times.append(time.perf_counter() - begin)
    one = jax.tree.map(lambda x: x[:1], (condition, first))
    program = functools.partial(sampling.program, count=1, frames=frames)
    work = flops.count(program, sampler, *one, jax.random.key(0))
    cost = {
        "passes": sampler.objective.passes(given, truth.shape[1]),
        "flops": work,
        # Leave out the first batch, which compiles.
        "seconds": float(np.median(times[1:] or times)) / BATCH,
    }
    return np.concatenate(parts)[:count], cost


# ---- all runs ----


def table(workdir: pathlib.Path, references: int) -> str:
    """Collects all finished runs; writes table.json, table.md and pictures; returns the table."""
    rows: dict[str, list[dict]] = {}
    for path in sorted(workdir.glob("*/scores.json")):
        rows.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(json.loads(path.read_text()))
    if not rows:
        return "no run has been measured yet"
    rows = {scheme: rows[scheme] for scheme in GIVEN if scheme in rows}
    config = configs.load(min(workdir.glob("*/scores.json")).parent / "config.json")
    bases = baselines(workdir, config, next(iter(rows.values()))[0]["clips"], references)
    text = schemes_table.text(rows, bases, BATCH)
    (workdir / "table.md").write_text(text + "\n")
    whole = {"rows": rows, "baselines": bases}
    (workdir / "table.json").write_text(json.dumps(whole, indent=2) + "\n")
    schemes_table.curves(workdir / "errors.png", rows, bases)
    for name, longer in (("clips", 1), ("long", 2)):
        given = {s: (GIVEN[s][-1] if longer == 1 else LONG.get(s)) for s in rows}
        given = {scheme: n for scheme, n in given.items() if n is not None}
        if given:
            truth = clips(config, "test", SHOWN, longer)["video"]
            schemes_table.pictures(workdir, name, truth, given)
    return text


def baselines(workdir: pathlib.Path, config, count: int, references: int) -> dict[str, dict]:
    """Returns scores of true clips, and of the last given frame repeated; computed once."""
    from wamjax.scores.video import copy_last

    path = workdir / "baselines.json"
    if path.exists():
        return json.loads(path.read_text())
    features, out = judge(workdir, config), {}
    for name, given, longer in (("0", 0, 1), ("1", 1, 1), ("2", 2, 1), ("long", 2, 2)):
        truth = clips(config, "test", count, longer)["video"]
        real = clips(config, "train", references, longer)["video"]
        real = real[:, -(real.shape[1] // longer) :]
        out[name] = {"held-out clips": score(truth, truth, 0, real, features)}
        if given:
            copied = score(copy_last(truth, given), truth, given, real, features)
            out[name]["copying"] = {"given": given} | copied
    path.write_text(json.dumps(out, indent=2) + "\n")
    return out


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/schemes", GIVEN, "schemes")
    flags.DEFINE_float("budget", 1.0, "factor on the steps of every training")
    flags.DEFINE_integer("count", 256, "held-out clips of each cell")
    flags.DEFINE_integer("references", 1024, "clips of the training data that those are held to")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS

    def each(scheme: str, seed: str, run: pathlib.Path) -> None:
        steps = f"steps={round(STEPS[scheme] * options.budget)}"
        if scheme == "tokens":
            study.train(CONFIGS / "video_tokens.py", steps, seed, run)
        else:
            study.train(CONFIGS / "video_tabletop.py", f"scheme={scheme},{steps}", seed, run)
        measure(run, scheme, options.count, options.references)

    study.run(argv, "schemes", each, functools.partial(table, references=options.references))


if __name__ == "__main__":
    cli.run(main, define_flags)
