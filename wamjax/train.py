"""The training loop, the only one.

    python -m wamjax.train --config=FILE[:ARG] --config.key=value --workdir=DIR

Starts the run in DIR, or continues it: the same command after a crash, a kill or a signal goes on
from the newest checkpoint, with the losses and parameters of a run that was never interrupted.
DIR then holds config.json, metrics.jsonl, checkpoints/, media/ and, at the end, DONE; of a policy
also eval.json, of a model of pictures media/samples.png, of a codec media/reconstructions.png.

    python -m wamjax.train ... --distributed --coordinator=HOST:PORT --processes=2 --process=0

Of several processes each runs the same command; DIR is one folder for all of them. A signal to any
stops all after the same step; if one dies the others end within half a minute. As many as before or
any other number go on from the same checkpoint with the same batches.

Exit status: 0 when the run is done, was done before, or saved and stopped on SIGTERM or SIGINT
(then without DONE); 1 on an error, which includes too many non-finite steps in a row. One of
several processes may also end by SIGABRT, from JAX, when another one has died.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from wamjax import cli, disk, files, hardware, tree, wam
from wamjax import config as configs
from wamjax.console import say
from wamjax.training import guards, init_from, optim, sharding
from wamjax.training import state as states
from wamjax.training.checkpoint import Checkpoints
from wamjax.training.compile import compile_fitting, keep_programs
from wamjax.training.metrics import Profile, Recorder
from wamjax.training.state import TrainState
from wamjax.training.step import Plan, model_flops, plan


@dataclasses.dataclass(frozen=True)
class Data:
    """What the loop needs of data.

    Attributes:
      spec: `wamjax.data.spec.DataSpec` of episodes, `wamjax.data.arrays.ArraySpec` of arrays.
      iterator: endless grain iterator of this process's rows of each batch, dicts of numpy.
      statistics: json of the normalisation statistics, and of the spec.
    """

    spec: Any
    iterator: Iterator[dict[str, np.ndarray]]
    statistics: dict[str, Any]


def build_data(
    config: ConfigDict, rows: np.ndarray | None = None, known: Sequence[str] = ()
) -> Data:
    """Collects what is missing, then opens the pipeline; for the arguments see `open_data`."""
    from wamjax.data import pipeline

    with guards.first():  # one collects
        spec, statistics, iterator = pipeline.open_data(config, rows, known)
    # A checkpoint must be usable without the data, so it carries the sizes as well.
    return Data(spec, iterator, statistics | {"spec": spec.to_json()})


def build_objective(config: ConfigDict, spec):
    """See `wamjax.wam.build`."""
    return wam.build(config, spec)


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    make_data: Callable[[ConfigDict, np.ndarray], Data] | None = None,
    make_objective: Callable[[ConfigDict, Any], Any] = build_objective,
    devices: list[jax.Device] | None = None,
) -> bool:
    """Trains to ``config.total_steps``, evaluates, and writes DONE.

    Args:
      config: resolved, from `wamjax.config.base_config`.
      workdir: of the run; continued if it has checkpoints.
      make_data, make_objective: what is trained on what; `build_data` by default.
      devices: all devices by default.

    Returns:
      True when done, False when a signal asked to stop and the state was saved.

    Raises:
      ValueError: a bad config, or one that the run in `workdir` cannot continue with.
      guards.Occupied: another process trains in `workdir`.
      guards.Diverged: too many non-finite steps in a row.
    """
    configs.validate(config)
    wam.check_training(config)
    if "float64" in config.precision.values() and not jax.config.jax_enable_x64:
        raise ValueError(f"config.precision {dict(config.precision)} needs JAX_ENABLE_X64=1 in the "
                         "environment: without it JAX computes in float32")  # fmt: skip
    workdir = files.path(workdir, "--workdir")
    files.reach(workdir, "give another --workdir")
    if _is_done(config, workdir):
        return True
    keep_programs(config.compile.cache)
    _check_average(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_config(config, mesh)
    peak = _peak(config, mesh)
    files.make_folder(workdir, "give another --workdir")
    with guards.alone(workdir), disk.sentence(workdir):
        with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
            _check_config(config, checkpoints)
            _start_folder(config, workdir)
            known = init_from.words(config, checkpoints)
            make_data = make_data or functools.partial(build_data, known=known)
            data = make_data(config, sharding.batch_rows(mesh, config.data.batch_size))
            _check_statistics(data.statistics, checkpoints)
            objective = make_objective(config, data.spec)
            if config.eval.episodes > 0:
                _check_evaluation(config, data.spec, objective)
            _draw_masks(objective, workdir)
            job = Job(config, workdir, mesh, peak, data, objective, checkpoints, make_objective)
            with jax.set_mesh(mesh), guards.together():
                if not _loop(job, *prepare(job)):
                    return False
        _finish(config, workdir, objective)
    return True


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same from the first step of a run to the last."""

    config: ConfigDict
    workdir: files.Path
    mesh: Mesh
    peak: tuple[float, str]
    data: Data
    objective: Any
    checkpoints: Checkpoints
    make_objective: Callable[[ConfigDict, Any], Any] = build_objective


def prepare(job: Job):
    """Everything between abstract shapes and the first step.

    Returns:
      (state on the mesh, restored or fresh; the compiled step; model FLOPs of a step).
    """
    config, objective, checkpoints = job.config, job.objective, job.checkpoints
    tx = optim.make(config)
    work = plan(objective, tx, config, job.mesh)
    say(f"parameters\n{tree.describe(work.state.params)}")
    checkpoints.check_room(work.state)
    step, flops = _program(job, work, tx)
    if (newest := checkpoints.latest) is not None:
        state = checkpoints.restore(work.state, job.data.iterator)
        if checkpoints.latest != newest:  # it was damaged, and this one was not compared yet
            _check_config(config, checkpoints)
            _check_statistics(job.data.statistics, checkpoints)
        say(f"continuing from checkpoint {checkpoints.latest}")
        return state, step, flops
    places = jax.tree.map(lambda x: x.sharding, work.state)
    if not config.init_from.path:
        create = functools.partial(states.create, objective, tx, config)
        return jax.jit(create, out_shardings=places)(), step, flops
    say(f"starting from {config.init_from.path}")
    params = init_from.params(objective, config, work.state.params)
    start = functools.partial(states.start, tx=tx, config=config)
    return jax.jit(start, out_shardings=places, donate_argnums=0)(params), step, flops


def _program(job: Job, work: Plan, tx):
    """The compiled step and its model FLOPs; logs memory and time."""
    config = job.config

    def planned(remat: str) -> Plan:
        if remat == config.model.remat:
            return work
        other = config.copy_and_resolve_references()
        other.model.remat = remat
        return plan(job.make_objective(other, job.data.spec), tx, other, job.mesh)

    device = job.mesh.devices.flat[0]
    _, program, remat = compile_fitting(planned, config.model.remat, device, config.compile.flags)
    flops = model_flops(job.objective, job.config, work.state.params, work.batch)
    size = program.memory and program.memory["peak_bytes"]
    peak = f"{size / 1e6:,.1f} MB a device" if size else "unknown memory"
    seconds = program.lower_seconds + program.compile_seconds
    chosen = f" with {len(program.options)} flags" if program.options else ""
    chosen += f", remat {remat}" if remat != config.model.remat else ""
    say(f"step compiled in {seconds:.1f} s for {dict(job.mesh.shape)}{chosen}: peak {peak}, "
        f"{flops:.3e} FLOPs")  # fmt: skip
    return program.step, float(flops)


def _loop(job: Job, state: TrainState, step_fn, flops: float) -> bool:
    """Steps until done or interrupted; both end with a checkpoint. Returns whether done."""
    config, workdir, start = job.config, job.workdir, int(state.step)
    with (
        guards.Interrupts(job.mesh) as interrupts,
        Recorder(workdir, config, start, flops, job.peak) as recorder,
        Profile(config, workdir / "media" / "profile") as profile,
    ):
        for step in range(start, config.total_steps):
            profile.before(step)
            batch = recorder.next(job.data.iterator)
            if step == start:
                with recorder.aside():
                    _first_batch(job, batch)
            batch = {k: batch[k] for k in job.objective.batch_spec(1)}
            state, metrics = step_fn(state, sharding.global_batch(batch, job.mesh))
            _guard(job, recorder.add(step + 1, metrics))
            stop = interrupts.agreed()
            if stop or (step + 1) % config.checkpoint.every == 0:
                _save(job, state, recorder)
            if stop:
                job.checkpoints.wait()
                say(f"{interrupts.received or 'another process was stopped'}: saved at step "
                    f"{job.checkpoints.latest}; the same command continues")  # fmt: skip
                return False
        _save(job, state, recorder, last=True)
        job.checkpoints.wait()
    return True


def _save(job: Job, state: TrainState, recorder: Recorder, last: bool = False) -> None:
    """Saves, lines first. Not in the middle of non-finite steps: they might go on to the limit,
    and the checkpoints that are kept should be from before them. After the `last` step nothing can
    go on, and what such steps leave is as it was before them."""
    _guard(job, recorder.drain())
    recorder.flush()
    if last or int(state.streak) == 0:
        with recorder.aside():
            job.checkpoints.save(state, job.data.iterator, job.config, job.data.statistics)


def _guard(job: Job, rows) -> None:
    for row in rows:
        if row["skips_in_a_row"]:
            say(f"step {row['step']:.0f} skipped: loss {row['loss']}, "
                f"gradient norm {row['grad_norm']}")  # fmt: skip
        guards.check_streak(row, job.config.guard.max_consecutive_skips, job.checkpoints.latest)


def _peak(config, mesh: Mesh) -> tuple[float, str]:
    """FLOP/s of the whole mesh, and the words for it. Simulated devices share their host."""

    rate, name = hardware.denominator(jnp.dtype(config.precision.compute), seconds=0.2)
    known = hardware.chip() is not None
    return rate * (mesh.size if known else jax.process_count()), name


def _is_done(config, workdir: files.Path) -> bool:
    done = _read(workdir / "DONE", step=int)
    if done is None or done["step"] < config.total_steps:
        return False
    step, saved = done["step"], _read(workdir / "config.json")
    if saved is not None:
        _say_changes(configs.load(saved), config, f"{workdir} (done at step {step})")
    say(
        f"{workdir} is done at step {step}; raise total_steps to train on, or use another --workdir"
    )
    return True


def _read(path: files.Path, **types: type) -> dict[str, Any] | None:
    """The json of a file of a run, which has keys of these types; or None if there is none, or none
    that can be read. What these files say the checkpoints say, too."""
    try:
        found = json.loads(path.read_text())
        known = isinstance(found, dict) and all(type(found.get(k)) is t for k, t in types.items())
        if not known:
            raise ValueError(f"it holds {str(found)[:80]}")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        say(f"{path} is ignored, it is damaged: {error}")
        return None


def _check_average(config) -> None:
    """Says what a run is too short for."""
    decay, total = config.optim.ema_decay, config.total_steps
    if not decay:
        return
    start = decay**total  # what is left of it at the end
    reached = (1 + total) / (10 + total)
    if not config.optim.ema_warmup and start > 0.01:
        say(f"warning: {total} steps are few for optim.ema_decay = {decay}: {start:.0%} of the "
            "average will be the parameters of the start, and the average is what acts. Set "
            "optim.ema_warmup, or a lower decay")  # fmt: skip
    elif config.optim.ema_warmup and reached < decay:
        say(f"the average warms up: of {total} steps its decay ends at {reached:.4g}, not at "
            f"optim.ema_decay = {decay}")  # fmt: skip


def _check_config(config, checkpoints: Checkpoints) -> None:
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


def _check_evaluation(config, spec, objective) -> None:
    """What would go wrong after training should do so before it."""
    from wamjax.runs import closed_loop

    config = config.copy_and_resolve_references()
    config.data.cameras = tuple(getattr(spec, "cameras", ()))
    closed_loop.check(config, objective)


def _check_statistics(statistics: dict[str, Any], checkpoints: Checkpoints) -> None:
    """A policy's outputs mean nothing under other statistics than those it was trained with."""
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


def _start_folder(config, workdir: files.Path) -> None:
    if jax.process_index() == 0:
        (workdir / "media").mkdir(parents=True, exist_ok=True)
        (workdir / "DONE").unlink(missing_ok=True)
        configs.save(config, workdir / "config.json")


def _draw_masks(objective, workdir: files.Path) -> None:
    from wamjax.viz import masks

    if jax.process_index() == 0:
        for table in objective.tables:
            masks.save(table, workdir / "media" / f"mask_{table.name}.png")


def _first_batch(job: Job, batch: dict[str, np.ndarray]) -> None:
    """Checks the first batch against what was compiled, and draws it if it holds pictures."""
    rows = len(sharding.batch_rows(job.mesh, job.config.data.batch_size))
    for key, want in job.objective.batch_spec(job.config.data.batch_size).items():
        if key not in batch:
            raise ValueError(f"the data has no {key!r}, the objective wants it; it has "
                             f"{sorted(batch)}")  # fmt: skip
        shape = (rows, *want.shape[1:])
        if batch[key].shape != shape or batch[key].dtype != want.dtype:
            raise ValueError(
                f"batch[{key!r}] is {batch[key].dtype}{batch[key].shape}, the objective wants "
                f"{want.dtype}{shape}: data and model disagree about config.data"
            )
    if {"video", "latents"} & batch.keys() and jax.process_index() == 0:
        from wamjax.viz import batch as pictures

        pictures.save(batch, job.workdir / "media" / "batch.png")


def _finish(config, workdir: files.Path, objective) -> None:
    """Plots, samples or evaluation, DONE; a run killed in here comes back to here."""
    if jax.process_index() == 0:
        from wamjax.viz import plots

        plots.losses(workdir)
    if objective.kind == "pictures":
        from wamjax.runs import sampling

        sampling.run(workdir)
    if objective.kind == "codec":
        from wamjax.runs import reconstruction

        reconstruction.run(workdir)
    if config.eval.episodes > 0:
        from wamjax.runs import evaluation

        evaluation.run(config, workdir)
    if jax.process_index() == 0:
        files.write_text(workdir / "DONE", json.dumps({"step": config.total_steps}) + "\n")
    guards.barrier()  # at its exit no process waits for long
    say(f"done: {workdir}")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    values = flags.FLAGS
    if values.distributed:
        join(values.coordinator, values.processes, values.process)
    else:
        hardware.restart_with_huge_pages()
    with guards.company():
        try:
            run(values.config, values.workdir)
        except (guards.Diverged, guards.Occupied, disk.NoRoom, files.NotWritable) as error:
            raise SystemExit(f"stopped: {error}") from None


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; arguments as of `jax.distributed.initialize`."""
    # It would take the first SIGTERM for itself, also where nobody asks it: before and after the
    # loop, which has an agreement of its own, for SIGINT too.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=guards.HEARTBEAT
    )


def define_flags() -> None:
    """Not on import: several entry points with the same flags may be imported by one another."""
    config_flags.DEFINE_config_file("config", None, "experiment file, as FILE[:ARG]")
    flags.DEFINE_string("workdir", None, "folder of the run; made, or continued")
    flags.DEFINE_bool("distributed", False, "one of several processes (jax.distributed)")
    flags.DEFINE_string("coordinator", None, "host:port of process 0; clouds know it themselves")
    flags.DEFINE_integer("processes", None, "how many processes; clouds know it themselves")
    flags.DEFINE_integer("process", None, "which process this is; clouds know it themselves")
    flags.mark_flags_as_required(["config", "workdir"])


if __name__ == "__main__":
    cli.run(main, define_flags)
