"""Opens the data sets that ``config.data`` names and checks that they agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax import files
from wamjax.console import say
from wamjax.data import latents, layout, normalize, published_statistics, records
from wamjax.data.episodes import LARGEST
from wamjax.data.latents import Latents
from wamjax.data.readers import Reader, is_elsewhere, open_elsewhere
from wamjax.data.records import RecordError
from wamjax.data.skips import Skips
from wamjax.data.spec import DataSpec
from wamjax.data.tokens import Vocabulary


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds one data set of a mixture.

    Attributes:
      name: its key in ``config.data.sources``.
      reader: reads its episodes.
      weight: share of a batch, relative to the other sources.
      action_free: whether its actions count as unknown.
      offset: number of its first episode.
      latents: latents of its windows; None if pictures are read.
      rollout, ended, successes, skips: see `Windows`.
    """

    name: str
    reader: Reader
    weight: float = 1.0
    action_free: bool = False
    offset: int = 0
    latents: Latents | None = None
    rollout: bool = False
    ended: str = ""
    successes: bool = False
    skips: Skips = dataclasses.field(default_factory=Skips, compare=False)

    @property
    def cameras(self) -> Mapping[str, tuple[int, int]]:
        """Name -> (height, width) of the pictures, or of those that the latents encode."""
        return self.latents.info.cameras if self.latents else self.reader.info.cameras

    @property
    def where(self) -> str:
        """Name and path for messages."""
        return f"config.data.sources.{self.name} ({self.reader.path})"


def cache_root() -> files.Path:
    """Returns the folder for the embedded world's data sets when ``config.data.root`` is empty."""
    return files.path(files.cache() / "data")


def data_root(root: str) -> files.Path:
    """Returns the folder that relative paths of a config start from."""
    return files.path(root, "config.data.root") if root else cache_root()


def open_sources(
    data, cached: bool = False, words: bool = True, known: Sequence[str] = ()
) -> tuple[DataSpec, dict[str, Any], list[Source]]:
    """Opens all sources and collects those that are configured for it and do not exist yet.

    Args:
      data: ``config.data``.
      cached: whether windows have latents instead of pictures.
      words: whether instructions become word ids, whose number is limited.
      known: words with the first ids, from the run to continue.

    Returns:
      (spec, statistics, sources); the statistics cover the sources with actions, and of those only
      the demonstrations, if there are any: rollouts are normalized as the policy was trained.

    Raises:
      FileNotFoundError, ValueError: a source does not exist or does not match; names it.
    """
    if not data.sources:
        raise ValueError("config.data.sources is empty; add an entry by wamjax.config.source(...)")
    sources, offset, skips = [], 0, Skips(data.skip_bad)
    for name, entry in data.sources.items():
        if is_elsewhere(entry.path) and not entry.collect.episodes:
            path, reader = entry.path, _elsewhere(name, entry, data, cached)
        else:
            path = _path(name, entry, data.root)
            if cached:
                latents.require(path)
            reader = records.Reader(path, entry.episodes)
        if not (cached or reader.info.cameras):
            raise ValueError(f"config.data.sources.{name} ({path}) holds no pictures: train on its "
                             "latents by config.model.codec.kind = 'cached', or use the data set "
                             "from which they were encoded")  # fmt: skip
        stored_latents = Latents(path, reader.index["lengths"]) if cached else None
        numbers = entry.weight, entry.action_free, offset, stored_latents
        sources.append(Source(name, reader, *numbers, entry.rollout, entry.ended,
                              entry.successes, skips))  # fmt: skip
        offset += len(reader)
    return _spec(sources, data, words, known), _statistics(sources, data.normalization), sources


def missing(data) -> dict[str, files.Path]:
    """Returns name -> folder of the sources of ``config.data`` that do not exist and are not
    collected."""
    entries = {n: e for n, e in data.sources.items()
               if not (e.collect.episodes or is_elsewhere(e.path))}  # fmt: skip
    paths = {name: _path(name, entry, data.root) for name, entry in entries.items()}
    return {name: path for name, path in paths.items() if not (path / "spec.json").exists()}


def labelled(sources: list[Source]) -> list[Source]:
    """Returns the sources with actions.

    Raises:
      ValueError: there are none, or one of them has no actions.
    """
    out = [s for s in sources if not s.action_free]
    for source in out:
        if source.reader.info.action_free:
            raise ValueError(
                f"{source.where} was recorded without actions: set its action_free to True"
            )
    if not out:
        raise ValueError("all of config.data.sources are action_free: add one with actions, which "
                         "the policy is trained on and the statistics are of")  # fmt: skip
    return out


def _elsewhere(name: str, entry, data, cached: bool) -> Reader:
    """Opens a source that is read in place."""
    if cached:
        raise ValueError(
            f"config.data.sources.{name}.path = {entry.path!r} is read in place, and "
            "config.model.codec.kind = 'cached' needs latents: convert it by wamjax.ingest, and "
            "write its latents by wamjax.data.precompute"
        )
    return open_elsewhere(entry.path, data_root(data.root), entry.episodes, data.skip_bad)


def _path(name: str, entry, root: str) -> files.Path:
    root = data_root(root)
    if entry.collect.episodes > 0:
        from wamjax.envs import collection  # here: data does not otherwise depend on the world

        return collection.ensure_collected(entry, root)
    if not entry.path:
        raise ValueError(f"config.data.sources.{name} has neither a path nor collect.episodes")
    return files.below(root, entry.path, f"config.data.sources.{name}.path")


def _spec(sources: list[Source], data, words: bool, known: Sequence[str]) -> DataSpec:
    first, size = labelled(sources)[0], tuple(data.image_size)
    names, cells = tuple(data.cameras) or tuple(first.cameras), cells_of(data)
    if any(size) and first.latents:
        raise ValueError(f"config.data.image_size = {size} must be (0, 0) with latents, because "
                         "their pictures cannot be resized")  # fmt: skip
    for source in sources:
        shown = () if source.latents and cells else names
        _check_agreement(source, first, shown, bool(cells or any(size)))
        if source.latents:
            _check_latents(source, data, names)
    info = first.reader.info
    whole = {name: size if any(size) else first.cameras[name] for name in names if not cells}
    spec = DataSpec(
        cameras=cells or whole,
        proprio_dim=info.proprio_dim,
        action_dim=info.action_dim,
        chunk=data.chunk,
        frames=data.frames,
        frame_stride=data.frame_stride,
        instruction_length=data.instruction_length,
        control_hz=info.control_hz,
        resize=data.resize if cells or any(size) else "",
        layout=data.layout,
        words=_vocabulary(sources, data, known).words if words else (),
    )
    _ = spec.composite  # raises if the cameras cannot stand side by side
    return spec


def cells_of(data) -> dict[str, tuple[int, int]]:
    """Returns camera -> (height, width) in the picture by ``config.data.layout``; {} without one.

    Raises:
      ValueError: the layout is invalid, shows other cameras, or conflicts with another key.
    """
    if not data.layout:
        return {}
    cells = layout.parse(data.layout).cells
    if tuple(data.cameras) != tuple(cells):
        raise ValueError(f"config.data.layout = {data.layout!r} shows {tuple(cells)}, "
                         f"config.data.cameras is {tuple(data.cameras)}: name the same cameras "
                         "in the same order")  # fmt: skip
    if any(data.image_size):
        raise ValueError(f"config.data.image_size = {tuple(data.image_size)} must be (0, 0) with "
                         "config.data.layout, which has the sizes of the cameras")
    return cells


def _vocabulary(sources: list[Source], data, known: Sequence[str]) -> Vocabulary:
    """Returns the vocabulary of all sources' instructions and checks their lengths."""
    texts = [(s, text) for s in sources for text in s.reader.index["instructions"]]
    numbered = data.vocabulary == "words"
    out = Vocabulary.of((text for _, text in texts), known) if numbered else Vocabulary()
    for source, text in texts:
        try:
            out.tokenize(text, data.instruction_length)
        except ValueError as error:
            raise ValueError(f"{source.where}: {error}") from error
    return out


_ADVICE = {"control_hz": "; write one of them again with every n-th step, or with steps in between"}


def _check_agreement(
    source: Source, first: Source, cameras: tuple[str, ...], resized: bool
) -> None:
    info, reference = source.reader.info, first.reader.info
    for name in cameras:
        if name not in source.cameras:
            raise ValueError(
                f"{source.where} has no camera {name!r}; it has {list(source.cameras)}: correct "
                "config.data.cameras"
            )
        if source.cameras[name] != first.cameras.get(name) and not resized:
            raise ValueError(
                f"{source.where} has camera {name!r} of size {source.cameras[name]}, "
                f"{first.where} of size {first.cameras.get(name)}: to mix them, set "
                "config.data.image_size = (HEIGHT, WIDTH)"
            )
    keys = ["proprio_dim", "control_hz"] + ([] if source.action_free else ["action_dim"])
    for key in keys:
        if getattr(info, key) != getattr(reference, key):
            raise ValueError(
                f"{source.where} has {key} {getattr(info, key)}, {first.where} has "
                f"{getattr(reference, key)}: they cannot be mixed{_ADVICE.get(key, '')}"
            )


def _check_latents(source: Source, data, cameras: tuple[str, ...]) -> None:
    """Compares the encoded windows with the configured ones."""
    info = source.latents.info
    actual = {"frames": info.frames, "frame_stride": info.frame_stride}
    expected = {"frames": data.frames, "frame_stride": data.frame_stride}
    if data.layout:
        actual["layout"], expected["layout"] = info.layout, data.layout
    else:
        actual["cameras"], expected["cameras"] = tuple(info.cameras), cameras
    for key, value in expected.items():
        if actual[key] != value:
            raise ValueError(
                f"{source.where}: its latents were computed with {key} {actual[key]}, "
                f"config.data.{key} is {value}; change it back, or write latents into another "
                f"folder by\n  {latents.command('DIR')}"
            )


def _statistics(sources: list[Source], mode: str) -> dict[str, Any]:
    """Returns stored statistics if they cover exactly the episodes in use, else computes them."""
    acting = labelled(sources)
    acting = [s for s in acting if not s.rollout] or acting
    one = acting[0].reader
    if len(acting) == 1 and len(one) == len(one.index["lengths"]):
        if (stored := one.stored_statistics()) is not None:
            return checked(stored, one, mode)
    return compute_statistics((s.reader for s in acting), acting[0].skips)


def compute_statistics(readers, skips: Skips | None = None) -> dict[str, Any]:
    """Computes statistics over all episodes of all readers without decoding pictures.

    Args:
      skips: counts bad episodes that may be skipped; none by default. Statistics of a single reader
        record which ones were.

    Raises:
      RecordError: an episode is bad.
    """
    arrays: dict[str, list] = {"proprio": [], "actions": []}
    readers, bad, skips = list(readers), [], skips or Skips()
    for reader in readers:
        if reader.info.action_free:
            arrays.pop("actions", None)
        for i in range(len(reader)):
            try:
                episode = reader[i]
            except RecordError as error:
                skips.add(reader.path, i, error)
                bad.append(i)
                continue
            for key, kept in arrays.items():
                kept.append(getattr(episode, key))
    out = normalize.statistics(arrays)
    if bad and len(readers) == 1:
        out = {key: rows | {"skipped": bad} for key, rows in out.items()}
    return out


def _check_origin(key: str, rows: Mapping[str, Any], reader: Reader, more: int) -> None:
    """Compares count and digest of a key's statistics with the episodes; `more` rows than
    actions."""
    good = np.ones(len(reader), bool)
    good[rows.get("skipped", [])] = False
    count = int(np.sum(reader.lengths[good] + more))
    if (said := rows.get("count", count)) != count:
        raise ValueError(f"the statistics are of {said} {key}, but there are {count}")
    said, known = rows.get("digest"), reader.digest(key, good)
    if said and known and said != known:
        raise ValueError(
            f"the statistics of {key} are of other episodes: digest {said}, not {known}"
        )


def checked(statistics: dict[str, Any], reader: Reader, mode: str) -> dict[str, Any]:
    """Returns `statistics` if they belong to `reader`'s episodes and suffice for a normalization
    mode.

    Raises:
      ValueError: they belong to another robot or to other episodes, lack rows, or are not numbers.
    """
    info = reader.info
    try:
        sizes = {"proprio": info.proprio_dim, "actions": info.action_dim}
        published_statistics.check(statistics, sizes, mode)
        for key, size in {"proprio": 1, "actions": 0}.items():
            _check_origin(key, statistics[key], reader, size)
            numbers = [x for name, x in statistics[key].items() if name not in normalize.ABOUT]
            if not all(np.isfinite(x).all() for x in numbers):
                raise ValueError(f"statistics of {key} are not finite")
            if any(np.abs(x).max() > LARGEST for x in numbers):
                raise ValueError(f"statistics of {key} hold numbers above {LARGEST:g}, probably of "
                                 "a bad episode")  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"{reader.path}: {error}. They may be of another data set: recompute them by `python "
            f"-m wamjax.stats --data={reader.path} --out={reader.path}/statistics.json`"
        ) from error
    if not all(statistics[key].get("digest") and reader.digest(key) for key in normalize.KEYS):
        say(f"{reader.path}: nothing says which episodes its statistics are of (no digest): taken "
            "as they are")  # fmt: skip
    return statistics
