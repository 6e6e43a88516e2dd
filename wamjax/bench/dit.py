"""Times a forward pass and a training step of DiT against eager PyTorch, in one run.

    python -m wamjax.bench dit --sizes=S/2

Both have the same shapes (latents 32 x 32 x 4, learn_sigma off) and the same work: noise, forward,
backward, AdamW. They are timed in turn, and the best time of each counts. The baseline is
`torch_dit`; without torch, only ours is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wamjax import config as configs
from wamjax import flops, hardware
from wamjax.bench.timing import random_batch
from wamjax.diffusion.ddpm import DDPM
from wamjax.models import dit
from wamjax.models.codec import CachedLatents
from wamjax.training import optim, sharding
from wamjax.training import state as states
from wamjax.training.step import make_train_step, model_flops
from wamjax.wam.slots import groups_of
from wamjax.wam.video.objective import Denoising
from wamjax.wam.video.schemes import SCHEMES, slots_of

BATCHES = {"S/2": 8, "S/4": 8, "B/2": 4, "B/4": 4}
SIDE, CHANNELS, CLASSES = 32, 4, 1000


def objective_of(size: str) -> Denoising:
    """Returns a DiT of one of the paper's sizes on latents, with all layers unrolled."""
    name, patch = size.split("/")
    layers, width, heads = dit.SIZES[name]
    scheme = SCHEMES["diffusion"]
    network = dit.DiT(
        video_spec=dit.expert(width, 4 * width),
        groups=groups_of(slots_of(scheme, 1)),
        latent=(SIDE, SIDE, CHANNELS),
        layers=layers,
        heads=heads,
        head_dim=width // heads,
        patch=int(patch),
        classes=CLASSES,
        time_scale=1.0,
        unroll=layers,
    )
    codec = CachedLatents(CHANNELS, 8, 1)
    return Denoising(network, codec, DDPM(), scheme, 1, (8 * SIDE, 8 * SIDE, 3))


def run(sizes: list[str], repeats: int) -> dict[str, Any]:
    """Times all sizes and returns the report, with seconds of ours and of torch in each row."""
    torch = importlib.util.find_spec("torch") is not None
    rate = hardware.measure_matmul_rate(seconds=1.0)
    rows = []
    for size in sizes:
        ours = _ours(size)
        theirs = _torch(size) if torch else {}
        for what, (call, work) in ours.items():
            seconds = _alternate([call, *([theirs[what]] if torch else [])], repeats)
            row = {"size": size, "batch": BATCHES[size], "what": what, "flops": work}
            row["seconds"] = seconds[0]
            row["torch_seconds"] = seconds[1] if torch else None
            row["times_faster_than_torch"] = seconds[1] / seconds[0] if torch else None
            rows.append(row)
    rate = max(rate, hardware.measure_matmul_rate(seconds=1.0))
    for row in rows:
        row["flop_utilisation"] = row["flops"] / row["seconds"] / rate
    return {
        "benchmark": "dit",
        "device": jax.devices()[0].device_kind,
        "matmul_flops_per_second": rate,
        "denominator": "float32 1024^3 matmul, best of the run",
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    print(f"{report['benchmark']} on {report['device']}, {report['denominator']}: "
          f"{report['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'size':<6}{'batch':>6} {'what':<9}{'GFLOP':>9}{'best s':>9}{'torch s':>9}"
          f"{'of matmul':>11}{'vs torch':>10}")  # fmt: skip
    for row in report["rows"]:
        torch = row["torch_seconds"]
        ratio = f"{row['times_faster_than_torch']:.2f}x" if torch else "-"
        print(f"{row['size']:<6}{row['batch']:>6} {row['what']:<9}{row['flops'] / 1e9:>9.1f}"
              f"{row['seconds']:>9.3f}{torch or float('nan'):>9.3f}"
              f"{row['flop_utilisation']:>11.1%}{ratio:>10}")  # fmt: skip


def _ours(size: str) -> dict[str, tuple[Any, float]]:
    config = configs.base_config()
    config.data.batch_size = BATCHES[size]
    objective = objective_of(size)
    tx = optim.make(config)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    batch = random_batch(objective.batch_spec(BATCHES[size]))
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(states.create, objective, tx, config))()
        work = model_flops(objective, config, state.params, batch)
        compiled = jax.jit(make_train_step(objective, tx, config), donate_argnums=0)
        compiled = compiled.lower(state, batch).compile()
    params = jax.tree.map(jnp.copy, state.params)

    def train():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics["loss"]

    x = batch["latents"].astype(jnp.float32)
    time_of, label = jnp.full((len(x), 1), 500.0), batch["label"]
    network, table = objective.network, objective.use.table

    @jax.jit
    def forward(params):
        group = next(iter(objective.slots))
        return network.apply(
            {"params": params}, {group: x}, {group: time_of}, {"label": label}, table,
            method="evaluate",
        )  # fmt: skip

    return {
        "forward": (lambda: forward(params), flops.count(forward, params)),
        "train": (train, work),
    }


def _torch(size: str) -> dict[str, Any]:
    import torch
    from torch.nn.functional import mse_loss

    from wamjax.bench.torch_dit import DiT

    torch.manual_seed(0)
    name, patch = size.split("/")
    layers, width, heads = dit.SIZES[name]
    model = DiT(SIDE, CHANNELS, int(patch), width, layers, heads, CLASSES, CHANNELS)
    b = BATCHES[size]
    x0 = torch.randn(b, CHANNELS, SIDE, SIDE)
    y = torch.arange(b)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def forward():
        with torch.no_grad():
            return model(x0, torch.full((b,), 500), y)

    def train():
        t = torch.randint(0, 1000, (b,))
        noise, a = torch.randn_like(x0), kept[t][:, None, None, None]
        loss = mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, y), noise)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return loss.item()

    return {"forward": forward, "train": train}


def _alternate(calls: list[Any], repeats: int) -> list[float]:
    """Returns the best seconds of each call, called in turn, after two rounds of warm-up."""
    best = np.full(len(calls), np.inf)
    for i in range(2 + repeats):
        for j, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i >= 2:
                best[j] = min(best[j], time.perf_counter() - start)
    return best.tolist()
