"""Compares velocities and sampled chunks with an independent torch implementation, in float64."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wam import tiny  # noqa: E402
from wam.official_names import official, tensor  # noqa: E402
from wam.torch_oracle import TorchWam  # noqa: E402

from wamjax.wam.fast_wam import uses as programs  # noqa: E402
from wamjax.wam.objectives import bind  # noqa: E402

TOKENS = {"N0": 4, "N+": 8, "C0": 4, "C+": 8, "A": tiny.CHUNK}
BATCH = 2

# Section 3.2 of the spec: query -> visible keys, in the published layouts.
MASKS = {
    "FAST": {"N0": "N0", "N+": "N0 N+", "A": "N0 A"},
    "JOINT": {"N0": "N0", "N+": "N0 N+", "A": "N0 N+ A"},
    "IDM": {"N0": "N0", "N+": "N0 N+", "C0": "C0", "C+": "C0 C+", "A": "C0 C+ A"},
    "acting": {"N0": "N0", "A": "N0 A"},
    "imagining": {"N0": "N0", "N+": "N0 N+", "A": "A"},  # the action output is not used
    "acting on a video": {"N0": "N0", "N+": "N0 N+", "A": "N0 N+ A"},
}


def mask(name):
    rows = MASKS[name]
    order = [k for k in TOKENS if k in rows]
    blocks = [
        [torch.full((TOKENS[q], TOKENS[k]), k in rows[q].split()) for k in order] for q in order
    ]
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


def channels_first(x):
    return tensor(np.asarray(x, np.float64)).movedim(-1, 1)


def channels_last(x):
    return x.movedim(1, -1).numpy()


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@functools.cache
def models():
    params = tiny.params("idm", vocabulary=0, dtype=np.float64)
    names = official(params, tiny.LAYERS, tiny.PATCH)
    return params, TorchWam(names, tiny.LAYERS, tiny.HEADS, tiny.HEAD_DIM, tiny.FREQ)


@functools.cache
def data():
    rng = np.random.default_rng(5)
    _, h, w, c = tiny.CODEC.shape(tiny.FRAMES, *tiny.PICTURE)
    draw = rng.standard_normal
    return {
        "first": draw((BATCH, 1, h, w, c)),
        "future": draw((BATCH, tiny.FRAMES - 1, h, w, c)),
        "cond": draw((BATCH, tiny.FRAMES - 1, h, w, c)),
        "action": draw((BATCH, tiny.CHUNK, tiny.ACTION)),
        "text": draw((BATCH, tiny.WORDS, tiny.CONTEXT)),
        "state": draw((BATCH, tiny.PROPRIO)),
        "future_level": np.array([0.83, 0.21]),
        "cond_level": np.array([0.0, 0.64]),
        "action_level": np.array([0.35, 0.97]),
    }


def clip(first, rest):
    return channels_first(np.concatenate([first, rest], axis=1))


def clip_levels(level):
    """Returns levels with frame 0 clean, and one level for the others."""
    levels = np.repeat(level[:, None], tiny.FRAMES, axis=1)
    levels[:, 0] = 0
    return tensor(levels)


@pytest.mark.parametrize("name", ["FAST", "JOINT", "IDM"])
def test_velocities(name):
    params, oracle = models()
    x = data()
    videos, levels = [clip(x["first"], x["future"])], [clip_levels(x["future_level"])]
    present = ["first", "future", "action"]
    if name == "IDM":
        videos.append(clip(x["first"], x["cond"]))
        levels.append(clip_levels(x["cond_level"]))
        present.append("cond")
    clips, action = oracle(
        videos, levels, tensor(x["action"]), tensor(x["action_level"]),
        tensor(x["text"]), tensor(x["state"]), mask(name),
    )  # fmt: skip
    want = {"future": channels_last(clips[0])[:, 1:], "action": action.numpy()}

    net = tiny.network(vocabulary=0)
    slots = {"first": 1, "future": tiny.FRAMES - 1, "cond": tiny.FRAMES - 1, "action": 1}
    level = {"first": np.zeros((BATCH, 1))}
    for g in present[1:]:
        level[g] = np.repeat(x[f"{g}_level"][:, None], slots[g], axis=1)

    @jax.jit
    def velocities(params):
        def call(method, *args, **kwargs):
            return net.apply({"params": params}, *args, method=method, **kwargs)

        condition = {"context": x["text"], "proprio": x["state"]}
        contexts = call("conditions", condition).contexts
        table = getattr(programs, name).restrict(present)
        values = {g: x[g] for g in present}
        times = call("times", level)
        return call("__call__", values, times, contexts, table, predict=tuple(want))[0]

    with jax.enable_x64(True):
        got = velocities(params)
    for group, value in want.items():
        assert got[group].dtype == np.float64
        assert np.std(value) > 0.1
        assert relative(got[group], value) < 1e-10, group


def euler(velocity, x, grids):
    for i in range(len(grids[0]) - 1):
        slopes = velocity(x, [grid[i] for grid in grids])
        x = [y + v * (g[i + 1] - g[i]) for y, v, g in zip(x, slopes, grids, strict=True)]
    return x


def oracle_chunk(mode, shifts, steps=3, prefix=None):
    """Runs whole sampling loops in torch, recomputing everything at every step as published.

    Args:
      prefix: (actions (b, d, a), count): the first actions of each chunk are set to these at every
        step, at level 0; velocities there do not matter.
    """
    _, oracle = models()
    x = {k: tensor(v) for k, v in data().items() if k not in ("first", "future", "cond")}
    first, noise = channels_first(data()["first"]), channels_first(data()["future"])
    u = np.linspace(1, 0, steps + 1)
    video_grid, action_grid = (s * u / (1 + (s - 1) * u) for s in shifts)
    zeros = torch.zeros(BATCH, tiny.FRAMES, dtype=torch.float64)

    def net(future, video_level, action, action_level, name):
        video = first if future is None else torch.cat([first, future], dim=2)
        levels = zeros[:, : video.shape[2]].clone()
        levels[:, 1:] = video_level
        level = torch.full((BATCH,), float(action_level), dtype=torch.float64)
        if prefix is not None:
            action, level = action.clone(), level[:, None].repeat(1, tiny.CHUNK)
            for row, count in enumerate(prefix[1]):
                action[row, :count] = tensor(prefix[0][row, :count])
                level[row, :count] = 0
        clips, a = oracle([video], [levels], action, level, x["text"], x["state"], mask(name))
        return clips[0][:, :, 1:], a

    if mode == "direct":
        return euler(
            lambda y, t: [net(None, 0, y[0], t[0], "acting")[1]], [x["action"]], [action_grid]
        )
    if mode == "joint":
        return euler(
            lambda y, t: net(y[0], t[0], y[1], t[1], "JOINT"),
            [noise, x["action"]],
            [video_grid, action_grid],
        )[1:]
    (video,) = euler(
        lambda y, t: [net(y[0], t[0], x["action"], 1.0, "imagining")[0]], [noise], [video_grid]
    )
    return euler(
        lambda y, t: [net(video, 0, y[0], t[0], "acting on a video")[1]],
        [x["action"]],
        [action_grid],
    )


def acted(objective, mode, monkeypatch, prefix=None):
    """Returns its actions in float64, from the noise of `data`."""
    x = data()
    monkeypatch.setattr(type(objective), "_noise", lambda self, group, first, rng, noise: x[group])

    def observe(self, params, *_):
        condition = {"context": x["text"], "proprio": x["state"]}
        return x["first"], bind(self.network, params)("conditions", condition).contexts

    monkeypatch.setattr(type(objective), "_observe", observe)

    class Identity:
        forward = inverse = staticmethod(lambda a: a)

    with jax.enable_x64(True):
        run = jax.jit(
            lambda p, f: objective.policy(p, {"actions": Identity}, {}, None, mode, prefix=f)
        )
        got = run(models()[0], prefix)
    assert got.dtype == np.float64
    return got


MODES = [("fast", "direct"), ("joint", "joint"), ("idm", "imagine")]


@pytest.mark.parametrize("variant, mode", MODES)
def test_sampled_actions(variant, mode, monkeypatch):
    """Compares `policy` with its cache with the published loops without one."""
    (want,) = oracle_chunk(mode, shifts=(5.0, 1.0))
    got = acted(tiny.fast_wam(variant, vocabulary=0), mode, monkeypatch)
    assert np.std(want.numpy()) > 0.1
    assert relative(got, want.numpy()) < 1e-10


@pytest.mark.parametrize("variant, mode", MODES)
def test_sampled_actions_behind_a_prefix(variant, mode, monkeypatch):
    """Compares with masked loops, in which given actions have their own level in every token."""
    prefix = np.random.default_rng(8).standard_normal((BATCH, 2, tiny.ACTION)), np.array([1, 2])
    (want,) = oracle_chunk(mode, shifts=(5.0, 1.0), prefix=prefix)
    objective = tiny.fast_wam(variant, vocabulary=0, prefix_max=2)
    got = np.asarray(acted(objective, mode, monkeypatch, prefix))
    for row, count in enumerate(prefix[1]):
        np.testing.assert_array_equal(got[row, :count], prefix[0][row, :count])
        assert relative(got[row, count:], want.numpy()[row, count:]) < 1e-10
    (without,) = oracle_chunk(mode, shifts=(5.0, 1.0))
    assert relative(got[:, 2:], without.numpy()[:, 2:]) > 1e-3
