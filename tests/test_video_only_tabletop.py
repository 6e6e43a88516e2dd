"""Tests the study of tasks that are seen in videos alone: its data, world and table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic
from test_configs import get
from test_denoising_runs import study

from wamjax.envs import tabletop
from wamjax.envs.tabletop import LABELLED, TASKS, VIDEO_ONLY
from wamjax.envs.world import open_world


@pytest.fixture
def video_only():
    module = study("video_only_tabletop")
    with synthetic.command(module):
        yield module


def test_the_world_has_the_tasks_of_both_groups_and_the_tabletop_does_not():
    world = open_world("recombined")
    assert tuple(world.tasks) == (*LABELLED, *VIDEO_ONLY)
    assert not set(VIDEO_ONLY) & set(TASKS) and set(LABELLED) <= set(TASKS)
    known = {word for task in LABELLED for word in tabletop.instruction(task).split()}
    for task in VIDEO_ONLY:
        sentence = tabletop.instruction(task)
        assert set(sentence.split()) <= known
        assert sentence not in {tabletop.instruction(other) for other in LABELLED}


def test_the_expert_achieves_the_tasks_without_actions():
    ids = jnp.asarray(np.resize([tabletop.task_id(task) for task in VIDEO_ONLY], 60))
    done = tabletop.expert_episodes(jax.random.split(jax.random.key(5), 60), ids, 0.1)
    rates = np.asarray(done.success).reshape(-1, len(VIDEO_ONLY)).mean(0)
    assert (rates >= 0.95).all(), dict(zip(VIDEO_ONLY, rates, strict=True))


def test_only_videos_show_the_three_tasks(video_only):
    for kind, arg in video_only.KINDS.items():
        config = get("recombined_tabletop", arg)
        sources = config.data.sources
        assert set(sources.demos.collect.tasks) == set(LABELLED) and not sources.demos.action_free
        assert ("videos" in sources) == (kind != "no_cotrain")
        if "videos" in sources:
            known = kind == "fast, five"
            assert sources.videos.action_free
            assert set(sources.videos.collect.tasks) - set(LABELLED) == set(
                () if known else VIDEO_ONLY
            )
        assert config.eval.tasks == VIDEO_ONLY


def test_table(video_only, tmp_path):
    assert video_only.table(tmp_path) == "no run has been measured yet"

    def measured(run, rows):
        (tmp_path / run).mkdir()
        tasks = {name: {
            "episodes": 1600,
            "per_task": {t: {"success_rate": known} for t in LABELLED}
            | {t: {"success_rate": rate} for t, rate in zip(VIDEO_ONLY, unknown, strict=True)},
        } for name, (known, unknown) in rows.items()}  # fmt: skip
        (tmp_path / run / "ways.json").write_text(json.dumps(tasks))

    measured("no_cotrain-0", {"no_cotrain": (0.9, (0.0, 0.1, 0.2))})
    measured("fast_five-0", {"fast": (0.8, (0.1, 0.1, 0.1))})
    measured("optional_idm-0", {
        "optional_idm, direct": (0.7, (0.4, 0.4, 0.4)),
        "optional_idm, imagine": (0.6, (0.7, 0.7, 0.4)),
    })  # fmt: skip
    head, _, none, five, direct, imagine, *_ = (
        [c.strip() for c in line.split("|")[1:-1]]
        for line in video_only.table(tmp_path).splitlines()
    )
    assert head[:3] == ["policy", "tasks with actions", "video only"]
    assert none[1].startswith("90.0 [") and none[2].startswith("10.0 [")
    assert [five[0], *five[-2:]] == ["fast, five", "0.0", "-"]
    assert [direct[0], *direct[-2:]] == ["optional_idm, direct", "30.0", "30.0"]
    assert [imagine[0], imagine[2].split()[0]] == ["optional_idm, imagine", "60.0"]
    assert none[-2] == "-" and (tmp_path / "table.json").exists()
