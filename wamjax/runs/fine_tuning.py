"""Fine-tuning a published model on a data set of one's own: a config that follows from the data.

    config = base_config()
    fine_tuning.configure(config, base="fast_wam", data="DATA/mine", checkpoint="Wan2.2-TI2V-5B")

Sizes, cameras, their picture, normalisation, rows of text and the length of training are those of
the data set. What training reads beside it is made by the run itself, see `runs.preparation`.
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
CHUNK_SECONDS = 0.8  # of Cosmos Policy's actions on LIBERO: 16 at 20 Hz
ROWS = 64  # text embeddings have a multiple of so many
MATRICES = r"(self_attn|cross_attn)/[qkvo]/kernel", r"ffn/(in|out)/kernel"


@dataclasses.dataclass(frozen=True)
class Base:
    """A published model to start from.

    Attributes:
      denoisers: families of its weights; the first that is there is taken.
      codec, text: families of what makes latents of pictures, and embeddings of words.
      template: of the prompt.
      rows: of text as published.
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
    """What the data does not decide.

    Attributes:
      cameras: that are looked through, in this order; () = all.
      layout: their picture (Fast-WAM), see `data.layout`; "" = as `layout.arrange` says.
      hold: numbers or names of the actions that keep their last command behind the end of an
        episode; () = the grippers that the data set has, ("none",) = none.
      lora: rank of adapters beside the frozen backbone; 0 = everything is trained.
      successes: all episodes are demonstrations that succeed, where the data does not say it.
      chunk: actions of a plan; 0 = as published, in seconds.
      steps, batch: of training; 0 = ten epochs, and 128.
      debug: a miniature from random weights, to see that everything runs.
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
    """Sets all that follows from a data set and the model that it is trained from.

    Args:
      config: of `wamjax.config.base_config`.
      base: a key of `BASES`.
      data: folder of the data set with pictures, see `wamjax.ingest`.
      checkpoint: folder of the published files, see `weights.downloads`; "" = they were converted
        by an earlier run on data beside this one.

    Raises:
      FileNotFoundError: there is no such data set.
      ValueError: the data lacks something; says what, and the fix.
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
    have = reader.info.cameras
    for name in choices.cameras:
        if name not in have:
            raise ValueError(f"{reader.path} has no camera {name!r}{did_you_mean(name, have)}; it "
                             f"has {list(have)}")  # fmt: skip
    return {name: tuple(have[name]) for name in choices.cameras or have}


def _weights(base: str, choices: Choices) -> str:
    return f"weights-debug/{base}" if choices.debug else "weights"


class _Start:
    """The weights that are started from."""

    def __init__(self, base: str, checkpoint: str, folder: files.Path, debug: bool):
        self.base, self.folder = BASES[base], folder
        self.name = "" if debug else checkpoint
        self.checkpoint = files.path(self.name) if self.name else None
        there = [f for f in self.base.denoisers if self._is_there(f)]
        self.denoiser = self.base.denoisers[-1] if debug or not there else there[0]

    def _is_there(self, family: str) -> bool:
        folder = downloads.folder_of(family, self.checkpoint, self.folder)
        published = self.checkpoint is not None and downloads.find(family, self.checkpoint)
        return folder.exists() or bool(published)

    def path(self, family: str) -> str:
        """Where the converted weights of a family are, once the run has begun."""
        return str(downloads.folder_of(family, self.checkpoint, self.folder))

    def sizes(self):
        """Of the weights of the denoiser, as far as they are known."""
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
        if lacks := [name for name in picture.cells if name not in info.cameras]:
            raise ValueError(f"layout={choices.layout} shows {lacks}; {reader.path} has cameras "
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
    """What cannot be taken from a policy of a robot with other numbers."""
    was = start.sizes()
    out = []
    if was.get("data.declared.action_dim", info.action_dim) != info.action_dim:
        out += ["action/encoder/.*", "action/head/.*"]
    if was.get("data.declared.proprio_dim", info.proprio_dim) != info.proprio_dim:
        out += ["proprio/.*"]
    return tuple(out)


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
    """The slots of a robot, in the order of the published ones."""
    state = [f"proprio:{proprio}"] if proprio else []
    now = [*state, *(f"camera:{name}" for name in cameras)]
    words = ("blank", *now, f"action:{chunk}x{actions}", *(f"future_{w}" for w in now), "value")
    parse(words)
    return words


def _held(reader: Reader, choices: Choices) -> list[str]:
    """The actions that keep their last command: as asked, or the grippers."""
    if choices.hold:
        return [] if choices.hold == ("none",) else list(choices.hold)
    names = reader.info.action_names
    some = [reader[i].actions for i in range(min(8, len(reader)))]
    found = signals.grippers(names, some)
    if not found and not names:
        raise ValueError(
            f"{reader.path} does not name its actions, and none takes two values only, so nothing "
            "says which keep their command behind the end of an episode, as grippers do: say it "
            "by hold=NUMBER+NUMBER or hold=none, or write action_names"
        )
    return [str(i) for i in found]


def _lora(config, choices: Choices, below: str, frozen: Sequence[str]) -> None:
    if choices.lora:
        config.lora.rank, config.optim.freeze = choices.lora, tuple(frozen)
        separator = "" if below.endswith("/") else "/"
        config.lora.targets = tuple(below + separator + matrix for matrix in MATRICES)


def _common(config, reader: Reader, choices: Choices, start: _Start) -> None:
    """What both bases have: sizes, text, and what the run makes by itself."""
    info, data, base = reader.info, config.data, start.base
    data.root, said = str(reader.path.parent), data.declared
    said.action_dim, said.proprio_dim = info.action_dim, info.proprio_dim
    said.control_hz, data.normalization = info.control_hz, "min_max"
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
    made = config.prepare
    made.denoiser, made.codec, made.text = start.denoiser, base.codec, base.text
    made.template, made.checkpoint, made.stand_in = base.template, start.name, choices.debug
    made.weights = str(start.folder.relative_to(reader.path.parent))


def rows(texts: Iterable[str], template: str, least: int) -> int:
    """Rows of text embeddings in which no prompt is cut: as published, or a multiple of `ROWS`.

    A piece of T5's vocabulary has two letters or more in all but rare words, and every word begins
    one.
    """
    longest = 0
    for text in texts:
        prompt = template.replace("{instruction}", text)
        longest = max(longest, len(prompt.encode()) // 2 + len(prompt.split()) + 1)
    return least if longest <= least else ROWS * math.ceil(longest / ROWS)


def _length(reader: Reader, choices: Choices) -> tuple[int, int]:
    """Steps and examples in a batch."""
    batch = choices.batch or BATCH
    epochs = math.ceil(EPOCHS * int(reader.lengths.sum()) / batch)
    return choices.steps or min(max(epochs, STEPS[0]), STEPS[1]), batch
