"""The one config: every key with its default and a line of documentation, locked.

An experiment file starts from `base_config` and changes values; a misspelt key is an error with a
suggestion. `TABLE` is the single place where keys, defaults and docs live; what `docs` returns is
shown by error messages and by ``python -m wamjax.doctor``.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

# (key, default, what it is).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("seed", 0, "seed of initialisation, noise and data order"),
    ("total_steps", 1000, "optimiser steps of the whole run"),
    ("log_every", 50, "steps between lines on the terminal and timing columns in metrics.jsonl"),
    ("mesh.data", -1, "devices along which the batch alone is split; -1 takes what is left"),
    ("mesh.fsdp", 1, "devices along which batch and parameters are split; -1 takes what is left"),
    ("mesh.tensor", 1, "devices along which heads and hidden units are split"),
    ("precision.params", "float32", "dtype of the master parameters and of the optimiser state"),
    ("precision.compute", "float32", "dtype parameters are cast to for the loss; or bfloat16"),
    ("optim.name", "adamw", "adamw, or muon for the matrices of the blocks (adamw for the rest)"),
    ("optim.learning_rate", 1e-4, "peak learning rate"),
    ("optim.b1", 0.9, "AdamW decay of the first moment"),
    ("optim.b2", 0.95, "AdamW decay of the second moment"),
    ("optim.weight_decay", 0.01, "AdamW weight decay, on all parameters, times the learning rate"),
    ("optim.warmup_fraction", 0.05, "share of total_steps in linear warm-up from peak / steps"),
    ("optim.final_fraction", 0.01, "the cosine ends at this share of the peak learning rate"),
    ("optim.anchor_steps", (), "steps between which the rate is linear instead; () = the cosine"),
    ("optim.anchor_factors", (), "factors of the peak rate at those steps; of two at one, a jump"),
    ("optim.clip_norm", 1.0, "global gradient norm is clipped to this; 0 = never"),
    ("optim.accumulate", 1, "microbatches that one batch is computed in; saves memory"),
    ("optim.ema_decay", 0.0, "decay of the exponential moving average of parameters; 0 = none"),
    ("optim.freeze", (), "regexes of parameters' whole paths that are not trained; see partition"),
    ("lora.rank", 0, "rank of adapters beside the targets (see adapters); 0 = none"),
    ("lora.targets", (), "regexes of whole paths of the kernels that get an adapter"),
    ("init_from.path", "", "folder of wamjax.convert, or a run, that a fresh run starts from"),
    ("init_from.missing", (), "regexes of parameters that it may lack; these start fresh"),
    ("init_from.unused", (), "regexes of parameters that it may have and the model has not"),
    ("guard.max_consecutive_skips", 10, "stop after this many non-finite steps in a row"),
    ("checkpoint.every", 1000, "steps between checkpoints; one is saved at the end in any case"),
    ("checkpoint.keep", 2, "checkpoints kept"),
    ("profile.start", 0, "step at which a profiler trace starts"),
    ("profile.steps", 0, "steps traced, into media/profile; 0 = none"),
    ("log.tensorboard", False, "also write TensorBoard events (pip install 'wamjax[log]')"),
    ("log.wandb", "", "project to also log to at wandb (pip install 'wamjax[log]'); '' = none"),
    ("data.root", "", "folder that relative source paths start at; '' = the cache for tabletop"),
    ("data.kind", "episodes", "episodes (windows of data.sources) or arrays (data.arrays)"),
    ("data.arrays", "", "NAME or NAME:option=value,...: arrays and how they are made, data.makers"),
    ("data.embeddings", "", "text-embedding cache, below data.root; read if text.kind is context"),
    ("data.batch_size", 32, "examples in a batch, over all devices and processes"),
    ("data.frames", 5, "raw video frames in a window (f)"),
    ("data.frame_stride", 4, "control steps between frames of a window"),
    ("data.chunk", 16, "action steps in a window (j)"),
    ("data.cameras", ("overhead", "gripper"), "cameras, side by side in this order"),
    ("data.normalization", "min_max", "min_max, mean_std or quantile, of actions and proprio"),
    ("data.instruction_length", 12, "instruction tokens (n); shorter ones are padded"),
    (
        "data.declared.camera_size",
        (0, 0),
        "(height, width) of each camera; (0, 0) = as in the data",
    ),
    ("data.declared.action_dim", 0, "action dimensions (a); 0 = as in the data"),
    ("data.declared.proprio_dim", 0, "state dimensions (p); 0 = as in the data"),
    ("data.declared.arrays", "", "KEY=SHAPE[:VALUES],... of an example; '' = as in the data"),
    ("data.declared.control_hz", 20.0, "control steps per second, where the sizes are declared"),
    ("data.prefetch", 2, "batches made ahead of their use"),
    ("data.outcome", False, "batches also say what comes of a window: state, score, steps to go"),
    ("objective.name", "fast_wam", "which objective is built"),
    ("objective.variant", "fast", "fast, joint, idm, no_cotrain or optional_idm"),
    ("objective.preset", "2026-08", "published settings followed: paper or 2026-08"),
    ("objective.video_shift", 5.0, "time shift of the video noise level"),
    ("objective.action_shift", 1.0, "time shift of the action noise level (paper: 5)"),
    ("objective.weighting", "wan", "loss weight over noise levels: wan, uniform or min_snr"),
    ("objective.lambda_video", 1.0, "weight of the video loss"),
    ("objective.lambda_action", 1.0, "weight of the action loss"),
    ("objective.cond_noise_prob", 0.5, "how often idm's conditioning video is noised in training"),
    ("objective.idm_prob", 0.5, "share of a batch that optional_idm trains as idm"),
    (
        "objective.action_from_video",
        False,
        "start the action expert as an interpolated video expert",
    ),
    ("objective.process", "flow", "flow, ddpm or edm, and options: builders.PROCESSES"),
    ("objective.scheme", "diffusion", "how frames are denoised, a key of schemes.SCHEMES"),
    ("objective.drop", 0.1, "share of examples trained without their condition, for guidance"),
    ("objective.guidance", 1.0, "scale of classifier-free guidance; 1 = none"),
    ("objective.guidance_interval", (), "levels (low, high] that are guided; () = all"),
    ("objective.temperature", 1.0, "of sampled tokens; 0 takes the most likely one"),
    ("objective.top_k", 0, "tokens are sampled from the so many most likely ones; 0 = all"),
    ("objective.top_p", 1.0, "tokens are sampled from the most likely ones of this probability"),
    ("objective.infer_steps", 10, "solver steps when acting, and when sampling"),
    ("objective.solver", "euler", "a key of diffusion.solvers.SOLVERS, or ancestral"),
    ("objective.slots", (), "what the latent frames of Cosmos Policy are, words of wam.layouts"),
    (
        "objective.value",
        "value",
        "what is judged: value V(s, a, s'), value_v V(s') or value_q Q(s, a)",
    ),
    ("objective.mix", (2, 1, 1), "examples of policy, world model and value in a row of a batch"),
    ("objective.visibility", "bidirectional", "or prefix: what is given sees nothing else"),
    ("objective.auxiliary", True, "whether all that is predicted has a loss"),
    ("objective.discount", 0.99, "of the return, for each control step"),
    (
        "objective.uniform",
        0.3,
        "share of uniform noise levels among log-normal ones",
    ),
    ("objective.sigma_max", 80.0, "noise that sampling starts at, as a ratio to the signal"),
    ("objective.sigma_min", 4.0, "noise of the last network call"),
    ("objective.augment", "", "random crops, turns and colours in training: weak or strong"),
    ("objective.compat", (), "published defects to keep, keys of cosmos_policy.COMPAT"),
    ("objective.plan.proposals", 8, "action chunks that planning chooses from"),
    ("objective.plan.futures", 3, "futures of each"),
    ("objective.plan.values", 5, "values of each future"),
    ("objective.plan.future_steps", 5, "solver steps of a future"),
    ("objective.plan.value_steps", 5, "solver steps of a value"),
    ("objective.plan.aggregate", "majority_mean", "of the values, one of planning.AGGREGATES"),
    ("objective.plan.depth", 1, "chunks that are imagined"),
    ("objective.plan.over_depth", "last", "of several depths: last or mean"),
    ("objective.plan.memory_gb", 0.0, "memory of a network call while planning; 0 = any"),
    ("model.layers", 4, "transformer blocks"),
    ("model.heads", 4, "attention heads, shared by the experts"),
    ("model.head_dim", 32, "width of a head"),
    ("model.video.width", 128, "width of the video expert"),
    ("model.video.ffn", 512, "hidden units of the video expert's feed-forward network"),
    ("model.action.width", 64, "width of the action expert"),
    ("model.action.ffn", 256, "hidden units of the action expert's feed-forward network"),
    ("model.patch", 2, "latents along each side of a video token"),
    ("model.positions", "rope", "rope, sincos (added, for images) or learned (autoregressive)"),
    ("model.position_table", (0, 0), "sincos: (side, base) of the table that it is cut from"),
    ("model.conditioning", "adaln_zero", "how time and class enter, one of dit.CONDITIONING"),
    ("model.label", False, "whether the class of an example conditions the model"),
    ("model.context_width", 64, "width of the instruction embeddings"),
    ("model.freq_dim", 256, "sinusoidal features of a noise level"),
    ("model.time_scale", 1.0, "what a noise level of 1 is to them (Cosmos Policy)"),
    ("model.lora_rank", 256, "rank of the modulation (Cosmos Policy)"),
    ("model.rope_scale", (1.0, 1.0, 1.0), "stretch along (t, h, w), see rope.ntk_bases"),
    ("model.context_rows", 0, "rows of text that attention counts; zero where not given"),
    (
        "model.remat",
        "none",
        "what is recomputed: none, full, or a policy in between",
    ),
    ("model.unroll", 1, "layers unrolled in the scan over blocks"),
    ("model.codec.kind", "pixel", "pixel (space to depth), cached (latents made ahead) or palette"),
    ("model.codec.patch", 4, "pixel, palette: side of the square of pixels that is one latent"),
    ("model.codec.codes", 512, "palette: different tokens, fitted to the data by k-means"),
    ("model.codec.channels", 48, "cached: channels of a latent"),
    ("model.codec.spatial", 16, "cached: pixels along each side of a latent"),
    ("model.codec.temporal", 4, "cached: frames of a latent after the first"),
    ("model.text.kind", "tokens", "tokens (trainable word embeddings) or context (given)"),
    ("model.text.route", "none", "none, pooled, cross, both or joint; autoregressive: prefix"),
    ("model.text.layers", 0, "of a text encoder that is trained along; 0 = words alone"),
    ("model.text.pooled_width", 0, "of pooled text in the data; 0 = the mean of the embeddings"),
    ("eval.env", "tabletop", "world that the policy is rolled out in"),
    ("eval.tasks", (), "tasks; () = those of the training data"),
    ("eval.episodes", 0, "episodes after training; 0 = no evaluation"),
    ("eval.execute", 8, "actions executed of each planned chunk"),
    ("eval.max_steps", 40, "control steps after which an episode has failed"),
    ("eval.batch_size", 64, "episodes in one program"),
    ("eval.seed", 0, "seed of the episodes"),
    ("eval.untrained", False, "also roll out the policy as it was before training"),
)

SOURCE: tuple[tuple[str, Any, str], ...] = (
    ("path", "", "folder of the data set, below data.root; '' = named by what is collected"),
    ("weight", 1.0, "share of a batch, relative to the other sources; counts are exact"),
    ("action_free", False, "video only: the actions are treated as unknown"),
    ("episodes", 0, "use the first so many episodes; 0 = all"),
    ("rollout", False, "of a policy: teaches what comes of actions and is not to be imitated"),
    ("ended", "", "success or failure: only episodes that ended so; '' = all"),
    ("stand_in", 0, "random episodes to make if the folder does not exist: tries a config"),
    ("collect.tasks", (), "tasks to collect if the folder does not exist; () = all"),
    ("collect.episodes", 0, "episodes to collect; 0 = the data set must exist"),
    ("collect.noise", 0.0, "standard deviation of the noise on the expert's actions"),
    ("collect.seed", 0, "seed of the collection"),
    (
        "collect.intended",
        False,
        "label steps with the expert's intention instead of the noisy action",
    ),
    ("collect.keep_failures", False, "keep episodes that fail, too"),
)

# Keys that a checkpoint's meaning rests on: they refuse to change on resume.
FROZEN = (
    "seed",
    "model",
    "objective.name",
    "objective.variant",
    "objective.slots",
    "objective.visibility",
    "objective.process",
    "objective.scheme",
    "precision.params",
    "optim.name",
    "optim.ema_decay",
    "optim.freeze",
    "lora",
    "data.kind",
    "data.arrays",
    "data.normalization",
    "data.chunk",
    "data.frames",
    "data.frame_stride",
    "data.cameras",
    "data.instruction_length",
    "data.batch_size",
    "data.declared",
    "data.sources.*.weight",
    "data.sources.*.action_free",
    "data.sources.*.episodes",
    "data.sources.*.rollout",
    "data.sources.*.ended",
    "data.sources.*.collect",
)
# Below a frozen key, but they change how a step is computed, not what.
_THAWED = {"model.remat", "model.unroll"}


def base_config() -> ConfigDict:
    """The documented config with all defaults; locked, except that sources may be added."""
    config = _nest(TABLE)
    config.data.sources = ConfigDict()
    config.eval.shift = ConfigDict()
    config.lock()
    config.data.sources.unlock()  # names are free
    config.eval.shift.unlock()  # dials belong to the world, which checks their names
    return config


def source(**values: Any) -> ConfigDict:
    """One entry of ``data.sources``; ``collect`` may be given as a dict."""
    config = _nest(SOURCE).lock()
    for key, value in values.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    return config


def docs() -> dict[str, str]:
    """Every key with its one-line documentation; ``*`` stands for the name of a source."""
    return {k: d for k, _, d in TABLE} | {f"data.sources.*.{k}": d for k, _, d in SOURCE}


def doc(key: str) -> str:
    """The line of one key, or ''."""
    return docs().get(re.sub(r"^data\.sources\.[^.]+", "data.sources.*", key), "")


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses what follows the colon of ``--config=FILE:ARG``, e.g. ``variant=idm,debug``.

    Args:
      arg: comma-separated ``name=value``; a bare name sets a bool to True.
      **defaults: the names that exist; a value is converted to the type of its default.

    Raises:
      ValueError: an unknown name (with a suggestion), or a value of the wrong type.
    """
    out = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, given, text = part.partition("=")
        if name not in defaults:
            raise ValueError(
                f"config argument {name!r} does not exist{did_you_mean(name, defaults)}; "
                f"there are {sorted(defaults)}"
            )
        out[name] = _parse(name, text if given else "True", defaults[name])
    return ConfigDict(out).lock()


def validate(config: ConfigDict) -> None:
    """Checks what can be checked without building anything; ValueError names the key."""
    flat = flatten(config)
    for key in ("total_steps", "log_every", "data.batch_size", "data.frames", "data.chunk",
                "checkpoint.every", "checkpoint.keep", "optim.accumulate",
                "guard.max_consecutive_skips", "model.layers", "model.heads"):  # fmt: skip
        if flat[key] < 1:
            raise ValueError(f"config.{key} = {flat[key]} must be at least 1 ({doc(key)})")
    for key, allowed in {
        "precision.params": ("float32", "float64"),
        "precision.compute": ("float32", "bfloat16", "float64"),
    }.items():
        if flat[key] not in allowed:
            raise ValueError(f"config.{key} = {flat[key]!r} must be one of {allowed}")
    for key in ("optim.ema_decay", "optim.warmup_fraction", "optim.final_fraction"):
        if not 0 <= flat[key] <= 1:
            raise ValueError(f"config.{key} = {flat[key]} must lie in [0, 1] ({doc(key)})")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config (or dict of a json file) to ``{"a.b.c": value}``; lists become tuples."""
    return dict(_leaves(config, prefix))


def save(config: ConfigDict, path: str | os.PathLike) -> None:
    """Writes ``config`` as json, in one atomic step."""
    path = pathlib.Path(path)
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(json.dumps(to_json(config), indent=2) + "\n")
    draft.replace(path)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """``config`` as plain nested dicts of json values."""
    return json.loads(json.dumps(config.to_dict()))


def load(path_or_json: str | os.PathLike | dict) -> ConfigDict:
    """Reads what `save` wrote (or takes its dict), with today's defaults for keys it lacks.

    Raises:
      ValueError: it has a key that does not exist.
    """
    given = path_or_json
    if not isinstance(given, dict):
        given = json.loads(pathlib.Path(given).read_text())
    config = base_config()
    known = flatten(config)
    for name in given.get("data", {}).get("sources", {}):
        config.data.sources[name] = source()
        known |= flatten(config.data.sources[name], f"data.sources.{name}")
    for key, value in flatten(given).items():
        if key.startswith("eval.shift."):
            config.eval.shift[key.removeprefix("eval.shift.")] = value
        elif key not in known:
            raise ValueError(f"saved config has unknown key {key!r}{did_you_mean(key, known)}")
        else:
            config.update_from_flattened_dict({key: value})
    return config


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, as (old, new); a key that one side lacks is `ABSENT` there."""
    old, new = flatten(old), flatten(new)
    keys = [*old, *(k for k in new if k not in old)]
    pairs = {k: (old.get(k, ABSENT), new.get(k, ABSENT)) for k in keys}
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b}


class _Absent:
    def __repr__(self):
        return "(absent)"


ABSENT = _Absent()


def frozen(key: str) -> bool:
    """Whether a checkpoint's meaning rests on `key`."""
    if key in _THAWED:
        return False
    plain = re.sub(r"^data\.sources\.[^.]+", "data.sources.*", key)
    return any(plain == f or plain.startswith(f + ".") for f in FROZEN)


def check_resume(old: Any, new: Any, where: str) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume `where` under a config that gives its state another meaning.

    A key that did not exist when the checkpoint was written is not refused: its default says what
    the code did then.

    Returns:
      The harmless changes, for printing.

    Raises:
      ValueError: a frozen key changed; names key, both values and the fix.
    """
    changes = diff(old, new)
    sources = {k.split(".")[2] for k in flatten(old) if k.startswith("data.sources.")}
    for key, (a, b) in changes.items():
        new_source = key.startswith("data.sources.") and key.split(".")[2] not in sources
        if frozen(key) and (a is not ABSENT or new_source):
            raise ValueError(
                f"config.{key} was {a!r} when {where} was saved and is now {b!r} "
                f"({doc(key) or 'no documentation'}). A run cannot change it: set it back to "
                f"{a!r}, or train in another --workdir"
            )
    return changes


def did_you_mean(name: str, known) -> str:
    """', did you mean ...?' if something of `known` is close to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _nest(table) -> ConfigDict:
    config = ConfigDict()
    for key, default, _ in table:
        node = config
        *parents, name = key.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[name] = default
    return config


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict | ConfigDict):
            yield from _leaves(value, path)
        else:
            yield path, tuple(value) if isinstance(value, list) else value


def _parse(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
    elif kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"config argument {name}={text!r} is not a {kind.__name__}")
