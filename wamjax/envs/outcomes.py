"""Records the outcome of every episode of an evaluation, so that a killed evaluation can continue.

The first line of episodes.jsonl holds the settings, then there is one line per episode: {"kind",
"episode", "task", "success", "steps", "crashes", "jerk"}, and the "rungs" of its plans if a policy
chose how far to climb.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from wamjax import files

Row = dict[str, Any]


class Outcomes:
    """Holds rows by kind (the policy, the one before training, ...) and number of the episode.

    Args:
      path: path of the file; None stores nothing.
      asked: JSON values of all settings that determine the outcomes. A file with other settings
        starts anew.
      anew: starts anew whatever exists, because a finished evaluation is repeated.
    """

    def __init__(
        self,
        path: files.Path | None = None,
        asked: Mapping[str, Any] | None = None,
        anew: bool = False,
    ):
        self._rows: dict[tuple[str, int], Row] = {}
        self._path = path if jax.process_index() == 0 else None
        if path is None:
            return
        asked = json.loads(json.dumps({"asked": asked}))
        # Only the first of several processes knows the file, and all must take the same path.
        anew = anew or jax.process_count() > 1 or not path.exists()
        lines = [] if anew else list(_lines(path))
        if lines and lines[0] == asked:
            self._rows = {(row["kind"], row["episode"]): row for row in lines[1:]}
        self._write([asked, *self._rows.values()], "w")  # drops an incomplete last line

    def has(self, kind: str, numbers: Iterable[int]) -> bool:
        """Returns whether all these episodes are recorded."""
        return all((kind, int(n)) in self._rows for n in numbers)

    def add(self, kind: str, outcomes: Iterable[tuple[Any, ...]]) -> None:
        """Records (episode, task, success, steps, crashes, jerk), optionally with the rungs of its
        plans; on disk before this returns."""
        names = "episode", "task", "success", "steps", "crashes", "jerk", "rungs"
        rows = [{"kind": kind, **dict(zip(names, row, strict=False))} for row in outcomes]
        new = [row for row in rows if (row["kind"], row["episode"]) not in self._rows]
        self._rows |= {(row["kind"], row["episode"]): row for row in new}
        self._write(new, "a")

    def rows(self, kind: str, total: int) -> list[Row]:
        """Returns the recorded rows among the first `total` episodes of a kind, in order."""
        return [self._rows[kind, n] for n in range(total) if (kind, n) in self._rows]

    def _write(self, rows: Iterable[Row], mode: str) -> None:
        if self._path is None:
            return
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if mode == "w":
            files.write_text(self._path, text)
            return
        with contextlib.closing(files.Journal(self._path)) as journal:
            journal.write(text)
            journal.flush(must=True)


def _lines(path: files.Path) -> Iterable[Row]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
