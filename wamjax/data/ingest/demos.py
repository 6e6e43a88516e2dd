"""Reads HDF5 files with ``/data/demo_i``: robomimic's layout, which LIBERO and RoboCasa share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import h5py
import numpy as np

from wamjax.data.ingest import hdf5
from wamjax.data.ingest.reader import About, Entry, SourceError, files_of, relative

PATTERNS = ("*.hdf5", "*.h5")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Describes how one project uses the layout.

    Attributes:
      instruction: (file, attributes of /data, attributes of the demonstration) -> text.
      state, action: (widths of the arrays) -> default terms.
      names: array -> names of its dimensions.
      upside_down: (attributes of /data) -> whether pictures are stored upside down.
      after: (attributes of /data) -> whether observations were stored after their action.
      hz: rate if the attributes do not state it; 0 = unknown.
      notes: lines for the report.
    """

    instruction: Callable[[pathlib.Path, Mapping, Mapping], str]
    state: Callable[[Mapping[str, int]], tuple[str, ...]]
    action: Callable[[Mapping[str, int]], tuple[str, ...]]
    names: Mapping[str, tuple[str, ...]]
    upside_down: Callable[[Mapping], bool] = lambda attributes: False
    after: Callable[[Mapping], bool] = lambda attributes: False
    hz: float = 0.0
    notes: tuple[str, ...] = ()


class Demos:
    """Reads the demonstrations in all files of a source.

    Args:
      source: a file, or a folder of files.
      layout: how the project that wrote the files uses the layout.
      flip: whether pictures are upside down: "yes", "no", or "auto" to follow the layout.
      split: only demonstrations of this list of /mask; '' = all.
    """

    late = 0.0

    def __init__(self, source: pathlib.Path, layout: Layout, flip: str = "auto", split: str = ""):
        if flip not in ("auto", "yes", "no"):
            raise ValueError(f"--option=flip={flip} must be auto, yes or no")
        self._source, self._layout, self._flip, self._split = source, layout, flip, split
        self._files = hdf5.Files()
        self._places: list[tuple[pathlib.Path, str]] = []
        self._entries: list[Entry] = []
        for file in files_of(source, *PATTERNS):
            self._list(file)
        self.about = self._describe()

    def episodes(self) -> Sequence[Entry]:
        """See `Reader.episodes`."""
        return self._entries

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """See `Reader.arrays`."""
        path, name = self._places[i]
        with self._files.open(path) as file:
            demo, count = file["data"][name], self._entries[i].length
            out = hdf5.vectors(demo, count) | hdf5.vectors(demo["obs"], count)
            if self.about.final:
                last = {k: x[-1:] for k, x in hdf5.vectors(demo["next_obs"], count).items()}
                out |= {k: np.concatenate([out[k], x]) for k, x in last.items()}
            if "rewards" in out:
                out["reward"] = out["rewards"][:, 0]
            return out

    def frames(
        self, i: int, camera: str, steps: Sequence[int]
    ) -> Iterator[bytes | np.ndarray]:
        """See `Reader.frames`."""
        path, name = self._places[i]
        with self._files.open(path) as file:
            demo, count = file["data"][name], self._entries[i].length
            flip = self._is_upside_down(file["data"].attrs)
            now = [t for t in steps if t < count]
            yield from hdf5.pictures(demo["obs"][self._keys[camera]], now, flip)
            if len(now) < len(steps):
                last = demo["next_obs"][self._keys[camera]]
                yield from hdf5.pictures(last, [count - 1], flip)

    def _is_upside_down(self, attributes: Mapping) -> bool:
        claim = self._flip == "yes"
        return self._layout.upside_down(attributes) if self._flip == "auto" else claim

    def _list(self, path: pathlib.Path) -> None:
        name = relative(path, self._source)
        try:
            with self._files.open(path) as file:
                data = file["data"]
                for demo in self._select(file):
                    self._places.append((path, demo))
                    self._entries.append(self._entry(path, f"{name}:{demo}", data, demo))
        except SourceError as error:
            self._places.append((path, ""))
            self._entries.append(Entry(name=name, file=str(path), error=str(error)))

    def _select(self, file: h5py.File) -> list[str]:
        names = hdf5.in_order(file["data"])
        if not self._split:
            return names
        masks = file.get("mask", {})
        if self._split not in masks:
            raise SourceError(f"it has no /mask/{self._split}; it has {sorted(masks)}")
        members = {x.decode() if isinstance(x, bytes) else str(x) for x in masks[self._split][:]}
        return [name for name in names if name in members]

    def _entry(self, path: pathlib.Path, name: str, data: h5py.Group, demo: str) -> Entry:
        group, text = data[demo], str(path)
        try:
            count = len(group["actions"])
            ends = group["dones"][:] if "dones" in group else None
            reward = group["rewards"][:] if "rewards" in group else ends
            short = {k: len(x) for k, x in group["obs"].items() if len(x) != count}
        except (KeyError, OSError, RuntimeError) as error:
            return Entry(name=name, file=text, error=f"{path}: {demo}: {error}")
        if short or not count:
            what = f"{count} actions, but {short}" if count else "no step"
            return Entry(name=name, file=text, error=f"{path}: {demo} has {what}")
        return Entry(
            name=name,
            file=text,
            length=count,
            instruction=self._layout.instruction(path, data.attrs, group.attrs),
            task=path.stem.removesuffix("_demo"),
            success=None if reward is None else bool(np.max(reward) > 0),
        )

    def _describe(self) -> About:
        good = next((i for i, entry in enumerate(self._entries) if not entry.error), None)
        if good is None:
            raise SourceError(f"no demonstration of {self._source} can be read: "
                              f"{self._entries[0].error if self._entries else 'there is none'}")
        path, name = self._places[good]
        with self._files.open(path) as file:
            data = file["data"]
            demo, count = data[name], self._entries[good].length
            widths = hdf5.widths(demo, count) | hdf5.widths(demo["obs"], count)
            keys = [key for key, x in demo["obs"].items() if hdf5.is_camera(x)]
            self._keys = {key.removesuffix("_jpeg"): key for key in keys}
            widths = {k: n for k, n in widths.items() if k not in keys}
            settings = hdf5.json_of(data.attrs, "env_args").get("env_kwargs", {})
            final = "next_obs" in demo and set(demo["obs"]) <= set(demo["next_obs"])
            flip = self._is_upside_down(data.attrs)
            return About(
                hz=float(settings.get("control_freq", self._layout.hz)),
                cameras={k: hdf5.size(demo["obs"][key]) for k, key in self._keys.items()},
                arrays=widths,
                state=self._layout.state(widths),
                action=self._layout.action(widths),
                names=self._layout.names,
                robot=hdf5.json_of(data.attrs, "env_args").get("env_name", ""),
                pairing="after" if self._layout.after(data.attrs) else "before",
                final=final,
                notes=(f"pictures are {'upside down and are turned' if flip else 'upright'}",
                       *self._layout.notes),
            )  # fmt: skip
