"""A small objective with the parameter paths of the real one, and endless data for it.

Also a script: ``python tests/toy.py WORKDIR STEPS [KILL_AT] [key=value ...]`` runs the real
training loop on them and, when it is about to take batch KILL_AT, kills itself by SIGKILL.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np

from wamjax import tree
from wamjax.config import base_config

LAYERS, HEADS, HEAD_DIM, J, A, P, N = 2, 2, 4, 4, 3, 5, 4
INNER = HEADS * HEAD_DIM
WIDTH = {"video": 16, "action": 8}
CONTEXT = 8


def shapes() -> dict[str, tuple[int, ...]]:
    out = {"proprio/kernel": (P, CONTEXT), "proprio/bias": (CONTEXT,),
           "text/embedding": (16, CONTEXT), "text/positions": (N, CONTEXT)}  # fmt: skip

    def linear(path, i, o, *lead):
        out[f"{path}/kernel"], out[f"{path}/bias"] = (*lead, i, o), (*lead, o)

    for e, d in WIDTH.items():
        for name, i in (("text_mlp", CONTEXT), ("time_mlp", 8)):
            linear(f"{e}/{name}/in", i, d)
            linear(f"{e}/{name}/out", d, d)
        linear(f"{e}/time_proj", d, 6 * d)
        linear(f"{e}/{'patch_embed' if e == 'video' else 'encoder'}", A, d)
        linear(f"{e}/head", d, A)
        block = f"blocks/{e}"
        for attention in ("self_attn", "cross_attn"):
            for name in "qkv":
                linear(f"{block}/{attention}/{name}", d, INNER, LAYERS)
            linear(f"{block}/{attention}/o", INNER, d, LAYERS)
            for name in ("q_norm", "k_norm"):
                out[f"{block}/{attention}/{name}/scale"] = (LAYERS, INNER)
        for name in ("scale", "bias"):
            out[f"{block}/cross_norm/{name}"] = (LAYERS, d)
        linear(f"{block}/ffn/in", d, 4 * d, LAYERS)
        linear(f"{block}/ffn/out", 4 * d, d, LAYERS)
        out[f"{block}/modulation"] = (LAYERS, 6, d)
    out["video/head_table"] = (2, WIDTH["video"])
    return out


@dataclasses.dataclass(frozen=True)
class Toy:
    """Attention, feed-forward and conditioning over a chunk, once for each expert.

    `noise` scales random numbers in the loss; a batch whose `bad` is not zero has a NaN loss.
    """

    noise: float = 0.1

    def init(self, rng):
        flat = {}
        for i, (path, shape) in enumerate(shapes().items()):
            scale = 0.3 if not path.endswith("scale") else 1.0
            flat[path] = scale * jax.random.normal(jax.random.fold_in(rng, i), shape)
        return tree.unflatten(flat)

    def batch_spec(self, b):
        s = jax.ShapeDtypeStruct
        return {
            "proprio": s((b, P), jnp.float32),
            "actions": s((b, J, A), jnp.float32),
            "instruction": s((b, N), jnp.int32),
            "bad": s((b,), jnp.float32),
        }

    def pictures(self):
        return []

    def loss(self, params, batch, rng):
        dtype = params["proprio"]["kernel"].dtype
        words = params["text"]["embedding"][batch["instruction"]] + params["text"]["positions"]
        state = linear(params["proprio"], batch["proprio"].astype(dtype))
        context = jnp.concatenate([words, state[:, None]], axis=1)
        noise = self.noise * jax.random.normal(rng, batch["actions"].shape)
        losses = {}
        for e in WIDTH:
            x = (batch["actions"] + noise).astype(dtype)
            y = expert(params[e], params["blocks"][e], x, context).astype(jnp.float32)
            losses[f"loss_{e}"] = jnp.mean(jnp.square(y - batch["actions"][:, ::-1]))
        poison = jnp.where(jnp.any(batch["bad"] > 0), jnp.nan, 1.0)
        return sum(losses.values()) * poison, losses


@dataclasses.dataclass(frozen=True)
class Small(Toy):
    """A few of the parameters, for tests that compile often."""

    def init(self, rng):
        keys = ("proprio", "action/encoder", "action/head")
        flat = {k: v for k, v in tree.flatten(super().init(rng)).items() if k.startswith(keys)}
        return tree.unflatten(flat)

    def loss(self, params, batch, rng):
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


def expert(free, blocks, x, context):
    embed = free.get("patch_embed") or free["encoder"]
    x = linear(embed, x)
    text = linear(free["text_mlp"]["out"], jax.nn.gelu(linear(free["text_mlp"]["in"], context)))
    level = jnp.ones((x.shape[0], 8), x.dtype)
    time = linear(free["time_mlp"]["out"], jax.nn.silu(linear(free["time_mlp"]["in"], level)))
    rows = linear(free["time_proj"], time).reshape(x.shape[0], 6, -1)

    def block(x, p):
        m = p["modulation"] + rows
        y = x * (1 + m[:, None, 0]) + m[:, None, 1]
        x = x + attend(p["self_attn"], y, y) * m[:, None, 2]
        y = x * p["cross_norm"]["scale"] + p["cross_norm"]["bias"]
        x = x + attend(p["cross_attn"], y, text)
        y = x * (1 + m[:, None, 3]) + m[:, None, 4]
        hidden = jax.nn.gelu(linear(p["ffn"]["in"], y))
        return x + 0.1 * linear(p["ffn"]["out"], hidden) * m[:, None, 5], None

    x, _ = jax.lax.scan(block, x, blocks)
    if "head_table" in free:
        x = x * free["head_table"][0] + free["head_table"][1]
    return linear(free["head"], jnp.tanh(x))


def attend(p, x, y):
    def split(z):
        return z.reshape(*z.shape[:2], HEADS, HEAD_DIM)

    def norm(z, name):
        return z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + 1e-6) * p[name]["scale"]

    q = split(norm(linear(p["q"], x), "q_norm"))
    k = split(norm(linear(p["k"], y), "k_norm"))
    w = jax.nn.softmax(jnp.einsum("blnk,bsnk->bnls", q, k))
    z = jnp.einsum("bnls,bsnk->blnk", w, split(linear(p["v"], y)))
    return linear(p["o"], z.reshape(*z.shape[:2], -1))


def example(index, rng, bad=()):
    return {
        "proprio": rng.normal(size=P).astype(np.float32),
        "actions": rng.normal(size=(J, A)).astype(np.float32),
        "instruction": rng.integers(0, 16, N).astype(np.int32),
        "bad": np.float32(index in bad),
        "episode": np.int32(index),
    }


class Source:
    """Random access to `size` numbers, with the stable repr that grain wants."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return i

    def __repr__(self):
        return f"Source({self.size})"


def iterator(batch_size, seed=0, bad=(), shuffle=True):
    data = grain.MapDataset.source(Source(64)).seed(seed)
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
        "optim.learning_rate": 1e-2, "optim.ema_decay": 0.9, "model.heads": HEADS,
    } | flat  # fmt: skip
    c.update_from_flattened_dict(values)
    return c


STATISTICS = {"actions": {"min": [0.0, -1.5], "count": 3}}


class Trap(grain.DatasetIterator):
    """An iterator that does something to this process when batch `at` (from 0) is asked for."""

    def __init__(self, inner, at, action):
        super().__init__()
        self.inner, self.at, self.action = inner, at, action

    def __next__(self):
        if self.inner.get_state()["next_index"] == self.at:
            self.action()
        return next(self.inner)

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

    def make(config):
        it = iterator(config.data.batch_size, config.seed, bad, shuffle)
        it = Trap(it, *trap) if trap else it
        return Data(None, it, statistics or STATISTICS)

    return make


def run(config, workdir, make_objective=lambda config, spec: Small(), devices=None, **data):
    from wamjax import train

    return train.run(config, workdir, make_data(**data), make_objective, devices)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    workdir, steps, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    overrides = dict(a.split("=") for a in sys.argv[4:])
    trap = (kill_at, kill) if kill_at >= 0 else None
    run(config(total_steps=steps, **{k: int(v) for k, v in overrides.items()}), workdir, trap=trap)
