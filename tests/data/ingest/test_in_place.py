"""Compares a foreign source read in place with the data set converted from it."""

import gc
import pickle

import h5py
import jax
import numpy as np
import pytest
from data import synthetic
from data.ingest import layouts

from wamjax import export_policy
from wamjax.data import pipeline
from wamjax.data.ingest import run
from wamjax.data.shards import RecordError
from wamjax.data.sources import missing, open_sources


def opened(root, path, **changes):
    config = synthetic.config(root, demos={"path": path} | changes)
    config.data.cameras = ()
    return config, *open_sources(config.data)


def test_windows_read_in_place_equal_those_of_the_converted_data_set(tmp_path):
    layouts.libero(tmp_path / "a_demo.hdf5")
    run.ingest("libero", tmp_path / "a_demo.hdf5", tmp_path / "made", progress=False)
    config, spec, statistics, (source,) = opened(tmp_path, "libero:a_demo.hdf5")
    made, said, stored, (other,) = opened(tmp_path, "made")
    assert spec == said and source.reader.info == other.reader.info
    for key in ("instructions", "lengths", "tasks", "success"):
        assert list(source.reader.index[key]) == list(other.reader.index[key])
    for key in ("proprio", "actions"):
        for name in ("min", "max", "mean", "digest"):
            np.testing.assert_array_equal(statistics[key][name], stored[key][name])
    ours, theirs = (pipeline.batches(c, spec, statistics, [s])
                    for c, s in ((config, source), (made, other)))  # fmt: skip
    for i in range(6):
        jax.tree.map(np.testing.assert_array_equal, ours[i], theirs[i])
    reader = pickle.loads(pickle.dumps(source.reader))
    stored = pickle.loads(pickle.dumps(other.reader))
    (camera, *_), at = spec.cameras, [3, 0, 3]
    np.testing.assert_array_equal(reader[1].frames(camera, at), stored[1].frames(camera, at))
    assert missing(config.data) == {}


def test_a_bundle_gets_its_names_of_dimensions_from_the_source(tmp_path, monkeypatch):
    layouts.libero(tmp_path / "a_demo.hdf5")
    config, _, _, (source,) = opened(tmp_path, "libero:a_demo.hdf5")
    names = export_policy._said(config.data)
    assert names["action_names"] == [tuple(source.reader.info.action_names)] != [()]
    assert names["proprio_names"] == [tuple(source.reader.info.proprio_names)]
    said = []
    monkeypatch.setattr(export_policy, "say", said.append)
    (tmp_path / "a_demo.hdf5").unlink()
    assert export_policy._said(config.data) == {"action_names": [], "proprio_names": []}
    assert "libero:a_demo.hdf5" in said[0] and "--action_names" in said[0]


def test_sources_that_cannot_be_read_in_place_are_errors(tmp_path):
    layouts.libero(tmp_path / "a_demo.hdf5")
    with pytest.raises(FileNotFoundError, match="gone.hdf5"):
        opened(tmp_path, "libero:gone.hdf5")
    with pytest.raises(ValueError, match="libero:.* has 2 episodes, so it cannot give 3"):
        opened(tmp_path, "libero:a_demo.hdf5", episodes=3)
    config = synthetic.config(tmp_path, demos={"path": "libero:a_demo.hdf5"})
    with pytest.raises(ValueError, match="is read in place, and .*'cached' needs latents"):
        open_sources(config.data, cached=True)
    gc.collect()  # sources that were refused keep their files open until then
    with h5py.File(tmp_path / "a_demo.hdf5", "a") as file:
        file["data/demo_1/actions"][3] = np.nan
    with pytest.raises(RecordError, match="demo_1.*actions holds non-finite numbers.*skip_bad"):
        opened(tmp_path, "libero:a_demo.hdf5")
    layouts.libero(tmp_path / "b_demo.hdf5")
    with h5py.File(tmp_path / "b_demo.hdf5", "a") as file:
        del file["data/demo_1/actions"]
    with pytest.raises(ValueError, match=r"demo_1.*\(1 bad episodes, more than .*skip_bad = 0"):
        opened(tmp_path, "libero:b_demo.hdf5")
