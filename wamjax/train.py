"""Trains a model, or resumes a run.

    python -m wamjax.train --config=FILE[:ARG] --config.key=value --workdir=DIR

Starts the run in DIR, or resumes it. After a crash, a kill or a signal, the same command continues
from the newest checkpoint, with the losses and parameters of an uninterrupted run. DIR then holds
config.json, metrics.jsonl, checkpoints/, media/ and, at the end, DONE; for a policy also eval.json,
for a picture model media/samples.png, for a codec media/reconstructions.png.

    python -m wamjax.train ... --distributed --coordinator=HOST:PORT --processes=2 --process=0

With several processes, each runs the same command, with the same DIR. A signal to any of them stops
all after the same step; if one dies, the others exit within half a minute. Any number of processes
can resume from the same checkpoint with the same batches.

Exit status: 0 if the run is done, was done before, or saved and stopped on SIGTERM or SIGINT (then
without DONE, and with the status of ``--stopped_status=N``, so that a launcher can restart it); 1
on an error, including too many non-finite steps in a row. One of several processes may also end
with SIGABRT, from JAX, when another one has died.
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
from ml_collections import ConfigDict

from wamjax import cli, disk, files, hardware, tree, wam
from wamjax import config as configs
from wamjax.console import say
from wamjax.training import continuing, guards, init_from, optim, sharding
from wamjax.training import state as states
from wamjax.training.checkpoint import Checkpoints
from wamjax.training.compile import compile_fitting, keep_programs
from wamjax.training.metrics import Profile, Recorder
from wamjax.training.state import TrainState
from wamjax.training.step import Plan, model_flops, plan


@dataclasses.dataclass(frozen=True)
class Data:
    """Holds what the loop needs of data.

    Attributes:
      spec: `wamjax.data.spec.DataSpec` of episodes, `wamjax.data.arrays.ArraySpec` of arrays.
      iterator: endless grain iterator of this process's rows of each batch, dicts of numpy.
      statistics: JSON of the normalization statistics and of the spec.
    """

    spec: Any
    iterator: Iterator[dict[str, np.ndarray]]
    statistics: dict[str, Any]


def build_data(
    config: ConfigDict, rows: np.ndarray | None = None, known: Sequence[str] = ()
) -> Data:
    """Makes missing data, then opens the pipeline; for the arguments see `open_data`."""
    from wamjax.data import pipeline
    from wamjax.runs import preparation

    with guards.first():  # one process collects and encodes
        preparation.ensure(config)
        spec, statistics, iterator = pipeline.open_data(config, rows, known)
    # A checkpoint must be usable without the data, so it stores the sizes too.
    return Data(spec, iterator, statistics | {"spec": spec.to_json()})


def build_objective(config: ConfigDict, spec):
    """Builds the objective, see `wamjax.wam.build`."""
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
      workdir: folder of the run; continued if it has checkpoints.
      make_data, make_objective: build data and objective; `build_data` and `build_objective` by
        default.
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
    if continuing.is_done(config, workdir):
        return True
    keep_programs(config.compile.cache)
    continuing.check_average(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_config(config, mesh)
    peak = _peak(config, mesh)
    files.make_folder(workdir, "give another --workdir")
    with guards.alone(workdir), disk.sentence(workdir):
        with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
            continuing.check_config(config, checkpoints)
            _start_folder(config, workdir)
            known = init_from.words(config, checkpoints)
            make_data = make_data or functools.partial(build_data, known=known)
            data = make_data(config, sharding.batch_rows(mesh, config.data.batch_size))
            continuing.check_statistics(data.statistics, checkpoints)
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
    """Holds everything that is constant during a run."""

    config: ConfigDict
    workdir: files.Path
    mesh: Mesh
    peak: tuple[float, str]
    data: Data
    objective: Any
    checkpoints: Checkpoints
    make_objective: Callable[[ConfigDict, Any], Any] = build_objective


def prepare(job: Job):
    """Does everything between abstract shapes and the first step.

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
        if (
            checkpoints.latest != newest
        ):  # the newest was damaged; this one has not been compared yet
            continuing.check_config(config, checkpoints)
            continuing.check_statistics(job.data.statistics, checkpoints)
        say(f"continuing from checkpoint {checkpoints.latest}")
        return state, step, flops
    places = jax.tree.map(lambda x: x.sharding, work.state)
    if not config.init_from.path:
        create = functools.partial(states.create, objective, tx, config)
        create = jax.jit(create, out_shardings=places)
        return create(seed=states.seed_of(config)), step, flops
    say(f"starting from {config.init_from.path}")
    params = init_from.params(objective, config, work.state.params)
    start = functools.partial(states.start, tx=tx, config=config)
    return jax.jit(start, out_shardings=places, donate_argnums=0)(params), step, flops


def _program(job: Job, work: Plan, tx):
    """Returns the compiled step and its model FLOPs; logs memory and time."""
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
    seed = states.seed_of(config)
    return lambda state, batch: program.step(state, batch, seed), float(flops)


def _loop(job: Job, state: TrainState, step_fn, flops: float) -> bool:
    """Runs steps until done or interrupted, with a checkpoint at the end; returns whether it is
    done."""
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
    """Saves a checkpoint after its lines. It does not save in the middle of non-finite steps: they
    might continue to the limit, and the stored checkpoints should precede them. After the `last`
    step nothing continues, and such steps leave the state unchanged."""
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
    """Returns FLOP/s of the whole mesh and its name. Simulated devices share their host."""

    rate, name = hardware.denominator(jnp.dtype(config.precision.compute), seconds=0.2)
    known = hardware.chip() is not None
    return rate * (mesh.size if known else jax.process_count()), name


def _check_evaluation(config, spec, objective) -> None:
    """Raises errors before training that would otherwise occur after it."""
    from wamjax.runs import closed_loop

    config = config.copy_and_resolve_references()
    config.data.cameras = tuple(spec.cameras) if objective.kind == "policy" else ()
    closed_loop.check(config, objective)


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
    """Checks the first batch against the compiled shapes, and draws it if it holds pictures."""
    rows = len(sharding.batch_rows(job.mesh, job.config.data.batch_size))
    for key, want in job.objective.batch_spec(job.config.data.batch_size).items():
        if key not in batch:
            raise ValueError(f"the data has no {key!r}, which the objective needs; it has "
                             f"{sorted(batch)}")  # fmt: skip
        shape = (rows, *want.shape[1:])
        if batch[key].shape != shape or batch[key].dtype != want.dtype:
            raise ValueError(
                f"batch[{key!r}] is {batch[key].dtype}{batch[key].shape}, the objective needs "
                f"{want.dtype}{shape}: the data set differs from config.data"
            )
    if {"video", "latents"} & batch.keys() and jax.process_index() == 0:
        from wamjax.viz import batch as pictures

        pictures.save(batch, job.workdir / "media" / "batch.png")


def _finish(config, workdir: files.Path, objective) -> None:
    """Plots, samples or evaluates, then writes DONE; a run killed here resumes here."""
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
    guards.barrier()  # processes do not wait long at exit
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
            done = run(values.config, values.workdir)
        except (guards.Diverged, guards.Occupied, disk.NoRoom, files.NotWritable) as error:
            raise SystemExit(f"stopped: {error}") from None
    if not done:
        raise SystemExit(values.stopped_status)


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; arguments as for `jax.distributed.initialize`."""
    # It would take the first SIGTERM for itself, also where nobody asks it: before and after the
    # loop, which has an agreement of its own, for SIGINT too.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=guards.HEARTBEAT
    )


def define_flags() -> None:
    """Defines the flags; not on import, since entry points that share flags import each other."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "folder of the run; created, or resumed")
    flags.DEFINE_bool("distributed", False, "this is one of several processes (jax.distributed)")
    flags.DEFINE_string("coordinator", None, "host:port of process 0; not needed on cloud TPUs")
    flags.DEFINE_integer("processes", None, "number of processes; not needed on cloud TPUs")
    flags.DEFINE_integer("process", None, "index of this process; not needed on cloud TPUs")
    flags.DEFINE_integer("stopped_status", 0, "exit status of a run that a signal stopped")
    flags.mark_flags_as_required(["config", "workdir"])


if __name__ == "__main__":
    cli.run(main, define_flags)
