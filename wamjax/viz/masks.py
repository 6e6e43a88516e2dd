"""Draws visibility tables as pictures and text."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from wamjax import files
from wamjax.models.visibility import Visibility
from wamjax.viz import figures

_LEAST = 0.06  # share of the side that a block needs for its label


def text(visibility: Visibility, lengths: Mapping[str, int] | None = None) -> str:
    """Returns the table as text; with token counts also the share of token pairs that attend."""
    if lengths is None:
        return str(visibility)
    return f"{visibility}\n{_share(visibility, lengths)}"


def save(
    visibility: Visibility, path: str | os.PathLike, lengths: Mapping[str, int] | None = None
) -> files.Path:
    """Draws the table: row attends column where the cell is filled.

    Args:
      visibility: the table.
      path: a PNG.
      lengths: tokens of each group; blocks are then drawn in proportion to them. Without it all
        groups have equal size.

    Raises:
      KeyError: `lengths` lacks a group of the table.
    """
    sides, to_scale = _sides(visibility, lengths)
    edges = np.concatenate([[0], np.cumsum(sides)])
    centres = (edges[1:] + edges[:-1]) / 2
    names = [g if lengths is None else f"{g}\n{lengths[g]}" for g in visibility.groups]

    inches = min(3.4 + 0.55 * len(sides), 12)
    figure = figures.figure(inches + 0.6, inches + 0.7)
    axes = figure.add_subplot()
    axes.pcolormesh(
        edges, edges, visibility.matrix(), cmap=_colours(), vmin=0, vmax=1,
        edgecolors="white", linewidth=2,
    )  # fmt: skip
    axes.set(xlim=(0, edges[-1]), ylim=(edges[-1], 0), aspect="equal")
    axes.set_xticks(centres, names, rotation=45 if max(map(len, names)) > 12 else 0)
    axes.set_yticks(centres, names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("attended (keys)", color=figures.MUTED)
    axes.set_ylabel("attends (queries)", color=figures.MUTED)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(visibility.name, fontweight="bold")
    notes = ["filled: the row attends the column"]
    if lengths is not None:
        notes.append(_share(visibility, lengths))
    if not to_scale:
        notes.append("small blocks drawn larger than to scale")
    figure.supxlabel("; ".join(notes), fontsize=8, color=figures.MUTED)
    return figures.write(figure, path)


def _sides(visibility: Visibility, lengths: Mapping[str, int] | None) -> tuple[np.ndarray, bool]:
    """Returns the side of each group's block, and whether all are in proportion to the token
    counts."""
    if lengths is None:
        return np.ones(len(visibility.groups)), True
    if missing := [g for g in visibility.groups if g not in lengths]:
        raise KeyError(f"lengths lacks {missing} of table {visibility.name!r}: {dict(lengths)}")
    tokens = np.array([lengths[g] for g in visibility.groups], float)
    least = _LEAST * tokens.sum()
    return np.maximum(tokens, least), bool((tokens >= least).all())


def _share(visibility: Visibility, lengths: Mapping[str, int]) -> str:
    mask = visibility.mask(lengths)
    return f"{mask.mean():.0%} of {mask.shape[0]} x {mask.shape[1]} token pairs attended"


def _colours():
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#E8EBEF", figures.COLORS[0]])
