"""Where should text enter a DiT? Pooled, by cross-attention, both, or joint attention.

    python experiments/routes_scenes.py --workdir=runs/routes
    python experiments/routes_scenes.py --workdir=runs/routes --routes=pooled,cross --seeds=0,1,2
    python experiments/routes_scenes.py --workdir=runs/routes --table_only

Trains `configs/text_scenes.py` by every route, three to four minutes each on two idle cores, draws
pictures for held-out captions, and reads them with the exact parser of the scenes. There are two
kinds of held-out captions: unseen combinations of seen objects, and unseen objects (a colour with a
shape). Writes table.md, table.json and routes.png. Everything can be resumed, between runs and
within each.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import study
from absl import flags

from wamjax import cli

ROUTES = ("pooled", "cross", "both", "joint")
PARTS = ("combination", "object")
CRITERIA = ("colour", "shape", "binding", "count", "position", "relation", "all")
CONFIG = pathlib.Path(__file__).parent / "configs" / "text_scenes.py"
SHOWN, SEED = 6, 2**21  # pictures of a route that are drawn; seed of the captions


def held_out(part: str, count: int, length: int = 13, size: int = 24):
    """Returns captions of a part, with true scenes for them."""
    from wamjax.data import scenes

    return scenes.make(count, SEED, part, size=size, length=length)


def measure(run: pathlib.Path, count: int, guidance: float) -> dict:
    """Returns verdicts on samples of both parts, and saves the samples in samples_PART.npz."""
    from wamjax import tree
    from wamjax.data import scenes
    from wamjax.runs import sampling

    path = run / "scores.json"
    if path.exists():
        return json.loads(path.read_text())
    sampler, _ = sampling.load(run, guidance=guidance)
    length, size = sampler.objective.instruction_length, sampler.objective.picture[0]
    result = {"parameters": tree.count(sampler.params), "guidance": guidance}
    for part in PARTS:
        batch = held_out(part, count, length, size)
        condition = {"instruction": batch.tokens}
        pictures = sampling.draw(sampler, condition, count, batch=min(count, 100))[:, 0]
        np.savez_compressed(run / f"samples_{part}.npz", video=pictures, instruction=batch.tokens)
        result[part] = verdicts(batch.captions, [p.objects for p in scenes.parse(pictures)])
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def verdicts(captions, found) -> dict[str, list[int]]:
    """Returns criterion -> (satisfied, total): each over the captions that require it; "relation"
    is position over the captions whose two objects are present."""
    from wamjax.data.scenes import satisfies

    asks = {
        "binding": lambda c: len(c.groups) > 1,
        "count": lambda c: c.kind == "count",
        "position": lambda c: bool(c.relation),
    }
    out = {name: [0, 0] for name in CRITERIA}
    for caption, scene in zip(captions, found, strict=True):
        verdict = satisfies(caption, scene)
        if caption.relation and verdict["binding"]:
            verdict["relation"] = verdict["position"]
        for name, right in verdict.items():
            if asks.get(name, lambda _: True)(caption):
                out[name][0] += bool(right)
                out[name][1] += 1
    return out


def chance(part: str, count: int) -> dict[str, list[int]]:
    """Returns the scores of a model that draws perfect scenes of other captions of the same
    kind."""
    batch = held_out(part, count)
    other = [c.kind for c in batch.captions]
    place = {kind: np.flatnonzero(np.array(other) == kind) for kind in set(other)}
    scenes = [None] * count
    for rows in place.values():
        for i, j in zip(rows, np.roll(rows, 1), strict=True):
            scenes[i] = batch.scenes[j]
    return verdicts(batch.captions, scenes)


def table(workdir: pathlib.Path) -> str:
    """Collects all finished runs; writes table.json, table.md and a picture; returns the table."""
    rows: dict[str, list[dict]] = {}
    for path in sorted(workdir.glob("*/scores.json")):
        rows.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(json.loads(path.read_text()))
    if not rows:
        return "no run has been measured yet"
    order = [route for route in ROUTES if route in rows]
    lines, cells = [], {}
    for part in PARTS:
        count = rows[order[0]][0][part]["all"][1]
        cells[part] = {r: {c: rate([f[part][c] for f in rows[r]]) for c in CRITERIA} for r in order}
        cells[part]["other scenes"] = {c: rate([v]) for c, v in chance(part, count).items()}
        what = {"combination": "unseen combinations", "object": "unseen objects"}[part]
        lines += [f"| {what}, % | " + " | ".join(CRITERIA) + " |", "|---|" + "---|" * len(CRITERIA)]
        for name, row in cells[part].items():
            texts = (row[c].percent() if row[c] else "-" for c in CRITERIA)
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        lines.append("")
    seeds, guidance = sorted({len(f) for f in rows.values()}), rows[order[0]][0]["guidance"]
    lines.append(
        f"{count} captions of each part at guidance {guidance}; {seeds} seeds. 95 % "
        "intervals: t over seeds, Wilson of one seed. binding, count and position are over the "
        "captions that ask for them, relation is position where both objects are there. other "
        "scenes: true scenes of other captions of the kind."
    )
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    bars(cells["combination"], workdir / "routes.png")
    pictures(workdir, order)
    return text


def rate(found: list[list[int]]):
    """Returns (satisfied, total) of each seed as an interval; None if the total is 0."""
    from wamjax.viz.intervals import student_t, wilson

    if not all(asked for _, asked in found):
        return None
    if len(found) > 1:
        return student_t([right / asked for right, asked in found])
    return wilson(*found[0])


def bars(rows: dict, path: pathlib.Path) -> None:
    """Draws rates by criterion, one bar per route; chance is a line."""
    from wamjax.viz import figures

    figure = figures.figure(9, 3.6)
    axes = figure.add_subplot()
    routes = [name for name in rows if name != "other scenes"]
    width = 0.8 / len(routes)
    for i, name in enumerate(routes):
        x = np.array([j for j, c in enumerate(CRITERIA) if rows[name][c]])
        x = x + (i - (len(routes) - 1) / 2) * width
        cells = [rows[name][c] for c in CRITERIA if rows[name][c]]
        arms = [[c.mean - max(c.low, 0) for c in cells], [min(c.high, 1) - c.mean for c in cells]]
        axes.bar(x, [c.mean for c in cells], width * 0.9, yerr=arms, capsize=2, alpha=0.85,
                 color=figures.COLORS[i], label=name, error_kw={"lw": 1})  # fmt: skip
    for x, c in enumerate(CRITERIA):
        level = rows["other scenes"][c].mean if rows["other scenes"][c] else np.nan
        axes.plot([x - 0.45, x + 0.45], [level, level], color=figures.BAD, lw=1.2, ls="--",
                  label="scenes of other captions" if x == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(CRITERIA)), CRITERIA)
    axes.set(ylim=(0, 1), ylabel="satisfied")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    figures.plain(axes)
    figures.write(figure, path)


def pictures(workdir: pathlib.Path, routes: list[str]) -> None:
    """Draws the same captions by every route: one column per caption, one row per route."""
    from wamjax.data.scenes import VOCABULARY
    from wamjax.viz import sheet

    clips, titles = [], []
    for route in routes:
        with np.load(min(workdir.glob(f"{route}-*/samples_combination.npz"))) as samples:
            clips.append(samples["video"][:SHOWN, None])
            for ids in samples["instruction"][:SHOWN]:
                titles.append(f"{route}: " + " ".join(VOCABULARY[i] for i in ids if i))
    sheet.save(np.concatenate(clips).repeat(2, 2).repeat(2, 3), workdir / "pictures.png", titles,
               len(clips[0]))  # fmt: skip


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/routes", ROUTES, "routes")
    flags.DEFINE_integer("count", 400, "captions of each part")
    flags.DEFINE_float("guidance", 1.5, "guidance scale of the samples")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS

    def each(route: str, seed: str, run: pathlib.Path) -> None:
        study.train(CONFIG, f"route={route}", seed, run)
        measure(run, options.count, options.guidance)

    study.run(argv, "routes", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
