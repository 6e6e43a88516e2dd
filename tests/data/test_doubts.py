"""Tests warnings about normalisation, rates and words, by doctor, stats and train."""

import dataclasses

import numpy as np
import pytest
from data import synthetic

from wamjax import stats
from wamjax.data import checks, embeddings, normalize, pipeline, stand_in
from wamjax.data.records import Writer
from wamjax.data.sources import open_sources

TEXTS = (
    "pick up the small red cube and put it into the upper drawer",
    "pick up the small red cube and put it into the lower drawer",
    "lift the cube",
)


def write(path, change, count=4, length=40, **of):
    of = synthetic.info(**of)
    with Writer(path, of) as writer:
        for i in range(count):
            episode = synthetic.episode(i, length, of)
            writer.write(dataclasses.replace(episode, **change(i, episode)))
    return path


def turns(number, episode):
    """Returns actions that are small except for one step per episode."""
    actions = np.random.default_rng(number).normal(size=(episode.length, 2)) * [0.3, 1e-3]
    actions[7, 1] = 1.0
    return {"actions": actions.astype(np.float32)}


def test_rare_values_that_clipping_loses_are_named_in_every_way_of_training(tmp_path, capsys):
    path = write(tmp_path / "a", turns, length=200, action_names=("dx", "drz"))
    config = synthetic.config(tmp_path, a={"path": "a"})
    _, statistics, sources = open_sources(config.data)
    assert normalize.lost(statistics, "min_max") == []
    for mode, back in {"quantile": 0.02, "mean_std": 0.5}.items():
        (line,) = (x for x in checks.lost(sources, statistics, mode) if "drz" in x)
        assert line.startswith("actions[1] (drz) reaches 1, and comes back as 0.") and mode in line
        found = [x for x in normalize.lost(statistics, mode) if x[:2] == ("actions", 1)]
        assert found[0][3] < back
        config.data.normalization = mode
        pipeline.open_data(config)
        assert f"warning: {line}" in capsys.readouterr().err
    with synthetic.command(stats, f"--data={path}"):
        stats.main(["stats"])
    assert "warning: actions[1] (drz) reaches 1" in capsys.readouterr().out


@pytest.mark.parametrize("mode", normalize.MODES)
def test_dimensions_without_a_warning_survive_a_round_trip(mode):
    rng = np.random.default_rng(0)
    rare = rng.random((4000, 4)) < 0.006
    rare[:, 0] = False
    x = np.where(rare, [1, 1, 1, 0.5], rng.normal(size=(4000, 4)) * [0.3, 1e-3, 0, 1e-4])
    x = x.astype(np.float32)
    statistics = normalize.statistics({"actions": [x]})
    n = normalize.normalizers(statistics, mode)["actions"]
    gone = np.abs(n.inverse(n.forward(x)) - x).max(axis=0) > normalize.LOSS * np.ptp(x, axis=0)
    assert np.flatnonzero(gone).tolist() == [i for _, i, *_ in normalize.lost(statistics, mode)]
    assert gone.any() == (mode != "min_max")


def test_a_source_that_moves_twice_as_far_in_a_step_has_another_rate(tmp_path):
    def walk(number, episode):
        rng = np.random.default_rng(number)
        speed = np.repeat(rng.normal(size=(8, 3)), 10, axis=0)
        return {"proprio": np.cumsum(np.pad(speed, ((1, 0), (0, 0))), 0).astype(np.float32)}

    def half(number, episode):
        return {"proprio": walk(number, None)["proprio"][::2]}

    write(tmp_path / "fast", walk, length=80)
    write(tmp_path / "same", lambda i, e: walk(i + 4, e), length=80)
    write(tmp_path / "slow", half, length=40)
    config = synthetic.config(tmp_path, a={"path": "fast"}, b={"path": "same"})
    assert checks.rates(open_sources(config.data)[2]) == []
    config = synthetic.config(tmp_path, a={"path": "fast"}, b={"path": "slow"})
    (line,) = checks.rates(open_sources(config.data)[2])
    assert "sources.b" in line and "moves 2 times as far" in line and "10 Hz" in line


def test_instructions_that_the_tokeniser_cannot_tell_apart_are_named(tmp_path):
    texts = ("Lift it", "lift it!", "举起", "lower it")
    write(tmp_path / "a", lambda i, e: {"instruction": texts[i]})
    config = synthetic.config(tmp_path, a={"path": "a"})
    spec, statistics, sources = open_sources(config.data)
    same, blank = checks.alike(sources, 8, spec.vocabulary)
    assert "['Lift it', 'lift it!'] are the same" in same
    assert "['举起'] have no word" in blank
    assert {same, blank} <= set(pipeline.doubts(config, spec, statistics, sources))


def test_embeddings_that_were_cut_are_named_and_those_that_are_equal(tmp_path, capsys):
    file = tmp_path / "texts"
    file.write_text("\n".join(TEXTS))
    for length in (8, 15):
        path = tmp_path / str(length)
        arguments = (f"--cache={path}", f"--instructions={file}", "--encoder=stand-in",
                     f"--length={length}", f"--encode={stand_in.__name__}:text_encoder",
                     "--weights=8")  # fmt: skip
        with synthetic.command(embeddings, *arguments):
            embeddings.main(["embeddings"])
        said = capsys.readouterr().out
        upper, lower, _ = map(repr, TEXTS)
        assert (f"2 instructions fill all 8 rows and were probably cut: {upper}" in said) == (
            length == 8
        )
        assert (f"{upper}, {lower} have the same embedding" in said) == (length == 8)
        write(tmp_path / f"data{length}", lambda i, e: {"instruction": TEXTS[i % 3]})
        config = synthetic.config(tmp_path, a={"path": f"data{length}"})
        config.model.text.kind, config.data.embeddings = "context", str(path)
        config.data.instruction_length, config.model.context_width = length, 8
        spec, statistics, sources = open_sources(config.data, words=False)
        lines = pipeline.doubts(config, spec, statistics, sources)
        for words in ("same embedding", "probably cut"):
            assert any(words in line for line in lines) == (length == 8)
