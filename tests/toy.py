"""Defines a small objective, endless data for it, and a miniature of the real objective.

It is also a script: ``python tests/toy.py WORKDIR STEPS KILL_AT [key=value ...]`` runs the training
loop on the small one and kills itself by SIGKILL before batch KILL_AT (-1: never).
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys

import compiler
import grain
import jax
import jax.numpy as jnp
import numpy as np

from wamjax import tree, wam
from wamjax.config import base_config
from wamjax.data.spec import DataSpec
from wamjax.wam.protocols import Objective

J, A, P, N, WIDTH = 4, 3, 5, 4, 8


@dataclasses.dataclass(frozen=True)
class Toy(Objective):
    """Implements regression of a part of the state from actions and state.

    `noise` scales random numbers in the loss; a batch whose `bad` is not zero has a NaN loss.
    """

    noise: float = 0.1
    kind = "toy"

    def init(self, rng):
        shapes = {"proprio": (P, WIDTH), "action/encoder": (A, WIDTH), "action/head": (WIDTH, A)}
        shapes = {f"{p}/kernel": s for p, s in shapes.items()} | {
            f"{p}/bias": s[1:] for p, s in shapes.items()
        }
        # One draw for all, since each takes a tenth of a second to compile.
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = jnp.split(0.3 * jax.random.normal(rng, (sum(sizes),)), np.cumsum(sizes)[:-1])
        return tree.unflatten({
            path: part.reshape(shape)
            for part, (path, shape) in zip(parts, shapes.items(), strict=True)
        })  # fmt: skip

    def batch_spec(self, b):
        s = jax.ShapeDtypeStruct
        return {
            "proprio": s((b, P), jnp.float32),
            "actions": s((b, J, A), jnp.float32),
            "instruction": s((b, N), jnp.int32),
            "bad": s((b,), jnp.float32),
        }

    def loss(self, params, batch, rng, average=None):
        dtype = params["proprio"]["kernel"].dtype
        noise = self.noise * jax.random.normal(rng, batch["actions"].shape)
        x = linear(params["action"]["encoder"], (batch["actions"] + noise).astype(dtype))
        state = linear(params["proprio"], batch["proprio"].astype(dtype))
        y = linear(params["action"]["head"], jnp.tanh(x + state[:, None])).astype(jnp.float32)
        loss = jnp.mean(jnp.square(y - batch["proprio"][:, None, :A]))
        poison = jnp.where(jnp.any(batch["bad"] > 0), jnp.nan, 1.0)
        return loss * poison, {"loss_action": loss}


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def fast_wam(variant="fast"):
    """Returns a miniature of the real objective: all parameter paths, divisible 2 x 4 ways."""
    c = config(**{
        "model.layers": 2, "model.heads": 4, "model.head_dim": 8, "model.video.width": 32,
        "model.video.ffn": 64, "model.action.width": 16, "model.action.ffn": 32,
        "model.context_width": 16, "model.freq_dim": 32, "objective.variant": variant,
    })  # fmt: skip
    cameras = {"overhead": (16, 16), "gripper": (16, 16)}
    return wam.build(c, DataSpec(cameras, P, A, 8, 3, 1, N, 10.0))


def batch_of(objective, size=8):
    """Returns a random, fully valid batch in the shapes of an objective."""
    rng = np.random.default_rng(0)

    def leaf(s):
        if s.dtype == jnp.bool_:
            return np.ones(s.shape, bool)
        if jnp.issubdtype(s.dtype, jnp.integer):
            return rng.integers(1, 200, s.shape).astype(s.dtype)
        return rng.normal(size=s.shape).astype(s.dtype)

    return {k: leaf(s) for k, s in objective.batch_spec(size).items()}


def example(index, rng, bad=()):
    return {
        "proprio": rng.normal(size=P).astype(np.float32),
        "actions": rng.normal(size=(J, A)).astype(np.float32),
        "instruction": rng.integers(0, 16, N).astype(np.int32),
        "bad": np.float32(index in bad),
        "episode": np.int32(index),
    }


class Source:
    """Gives random access to `size` numbers, with the stable repr that grain needs."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return i

    def __repr__(self):
        return f"Source({self.size})"


def iterator(batch_size, seed=0, bad=(), shuffle=True):
    # Grain needs 9 ms to shuffle an index of 64, and a fiftieth of a millisecond for one of 4096.
    data = grain.MapDataset.source(Source(4096 if shuffle else 64)).seed(seed)
    data = data.shuffle() if shuffle else data
    data = data.repeat().random_map(lambda i, rng: example(int(i), rng, bad))
    return iter(data.batch(batch_size).to_iter_dataset())


def batch(size=8, seed=0, bad=False):
    rng = np.random.default_rng(seed)
    rows = [example(0, rng, (0,) if bad else ()) for _ in range(size)]
    out = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    del out["episode"]
    return out


def config(**flat):
    c = base_config()
    values = {
        "total_steps": 12, "log_every": 3, "checkpoint.every": 4, "data.batch_size": 8,
        "optim.learning_rate": 1e-2, "optim.ema_decay": 0.9,
    } | flat  # fmt: skip
    c.update_from_flattened_dict(values)
    return c


STATISTICS = {"actions": {"min": [0.0, -1.5], "count": 3}}


class Trap(grain.DatasetIterator):
    """Yields some rows of the batches, and runs an action before batch `at` (from 0)."""

    def __init__(self, inner, at, action, rows=None):
        super().__init__()
        self.inner, self.at, self.action = inner, at, action
        self.rows = slice(None) if rows is None else rows

    def __next__(self):
        if self.inner.get_state()["next_index"] == self.at:
            self.action()
        return {k: v[self.rows] for k, v in next(self.inner).items()}

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)

    def start_prefetch(self):
        pass


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def make_data(trap=None, bad=(), shuffle=True, statistics=None):
    """`trap` is (batch, action)."""
    from wamjax.train import Data

    def make(config, rows=None):
        it = iterator(config.data.batch_size, config.seed, bad, shuffle)
        it = Trap(it, *(trap or (-1, None)), rows)
        return Data(None, it, statistics or STATISTICS)

    return make


def run(config, workdir, make_objective=lambda config, spec: Toy(), devices=None, **data):
    from wamjax import train

    return train.run(config, workdir, make_data(**data), make_objective, devices)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    compiler.collect_rarely()
    workdir, steps, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = {k: int(v) for k, v in (a.split("=") for a in sys.argv[4:])}
    if "port" in options:
        address = f"localhost:{options.pop('port')}"
        jax.distributed.initialize(address, options.pop("processes"), options.pop("process"))
    trap = (kill_at, kill) if kill_at >= 0 else None
    run(config(total_steps=steps, **options), workdir, trap=trap)
