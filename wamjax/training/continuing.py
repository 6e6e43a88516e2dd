"""Checks what a run in a folder can continue with: its config, its statistics, its length."""

from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import files
from wamjax.console import say
from wamjax.training.checkpoint import Checkpoints


def is_done(config, workdir: files.Path) -> bool:
    """Returns whether the run in a folder has trained as long as `config` says; reports other
    changes.

    Raises:
      ValueError: the run cannot continue under this config.
    """
    record = _read(workdir / "DONE", step=int)
    if record is None or record["step"] < config.total_steps:
        return False
    step, saved = record["step"], _read(workdir / "config.json")
    if saved is not None:
        _say_changes(configs.load(saved), config, f"{workdir} (done at step {step})")
    say(
        f"{workdir} is done at step {step}; raise total_steps to train on, or use another --workdir"
    )
    return True


def _read(path: files.Path, **types: type) -> dict[str, Any] | None:
    """Returns the JSON of a run's file that has keys of these types, or None if it does not exist
    or cannot be read; the checkpoints hold the same information."""
    try:
        values = json.loads(path.read_text())
        valid = isinstance(values, dict) and all(type(values.get(k)) is t for k, t in types.items())
        if not valid:
            raise ValueError(f"it holds {str(values)[:80]}")
        return values
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        say(f"{path} is ignored, it is damaged: {error}")
        return None


def check_average(config) -> None:
    """Warns if a run is too short for its moving average."""
    decay, total = config.optim.ema_decay, config.total_steps
    if not decay:
        return
    start = decay**total  # the share of the start that is left at the end
    reached = (1 + total) / (10 + total)
    if not config.optim.ema_warmup and start > 0.01:
        say(f"warning: {total} steps are few for optim.ema_decay = {decay}: {start:.0%} of the "
            "average will be the parameters of the start, and the average is what acts. Set "
            "optim.ema_warmup, or a lower decay")  # fmt: skip
    elif config.optim.ema_warmup and reached < decay:
        say(f"the average warms up: of {total} steps its decay ends at {reached:.4g}, not at "
            f"optim.ema_decay = {decay}")  # fmt: skip


def check_config(config, checkpoints: Checkpoints) -> None:
    """Checks that the newest checkpoint, if there is one, can continue under `config`.

    Raises:
      ValueError: it cannot; names the key.
    """
    if checkpoints.latest is None:
        return
    _say_changes(checkpoints.config(), config, f"checkpoint {checkpoints.latest}")
    if config.total_steps < checkpoints.latest:
        raise ValueError(
            f"config.total_steps = {config.total_steps} is behind checkpoint {checkpoints.latest} "
            "of this run: raise it, or train in another --workdir"
        )


def _say_changes(old: ConfigDict, new: ConfigDict, where: str) -> None:
    for key, (before, now) in configs.check_resume(old, new, where).items():
        say(f"config.{key}: {before!r} -> {now!r} since {where}")


def check_statistics(statistics: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Refuses other statistics than those of training, under which a policy's outputs mean
    nothing."""
    if checkpoints.latest is None:
        return
    statistics = json.loads(json.dumps(statistics))  # tuples become lists, as in the checkpoint
    # Instructions are for people who are told something else, and were not always kept.
    old, new = (
        configs.flatten({k: v for k, v in x.items() if k != "instructions"})
        for x in (checkpoints.statistics(), statistics)
    )
    without = [k for k in new if k.endswith(".digest") and k not in old]
    if without:  # a checkpoint from before statistics said which episodes they are of
        say(f"checkpoint {checkpoints.latest} has no digest of the episodes that it was trained "
            "on: only the numbers of its statistics are compared")  # fmt: skip
    # Of words only those that are new or gone: there may be many.
    gone, more = (set(a.get("spec.words", ())) - set(b.get("spec.words", ()))
                  for a, b in ((old, new), (new, old)))  # fmt: skip
    if gone or more:
        old, new = (x | {"spec.words": tuple(sorted(y))} for x, y in ((old, gone), (new, more)))
    for key in [*old, *(k for k in new if k not in without)]:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"normalisation statistics {key!r} of the data are {new.get(key)}, checkpoint "
                f"{checkpoints.latest} was trained with {old.get(key)}: the data changed. Restore "
                "the data set, or train in another --workdir"
            )
