"""Recomputes the statistics of a data set, prints them, and warns about suspicious values.

    python -m wamjax.stats --data=DIR [--out=FILE.json] [--plots=FOLDER] [--skip_bad=N]
    python -m wamjax.stats --data=DIR --out=dataset_stats.json --format=fast_wam
    python -m wamjax.stats --source=dataset_statistics.json --out=statistics.json

Reads every record, so it also finds corrupt ones; pictures are not decoded. ``--format`` writes the
statistics files of Fast-WAM and Cosmos Policy and ``--source`` reads them, see
`wamjax.data.published_statistics`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from absl import app, flags

from wamjax import cli, files
from wamjax.data import published_statistics
from wamjax.data.checks import checks, lost
from wamjax.data.normalize import MODES
from wamjax.data.records import Episode, Reader, RecordError
from wamjax.data.skips import Skips
from wamjax.data.sources import Source, compute_statistics


def compare(stored: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Returns warnings where stored statistics differ from those of the data."""
    out = []
    for key, rows in found.items():
        for name, value in rows.items():
            old = stored.get(key, {}).get(name)
            if name == "digest":
                same = old in (None, value)  # old statistics have none
            else:
                same = old is not None and np.shape(old) == np.shape(value)
                same = same and np.allclose(old, value)
            if not same:
                out.append(f"statistics.json says {key}.{name} = {old}, the data say {value}")
    return out


def table(statistics: dict[str, Any], names: dict[str, tuple[str, ...]]) -> str:
    """Formats the statistics as text, one line per dimension."""
    columns = ("min", "q01", "mean", "std", "q99", "max")
    lines = [f"{'':24}" + "".join(f"{c:>11}" for c in columns)]
    for key, rows in statistics.items():
        for i in range(len(rows["min"])):
            known = names.get(key, ())
            label = f"{key}[{i}] {known[i] if i < len(known) else ''}"
            lines.append(f"{label:24}" + "".join(f"{rows[c][i]:11.4f}" for c in columns))
        lines.append(f"{key}: {rows['count']} steps")
    return "\n".join(lines)


def plot(reader: Reader, folder: files.Path, skips: Skips | None = None) -> list[files.Path]:
    """Plots a histogram of every dimension, one picture per key."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    episodes, out = _good(reader, skips), []
    for key in ("proprio",) if reader.info.action_free else ("proprio", "actions"):
        x = np.concatenate([getattr(episode, key) for episode in episodes])
        names = getattr(reader.info, {"actions": "action_names"}.get(key, "proprio_names"))
        figure, axes = plt.subplots(1, x.shape[1], figsize=(2.4 * x.shape[1], 2.2), squeeze=False)
        for i, (axis, column) in enumerate(zip(axes[0], x.T, strict=True)):
            axis.hist(column, bins=50, color="tab:blue")
            axis.set_title(names[i] if i < len(names) else f"{key}[{i}]", fontsize=9)
            axis.set_yticks([])
        figure.tight_layout()
        out.append(folder / f"{key}.png")
        with files.draft(out[-1], replace=True) as draft:
            figure.savefig(draft, dpi=100)
        plt.close(figure)
    return out


def medians(reader: Reader, skips: Skips | None = None) -> dict[str, list[float]]:
    """Returns the median of every dimension; Cosmos Policy's files have them."""
    episodes = _good(reader, skips)
    return {
        key: np.median(np.concatenate([getattr(e, key) for e in episodes]), axis=0).tolist()
        for key in (("proprio",) if reader.info.action_free else ("proprio", "actions"))
    }


def _good(reader: Reader, skips: Skips | None) -> list[Episode]:
    out = []
    for i in range(len(reader)):
        try:
            out.append(reader[i])
        except RecordError as error:
            (skips or Skips()).add(reader.path, i, error)
    return out


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    forms = published_statistics.FORMATS
    flags.DEFINE_string("data", None, "folder of the data set")
    flags.DEFINE_string("source", None, "statistics file to convert, instead of a data set")
    flags.DEFINE_string("out", None, "json file to write the statistics to")
    flags.DEFINE_enum("format", forms[0], forms, "format of that file")
    flags.DEFINE_string("plots", None, "folder to write histograms to")
    flags.DEFINE_integer("skip_bad", 0, "bad episodes that may be skipped, as config.data.skip_bad")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    values = flags.FLAGS
    if bool(values.data) == bool(values.source) or (values.source and not values.out):
        raise app.UsageError("give --data, or --source and --out")
    if values.source:
        statistics = published_statistics.read(values.source)
        published_statistics.write(statistics, values.out, values.format)
        print(f"wrote {values.out}")
        return
    reader = Reader(values.data)
    info = reader.info
    skips = Skips(values.skip_bad)
    statistics = compute_statistics([reader], skips)
    print(
        f"{reader}: {reader.lengths.sum()} steps, {np.mean(reader.index['success']):.1%} successful"
    )
    print(table(statistics, {"actions": info.action_names, "proprio": info.proprio_names}))
    source = Source("data", reader, action_free=info.action_free, skips=skips)
    warnings = compare(reader.stored_statistics(), statistics) + checks([source], statistics)
    for warning in warnings + [w for mode in MODES for w in lost([source], statistics, mode)]:
        print(f"warning: {warning}")
    if values.out:
        if values.format == published_statistics.COSMOS_POLICY:
            statistics = {
                k: statistics[k] | {"median": row} for k, row in medians(reader, skips).items()
            }
        published_statistics.write(statistics, values.out, values.format)
        print(f"wrote {values.out}")
    if values.plots:
        for file in plot(reader, files.path(values.plots, "--plots"), skips):
            print(f"wrote {file}")


if __name__ == "__main__":
    cli.run(main, define_flags)
