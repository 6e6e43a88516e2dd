"""Reads and writes the folder of a policy bundle.

    DIR/policy.json   config, sizes and names of the data, statistics, mode, and so on
    DIR/weights/      parameters, as a folder of `wamjax.convert`
    DIR/planner/      parameters of a separate planner, if there is one
    DIR/codec/        encodes pictures for a policy that was trained on cached latents
    DIR/embeddings/   text embeddings (`wamjax.data.embeddings`), if the policy reads them; new
                      instructions can be added
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import tqdm
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import files as storage
from wamjax.data import published_statistics
from wamjax.data.spec import DataSpec
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.training import integrity
from wamjax.training.step import KEPT_PRECISE
from wamjax.weights import store
from wamjax.weights.plan import Slice
from wamjax.weights.tensor import Tensor

FORMAT = 1
MANIFEST, WEIGHTS, PLANNER, CODEC, TEXT = (
    "policy.json", "weights", "planner", "codec", "embeddings",
)  # fmt: skip

Slices = dict[Slice, Tensor]


class BadBundle(ValueError):
    """A bundle is damaged or inconsistent; the message names file and key."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Holds the contents of ``policy.json``.

    Attributes:
      config: resolved config; the policy computes in its ``precision.compute``.
      spec: sizes of the data: cameras in their order, control rate, chunk, proprio, actions.
      statistics: of actions and proprio, see `wamjax.data.normalize`.
      mode: how to act; None: the policy's default.
      step: step of the checkpoint.
      source: origin of the parameters, for people.
      action_names, proprio_names: names of the dimensions; empty if unknown.
      constants: mean and std of the codec's latents, if they are normalized; see `constants_of`.
      planner: training config of a separate planner.
    """

    config: ConfigDict
    spec: DataSpec
    statistics: Mapping[str, Any]
    mode: str | None = None
    step: int = 0
    source: str = ""
    action_names: tuple[str, ...] = ()
    proprio_names: tuple[str, ...] = ()
    constants: Mapping[str, Any] | None = None
    planner: ConfigDict | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values with the format version."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out |= {"config": configs.to_json(self.config), "spec": self.spec.to_json()}
        out["planner"] = self.planner and configs.to_json(self.planner)
        return {"format": FORMAT, **out}

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str) -> Manifest:
        """Reverses `to_json`; `where` names the file in errors."""
        values = dict(values)
        if (version := values.pop("format", None)) != FORMAT:
            raise ValueError(f"{where} has format {version!r}, this wamjax reads {FORMAT}; export "
                             "the policy again")  # fmt: skip
        fields = {f.name for f in dataclasses.fields(Manifest)}
        if set(values) != fields:
            raise ValueError(
                f"{where}: keys {sorted(set(values) ^ fields)} are missing or unknown, it must "
                f"have {fields}"
            )
        values["config"] = configs.load(values["config"])
        values["spec"] = DataSpec.from_json(values["spec"])
        values["planner"] = values["planner"] and configs.load(values["planner"])
        for names in ("action_names", "proprio_names"):
            values[names] = tuple(values[names])
        return Manifest(**values)


def write(
    output: str | os.PathLike,
    manifest: Manifest,
    parts: Mapping[str, tuple[Slices, Mapping[str, Any]]],
    embeddings: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Writes a bundle, all or nothing, with at most one slice of the parameters in memory.

    Args:
      parts: folder -> (parameters, contents of its ``weights.json``), see `store.write`.
      embeddings: the text-embedding cache to include.

    Raises:
      FileExistsError: `output` exists.
    """
    size = sum(x.nbytes for slices, _ in parts.values() for x in slices.values())
    bar = tqdm.tqdm(total=size, unit="B", unit_scale=True, desc="export", disable=not progress)
    with storage.draft(output, last=MANIFEST) as draft, bar:
        draft.mkdir()
        for name, (slices, about) in parts.items():
            store.write(draft / name, slices, about, bar.update)
        if embeddings is not None:
            (draft / TEXT).mkdir()
            source = storage.path(embeddings)
            for file in [source / "cache.json", *storage.glob(source, "embeddings-*.safetensors")]:
                shutil.copyfile(storage.fetch(file), draft / TEXT / file.name)
        values = json.loads(json.dumps(manifest.to_json()))
        values["files"] = {f"{TEXT}/{file.name}": _digest(file)
                           for file in sorted((draft / TEXT).glob("*"))}  # fmt: skip
        text = json.dumps({**values, "digest": integrity.of_json(values)}, indent=2)
        (draft / MANIFEST).write_text(text + "\n")


def read(folder: str | os.PathLike) -> Manifest:
    """Returns the manifest of a bundle.

    Raises:
      FileNotFoundError: there is none, or a part of it is gone.
      BadBundle: it is of another format, is damaged, or says what cannot be.
    """
    folder = storage.path(folder)
    file = folder / MANIFEST
    if not file.exists():
        raise FileNotFoundError(_no_bundle(folder))
    manifest = _manifest(file)
    folders = [WEIGHTS]
    folders += [PLANNER] if manifest.planner is not None else []
    folders += [CODEC] if manifest.config.model.codec.kind == "cached" else []
    folders += [TEXT] if manifest.config.model.text.kind == "context" else []
    if missing := [name for name in folders if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; export the policy again")
    return manifest


def fingerprint(folder: str | os.PathLike) -> str:
    """Returns an identifier of a bundle: 16 hexadecimal digits that hash its manifest and the
    digests of its weights."""
    digest = hashlib.sha256()
    for file in (MANIFEST, *(f"{part}/{store.ABOUT}" for part in (WEIGHTS, PLANNER, CODEC))):
        path = storage.path(folder) / file
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def _no_bundle(folder: storage.Path) -> str:
    """Returns a message that says what a folder is instead of a bundle, and how to export one."""
    from wamjax.training import checkpoint

    export = "python -m wamjax.export_policy"
    if not folder.exists():
        return (f"{folder} does not exist, so it is not a policy bundle; make one by\n  {export} "
                f"--workdir=RUN --output={folder}")  # fmt: skip
    if (folder / checkpoint.FOLDER).is_dir():
        return (f"{folder} is a run, not a policy bundle; make one of it by\n  {export} "
                f"--workdir={folder} --output=BUNDLE")  # fmt: skip
    if (folder / store.ABOUT).exists():
        return (f"{folder} holds converted weights, not a policy bundle; make one by\n  "
                f"{export} --config=FILE --weights={folder} --statistics=FILE --output=BUNDLE")
    return (f"{folder} is not a policy bundle (no {MANIFEST}); make one by\n  {export} "
            "--workdir=RUN --output=BUNDLE")  # fmt: skip


def _digest(file: pathlib.Path | storage.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _manifest(file: storage.Path) -> Manifest:
    """Reads and checks ``policy.json``.

    Raises:
      BadBundle: it cannot, or is not such JSON.
    """
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        digest = values.pop("digest", None)
        plain = {key: value for key, value in values.items() if key != "files"}
        manifest = Manifest.from_json(plain, str(file))
        if digest is not None and digest != integrity.of_json(values):
            raise ValueError("it is not what was written: its digest differs")
        _check(manifest)
        # Weights are checked as they are loaded; embeddings added later have no digest.
        for name, written in values.get("files", {}).items():
            if _digest(file.parent / name) != written:
                raise ValueError(f"{name} in the same folder is not what was written")
    except Exception as error:  # a parser can raise anything on a damaged file
        text = " ".join(str(error).split()) or type(error).__name__
        raise BadBundle(f"{file}: {text}; export the policy again") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Checks types, sizes and statistics; the ValueError names the key."""
    spec, config = manifest.spec, manifest.config
    configs.validate(config)
    for key in ("proprio_dim", "action_dim", "chunk", "frames", "frame_stride",
                "instruction_length"):  # fmt: skip
        value = getattr(spec, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**20:
            raise ValueError(f"spec.{key} = {value!r} must be a positive number")
    hz = spec.control_hz
    if isinstance(hz, bool) or not isinstance(hz, int | float) or not 0 < hz < 1e6:
        raise ValueError(f"spec.control_hz = {hz!r} must be a positive number")
    for camera, size in spec.cameras.items():
        valid = all(isinstance(n, int) and not isinstance(n, bool) for n in size)
        if not isinstance(camera, str) or not valid or not all(0 < n <= 2**14 for n in size):
            raise ValueError(f"spec.cameras: {camera!r} is {size}, it must be (height, width) of "
                             f"1 to {2**14} pixels")  # fmt: skip
    for key, size in (("action_names", spec.action_dim), ("proprio_names", spec.proprio_dim)):
        names = getattr(manifest, key)
        if names and (len(names) != size or not all(isinstance(n, str) for n in names)):
            raise ValueError(f"{key} names {len(names)} dimensions, there are {size}")
    words = spec.words
    if not all(isinstance(w, str) for w in words) or len(set(words)) != len(words):
        raise ValueError(f"spec.words must be words, each once, not {str(words)[:60]}")
    texts = manifest.statistics.get("instructions", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"statistics.instructions must be a list of texts, not {str(texts)[:60]}")
    sizes = {"actions": spec.action_dim, "proprio": spec.proprio_dim}
    published_statistics.check(manifest.statistics, sizes, config.data.normalization)
    if not isinstance(manifest.step, int) or isinstance(manifest.step, bool) or manifest.step < 0:
        raise ValueError(f"step = {manifest.step!r} must be a number of steps")
    for key in ("mode", "source"):
        if not isinstance(value := getattr(manifest, key), str | None):
            raise ValueError(f"{key} = {value!r} must be a text")


def slices_of(
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[Slice], Tensor],
    config: ConfigDict | None = None,
) -> Slices:
    """Returns all parameters as slices, layer by layer where they are stacked.

    Args:
      get: returns a slice of a parameter.
      config: casts to its ``precision.compute``, as `step.compute_cast` does; None keeps the
        dtypes.
    """
    out: Slices = {}
    for path, shape in shapes.items():
        # Parameters of blocks are stacked along the first axis.
        for layer in range(shape[0]) if path.startswith("blocks/") else (None,):
            out[path, layer] = _cast(path, get((path, layer)), config)
    return out


def _cast(path: str, x: Tensor, config: ConfigDict | None) -> Tensor:
    if config is None:
        return x
    precise = path.rsplit("/", 1)[-1] in KEPT_PRECISE
    dtype = jnp.dtype(config.precision.params if precise else config.precision.compute)
    return Tensor(x.shape, dtype, lambda: x.read().astype(dtype, copy=False))


def constants_of(codec: Any) -> dict[str, Any] | None:
    """Returns the mean and std per channel that a codec normalizes its latents with."""
    if not isinstance(codec, VAECodec) or not codec.std:
        return None
    return {"mean": list(codec.mean), "std": list(codec.std)}
