"""Tests the interpolated action expert against the published rule in torch."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wam import tiny  # noqa: E402

from wamjax.models.transformer import unstack  # noqa: E402
from wamjax.tree import flatten  # noqa: E402
from wamjax.wam.fast_wam.expert_init import action_from_video, interpolate  # noqa: E402


def resize(x, shape):
    """Computes spec 2.1 on one torch tensor: every dimension in order, then alpha."""
    source = x.shape
    for dim, size in enumerate(shape):
        if x.shape[dim] != size:
            moved = x.movedim(dim, -1)
            flat = moved.reshape(1, -1, moved.shape[-1])
            flat = torch.nn.functional.interpolate(
                flat, size=size, mode="linear", align_corners=True
            )
            x = flat.reshape(*moved.shape[:-1], size).movedim(-1, dim)
    if x.ndim >= 2 and source[-1] != shape[-1]:
        x = x * (source[-1] / shape[-1]) ** 0.5
    return x


def published(path, old, new):
    """Converts a tensor of one layer to torch's layout and back; modulation is (1, 6, d)."""
    old, shape = torch.from_numpy(old.copy()), new.shape
    if path.endswith("kernel"):
        return resize(old.T, shape[::-1]).T.numpy()
    if path.endswith("modulation"):
        return resize(old[None], (1, *shape))[0].numpy()
    return resize(old, shape).numpy()


@pytest.fixture(scope="module")
def params():
    return tiny.params("fast")


def test_every_tensor_is_the_published_one(params):
    got = flatten(jax.jit(action_from_video)(params))
    before = flatten(params)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in before.items()}
    changed = 0
    for path, value in got.items():
        if path.startswith("blocks/action/"):
            source = before[path.replace("blocks/action", "blocks/video")]
            for i in range(tiny.LAYERS):
                want = published(path, source[i], before[path][i])
                np.testing.assert_allclose(value[i], want, atol=2e-6, err_msg=path)
            changed += 1
        elif path.startswith("action/") and path.split("/")[1] not in ("encoder", "head"):
            want = published(path, before[path.replace("action/", "video/", 1)], before[path])
            np.testing.assert_allclose(value, want, atol=2e-6, err_msg=path)
            changed += 1
        else:
            np.testing.assert_array_equal(value, before[path], err_msg=path)
    assert changed == 10 + 27  # two networks of two Linears and the projection; a block's tensors


def test_the_scaling_rule():
    """alpha follows torch's last dimension: the input of a kernel, the width of a modulation."""
    params = tiny.params("fast")
    ones = jax.tree.map(np.ones_like, params)
    got = {k: np.unique(np.asarray(v)) for k, v in flatten(action_from_video(ones)).items()}
    root = {"width": (14 / 8) ** 0.5, "ffn": (20 / 12) ** 0.5}
    for name, alpha in {
        "self_attn/q/kernel": root["width"],
        "cross_attn/v/kernel": root["width"],
        "self_attn/o/kernel": 1,
        "self_attn/q/bias": 1,
        "self_attn/o/bias": 1,
        "self_attn/q_norm/scale": 1,
        "cross_norm/scale": 1,
        "ffn/in/kernel": root["width"],
        "ffn/out/kernel": root["ffn"],
        "ffn/in/bias": 1,
        "modulation": root["width"],
    }.items():
        np.testing.assert_allclose(got[f"blocks/action/{name}"], alpha, rtol=1e-6, err_msg=name)
    for name, alpha in {
        "text_mlp/in/kernel": 1,
        "text_mlp/out/kernel": root["width"],
        "time_mlp/in/kernel": 1,
        "time_mlp/out/kernel": root["width"],
        "time_proj/kernel": root["width"],
        "time_proj/bias": 1,
    }.items():
        np.testing.assert_allclose(got[f"action/{name}"], alpha, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("old, new", [(3072, 1024), (14336, 4096), (18432, 6144), (5, 9), (4, 1)])
def test_interpolation_at_the_published_widths_is_torchs(old, new):
    x = np.random.default_rng(0).standard_normal((2, old)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x)[None], size=new, mode="linear", align_corners=True
    )[0]
    got = interpolate(x, new, axis=1)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[:, 0], x[:, 0])
    np.testing.assert_array_equal(interpolate(x.T, new, axis=0), got.T)


def test_errors(params):
    with pytest.raises(KeyError, match="blocks_0.*unstack"):
        action_from_video(unstack(params, tiny.LAYERS))
    blocks = params["blocks"]
    fewer = {"video": jax.tree.map(lambda x: x[:1], blocks["video"]), "action": blocks["action"]}
    with pytest.raises(ValueError, match="same number of layers"):
        action_from_video(params | {"blocks": fewer})
