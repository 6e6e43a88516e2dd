import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic

from wamjax.data import normalize
from wamjax.data.records import Reader
from wamjax.data.sources import compute_statistics


def sample(rng, steps=400):
    x = rng.normal(size=(steps, 4)) * [1, 20, 0.01, 1] + [0, 5, 3, 0]
    x[:, 3] = 0.25  # constant
    return x.astype(np.float32)


@pytest.mark.parametrize("mode", normalize.MODES)
def test_inverse_undoes_forward_and_constants_come_back(mode):
    x = sample(np.random.default_rng(0))
    n = normalize.normalizers(normalize.statistics({"actions": [x]}), mode)["actions"]
    z = n.forward(x)
    assert z.dtype == np.float32 and np.abs(z).max() <= normalize.CLIP
    np.testing.assert_allclose(n.inverse(z), x, rtol=1e-5, atol=1e-5)
    assert (z[:, 3] == 0).all()
    # Whatever a policy returns for a constant dimension, the robot gets the constant.
    np.testing.assert_allclose(n.inverse(np.full((1, 4), 7.0, np.float32))[0, 3], 0.25, rtol=1e-6)
    if mode == "min_max":
        np.testing.assert_allclose(z[:, :3].min(0), -1, atol=1e-4)
        np.testing.assert_allclose(z[:, :3].max(0), 1, atol=1e-4)
    elif mode == "mean_std":
        np.testing.assert_allclose(z[:, :3].mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(z[:, :3].std(0), 1, atol=1e-3)
    else:
        np.testing.assert_allclose(np.quantile(z, 0.99, 0)[:3], 1, atol=1e-3)
        assert z[:, 0].max() > 1.05


def test_forward_clamps_and_inverse_does_not():
    x = np.array([[0.0], [2.0]], np.float32)
    n = normalize.normalizers(normalize.statistics({"actions": [x]}), "min_max")["actions"]
    assert n.forward(np.float32([[1e6], [-1e6]])).ravel().tolist() == [5, -5]
    assert n.inverse(np.float32([[9.0]])).item() == pytest.approx(10.0)


def test_a_dimension_that_rarely_moves_is_not_lost_in_quantile_mode():
    x = np.zeros((1000, 1), np.float32)
    x[:5] = 1
    n = normalize.normalizers(normalize.statistics({"actions": [x]}), "quantile")["actions"]
    assert n.forward(x)[[0, -1], 0].tolist() == [1, -1]


def test_it_is_a_pytree_that_gives_the_same_under_jit():
    x = sample(np.random.default_rng(1))
    n = normalize.normalizers(normalize.statistics({"actions": [x]}), "min_max")["actions"]
    jitted = jax.jit(lambda n, x: n.inverse(n.forward(x)))(n, jnp.asarray(x))
    np.testing.assert_allclose(jitted, n.inverse(n.forward(x)), rtol=1e-5, atol=1e-6)
    doubled = jax.tree.map(lambda v: v * 2, n)
    assert doubled.clip == n.clip and (doubled.scale == 2 * n.scale).all()


def test_statistics_are_those_of_numpy_over_everything(tmp_path):
    path = synthetic.write(tmp_path / "a", shard_bytes=3000)
    reader = Reader(path)
    stored = reader.stored_statistics()
    everything = {k: np.concatenate([getattr(e, k) for e in reader]) for k in stored}
    assert set(stored) == {"proprio", "actions"}
    assert len(everything["proprio"]) == sum(synthetic.LENGTHS) + len(synthetic.LENGTHS)
    for key, x in everything.items():
        x = x.astype(np.float64)
        wanted = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
        wanted |= {"q01": np.quantile(x, 0.01, axis=0), "q99": np.quantile(x, 0.99, axis=0)}
        assert stored[key].pop("count") == len(x)
        assert stored[key].pop("digest") == reader.digest(key) != ""
        assert set(stored[key]) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(stored[key][name], value, rtol=1e-12, err_msg=name)
    # Stored and recomputed statistics are equal to the last bit, since a resumed run compares them.
    assert compute_statistics([reader]) == reader.stored_statistics()


def test_statistics_do_not_decode_pixels(tmp_path, monkeypatch):
    reader = Reader(synthetic.write(tmp_path / "a"))
    monkeypatch.setattr("wamjax.data.images.decode", lambda data: 1 / 0)
    assert compute_statistics([reader])["actions"]["count"] == sum(synthetic.LENGTHS)


def test_statistics_are_json_and_bad_modes_are_named():
    rows = normalize.statistics({"a": [np.ones((3, 2), np.float32)]})
    assert json.loads(json.dumps(rows)) == rows
    assert normalize.normalizers({"spec": {"chunk": 4}}, "min_max") == {}  # ignores other keys
    with pytest.raises(ValueError, match="data.normalization = 'minmax' is not one of min_max"):
        normalize.normalizers(rows, "minmax")
    with pytest.raises(ValueError, match="not a single step"):
        normalize.statistics({"a": []})
