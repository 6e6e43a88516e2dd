"""A small convolutional classifier, trained in seconds in the run that it scores.

It scores generated pictures twice: by Frechet distance on its features (the last hidden layer),
and by how often it sees the class that was asked for.

    network = Classifier(heads=(10,))
    params = fit(network, images, labels, steps=600, rng=jax.random.key(0))
    out = outputs(network, params, generated)     # out.features (n, d), out.logits ((n, 10),)

Pictures are float in [-1, 1] or uint8, (n, h, w, c). The digits that ship in scikit-learn are
float in 0..16: pass ``x / 8 - 1``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from wamjax.models.layers import Linear, at_least_float32

Params = dict[str, Any]
relu_scale = nn.initializers.he_normal()
LEARNING_RATE = 3e-3  # at its peak


class Outputs(NamedTuple):
    """What the network says about pictures."""

    logits: tuple[Float[Array, "n classes"], ...]  # one for each head
    features: Float[Array, "n d"]


class Classifier(nn.Module):
    """Patches, 3x3 convolutions of stride 2, one hidden layer of features, linear heads.

    Attributes:
      heads: number of classes of each head; one head for a plain classifier.
      patch: the side of the squares of pixels that become one position each.
      widths: of the patch embedding and of the convolutions, which halve the grid each time.
      features: d, the width of the last hidden layer.
    """

    heads: tuple[int, ...]
    patch: int = 1
    widths: tuple[int, ...] = (16, 32, 64)
    features: int = 64

    @nn.compact
    def __call__(self, images: Shaped[Array, "n h w c"]) -> Outputs:
        n, h, w, _ = images.shape
        smallest = self.patch * 2 ** (len(self.widths) - 1)
        if h % smallest or w % smallest:
            raise ValueError(
                f"pictures of {h}x{w} do not divide by patch {self.patch} times 2 for each of "
                f"{len(self.widths) - 1} convolutions"
            )
        p, x = self.patch, as_float(images)
        x = rearrange(x, "n (h p) (w q) c -> n h w (p q c)", p=p, q=p)
        x = nn.relu(Linear(self.widths[0], kernel_init=relu_scale, name="patch_embed")(x))
        for i, width in enumerate(self.widths[1:]):
            x = nn.relu(Linear(width, kernel_init=relu_scale, name=f"conv_{i}")(neighbours(x)))
        x = Linear(self.features, kernel_init=relu_scale, name="features")(x.reshape(n, -1))
        logits = [Linear(k, name=f"head_{i}")(nn.relu(x)) for i, k in enumerate(self.heads)]
        return Outputs(tuple(logits), x)


def as_float(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """uint8 to [-1, 1]; floats as they are."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    return at_least_float32(images)


def neighbours(x: Float[Array, "n h w c"]) -> Float[Array, "n h/2 w/2 9c"]:
    """The 3x3 surroundings of every second position, zero outside: a Linear makes it a convolution.

    On a CPU this beats XLA's own convolution, by up to half in the gradient.
    """
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def fit(
    network: Classifier,
    images: Shaped[Array, "n h w c"],
    labels: Int[Array, " n"],
    steps: int,
    rng: Array,
    batch_size: int = 128,
) -> Params:
    """Trains a network of one head on labelled pictures.

    Raises:
      ValueError: labels do not fit the pictures or the head.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"labels have shape {labels.shape}, expected ({len(images)},)")
    if network.heads != (k := network.heads[0],) or labels.min() < 0 or labels.max() >= k:
        raise ValueError(
            f"labels are in {labels.min()}..{labels.max()}, the heads have {network.heads} classes"
        )
    return train(network, _some, (images, labels[:, None]), steps, rng, batch_size)


def _some(data, rng: Array, size: int) -> tuple[Array, Array]:
    """A batch of (images, labels), drawn with replacement."""
    rows = jax.random.randint(rng, (size,), 0, len(data[0]))
    return jax.tree.map(lambda x: x[rows], data)


@functools.partial(jax.jit, static_argnames=("network", "draw", "steps", "batch_size"))
def train(
    network: Classifier,
    draw: Callable,
    data: Any,
    steps: int,
    rng: Array,
    batch_size: int = 128,
) -> Params:
    """All of training as one compiled scan: AdamW on the summed cross-entropies.

    The learning rate rises over a tenth of the steps and falls to zero by a cosine.

    Args:
      network: what to train.
      draw: ``draw(data, rng, batch_size) -> (images, labels (b, heads))``, traced in every step.
      data: a pytree of arrays that `draw` reads.
      steps: number of updates.
      rng: of the initial parameters and of the batches.
      batch_size: examples of an update.
    """

    def loss(params, images, labels):
        logits = network.apply({"params": params}, images).logits
        each = optax.softmax_cross_entropy_with_integer_labels
        return sum(each(x, labels[:, i]).mean() for i, x in enumerate(logits))

    def update(carry, step):
        params, state = carry
        gradient = jax.grad(loss)(params, *draw(data, jax.random.fold_in(rng, step), batch_size))
        change, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), None

    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 10, steps)
    optimizer = optax.adamw(rate, weight_decay=1e-2)
    init_rng, rng = jax.random.split(rng)
    params = network.init(init_rng, draw(data, rng, 1)[0])["params"]
    (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(steps))
    return params


def outputs(
    network: Classifier, params: Params, images: Shaped[np.ndarray, "n h w c"], batch: int = 256
) -> Outputs:
    """Logits and features of any number of pictures, `batch` at a time, as numpy arrays."""
    parts = []
    for start in range(0, len(images), batch):
        some = np.asarray(images[start : start + batch])
        # The last batch is filled up, so that there is one shape and one compilation.
        full = np.concatenate([some, np.repeat(some[-1:], batch - len(some), axis=0)])
        out = _apply(network, params, full)
        parts.append(jax.tree.map(lambda x: np.asarray(x)[: len(some)], out))  # noqa: B023
    if not parts:
        raise ValueError(f"there are no pictures to score: shape {np.shape(images)}")
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnames="network")
def _apply(network, params, images) -> Outputs:
    return network.apply({"params": params}, images)


def accuracy(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> float:
    """The share of pictures whose most likely class is the one that was asked for."""
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits and {len(labels)} labels")
    return float(np.mean(np.argmax(logits, axis=-1) == np.asarray(labels)))
