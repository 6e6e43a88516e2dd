"""The DiT benchmark compares like with like: torch's network is ours, parameter for parameter."""

import jax
import numpy as np
import pytest
from models.helpers import random_params

torch = pytest.importorskip("torch")

from wamjax.bench import dit as bench  # noqa: E402
from wamjax.bench.torch_dit import DiT  # noqa: E402
from wamjax.models import dit  # noqa: E402


def transplant(params, model, layers):
    """Our parameters in the torch model, all of them."""

    def linear(module, p):
        module.weight.data = torch.from_numpy(np.array(p["kernel"]).T.copy())
        module.bias.data = torch.from_numpy(np.array(p["bias"]))

    video, blocks = params["video"], params["blocks"]["video"]
    patch, kernel = model.x_embedder.proj, np.array(video["patch_embed"]["kernel"])
    patch.weight.data = torch.from_numpy(kernel.T.reshape(patch.weight.shape).copy())
    patch.bias.data = torch.from_numpy(np.array(video["patch_embed"]["bias"]))
    linear(model.t_embedder.mlp[0], video["time_mlp"]["in"])
    linear(model.t_embedder.mlp[2], video["time_mlp"]["out"])
    table = model.y_embedder.embedding_table
    table.weight.data = torch.from_numpy(np.array(params["labels"]["embedding"]))
    linear(model.final_layer.linear, video["head"])
    linear(model.final_layer.adaLN_modulation[1], video["head_modulation"])
    for i in range(layers):
        p, block = jax.tree.map(lambda x, i=i: x[i], blocks), model.blocks[i]
        qkv = [p["self_attn"][n] for n in "qkv"]
        joined = {k: np.concatenate([x[k] for x in qkv], axis=-1) for k in ("kernel", "bias")}
        linear(block.attn.qkv, joined)
        linear(block.attn.proj, p["self_attn"]["o"])
        linear(block.mlp.fc1, p["ffn"]["in"])
        linear(block.mlp.fc2, p["ffn"]["out"])
        linear(block.adaLN_modulation[1], p["modulation"])


def test_torch_and_ours_are_the_same_network(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "T", (2, 32, 2))
    objective = bench.objective_of("T/4")
    params = random_params(jax.eval_shape(objective.init, jax.random.key(0)), 3)
    model = DiT(32, 4, 4, 32, 2, 2, bench.CLASSES, 4)
    counts = [sum(np.size(x) for x in jax.tree.leaves(params)),
              sum(p.numel() for p in model.parameters() if p.requires_grad)]  # fmt: skip
    assert counts[0] == counts[1]
    transplant(params, model, 2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 32, 32, 4)).astype(np.float32)
    t, y = np.array([3.0, 870.0], np.float32), np.array([1, 999], np.int32)
    ours = objective.network.apply(
        {"params": params}, {"g0": x[:, None]}, {"g0": t[:, None]}, {"label": y},
        objective.visibility, method="evaluate",
    )["g0"]  # fmt: skip
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t),
                       torch.from_numpy(y).long())  # fmt: skip
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    error = np.linalg.norm(ours[:, 0] - theirs) / np.linalg.norm(theirs)
    assert error < 2e-5, error


def test_a_row_is_ours_over_theirs(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "T", (2, 32, 2))
    monkeypatch.setitem(bench.BATCHES, "T/8", 2)
    report = bench.run(["T/8"], repeats=1)
    assert [r["what"] for r in report["rows"]] == ["forward", "train"]
    for row in report["rows"]:
        assert row["times_faster_than_torch"] == row["torch_seconds"] / row["seconds"]
    forward, train = (r["flops"] for r in report["rows"])
    assert train == 3 * forward
