"""Checks a config, or a data set, before you spend money on it.

    python -m wamjax.doctor --config=experiments/configs/fast_wam_libero.py
    python -m wamjax.doctor --config=... --devices=64 --json --out=report/
    python -m wamjax.doctor --config=experiments/configs/dit_imagenet.py --sizes
    python -m wamjax.doctor --config=experiments/configs/quickstart.py --keys
    python -m wamjax.doctor --data=DIR --out=report/

For a config it reports the parameters of each expert, the FLOPs per sample for training and for
acting or sampling, and the memory of the state on each device of a mesh. It draws the visibility
tables and checks the data (constant dimensions, values that do not fit the statistics, episodes
shorter than a window). --sizes also counts the published sizes and designs of DiT on the same
pictures; --keys lists every key of the config with its value and meaning instead. Nothing is
trained and no parameter is allocated. A config that cannot be trained is an error.

For a data set it reports what looks wrong in numbers and pictures: ranges, constant and nearly
constant dimensions, jumps, the gripper convention, delta or absolute actions, dark or rotated
cameras, inconsistent rates, missing instructions, one-step or duplicate episodes, statistics of
another data set. --out also writes a page for the browser, with pictures and histograms, in one
file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict

from wamjax import cli, files, flops, tree, wam
from wamjax import config as configs
from wamjax.models import dit
from wamjax.models.layers import unconstrained
from wamjax.training import optim, partition, sharding
from wamjax.training import state as states
from wamjax.training.step import forward_flops, make_train_step, model_flops


def diagnose(config: ConfigDict, devices: int, sizes: bool = False) -> dict[str, Any]:
    """Returns the report of a config on a mesh of `devices` devices.

    Args:
      sizes: whether to count `published_sizes`, too.

    Raises:
      ValueError: the config cannot be trained; names the key.
    """
    from wamjax.data import pipeline

    configs.validate(config)
    wam.check_training(config)
    mesh = _mesh(config, devices)  # quick checks come before slow counts
    objective = wam.build(config, pipeline.spec_of(config))
    table = {"sizes": published_sizes(objective)} if sizes else {}
    tx = optim.make(config)
    make_train_step(objective, tx, config)  # raises if the config does not allow it
    state = jax.eval_shape(functools.partial(states.create, objective, tx, config))
    return {
        "parameters": tree.count_by_expert(state.params),
        "flops": work(objective, config, state.params),
        "memory": memory(state, config, mesh),
        "batch": {k: [str(s.dtype), *s.shape] for k, s in _batch(objective, config).items()},
        "tables": {table.name: str(table) for table in objective.tables},
        "roles": objective.describe(),
        "warnings": _data_warnings(config),
    } | table


def work(objective, config: ConfigDict, params: Any) -> dict[str, float]:
    """Returns FLOPs (two for a multiply-add) per sample of a forward pass and of a training step,
    and of one plan in each mode, or of making one sample."""
    batch = _batch(objective, config)
    key = jax.eval_shape(lambda: jax.random.key(0))

    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])):
        forward = forward_flops(objective, config, params, batch) / config.data.batch_size
        train = model_flops(objective, config, params, batch) / config.data.batch_size
    out = {"forward": forward, "train": train}
    one = objective.batch_spec(1)
    if objective.kind == "pictures":
        condition = {k: v for k, v in one.items() if k != objective.codec.key}

        def sample(params, condition, key):
            return objective.sample(params, condition, key, count=1)

        return out | {"sample": float(flops.count(sample, params, condition, key))}
    if objective.kind != "policy":  # a codec
        return out
    observation = objective.observation_spec(1)
    for mode in objective.modes:
        act = functools.partial(_act, objective, mode)
        out[f"act/{mode}"] = float(flops.count(act, params, observation, key))
    return out


def published_sizes(objective) -> dict[str, dict[str, float]]:
    """Returns, for the sizes of DiT with patches of 2, 4 and 8 and its designs on an objective's
    pictures, the trained parameters and FLOPs of one forward pass."""
    network, out = objective.network, {}
    if not isinstance(network, dit.DiT) or network.text != "none":
        raise ValueError("--sizes needs a config of a DiT without text, such as dit_imagenet")
    small = [patch for patch in (2, 4, 8) if not any(n % patch for n in network.latent[:2])]
    cases = [(size, patch, network.conditioning) for size in dit.SIZES for patch in small]
    cases += [("XL", small[0], design) for design in dit.CONDITIONING]
    for size, patch, design in cases:
        layers, width, heads = dit.SIZES[size]
        changed = network.clone(
            video_spec=dit.expert(width, 4 * width, design),
            layers=layers, heads=heads, head_dim=width // heads, freq_dim=256, patch=patch,
            conditioning=design, constrain=unconstrained,
        )  # fmt: skip
        one = dataclasses.replace(objective, network=changed)
        params = jax.eval_shape(one.init, jax.random.key(0))
        cost = flops.count(functools.partial(_forward, one), params)
        name = f"DiT-{size}/{patch} {design}"
        out[name] = {"parameters": tree.count(params), "forward": float(cost)}
    return out


def _forward(objective, params):
    """Runs one forward pass of a picture model on blank input."""
    batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in objective.batch_spec(1).items()}
    values = {g: jnp.zeros((1, m, *objective.network.latent)) for g, m in objective.slots.items()}
    levels = {g: jnp.zeros((1, 1)) for g in values}
    arguments = values, levels, objective.condition(batch), objective.use.table
    return objective.network.apply({"params": params}, *arguments, method="evaluate")


def _mesh(config: ConfigDict, devices: int) -> sharding.Shape:
    try:
        mesh = sharding.Shape(sharding.axis_sizes(config.mesh, devices))
    except ValueError as error:
        raise ValueError(f"{error}, or give --devices") from None
    sharding.check_config(config, mesh)
    return mesh


def memory(state, config: ConfigDict, mesh: sharding.Shape) -> dict[str, float]:
    """Returns bytes on each device that do not depend on the batch: masters, optimizer, gradients.

    Activations come on top; ``tpu/aot.py`` compiles the step and reports the true peak.
    """
    specs = sharding.state_specs(state, state.params, mesh)

    def bytes_of(values, places) -> float:
        total = 0.0
        for leaf, axes in zip(jax.tree.leaves(values), jax.tree.leaves(places), strict=True):
            parts = math.prod(mesh.shape[a] for a in axes if a is not None)
            total += math.prod(leaf.shape) * leaf.dtype.itemsize / parts
        return total

    def trained(params):
        return partition.split(params, partition.trained(config.optim.freeze))[0]

    out = {
        "parameters": bytes_of(state.params, specs.params),
        "gradients": bytes_of(trained(state.params), trained(specs.params)),
        "optimiser": bytes_of(state.opt_state, specs.opt_state),
    }
    if state.ema is not None:
        out["ema"] = bytes_of(state.ema, specs.ema)
    devices = math.prod(mesh.shape.values())
    return {"devices": devices, "mesh": mesh.shape, **out, "total": sum(out.values())}


def _act(objective, mode: str, params, observation, key):
    return objective.policy(
        params, {"actions": _Same(), "proprio": _Same()}, observation, key, mode
    )


class _Same:
    """Stands in for a normalizer, at no cost."""

    def forward(self, x):
        return x

    inverse = forward


def _batch(objective, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    return objective.batch_spec(config.data.batch_size)


def _data_warnings(config: ConfigDict) -> list[str]:
    """Returns warnings about existing episodes; arrays and branches are checked when they are
    opened."""
    from wamjax.data import pipeline
    from wamjax.data.sources import missing
    from wamjax.data.windows import padding

    if config.data.kind != "episodes":
        return []
    # Declared sizes make a report possible without the data, or with stand-ins not made yet.
    if pipeline.declared(config.data) and (absent := missing(config.data)):
        return [f"config.data.sources.{name}: no data in {path}, so nothing of the data was checked"
                for name, path in absent.items()]  # fmt: skip
    spec, statistics, sources = pipeline.open_episodes(config)
    doubts = pipeline.doubts(config, spec, statistics, sources)
    hold = padding(config.data.padding)
    return pipeline.checks(sources, statistics, spec, hold) + doubts


def _print(report: dict[str, Any]) -> None:
    print("parameters")
    for name, number in report["parameters"].items():
        print(f"  {name:<12}{number:>18,}")
    print("cost of a sample (a multiply-add is two FLOPs; papers on DiTs count one, as here GMAC)")
    for name, number in report["flops"].items():
        print(f"  {name:<18}{number / 1e9:>14,.2f} GFLOP{number / 2e9:>14,.2f} GMAC")
    for name, row in report.get("sizes", {}).items():
        forward = f"{row['forward'] / 1e9:>9,.2f} GFLOP{row['forward'] / 2e9:>9,.2f} GMAC"
        print(f"  {name:<26}{row['parameters']:>14,} parameters{forward}")
    memory = report["memory"]
    print(f"state on each of {memory['devices']} devices, mesh {memory['mesh']}")
    for name in ("parameters", "gradients", "optimiser", "ema", "total"):
        if name in memory:
            print(f"  {name:<12}{memory[name] / 2**30:>12.3f} GiB")
    for text in (*report["tables"].values(), report["roles"]):
        print(text, end="\n" * bool(text))
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    if not report["warnings"]:
        print("no warnings")


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    cli.define_config()
    flags.DEFINE_integer("devices", 0, "devices of the mesh; 0 = as few as the config allows")
    flags.DEFINE_bool("json", False, "print json")
    flags.DEFINE_list(
        "data", [], "folders of data sets to check instead; several if they will be mixed"
    )
    flags.DEFINE_string("out", None, "folder for the table pictures, or for data.html")
    flags.DEFINE_bool("sizes", False, "also count the published sizes and designs of DiT")
    flags.DEFINE_bool("keys", False, "list the config's keys instead")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    if options.data:
        _look(options.data, options.out, options.json)
        return
    config = options.config
    if config is None:
        raise app.UsageError("give --config, or --data")
    if options.keys:
        _print_keys(config, options.json)
        return
    fixed = math.prod(abs(int(config.mesh[a])) for a in sharding.AXES)
    report = diagnose(config, options.devices or fixed, options.sizes)
    if options.out:
        _draw(config, files.path(options.out, "--out"))
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report)


def _look(paths: Sequence[str], out: str | None, as_json: bool) -> None:
    """Examines a data set."""
    from wamjax.data import examine
    from wamjax.data import page as pages

    examination = examine.examine(paths[0], paths[1:])
    print(examine.as_json(examination) if as_json else examine.as_text(examination))
    if out:
        page = files.path(out) / "data.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(page, pages.html(examination))
        print(f"wrote {page}", file=sys.stderr if as_json else sys.stdout)


def _print_keys(config: ConfigDict, as_json: bool) -> None:
    rows = {key: [value, configs.doc(key)] for key, value in configs.flatten(config).items()}
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    for key, (value, text) in rows.items():
        print(f"{f'{key} = {value!r}':<48}  {text}")


def _draw(config: ConfigDict, folder: files.Path) -> None:
    from wamjax.data import pipeline
    from wamjax.viz import masks

    folder.mkdir(parents=True, exist_ok=True)
    for table in wam.build(config, pipeline.spec_of(config)).tables:
        masks.save(table, folder / f"mask_{table.name}.png")


if __name__ == "__main__":
    cli.run(main, define_flags)
