"""Makes matplotlib figures as objects on the Agg canvas, without pyplot's global state.

Safe in threads, without a display, and next to a user's own pyplot session.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wamjax import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct to colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
GOOD, BAD, MUTED = "#009E73", "#C8102E", "#8A8A8A"


def figure(width: float, height: float) -> Figure:
    """Returns an empty figure of the given size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(empty)
    return empty


def plain(axes) -> None:
    """Removes the top and right spines."""
    axes.spines[["top", "right"]].set_visible(False)


def write(made: Figure, path: str | os.PathLike, dpi: int = 120) -> files.Path:
    """Writes the figure in the format of the suffix, making parent folders; returns the path."""
    with files.draft(path, replace=True) as draft:
        made.savefig(draft, dpi=dpi)
    return files.path(path)
