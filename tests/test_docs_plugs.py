"""Tests docs/plugs.md: each block is a module that works as described."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_configs import get, spec_of
from test_docs_site import DOCS, FENCE

from wamjax import tree, wam
from wamjax.envs.world import World, open_world
from wamjax.models import attention
from wamjax.models.visibility import causal
from wamjax.training import sharding
from wamjax.weights import families


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Loads the titled blocks as modules of that name."""
    for kind, more, code in FENCE.findall((DOCS / "plugs.md").read_text()):
        if kind == "python":
            (tmp_path / re.search(r'title="(\w+\.py)"', more)[1]).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_method_is_built_trained_and_acts(modules):
    config = get("quickstart")
    config.objective.name = "my_method:METHOD"
    objective = wam.build(config, spec_of(config))
    params = objective.init(jax.random.key(0))
    mesh = sharding.Shape({"data": 1, "fsdp": 1, "tensor": 1})
    for path, x in tree.flatten(params).items():
        sharding.spec_of(path, x.shape, mesh)
    batch = {k: jnp.ones(s.shape, s.dtype) for k, s in objective.batch_spec(2).items()}
    losses = []
    for _ in range(3):
        loss, gradient = jax.value_and_grad(lambda p: objective.loss(p, batch, None)[0])(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]

    class Same:
        forward = inverse = staticmethod(lambda x: x)

    actions = objective.policy(params, {"proprio": Same, "actions": Same}, batch, None)
    assert actions.shape == batch["actions"].shape


def test_the_world_opens_and_its_expert_reaches_the_goal(modules):
    world = open_world("my_world:world")
    assert isinstance(world, World) and world.expert
    import my_world

    line = my_world.Line()
    seen, achieved = line.reset("right", 0, {}), False
    for _ in range(world.max_steps):
        assert seen["images"]["side"].shape == (*world.cameras["side"], 3)
        seen, achieved = line.step(line.intend())
        if achieved:
            break
    assert achieved


def test_the_kernel_computes_attention(modules):
    rng = np.random.default_rng(0)
    q, k, v = ({g: rng.standard_normal((1, 2, n, 8)).astype(np.float32)
                for g, n in (("a", 3), ("b", 5))} for _ in range(3))  # fmt: skip
    got = attention.named("my_kernel:kernel")(q, k, v, visibility=causal("a", "b"))
    want = attention.masked(q, k, v, causal("a", "b"))
    for group in q:
        np.testing.assert_allclose(got[group], want[group], atol=1e-6)


def test_the_backbone_has_a_row_for_every_key_of_its_files(modules):
    family = families.family("my_backbone:BACKBONE")
    sizes = family.rows_of(family.sizes)
    mine = family.layouts["mine"].rows(sizes)
    theirs = families.FAMILIES["dit"].layouts["official"].rows(sizes)
    assert [row.theirs for row in mine] == [f"net.{row.theirs}" for row in theirs]
