"""Configures the fine-tuning of a published model on your own data set.

    config = base_config()
    fine_tuning.configure(config, base="fast_wam", data="DATA/mine", checkpoint="Wan2.2-TI2V-5B")

Sizes, cameras and their layout, normalization, rows of text and the length of training follow from
the data set. The run itself prepares everything else that training reads, see `runs.preparation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from wamjax import files
from wamjax.config import did_you_mean, source
from wamjax.data import embeddings, layout
from wamjax.data.ingest import signals
from wamjax.data.readers import is_elsewhere
from wamjax.data.records import SPEC, Reader
from wamjax.wam.cosmos_policy import presets as cosmos_policy
from wamjax.wam.cosmos_policy.layouts import parse
from wamjax.wam.fast_wam import presets as fast_wam
from wamjax.weights import downloads

EPOCHS, STEPS, BATCH = 10, (2_000, 30_000), 128  # as Fast-WAM on LIBERO: about ten epochs
CHUNK_SECONDS = 0.8  # Cosmos Policy's chunk on LIBERO: 16 actions at 20 Hz
ROWS = 64  # the number of text embeddings is a multiple of this
MATRICES = r"(self_attn|cross_attn)/[qkvo]/kernel", r"ffn/(in|out)/kernel"


@dataclasses.dataclass(frozen=True)
class Base:
    """A published model to start from.

    Attributes:
      denoisers: weight families of the model; the first available one is used.
      codec, text: weight families of the picture codec and the text encoder.
      template: prompt template.
      rows: rows of text as published.
    """

    denoisers: tuple[str, ...]
    codec: str
    text: str
    template: str
    rows: int


BASES = {
    "fast_wam": Base(("fast_wam", "wan22_ti2v"), "wan22_vae", "umt5", embeddings.FAST_WAM, 128),
    "cosmos_policy": Base(
        ("cosmos_policy", "cosmos_predict2"), "wan21_vae", "t5", "{instruction}", 64
    ),
}


@dataclasses.dataclass(frozen=True)
class Choices:
    """Holds the choices that the data does not determine.

    Attributes:
      cameras: cameras to use, in this order; () = all.
      layout: their arrangement (Fast-WAM), see `data.layout`; "" = as `layout.arrange` says.
      hold: numbers or names of the actions that keep their last command after the end of an
        episode; () = the grippers of the data set, ("none",) = none.
      lora: rank of adapters on the frozen backbone; 0 = train everything.
      successes: treat all episodes as successful demonstrations, where the data does not say.
      chunk: actions per plan; 0 = as published, in seconds.
      steps, batch: steps and batch size of training; 0 = ten epochs, and 128.
      debug: use a miniature with random weights, to test that everything runs.
    """

    cameras: tuple[str, ...] = ()
    layout: str = ""
    hold: tuple[str, ...] = ()
    lora: int = 0
    successes: bool = False
    chunk: int = 0
    steps: int = 0
    batch: int = 0
    debug: bool = False


def configure(
    config, base: str, data: str, checkpoint: str = "", choices: Choices | None = None
) -> None:
    """Sets every key that follows from a data set and the base model.

    Args:
      config: from `wamjax.config.base_config`.
      base: a key of `BASES`.
      data: folder of the data set with pictures, see `wamjax.ingest`.
      checkpoint: folder of the published files, see `weights.downloads`; "" = an earlier run on
        data in the same folder converted them.

    Raises:
      FileNotFoundError: the data set does not exist.
      ValueError: the data lacks something; names it and the fix.
    """
    if base not in BASES:
        raise ValueError(f"base {base!r} does not exist{did_you_mean(base, BASES)}; there are "
                         f"{sorted(BASES)}")  # fmt: skip
    choices, reader = choices or Choices(), _open(data)
    cameras = _cameras(reader, choices)
    start = _Start(base, checkpoint, reader.path.parent / _weights(base, choices), choices.debug)
    if base == "fast_wam":
        _fast_wam(config, reader, cameras, choices, start)
    else:
        _cosmos_policy(config, reader, cameras, choices, start)
    _common(config, reader, choices, start)


def _open(data: str) -> Reader:
    fix = "make it by python -m wamjax.ingest --source=FILES --out=DIR, and name it by data=DIR"
    if not data:
        raise ValueError(f"the data set is missing: {fix}")
    path = files.path(data, "data=")
    if is_elsewhere(data) or not (path / SPEC).exists():
        raise FileNotFoundError(f"data={data}: there is no data set ({SPEC}); {fix}")
    reader = Reader(path)
    if not reader.info.cameras:
        raise ValueError(f"{path} holds no pictures: name the data set that it was made of")
    if reader.info.action_free:
        raise ValueError(f"{path} was recorded without actions, which a policy learns from: ingest "
                         "it with --action=KEY")  # fmt: skip
    return reader


def _cameras(reader: Reader, choices: Choices) -> dict[str, tuple[int, int]]:
    cameras = reader.info.cameras
    for name in choices.cameras:
        if name not in cameras:
            raise ValueError(f"{reader.path} has no camera {name!r}{did_you_mean(name, cameras)}; "
                             f"it has {list(cameras)}")  # fmt: skip
    return {name: tuple(cameras[name]) for name in choices.cameras or cameras}


def _weights(base: str, choices: Choices) -> str:
    return f"weights-debug/{base}" if choices.debug else "weights"


class _Start:
    """Holds the weights that training starts from."""

    def __init__(self, base: str, checkpoint: str, folder: files.Path, debug: bool):
        self.base, self.folder = BASES[base], folder
        self.name = "" if debug else checkpoint
        self.checkpoint = files.path(self.name) if self.name else None
        available = [f for f in self.base.denoisers if self._is_available(f)]
        self.denoiser = self.base.denoisers[-1] if debug or not available else available[0]

    def _is_available(self, family: str) -> bool:
        folder = downloads.folder_of(family, self.checkpoint, self.folder)
        published = self.checkpoint is not None and downloads.find(family, self.checkpoint)
        return folder.exists() or bool(published)

    def path(self, family: str) -> str:
        """Returns where the converted weights of a family are once the run has started."""
        return str(downloads.folder_of(family, self.checkpoint, self.folder))

    def sizes(self):
        """Returns the sizes of the denoiser's weights, as far as they are known."""
        return downloads.sizes(self.denoiser, self.checkpoint, self.folder)


def _fast_wam(config, reader: Reader, cameras, choices: Choices, start: _Start) -> None:
    info, data = reader.info, config.data
    if not info.proprio_dim:
        raise ValueError(f"{reader.path} holds no state, and Fast-WAM is told it: ingest it with "
                         "--state=KEY,...")  # fmt: skip
    fast_wam.fast_wam(config, "fast", "2026-08")
    fast_wam.wan22_5b(config)
    fast_wam.wan22_training(config)
    fast_wam.wan22_windows(config)
    if choices.debug:
        fast_wam.miniature(config)
    data.chunk = choices.chunk or data.chunk
    data.padding = "hold:" + ",".join(_held(reader, choices))
    picture = layout.arrange(cameras, 32 if choices.debug else 224)
    if choices.layout:
        picture = layout.parse(choices.layout)
        if missing := [name for name in picture.cells if name not in info.cameras]:
            raise ValueError(f"layout={choices.layout} shows {missing}; {reader.path} has cameras "
                             f"{list(info.cameras)}")  # fmt: skip
    data.layout, data.cameras, data.resize = str(picture), tuple(picture.cells), "stretch"
    height, width = picture.size
    size = f"-debug-{height}x{width}" if choices.debug else f"-{height}x{width}"
    latents = f"{files.name(reader.path)}-latents{size}"
    data.sources.demos = source(path=latents, pictures=files.name(reader.path))
    config.eval.execute = min(10, data.chunk)
    init, config.objective.action_from_video = config.init_from, start.denoiser == "wan22_ti2v"
    init.path = start.path(start.denoiser)
    frozen, below = ["video/.*", "blocks/video/.*"], "blocks/video/"
    if start.denoiser == "wan22_ti2v":
        init.missing = ("action/.*", "blocks/action/.*", "proprio/.*")
    else:
        frozen, below = ["video/.*", "blocks/.*", "action/(text|time)_.*"], "blocks/.*"
        init.fresh = _other_robot(start, info)
    _lora(config, choices, below, frozen)


def _other_robot(start: _Start, info) -> tuple[str, ...]:
    """Returns the parameters that start fresh because the robot has other dimensions."""
    sizes = start.sizes()
    fresh = []
    if sizes.get("data.declared.action_dim", info.action_dim) != info.action_dim:
        fresh += ["action/encoder/.*", "action/head/.*"]
    if sizes.get("data.declared.proprio_dim", info.proprio_dim) != info.proprio_dim:
        fresh += ["proprio/.*"]
    return tuple(fresh)


def _cosmos_policy(config, reader: Reader, cameras, choices: Choices, start: _Start) -> None:
    info, data = reader.info, config.data
    if choices.layout:
        raise ValueError("layout is Fast-WAM's: to Cosmos Policy every camera is a slot of its own")
    if not (info.outcomes or choices.successes):
        raise ValueError(f"{reader.path} says neither rewards nor success, and Cosmos Policy "
                         "learns values: write it with them, or say by successes that all of its "
                         "episodes are demonstrations that succeed")  # fmt: skip
    names = [*choices.cameras] or sorted(cameras, key=lambda name: not layout.ON_ARM.search(name))
    chunk = choices.chunk or max(4, round(CHUNK_SECONDS * info.control_hz))
    words = _words(names, info.proprio_dim, chunk, info.action_dim)
    cosmos_policy.objective(config, words)
    cosmos_policy.predict2_2b(config)
    steps, _ = _length(reader, choices)  # the anchors on LIBERO: 1,000 and 30,000 of 40,000
    cosmos_policy.training(config, (max(steps // 40, 1), max(3 * steps // 4, 2)))
    config.init_from.path = f"{start.path(start.denoiser)},codec={start.path(start.base.codec)}"
    cosmos_policy.declare(config, control_hz=info.control_hz)
    if choices.debug:
        cosmos_policy.miniature(config)
        config.init_from.path = start.path(start.denoiser)
    data.image_size, data.resize = tuple(data.declared.camera_size), "stretch"
    data.sources.demos = source(path=files.name(reader.path), weight=2.0)
    data.sources.demos.successes = not info.outcomes
    config.eval.execute = chunk
    _lora(config, choices, "blocks/.*", [*config.optim.freeze, "video/.*", "blocks/.*"])


def _words(cameras: Sequence[str], proprio: int, chunk: int, actions: int) -> tuple[str, ...]:
    """Returns the slots of a robot, in the published order."""
    state = [f"proprio:{proprio}"] if proprio else []
    now = [*state, *(f"camera:{name}" for name in cameras)]
    words = ("blank", *now, f"action:{chunk}x{actions}", *(f"future_{w}" for w in now), "value")
    parse(words)
    return words


def _held(reader: Reader, choices: Choices) -> list[str]:
    """Returns the actions that keep their last command: the chosen ones, else the grippers."""
    if choices.hold:
        return [] if choices.hold == ("none",) else list(choices.hold)
    names = reader.info.action_names
    samples = [reader[i].actions for i in range(min(8, len(reader)))]
    grippers = signals.grippers(names, samples)
    if not grippers and not names:
        raise ValueError(
            f"{reader.path} does not name its actions, and none takes two values only, so nothing "
            "says which keep their command behind the end of an episode, as grippers do: say it "
            "by hold=NUMBER+NUMBER or hold=none, or write action_names"
        )
    return [str(i) for i in grippers]


def _lora(config, choices: Choices, below: str, frozen: Sequence[str]) -> None:
    if choices.lora:
        config.lora.rank, config.optim.freeze = choices.lora, tuple(frozen)
        separator = "" if below.endswith("/") else "/"
        config.lora.targets = tuple(below + separator + matrix for matrix in MATRICES)


def _common(config, reader: Reader, choices: Choices, start: _Start) -> None:
    """Sets the keys that both bases share: sizes, text, and the run's own preparation."""
    info, data, base = reader.info, config.data, start.base
    data.root, declared = str(reader.path.parent), data.declared
    declared.action_dim, declared.proprio_dim = info.action_dim, info.proprio_dim
    declared.control_hz, data.normalization = info.control_hz, "min_max"
    if choices.debug:
        data.batch_size = choices.batch or data.batch_size
        config.total_steps = choices.steps or config.total_steps
    else:
        config.total_steps, data.batch_size = _length(reader, choices)
        config.mesh.data, config.mesh.fsdp = 1, -1
    texts = reader.index["instructions"]
    data.instruction_length = rows(texts, base.template, base.rows)
    if 0 < config.model.context_rows < data.instruction_length:
        raise ValueError(f"{reader.path}: an instruction may take {data.instruction_length} rows "
                         f"of text, the model counts {config.model.context_rows}: shorten "
                         f"{max(texts, key=len)!r}")  # fmt: skip
    debug = "-debug" if choices.debug else ""
    name = files.name(reader.path)
    data.embeddings = f"{name}-{base.text}{debug}-{data.instruction_length}"
    prepare = config.prepare
    prepare.denoiser, prepare.codec, prepare.text = start.denoiser, base.codec, base.text
    prepare.template, prepare.checkpoint, prepare.stand_in = (
        base.template,
        start.name,
        choices.debug,
    )
    prepare.weights = str(start.folder.relative_to(reader.path.parent))


def rows(texts: Iterable[str], template: str, least: int) -> int:
    """Returns the rows of text embeddings that no prompt exceeds: as published, or a multiple of
    `ROWS`.

    A piece of T5's vocabulary has two letters or more in all but rare words, and every word starts
    a new piece.
    """
    longest = 0
    for text in texts:
        prompt = template.replace("{instruction}", text)
        longest = max(longest, len(prompt.encode()) // 2 + len(prompt.split()) + 1)
    return least if longest <= least else ROWS * math.ceil(longest / ROWS)


def _length(reader: Reader, choices: Choices) -> tuple[int, int]:
    """Returns the steps of training and the batch size."""
    batch = choices.batch or BATCH
    epochs = math.ceil(EPOCHS * int(reader.lengths.sum()) / batch)
    return choices.steps or min(max(epochs, STEPS[0]), STEPS[1]), batch
