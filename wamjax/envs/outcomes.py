"""What came of every episode of an evaluation, kept as it goes, so that a killed one goes on.

episodes.jsonl has a first line that says what was asked, then one for each episode: {"kind",
"episode", "task", "success", "steps", "crashes"}.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from wamjax.envs.world import Recording

Row = dict[str, Any]


class Outcomes:
    """Rows by kind (the policy, the one before training, ...) and number of the episode.

    Args:
      path: of the file; None keeps nothing.
      asked: all that decides the outcomes, json. A file of something else starts anew.
      anew: starts anew whatever is there: an evaluation that was finished is asked for again.
    """

    def __init__(
        self,
        path: pathlib.Path | None = None,
        asked: Mapping[str, Any] | None = None,
        anew: bool = False,
    ):
        self._rows: dict[tuple[str, int], Row] = {}
        self._path = path if jax.process_index() == 0 else None
        if path is None:
            return
        asked = json.loads(json.dumps({"asked": asked}))
        lines = [] if anew or not path.exists() else list(_lines(path))
        if lines and lines[0] == asked:
            self._rows = {(row["kind"], row["episode"]): row for row in lines[1:]}
        self._write([asked, *self._rows.values()], "w")  # a torn last line goes

    def has(self, kind: str, numbers: Iterable[int]) -> bool:
        """Whether all these episodes are there."""
        return all((kind, int(n)) in self._rows for n in numbers)

    def add(self, kind: str, numbers: Iterable[int], done: Recording) -> None:
        """Keeps what came of episodes, the first of `done`; on disk before this returns."""
        rows = [
            {"kind": kind, "episode": int(n), "task": done.tasks[i],
             "success": int(done.success[i]), "steps": int(done.steps[i]),
             "crashes": int(done.crashes[i])}
            for i, n in enumerate(numbers)
        ]  # fmt: skip
        new = [row for row in rows if (row["kind"], row["episode"]) not in self._rows]
        self._rows |= {(row["kind"], row["episode"]): row for row in new}
        self._write(new, "a")

    def rows(self, kind: str, total: int) -> list[Row]:
        """Of a kind, the first `total` episodes in order, as far as they are there."""
        return [self._rows[kind, n] for n in range(total) if (kind, n) in self._rows]

    def _write(self, rows: Iterable[Row], mode: str) -> None:
        if self._path is None:
            return
        with open(self._path, mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> Iterable[Row]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
