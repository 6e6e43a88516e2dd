"""Implements a method in one file: behaviour cloning of a picture by one linear layer."""

import dataclasses

import jax
import jax.numpy as jnp

from wamjax.wam.protocols import Method, Policy


@dataclasses.dataclass(frozen=True)
class Cloning(Policy):
    pixels: tuple[int, int]
    chunk: int
    action_dim: int
    proprio_dim: int
    words: int

    def batch_spec(self, batch_size):
        def array(dtype, *shape):
            return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

        return {
            "video": array(jnp.uint8, 1, *self.pixels, 3),
            "proprio": array(jnp.float32, self.proprio_dim),
            "instruction": array(jnp.int32, self.words),
            "actions": array(jnp.float32, self.chunk, self.action_dim),
            "action_valid": array(jnp.bool_, self.chunk),
        }

    def init(self, rng):
        size = self.pixels[0] * self.pixels[1] * 3 + self.proprio_dim
        shape = size, self.chunk * self.action_dim
        return {"action": {"head": {"kernel": 0.01 * jax.random.normal(rng, shape)}}}

    def loss(self, params, batch, rng, average=None):
        error = jnp.square(self._actions(params, batch) - batch["actions"]).mean(axis=2)
        mask = batch["action_valid"]
        loss = jnp.sum(error * mask) / jnp.maximum(jnp.sum(mask), 1)
        # The average is for methods with a teacher: None, or shaped like the parameters.
        same = average is not None and jax.tree.structure(average) == jax.tree.structure(params)
        return loss, {"loss_action": loss, "teacher": jnp.float32(same)}

    def policy(self, params, normalizers, observation, rng, mode=None, noise=None):
        proprio = normalizers["proprio"].forward(observation["proprio"])
        actions = self._actions(params, {**observation, "proprio": proprio})
        return normalizers["actions"].inverse(actions)

    def _actions(self, params, batch):
        picture = batch["video"].reshape(len(batch["proprio"]), -1) / 255.0 - 0.5
        x = jnp.concatenate([picture, batch["proprio"]], axis=1)
        y = x.astype(jnp.float32) @ params["action"]["head"]["kernel"]
        return y.reshape(-1, self.chunk, self.action_dim)


def build(config, spec):
    return Cloning(spec.composite, spec.chunk, spec.action_dim, spec.proprio_dim,
                   spec.instruction_length)  # fmt: skip


METHOD = Method(build, keys=lambda config: ())
