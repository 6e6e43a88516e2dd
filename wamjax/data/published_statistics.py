"""Converts the statistics files of Fast-WAM and of Cosmos Policy to our format and back.

    dataset_stats.json        {"action" and "state": {"default": {"global_min": [...], ...,
                               "stepwise_min": [[...], ...], ...}}, "num_episodes", ...}
    dataset_statistics.json   {"actions_min": [...], ..., "proprio_min": [...], ...}

`wamjax.data.normalize` describes our format. Other contents of a published file, such as Fast-WAM's
rows for each step of a window, are kept under ``statistics["published"]``, so writing reproduces
the file that was read. No published file counts steps, and Cosmos Policy has no quantiles; it has
medians, which ours have only if `wamjax.stats` is told to write such a file.

Sources: the public ``base_lerobot_dataset.py`` (Fast-WAM) and ``dataset_utils.py`` (Cosmos Policy).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from wamjax import files
from wamjax.data.normalize import CONSTANT, KEYS, MODES, normalizers

FAST_WAM, COSMOS_POLICY, OURS = "fast_wam", "cosmos_policy", "wamjax"
FORMATS = (OURS, FAST_WAM, COSMOS_POLICY)
ROWS = {
    FAST_WAM: ("min", "max", "mean", "std", "q01", "q99"),
    COSMOS_POLICY: ("min", "max", "mean", "std", "median"),
}
NAMES = {"proprio": "state", "actions": "action"}  # ours -> Fast-WAM's
GROUP = "default"  # Fast-WAM may group dimensions; its published files have the one group
NEEDS = {"min_max": ("min", "max"), "mean_std": ("min", "max", "mean", "std"),
         "quantile": ("min", "max", "q01", "q99")}  # fmt: skip
KEPT = "published"

Json = dict[str, Any]


def read(path: str | os.PathLike) -> Json:
    """Reads a file in any of `FORMATS`, recognized by its keys, into our format.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it has none of the formats, or lacks rows; names all of them.
    """
    path = files.path(path)
    try:
        return from_published(json.loads(path.read_text()), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write(statistics: Mapping[str, Any], path: str | os.PathLike, form: str) -> None:
    """Writes statistics in one of `FORMATS`; see `to_published`."""
    files.write_text(path, json.dumps(to_published(statistics, form), indent=4) + "\n")


def form_of(values: Any) -> str | None:
    """Returns which of `FORMATS` a JSON value has."""
    keys = set(values) if isinstance(values, Mapping) else set()
    if keys & {f"{key}_min" for key in KEYS}:
        return COSMOS_POLICY
    if keys & set(NAMES.values()):
        return FAST_WAM
    return OURS if keys & set(KEYS) else None


def from_published(values: Any, where: str = "the statistics") -> Json:
    """Converts JSON in any of `FORMATS` to our format; `where` names the file in errors. See
    `read`."""
    form = form_of(values)
    if form is None:
        raise ValueError(
            f"{where} is neither Fast-WAM's dataset_stats.json (keys 'action', 'state') nor Cosmos "
            "Policy's dataset_statistics.json (keys 'actions_min', ...) nor ours (keys 'actions', "
            f"'proprio'); it has {sorted(values) if isinstance(values, Mapping) else values!r}"
        )
    take = {OURS: _take_ours, FAST_WAM: _take_fast_wam, COSMOS_POLICY: _take_cosmos}[form]
    out, rest = take(values)
    if form != OURS:
        rest = {KEPT: {"format": form, "rest": rest}}
    wrong = [
        f"{_name(form, key, row)} {problem}"
        for key in out
        for row in (NEEDS["min_max"] if form == OURS else ROWS[form])
        if (problem := _problem(out[key], row))
    ]
    if wrong:
        raise ValueError(f"{where}, statistics in the format of {form}: " + "; ".join(wrong))
    return out | rest


def to_published(statistics: Mapping[str, Any], form: str) -> Json:
    """Converts statistics to the JSON of one of `FORMATS`.

    Raises:
      ValueError: the format does not exist, or rows are missing; names all of them.
    """
    if form not in FORMATS:
        raise ValueError(f"statistics are written as one of {', '.join(FORMATS)}, not {form!r}")
    if form == OURS:
        return dict(statistics)
    missing = [f"{key}.{row}" for key in KEYS for row in ROWS[form]
               if row not in statistics.get(key, {})]  # fmt: skip
    if missing:
        raise ValueError(
            f"the format of {form} needs {', '.join(missing)}, which these statistics lack: "
            f"compute them from the data by python -m wamjax.stats --data=DIR --format={form}"
        )
    published = statistics.get(KEPT, {})
    rest = published["rest"] if published.get("format") == form else {}
    if form == COSMOS_POLICY:
        rows = {f"{k}_{row}": statistics[k][row] for k in ("actions", "proprio")
                for row in ROWS[form]}  # fmt: skip
        return rows | rest
    out = {k: v for k, v in rest.items() if k not in NAMES.values()}
    for key, theirs in NAMES.items():
        groups = rest.get(theirs, {GROUP: {}})
        rows = {f"global_{row}": statistics[key][row] for row in ROWS[form]}
        out[theirs] = {group: rows | more for group, more in groups.items()}
    return out


def check(statistics: Mapping[str, Any], sizes: Mapping[str, int], mode: str) -> None:
    """Checks that `statistics` can normalize a policy of these sizes.

    Args:
      sizes: key -> number of dimensions.
      mode: see `normalize.normalizers`.

    Raises:
      ValueError: rows are missing, have another number of dimensions or hold impossible values;
      names all of them.
    """
    wrong = []
    if mode not in MODES:
        normalizers(statistics, mode)  # its error lists the modes
    for key, size in sizes.items():
        for row in NEEDS[mode]:
            values = statistics.get(key, {}).get(row)
            if values is None:
                wrong.append(f"{key}.{row} is missing (config.data.normalization is {mode!r})")
            elif not hasattr(values, "__len__") or len(values) != size:
                count = len(values) if hasattr(values, "__len__") else repr(values)
                wrong.append(f"{key}.{row} has {count} dimensions, the policy {size}")
            elif problem := _problem(statistics[key], row):
                wrong.append(f"{key}.{row} {problem}")
    if wrong:
        raise ValueError("statistics: " + "; ".join(wrong))


def _take_ours(values: Mapping[str, Any]) -> tuple[Json, Json]:
    rows = {key: dict(values[key]) for key in KEYS if key in values}
    return rows, {k: v for k, v in values.items() if k not in KEYS}


def _take_cosmos(values: Mapping[str, Any]) -> tuple[Json, Json]:
    names = {f"{key}_{row}": (key, row) for key in KEYS for row in ROWS[COSMOS_POLICY]}
    rows: Json = {key: {} for key in KEYS}
    for name, value in values.items():
        if name in names:
            key, row = names[name]
            rows[key][row] = value
    return rows, {k: v for k, v in values.items() if k not in names}


def _take_fast_wam(values: Mapping[str, Any]) -> tuple[Json, Json]:
    rows, rest = {}, dict(values)
    for key, theirs in NAMES.items():
        groups = values.get(theirs) or {}
        if len(groups) > 1:
            raise ValueError(f"{theirs!r} has groups {sorted(groups)}; it must have one of "
                             f"all dimensions, {GROUP!r}")  # fmt: skip
        (name, group), *_ = [*groups.items(), (GROUP, {})]
        names = {f"global_{row}": row for row in ROWS[FAST_WAM]}
        rows[key] = {names[k]: v for k, v in group.items() if k in names}
        rest[theirs] = {name: {k: v for k, v in group.items() if k not in names}}
    return rows, rest


def _name(form: str, key: str, row: str) -> str:
    """Returns a format's name for a row."""
    return {
        OURS: f"{key}.{row}",
        FAST_WAM: f"{NAMES[key]}.{GROUP}.global_{row}",
        COSMOS_POLICY: f"{key}_{row}",
    }[form]


def _problem(rows: Mapping[str, Any], row: str) -> str:
    """Returns what is wrong with a row, or ''."""
    if row not in rows:
        return "is missing"
    values = rows[row]
    if not isinstance(values, list) or not all(map(_is_finite, values)):
        return f"must be a list of finite numbers, not {str(values)[:60]}"
    size = len(rows["min"]) if isinstance(rows.get("min"), list) else len(values)
    if len(values) != size:
        return f"has {len(values)} numbers, its minimum {size}"
    return _impossible(rows, row)


def _is_finite(x: Any) -> bool:
    """Returns whether a value is a finite number that fits a float; booleans are not."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    try:
        return math.isfinite(float(x))
    except OverflowError:
        return False


def _impossible(rows: Mapping[str, Any], row: str) -> str:
    """Returns what no data can have, or '': a negative deviation, a zero one where numbers differ,
    a minimum above the maximum."""
    values = rows[row]
    if row == "std":
        ends = [rows.get(name) for name in ("min", "max")]
        known = all(isinstance(x, list) and len(x) == len(values) for x in ends)
        for i, deviation in enumerate(values):
            if deviation < 0:
                return f"is negative in dimension {i}: {deviation}"
            pair = [x[i] for x in ends] if known else []
            if not deviation and len(pair) == 2 and all(map(_is_finite, pair)):
                if pair[1] - pair[0] >= CONSTANT:
                    return f"is 0 in dimension {i}, which goes from {pair[0]} to {pair[1]}"
    above = {"min": "max", "q01": "q99"}.get(row)
    others = rows.get(above)
    if not isinstance(others, list) or len(others) != len(values):
        return ""
    for i, (low, high) in enumerate(zip(values, others, strict=True)):
        if _is_finite(high) and low > high:
            return f"is above {above} in dimension {i}: {low} > {high}"
    return ""
