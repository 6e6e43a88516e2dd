"""Tests the sampler against the public recipe in sigma and float64; caches; modes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import cosmos_tiny as tiny

from wamjax.models.transformer import Cache
from wamjax.wam.cosmos_policy.injection import extract, read_value
from wamjax.wam.cosmos_policy.objective import Seen
from wamjax.wam.cosmos_policy.sampling import (
    Sampler,
    frozen_error,
    join,
    marked,
    published_noise,
    split,
)
from wamjax.wam.cosmos_policy.uses import uses

KEY = jax.random.key(0)
SHAPE = (2, 9, 4, 4, 12)
EMPTY = Cache({}, {})


def answer(x, sigma):
    """Returns the x0 that the fake network predicts."""
    return (
        np.sin(x) * 2 / (1 + sigma) if isinstance(x, np.ndarray) else jnp.sin(x) * 2 / (1 + sigma)
    )


class Network:
    """Returns `answer` as a velocity, and records its calls."""

    def __init__(self):
        self.calls, self.flags = [], {}

    def __call__(self, method, values, *rest, **options):
        if method == "times":
            return values  # levels, as they are
        (times, _, _), predict, out = rest, options["predict"], {}
        self.calls.append(predict)
        for g, x in values.items():
            self.flags[g] = x[0, 0, 0, 0, 12]
            x, tau = x[..., :12], times[g][:, :, None, None, None]
            if g in predict:
                out[g] = (x - answer(x / (1 - tau), tau / (1 - tau))) / tau
        return out, EMPTY


POLICY = uses()[0]


def sampler(network):
    return Sampler(network, tiny.LAYOUT, tiny.PROCESS, 80.0, 4.0)


def oracle(noise, steps):
    """Computes section 6.1 in sigma: a grid of n points, n - 1 steps of "2ab", one clean call."""
    if steps == 1:
        sigmas = np.array([80.0])
    else:
        i = np.arange(steps) / (steps - 1)
        sigmas = (80 ** (1 / 7) + i * (4 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x, before, last = noise * 80.0, None, None
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = answer(x, sigma)
        if before is None:
            b = following / sigma
            x_next = (1 - b) * x0 + b * x
        else:
            h = np.log(sigma) - np.log(following)
            r = (np.log(sigma) - np.log(last)) / h  # (lambda_prev - lambda) / h, negative
            phi1 = (np.exp(-h) - 1) / -h
            phi2 = (phi1 - 1) / -h
            x_next = np.exp(-h) * x + h * ((phi1 - phi2 / r) * x0 + phi2 / r * before)
        x, before, last = x_next, x0, sigma
    return answer(x, sigmas[-1])


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_sampling_is_the_public_recipe_with_as_many_calls_as_asked(steps):
    """n = 2 means two calls, where the public code makes one."""
    rng = np.random.default_rng(0)
    noise, latents = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    network = Network()
    with jax.disable_jit():  # so that every step of the scan calls
        out = sampler(network)(
            POLICY, jnp.asarray(latents, jnp.float32), EMPTY,
            jnp.asarray(noise, jnp.float32), steps,
        )  # fmt: skip
    assert len(network.calls) == steps
    assert set(network.calls) == {("action", "future", "value")}
    assert network.flags == dict(blank=1, current=1, action=0, future=0, value=0)
    np.testing.assert_array_equal(out[:, :4], np.float32(latents[:, :4]))
    np.testing.assert_allclose(out[:, 4:], oracle(noise[:, 4:], steps), atol=2e-4)


def test_the_grids_and_times_of_the_specification():
    grids = {
        5: [80, 42.2911, 20.9724, 9.6183, 4],
        10: [80, 60.6947, 45.5286, 33.7340, 24.6618, 17.7667, 12.5947, 8.7709, 5.9887, 4],
        2: [80, 4],
        1: [80],
    }
    for steps, want in grids.items():
        levels = sampler(Network()).schedule(steps)
        assert len(levels) == steps + 1 and levels[-1] == 0
        sigmas = levels[:-1] / (1 - levels[:-1])
        np.testing.assert_allclose(sigmas, want, atol=5e-5)
    levels = sampler(Network()).schedule(5)
    np.testing.assert_allclose(levels[[0, 4]], [0.987654, 0.8], atol=1e-6)
    # What is given is at time 0.
    denoiser = sampler(Network()).denoiser(POLICY.table)
    assert denoiser._clean_times({"blank": None})["blank"].tolist() == [[0.0]]


def test_published_noise_is_numpys_and_does_not_depend_on_the_batch():
    noise = published_noise(195, (2, 9, 28, 28, 16))
    want = np.random.RandomState(195).standard_normal((2, 16, 9, 28, 28)).astype(np.float32)
    np.testing.assert_array_equal(noise, want.transpose(0, 2, 3, 4, 1))
    np.testing.assert_array_equal(published_noise(195, (1, 9, 28, 28, 16))[0], noise[0])


class Answering(tiny.CosmosPolicy):
    """Is a policy with the fake network."""

    def bind(self, params, *constrain):
        return Network()


def latents():
    return np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)


def test_acting_may_start_from_the_published_noise():
    objective, seen = Answering(**vars(tiny.objective(steps=2))), Seen(latents(), EMPTY)

    @jax.jit
    def run(key, noise):
        drawn = jax.random.normal(key, SHAPE)
        return [objective.act({}, seen, key, noise=x) for x in (None, drawn, noise)]

    noise = published_noise(195, SHAPE)
    (want, same, one), (_, _, two) = (
        jax.device_get(run(jax.random.key(i), noise)) for i in range(2)
    )
    np.testing.assert_array_equal(same, want)
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - want).max() > 0.01


def test_acting_tells_rounded_levels_under_compat():
    told = set()

    def tell(levels):
        for x in levels.values():
            told.update(x.ravel().tolist())

    class Spy(Answering):
        def bind(self, params, *constrain):
            net = super().bind(params, *constrain)

            def call(method, levels, *rest, **options):
                if method == "times":
                    jax.debug.callback(tell, levels)
                return net(method, levels, *rest, **options)

            return call

    for compat in ((), ("bf16_times",)):
        objective = Spy(**vars(tiny.objective(compat=compat, steps=5)))
        told.clear()
        run = jax.jit(lambda key, o=objective: o.act({}, Seen(latents(), EMPTY), key))
        jax.block_until_ready(run(KEY))
        jax.effects_barrier()
        levels = told - {0.0}
        rounded = {float(jnp.bfloat16(x)) for x in levels}
        assert len(levels) == 5 and (levels == rounded) == bool(compat)


def test_masks_and_groups():
    x = latents()
    given = jnp.asarray(np.random.default_rng(1).random((2, 9)) < 0.5)
    y = np.asarray(marked({"g": x}, {"g": given})["g"])
    np.testing.assert_array_equal(y[..., :12], x)
    assert np.all(y[..., 12] == np.asarray(given)[:, :, None, None]) and np.all(y[..., 13] == 0)
    np.testing.assert_array_equal(join(tiny.LAYOUT, split(tiny.LAYOUT, x)), x)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _act(objective, params, observation, key, steps, mode):
    seen = objective.observe(params, tiny.normalizers(), observation)
    return objective.act(params, seen, key, steps, frozen=mode == "frozen")


def act(objective, params, observation, key, steps=2, mode="direct"):
    return np.asarray(_act(objective, params, observation, key, steps, mode))


def test_direct_acting_gives_what_was_given_and_layers_may_be_unstacked():
    objective, seen = tiny.objective(steps=2), tiny.observation()
    out = act(objective, tiny.params(), seen, KEY)
    assert out.shape == SHAPE and np.all(np.isfinite(out))
    np.testing.assert_array_equal(out[:, 0], -1)
    np.testing.assert_allclose(extract(tiny.LAYOUT, out, "proprio"), seen["proprio"], atol=1e-6)
    eye = np.asarray(objective.codec.encode(jnp.asarray(seen["video"][:, :, :, 8:])))[:, 0]
    np.testing.assert_array_equal(out[:, tiny.LAYOUT.index("eye")], eye)
    prepared = objective.prepare(tiny.params())
    assert "blocks" not in prepared
    # Frozen with one call equals direct: keys and values are of the only level.
    one = act(objective, tiny.params(), seen, KEY, 1)
    frozen = act(objective, prepared, seen, KEY, 1, "frozen")
    np.testing.assert_allclose(frozen, one, atol=2e-5)
    np.testing.assert_array_equal(frozen[:, :4], out[:, :4])


def test_a_prefix_is_cached_exactly():
    """Without a cache, every call recomputes everything under the same table."""
    objective = tiny.objective(visibility="prefix", steps=2)
    got = act(objective, tiny.params(), tiny.observation(), KEY)

    class Uncached(tiny.CosmosPolicy):
        def act(self, params, seen, rng, steps=0, frozen=False):
            use, sampler = self.uses[0], self.sampler(params)
            contexts = self.bind(params)("conditions", self.text(tiny.observation())).contexts
            denoiser = sampler.denoiser(use.table)
            denoiser = dataclasses.replace(denoiser, use_cache=False)
            parts = split(self.layout, seen.latents)
            noise = split(self.layout, jax.random.normal(rng, seen.latents.shape))
            grid = sampler.schedule(steps)
            start = {g: grid[0] * noise[g] for g in use.predicted}
            given, grids = {g: parts[g] for g in use.given}, dict.fromkeys(start, grid)
            done, _ = denoiser.sample(given, start, grids, contexts, None, "exponential")
            return join(self.layout, given | done)

    want = act(Uncached(**vars(objective)), tiny.params(), tiny.observation(), KEY)
    np.testing.assert_allclose(got, want, atol=5e-5)
    # Given slots do not see denoised ones, unlike under the other table.
    other = act(tiny.objective(steps=2), tiny.params(), tiny.observation(), KEY)
    assert np.abs(other - want).max() > 1e-3


def test_world_model_and_value_keep_what_they_are_given():
    objective = tiny.objective(judge="value_v")

    @jax.jit
    def run(params, observation, latents):
        text = objective.read(params, observation)
        future = objective.predict(params, Seen(latents, text), KEY, 2)
        values = objective.value(params, Seen(future, text), KEY, 2)
        # V(s') does not depend on the present or the action.
        hidden = future.at[:, 1:5].set(0)
        return future, values, objective.value(params, Seen(hidden, text), KEY, 2)

    before = latents()
    future, values, same = jax.device_get(run(tiny.params(), tiny.observation(), before))
    np.testing.assert_array_equal(future[:, :5], before[:, :5])
    assert np.abs(future[:, 5:] - before[:, 5:]).min(axis=(0, 2, 3, 4)).max() > 0
    np.testing.assert_allclose(values, same, atol=1e-6)
    assert values.shape == (2,) and np.all((0 <= values) & (values <= 1))
    assert np.all(np.isfinite(read_value(tiny.LAYOUT, future)))


def test_modes_act_in_robot_units_and_unknown_ones_are_named():
    objective, params = tiny.objective(steps=2), tiny.params()
    policy = functools.partial(objective.policy, params, tiny.normalizers())

    @jax.jit
    def run(params, o, key):
        asked = params, tiny.normalizers(), o, key
        return objective.policy(*asked), objective.imagine(*asked), frozen_error(objective, *asked)

    actions, video, error = jax.device_get(run(params, tiny.observation(), KEY))
    want = extract(tiny.LAYOUT, act(objective, params, tiny.observation(), KEY, 2), "action")
    np.testing.assert_allclose(actions, 2 * want, atol=1e-4)  # the normaliser's scale
    assert video.shape == (2, 2, 8, 16, 3) and video.dtype == jnp.uint8
    np.testing.assert_array_equal(video[:, 0], tiny.observation()["video"][:, 0])
    with pytest.raises(ValueError, match="not 'frosen', did you mean 'frozen'"):
        policy(tiny.observation(), KEY, "frosen")
    assert 1e-4 < error["max"] < 10
    assert 0 < error["mean"] < error["max"] and 0 < error["relative"] < 2
    clip = tiny.observation() | {"video": tiny.batch(2)["video"]}
    with pytest.raises(ValueError, match="acts on one frame, video has 2"):
        policy(clip, KEY)
