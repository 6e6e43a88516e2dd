"""Exports a policy as a bundle: one folder with everything that acting needs.

    python -m wamjax.export_policy --workdir=runs/quickstart --output=bundles/quickstart
    python -m wamjax.export_policy --workdir=runs/cosmos --planner=runs/planner --output=bundles/c
    python -m wamjax.export_policy --config=experiments/configs/fast_wam_libero.py \\
        --weights=weights/fast_wam --codec=weights/wan22_vae --statistics=dataset_stats.json \\
        --embeddings=DATA/libero-text --output=bundles/libero
    python -m wamjax.export_policy --config=experiments/configs/cosmos_policy_libero.py \\
        --weights=weights/cosmos_libero --codec=weights/wan21_vae \\
        --statistics=libero_dataset_statistics.json --embeddings=DATA/libero-t5 --output=bundles/cp

The first two export a run: its newest checkpoint or ``--step``, and the moving average if there is
one. The others export published weights that `wamjax.convert` has converted, with the sizes that
the config declares. A robot then needs neither the run nor its data:

    policy = wamjax.load_policy("bundles/quickstart")
    actions = policy({"images": {...}, "proprio": ..., "instruction": "..."}, seed_or_key=0)

Parameters are stored in the dtype that the config computes in, or in ``--dtype``, in which the
policy then computes. If anything is missing, the command lists all of it and writes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from wamjax import cli, tree, wam
from wamjax import config as configs
from wamjax import files as storage
from wamjax.bundle import files
from wamjax.bundle.policy import check_mode
from wamjax.console import say
from wamjax.data import pipeline, published_statistics, readers, tokens
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.normalize import check_same, normalizers
from wamjax.data.sources import data_root
from wamjax.data.spec import DataSpec, Info
from wamjax.models.codec import Codec
from wamjax.training import checkpoint, init_from
from wamjax.training import state as states
from wamjax.training.checkpoint import Found
from wamjax.weights import downloads, store
from wamjax.weights.codecs import codec_of
from wamjax.weights.merging import merged

DTYPES = ("bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Choices:
    """Holds the choices for a bundle of either kind.

    Attributes:
      mode: how to act; None: the policy's default, or "plan" with a planner.
      dtype: see the module; that of ``config.precision.compute`` by default.
      codec: folder of `wamjax.convert` with the codec that encodes pictures.
      embeddings: folder of text embeddings; that of the config by default.
      action_names, proprio_names: names of the dimensions; those of the data set by default, if it
        still exists.
    """

    mode: str | None = None
    dtype: str | None = None
    codec: str | os.PathLike | None = None
    embeddings: str | os.PathLike | None = None
    action_names: tuple[str, ...] = ()
    proprio_names: tuple[str, ...] = ()


def from_run(
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    step: int | None = None,
    planner: str | os.PathLike | None = None,
    choices: Choices | None = None,
    progress: bool = True,
    ema: bool | None = None,
) -> None:
    """Exports the policy of a training run; see the module.

    Args:
      step: step of the checkpoint; the newest by default.
      ema: whether to use the moving average; by default if the run has one.
      planner: another run, whose world model and value function plan for this one.

    Raises:
      FileExistsError: `output` exists.
      FileNotFoundError, ValueError: the checkpoint does not exist, or something is missing or does
        not match; names all of it.
    """
    choices = choices or Choices()
    stored, step = checkpoint.parameters(workdir, step, ema)
    run = checkpoint.find(workdir, step)
    if pipeline.kind_of(run.config) == "arrays":
        raise ValueError(f"{workdir} was trained on {run.config.data.kind}, so it is not a policy: "
                         "give the --workdir of a policy")
    config, spec = _for_acting(run.config, choices), DataSpec.from_json(run.statistics["spec"])
    job = _Job(config, spec, choices, str(workdir), run.step)
    if choices.codec and config.model.codec.kind != "cached":
        job.problems.append("--codec: the run itself holds what its pictures are encoded by")
    # Adapters stay beside their kernels, so that the policy is that of the run to the last bit.
    job.parameters(files.WEIGHTS, stored.shapes, stored.slice)
    if planner is not None:
        job.attempt(lambda: _plan_by_run(job, run, planner))
    job.write(output, run.statistics, progress)


def _plan_by_run(job: _Job, run: Found, planner: str | os.PathLike) -> None:
    """Adds the newest checkpoint of a run as the planner for another run."""
    stored, step = checkpoint.parameters(planner)
    found = checkpoint.find(planner, step)
    ours, theirs = (normalizers(x.statistics, x.config.data.normalization) for x in (run, found))
    check_same(ours, theirs, f"the planner {planner}")
    ours, theirs = (x.statistics["spec"].get("words", ()) for x in (run, found))
    tokens.check_same(ours, theirs, f"the planner {planner}")
    job.add_planner(found.config, stored.shapes, stored.slice, str(planner))


def from_weights(
    config: ConfigDict,
    weights: str | os.PathLike,
    statistics: str | os.PathLike | None,
    output: str | os.PathLike,
    choices: Choices | None = None,
    progress: bool = True,
    planner: tuple[ConfigDict, str | os.PathLike] | None = None,
) -> None:
    """Exports converted weights as a policy; see the module.

    Args:
      config: config of the policy; must declare the sizes of its data (``data.declared``).
      weights: as ``config.init_from.path``: a folder of `wamjax.convert`, or several of them.
      statistics: file in a format of `wamjax.data.published_statistics`.
      planner: (config, weights) whose world model and value function plan for this policy.

    Raises:
      As `from_run`.
    """
    configs.validate(config)
    choices = choices or Choices()
    config = _for_acting(config, choices)
    config.lora.rank = 0  # adapters of the source are merged
    spec = pipeline.declared(config.data)
    if spec is None:
        raise ValueError("config.data.declared has no sizes (action_dim is 0): declare those of "
                         "the data that the weights were trained on")  # fmt: skip
    codec = ""
    if choices.codec and config.model.codec.kind != "cached":
        codec = f",codec={choices.codec}"
    job = _Job(config, spec, choices, f"{weights}{codec}", 0)
    stored = job.attempt(lambda: init_from.sources(job.source))
    if stored is not None:
        job.parameters(files.WEIGHTS, *merged(stored))
    if planner is not None:
        other, source = planner[0], f"{planner[1]}{codec}"
        configs.validate(other)
        stored = job.attempt(lambda: init_from.sources(source))
        if stored is not None:
            job.attempt(lambda: job.add_planner(other, *merged(stored), source))
    read = None
    if statistics is None:
        job.problems.append("the statistics of actions and proprio are missing: give "
                            "--statistics=FILE, the json published beside the weights")  # fmt: skip
    else:
        read = job.attempt(lambda: published_statistics.read(statistics))
    job.write(output, read, progress)


def _for_acting(config: ConfigDict, choices: Choices) -> ConfigDict:
    """Returns a copy of a config that computes in the chosen dtype."""
    config = configs.load(configs.to_json(config))
    config.precision.compute = choices.dtype or config.precision.compute
    return config


class _Job:
    """Collects the parts of a bundle, and every problem with them."""

    def __init__(
        self, config: ConfigDict, spec: DataSpec, choices: Choices, source: str, step: int
    ):
        self.config, self.spec, self.choices = config, spec, choices
        self.source, self.step = source, step
        self.objective = wam.build(config, spec)
        self.mode = check_mode(self.objective, choices.mode)
        self.problems: list[str] = []
        self.parts: dict[str, tuple[files.Slices, dict[str, Any]]] = {}
        self.planner: ConfigDict | None = None

    def attempt(self, make: Callable[[], Any]) -> Any:
        """Returns the result of `make`; on an error notes it and returns None."""
        try:
            return make()
        except (ValueError, FileNotFoundError) as error:
            self.problems.append(str(error))
            return None

    def parameters(self, part: str, shapes, get, source: str = "") -> None:
        """Adds parameters after checking that they match the objective."""
        abstract = jax.eval_shape(
            functools.partial(states.init_params, self.objective, self.config)
        )
        what = f"{source or self.source} does not fit the policy that the config builds"
        expected = tree.flatten(abstract)
        if self.attempt(lambda: init_from.check(shapes, expected, what=what)) is not None:
            self._add(part, shapes, get, self.config, source)

    def add_planner(self, config: ConfigDict, shapes, get, source: str) -> None:
        """Adds world model and value function of another checkpoint, trained with `config`."""
        self.objective = self.objective.with_planner(wam.build(config, self.spec))
        self.planner, self.mode = config, self.mode or check_mode(self.objective, "plan")
        self.parameters(files.PLANNER, shapes, get, source)

    def write(
        self, output: str | os.PathLike, statistics: dict[str, Any] | None, progress: bool
    ) -> None:
        """Adds the rest, and writes the bundle if there are no problems.

        Raises:
          FileExistsError, ValueError: see `from_run`.
        """
        sizes = {"actions": self.spec.action_dim, "proprio": self.spec.proprio_dim}
        mode = self.config.data.normalization
        if statistics is not None:
            self.attempt(lambda: published_statistics.check(statistics, sizes, mode))
        codec = self.attempt(self._codec) or self.objective.codec
        embeddings = self.attempt(self._embeddings)
        names = self.attempt(self._names) or {}
        if self.problems:
            raise ValueError("the policy is not complete:\n- " + "\n- ".join(self.problems))
        manifest = files.Manifest(
            config=self.config, spec=self.spec, statistics=statistics, mode=self.mode,
            step=self.step, source=self.source, constants=files.constants_of(codec),
            planner=self.planner, **names,
        )  # fmt: skip
        files.write(output, manifest, self.parts, embeddings, progress)

    def _add(self, part: str, shapes, get, config: ConfigDict | None, source: str = "") -> None:
        about = {"family": self.config.objective.name, "layout": None, "sizes": {},
                 "source": source or self.source, "plain": {"step": self.step}}  # fmt: skip
        if self.config.model.text.kind == "tokens":  # what its embedding of words is of
            about["plain"]["words"] = list(self.spec.words)
        self.parts[part] = files.slices_of(shapes, get, config), about

    def _codec(self) -> Codec | None:
        """Returns the codec that encodes pictures for a policy trained on cached latents."""
        actual = self.objective.codec
        if self.config.model.codec.kind != "cached":
            return None
        expected = actual.channels, actual.spatial, actual.temporal
        chosen = self.choices.codec or self._prepared_codec()
        if not chosen:
            raise ValueError(
                f"the codec (channels, pixels, frames: {expected}) is missing: give --codec=DIR, "
                "a folder of wamjax.convert, such as of --family=wan22_vae"
            )
        about = store.about(chosen)
        codec = codec_of(about, chosen)
        sizes = codec.sizes.channels, codec.sizes.space_stride, codec.sizes.time_stride
        if sizes != expected:
            raise ValueError(f"--codec={chosen} has (channels, pixels, frames) "
                             f"{sizes}, the policy {expected}")  # fmt: skip
        stored = store.read(storage.path(chosen, "--codec") / store.PARAMS)
        self.parts[files.CODEC] = files.slices_of(stored.shapes, stored.slice), about
        return codec

    def _prepared_codec(self) -> storage.Path | None:
        """Returns the codec with which the run encoded its own latents, if it still exists."""
        config = self.config
        if not config.prepare.codec:
            return None
        folder = storage.below(data_root(config.data.root), config.prepare.weights)
        given = config.prepare.checkpoint
        path = downloads.folder_of(
            config.prepare.codec, storage.path(given) if given else None, folder
        )
        return path if path.exists() else None

    def _embeddings(self) -> storage.Path | None:
        """Returns the folder of the text embeddings after checking it."""
        data, asked = self.config.data, self.choices.embeddings
        if self.config.model.text.kind != "context":
            if asked:
                raise ValueError(
                    f"--embeddings={asked}: the policy reads words, not embeddings: leave it out"
                )
            return None
        if not (asked or data.embeddings):
            raise ValueError("the text embeddings are missing: give --embeddings=DIR, a folder of "
                             "wamjax.data.embeddings")  # fmt: skip
        if asked:
            path = storage.path(asked, "--embeddings")
        else:
            path = storage.below(data_root(data.root), data.embeddings)
        cache = EmbeddingCache(path)
        actual = len(cache) > 0, cache.settings.length, cache.width
        expected = True, self.spec.instruction_length, self.config.model.context_width
        if actual != expected:
            raise ValueError(f"--embeddings={path} has {len(cache)} embeddings of {actual[1:]} "
                             f"(rows and width), the policy reads {expected[1:]}")  # fmt: skip
        return path

    def _names(self) -> dict[str, tuple[str, ...]]:
        """Returns names of the dimensions: the chosen ones, else those of a data set of the
        config."""
        sizes = {"action_names": self.spec.action_dim, "proprio_names": self.spec.proprio_dim}
        out, said = {}, _said(self.config.data)
        for key, size in sizes.items():
            names = tuple(getattr(self.choices, key))
            if names and len(names) != size:
                raise ValueError(f"--{key} names {len(names)} dimensions, there are {size}")
            out[key] = names or next((n for n in said[key] if len(n) == size), ())
        return out


def _said(data) -> dict[str, list[tuple[str, ...]]]:
    """Returns names of the dimensions from the existing data sets of a config."""
    from wamjax.envs.world import open_world

    out: dict[str, list[tuple[str, ...]]] = {"action_names": [], "proprio_names": []}
    root = data_root(data.root)
    for entry in data.sources.values():
        if entry.collect.episodes:
            described: Any = open_world(entry.collect.env)
        elif readers.is_elsewhere(entry.path):
            try:
                described = readers.open_elsewhere(entry.path, root, 0, data.skip_bad).info
            except (OSError, ImportError, ValueError) as error:
                say(f"the bundle has no names of dimensions from {entry.path}: {error}; name them "
                    "by --action_names and --proprio_names")  # fmt: skip
                continue
        else:
            file = storage.below(root, entry.path) / "spec.json"
            if not file.is_file():
                continue
            described = Info.from_json(json.loads(file.read_text()), str(file))
        for key, names in out.items():
            names.append(tuple(getattr(described, key)))
    return out


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run whose policy to export")
    flags.DEFINE_integer("step", None, "checkpoint of the run; the newest by default")
    flags.DEFINE_string(
        "planner", None, "what plans for the policy: another run, or other weights with --weights"
    )
    cli.define_config(text="for --weights")
    cli.define_config("planner_config", text="that of the planner, for --weights")
    flags.DEFINE_string(
        "weights", None, "output folder of wamjax.convert, to export instead of a run"
    )
    flags.DEFINE_string(
        "statistics", None, "json file of the weights' statistics, in our format or as published"
    )
    flags.DEFINE_string(
        "codec", None, "output folder of wamjax.convert with the codec that encodes pictures"
    )
    flags.DEFINE_string("embeddings", None, "folder of text embeddings; the config's by default")
    flags.DEFINE_string("output", None, "bundle folder to create; must not exist", required=True)
    flags.DEFINE_string(
        "mode",
        None,
        "default mode of the bundle: direct, joint, plan, ...; the policy's own by default",
    )
    flags.DEFINE_enum(
        "dtype", None, DTYPES, "dtype the policy computes in; the config's by default"
    )
    flags.DEFINE_list(
        "action_names", [], "names of the action dimensions; the data set's by default"
    )
    flags.DEFINE_list(
        "proprio_names", [], "names of the state dimensions; the data set's by default"
    )
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    if bool(options.workdir) == bool(options.weights) or bool(options.weights) != bool(
        options.config
    ):
        raise app.UsageError("give --workdir, or --config and --weights")
    for name in ("statistics", "planner_config") if options.workdir else ("step", "ema"):
        if options[name].present:
            raise app.UsageError(f"--{name} cannot be used with the other flags: leave it out")
    if options.weights and bool(options.planner) != bool(options.planner_config):
        raise app.UsageError("with --weights a planner is --planner=DIR and --planner_config=FILE")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    chosen = Choices(**{f.name: options[f.name].value for f in dataclasses.fields(Choices)})
    try:
        if options.workdir:
            ema = checkpoint.asked_ema()
            from_run(
                options.workdir, options.output, options.step, options.planner, chosen, ema=ema
            )
        else:
            planner = (options.planner_config, options.planner) if options.planner else None
            from_weights(
                options.config,
                options.weights,
                options.statistics,
                options.output,
                chosen,
                planner=planner,
            )
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise SystemExit(f"nothing was written: {error}") from None
    print(f"wrote {options.output}")


if __name__ == "__main__":
    cli.run(main, define_flags)
