"""Compares DiT's four ways of conditioning, on real pictures and one budget.

    python experiments/designs_digits.py --workdir=runs/designs
    python experiments/designs_digits.py --workdir=runs/designs --seeds=0,1,2 --arg=process=ddpm
    python experiments/designs_digits.py --workdir=runs/designs --table_only

Trains `configs/dit_digits.py` in every design, about a minute each on two idle cores, and draws
1500 digits of each, without guidance as the paper compares them, and with guidance. A classifier
that is trained here on the same pictures scores them: Frechet distance of its features from the
training data's, and how often it recognizes the requested digit. Writes table.md, table.json and
designs.png. Everything can be resumed, between runs and within each. The distances are comparable
only within one table.
"""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import study
from absl import flags

from wamjax import cli

DESIGNS = ("adaln_zero", "adaln", "cross_attention", "in_context")
CONFIG = pathlib.Path(__file__).parent / "configs" / "dit_digits.py"
CLASSES, SHOWN = 10, 3  # rows of each design in the picture


def data(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns pictures (n, 8, 8, 1) and labels of a split."""
    from wamjax.data.makers import digits

    table = digits("", split, size=8)
    rows = table.take(np.arange(table.spec.count))
    return rows["video"][:, 0], rows["label"]


def judge(workdir: pathlib.Path):
    """Returns ``pictures -> outputs`` of this study's classifier, which is trained once."""
    from wamjax import tree
    from wamjax.scores import classifier

    network = classifier.Classifier(heads=(CLASSES,))
    path = workdir / "classifier.npz"
    if not path.exists():
        made = classifier.fit(network, *data("train"), steps=600, rng=jax.random.key(0))
        np.savez(path, **{k: np.asarray(v) for k, v in tree.flatten(made).items()})
    with np.load(path) as flat:
        params = tree.unflatten(dict(flat))
    return lambda pictures: classifier.outputs(network, params, pictures)


def measure(run: pathlib.Path, judge, count: int, guidance: float) -> dict:
    """Scores a run without guidance (scale 1) and with it; saves samples of the latter in
    samples.npz."""
    from wamjax import doctor, tree
    from wamjax.runs import sampling

    path = run / "scores.json"
    if path.exists():
        return json.loads(path.read_text())
    labels = np.arange(count, dtype=np.int32) % CLASSES
    scores = []
    for scale in (1.0, guidance):
        sampler, config = sampling.load(run, guidance=scale)
        pictures = sampling.draw(sampler, {"label": labels}, count, batch=min(count, 500))[:, 0]
        scores.append(score(pictures, labels, judge))
    np.savez_compressed(run / "samples.npz", video=pictures, label=labels)
    result = {
        "plain": scores[0],
        "guided": scores[1],
        "samples": count,
        "guidance": guidance,
        "parameters": tree.count(sampler.params),
        "forward": doctor.work(sampler.objective, config, sampler.params)["forward"],
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def score(pictures: np.ndarray, labels: np.ndarray, judge, resamples: int = 100) -> dict:
    """Returns the Frechet distance from the training data, and the accuracy on the requested
    digit."""
    from wamjax.scores import classifier, frechet

    features, real = judge(pictures), judge(data("train")[0])
    return {
        "frechet": frechet.interval(features.features, real.features, resamples=resamples),
        "accuracy": classifier.accuracy(features.logits[0], labels),
    }


def table(workdir: pathlib.Path) -> str:
    """Collects all finished runs; writes table.json, table.md and a picture; returns the table."""
    rows: dict[str, list[dict]] = {}
    for path in sorted(workdir.glob("*/scores.json")):
        rows.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(json.loads(path.read_text()))
    if not rows:
        return "no run has been measured yet"
    pictures, labels = data("test")
    # Its interval is not shown, so two resamples are enough.
    real, one = score(pictures, labels, judge(workdir), 2), next(iter(rows.values()))[0]
    order = [d for d in DESIGNS if d in rows]
    scale = f"guidance {one['guidance']}"
    heads = ["design", "parameters", "forward MFLOP"]
    heads += [f"{what}, {how}" for how in ("no guidance", scale) for what in ("Frechet", "digit %")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for design in order:
        first = rows[design][0]
        cells = [design, f"{first['parameters']:,}", f"{first['forward'] / 1e6:.1f}"]
        for how in ("plain", "guided"):
            distance, accuracy = intervals(rows[design], how)
            cells += [_text(distance), accuracy.percent()]
        lines.append("| " + " | ".join(cells) + " |")
    held_out = f"{real['frechet'][0]:.1f} | {100 * real['accuracy']:.1f}"
    lines.append(f"| real pictures, held out ({len(labels)}) | | | {held_out} | | |")
    seeds = sorted({len(found) for found in rows.values()})
    lines.append(
        f"\n{one['samples']} samples a cell; {seeds} seeds. 95 % intervals: t over seeds; of one "
        "seed, bootstrap of the distance and Wilson of the rate. Frechet: distance of a "
        "classifier's features from the training data's; few pictures, as those held out, have a "
        "larger one by chance. digit %: how often the classifier sees the digit asked for."
    )
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps({"rows": rows, "real": real}, indent=2) + "\n")
    draw(workdir, {d: intervals(rows[d], "guided") for d in order})
    return text


def intervals(found: list[dict], how: str):
    """Returns (Frechet distance, accuracy) over the seeds of a design, as intervals."""
    from wamjax.viz.intervals import Interval, student_t, wilson

    scores = [f[how] for f in found]
    if len(scores) > 1:
        return (
            student_t([s["frechet"][0] for s in scores]),
            student_t([s["accuracy"] for s in scores]),
        )
    count = found[0]["samples"]
    return Interval(*scores[0]["frechet"]), wilson(round(scores[0]["accuracy"] * count), count)


def draw(workdir: pathlib.Path, scores: dict) -> None:
    """Draws samples of each design under its scores, one column per digit."""
    from wamjax.viz import figures, sheet

    figure = figures.figure(6.4, 2.5 * len(scores))
    panels = np.atleast_1d(figure.subplots(len(scores), 1))
    for axes, (design, (distance, accuracy)) in zip(panels, scores.items(), strict=True):
        run = min(workdir.glob(f"{design}-*/samples.npz"))
        with np.load(run) as samples:
            pictures = samples["video"][: SHOWN * CLASSES, None]
        axes.imshow(sheet.sheet(pictures, columns=CLASSES))
        title = f"{design}: Frechet {_text(distance)}, accuracy {accuracy.percent()} %"
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_axis_off()
    figures.write(figure, workdir / "designs.png")


def _text(interval) -> str:
    return f"{interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/designs", DESIGNS, "designs")
    flags.DEFINE_integer("count", 1500, "samples of each run and scale, of all classes alike")
    flags.DEFINE_float("guidance", 1.5, "guidance scale of half of the samples")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS

    def each(design: str, seed: str, run: pathlib.Path) -> None:
        study.train(CONFIG, f"design={design}", seed, run)
        measure(run, judge(run.parent), options.count, options.guidance)

    study.run(argv, "designs", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
