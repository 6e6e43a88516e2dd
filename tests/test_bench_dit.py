"""Tests that the DiT benchmark compares equal networks, with the same names in torch."""

import functools

import jax
import numpy as np
import pytest
from models import dit_names

torch = pytest.importorskip("torch")

from wamjax import hardware  # noqa: E402
from wamjax.bench import dit as bench  # noqa: E402
from wamjax.bench.torch_dit import DiT  # noqa: E402
from wamjax.models import dit  # noqa: E402


def test_torch_and_ours_are_the_same_network(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "T", (2, 32, 2))
    objective = bench.objective_of("T/4")
    model = DiT(32, 4, 4, 32, 2, 2, bench.CLASSES, 4)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    params = dit_names.official(trained, 2)
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(objective.init, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == shapes
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 32, 32, 4)).astype(np.float32)
    t, y = np.array([3.0, 870.0], np.float32), np.array([1, 999], np.int32)
    ours = jax.jit(lambda params: objective.network.apply(
        {"params": params}, {"g0": x[:, None]}, {"g0": t[:, None]}, {"label": y},
        objective.use.table, method="evaluate",
    )["g0"])(params)  # fmt: skip
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t),
                       torch.from_numpy(y).long())  # fmt: skip
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    error = np.linalg.norm(ours[:, 0] - theirs) / np.linalg.norm(theirs)
    assert error < 2e-5, error


def test_a_row_is_ours_over_theirs(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "T", (2, 32, 2))
    monkeypatch.setitem(bench.BATCHES, "T/8", 2)
    rate = functools.partial(hardware.measure_matmul_rate, n=64)
    monkeypatch.setattr(hardware, "measure_matmul_rate", lambda seconds: rate(seconds=0.01))
    report = bench.run(["T/8"], repeats=1)
    assert [r["what"] for r in report["rows"]] == ["forward", "train"]
    for row in report["rows"]:
        assert row["times_faster_than_torch"] == row["torch_seconds"] / row["seconds"]
    forward, train = (r["flops"] for r in report["rows"])
    # Patches and timesteps need no gradient.
    assert train == 3 * forward - 2 * 2 * (16 * 8 * 8 * 4 * 32 + 256 * 32)
