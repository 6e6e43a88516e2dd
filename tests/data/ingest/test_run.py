"""Tests parallel conversion, resuming, bad files and custom formats."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from data.ingest import layouts
from data.ingest.test_hdf5 import ingest

from wamjax.data.ingest import guess, reader
from wamjax.data.ingest.reader import SourceError
from wamjax.data.records import Reader


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "ingest.json"}


def test_the_number_of_processes_changes_nothing(tmp_path):
    layouts.lerobot_v30(tmp_path / "in")
    ingest(tmp_path / "in", tmp_path / "one", "lerobot")
    ingest(tmp_path / "in", tmp_path / "two", "lerobot", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "one", "two"]


def test_a_corrupt_file_is_reported_counted_and_skipped(tmp_path):
    for i in range(3):
        layouts.libero(tmp_path / f"{i}_demo.hdf5", seed=10 * i)
    (tmp_path / "1_demo.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(SourceError, match=r"1_demo.hdf5 cannot be read: .*--skip_bad=1"):
        ingest(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report, episodes = ingest(tmp_path, tmp_path / "out", skip_bad=1)
    assert len(episodes) == 4 and list(report["bad"]) == ["1_demo.hdf5"]


def test_non_finite_numbers_make_an_episode_bad(tmp_path):
    import h5py

    layouts.libero(tmp_path / "a_demo.hdf5")
    with h5py.File(tmp_path / "a_demo.hdf5", "a") as file:
        file["data/demo_1/actions"][4, 2] = np.nan
    with pytest.raises(SourceError, match=r"a_demo.hdf5:demo_1\): actions holds non-finite"):
        ingest(tmp_path, tmp_path / "out", workers=2)


# Stops when it converts the fourth episode, so that a test can kill it there.
SLOW = '''
"""Slow."""
import collections, pathlib, time
from wamjax.data.ingest.formats import libero

def open(source, stop=""):
    reader, reads = libero.open(source), collections.Counter()
    inner = reader.arrays

    def arrays(i):
        reads[i] += 1
        if stop and (i, reads[i]) == (3, 2):  # once all numbers have been looked at
            pathlib.Path(stop).touch()
            time.sleep(60)
        return inner(i)

    reader.arrays = arrays
    return reader
'''


def test_a_killed_conversion_resumes(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "slow.py").write_text(SLOW)
    file, mark = tmp_path / "a_demo.hdf5", tmp_path / "mark"
    truth = layouts.libero(file, lengths=(5, 6, 7, 8, 9))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    args = [sys.executable, "-m", "wamjax.ingest", "--format=mine.slow", f"--source={file}",
            f"--out={tmp_path / 'out'}", f"--option=stop={mark}"]  # fmt: skip
    process = subprocess.Popen(args, env=os.environ | {"PYTHONPATH": path})
    try:
        for _ in range(600):
            if mark.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert mark.exists() and not (tmp_path / "out").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    parts = sorted((tmp_path / ".out.ingest").glob("*.part"))
    assert [p.stem for p in parts] == ["0000000", "0000001", "0000002"]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    report, episodes = ingest(file, tmp_path / "out", "mine.slow", {"stop": str(mark)})
    assert "continuing: 3 episodes are done" in capsys.readouterr().err
    assert report["episodes"] == 5
    for episode, (actions, _, _) in zip(episodes, truth, strict=True):
        assert np.array_equal(episode.actions, actions.astype(np.float32))
    assert not (tmp_path / ".out.ingest").exists()


def test_other_settings_start_over(tmp_path, capsys):
    file = tmp_path / "a_demo.hdf5"
    layouts.libero(file)
    folder = tmp_path / ".out.ingest"
    folder.mkdir()
    (folder / "digest").write_text("other")
    (folder / "0000000.part").write_bytes(b"of other settings")
    ingest(file, tmp_path / "out")
    assert "starting over" in capsys.readouterr().err and len(Reader(tmp_path / "out")) == 2
    with pytest.raises(FileExistsError, match="exists already"):
        ingest(file, tmp_path / "out")


def test_unknown_formats_and_options_are_errors(tmp_path):
    layouts.libero(tmp_path / "a_demo.hdf5")
    with pytest.raises(ValueError, match="no such format, did you mean 'libero'"):
        ingest(tmp_path, tmp_path / "out", "libro")
    with pytest.raises(ValueError, match="no such option, did you mean 'flip'"):
        ingest(tmp_path, tmp_path / "out", options={"flap": "yes"})
    with pytest.raises(FileNotFoundError):
        ingest(pathlib.Path("nowhere"), tmp_path / "out")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    layouts.libero(tmp_path / "a_demo.hdf5")
    for name in [n for n in sys.modules if n.startswith("wamjax.data.ingest.formats.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("demos", "hdf5"):
        monkeypatch.delitem(sys.modules, f"wamjax.data.ingest.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py: pip install 'wamjax\[ingest\]'"):
        ingest(tmp_path, tmp_path / "out")
    assert "libero" in reader.formats()  # listed nevertheless


def test_a_source_without_pictures_of_one_size_says_so(tmp_path):
    layouts.libero(tmp_path / "a_demo.hdf5")
    import h5py

    with h5py.File(tmp_path / "a_demo.hdf5", "a") as file:
        obs = file["data/demo_1/obs"]
        small = obs.pop("agentview_rgb")[:, ::2, ::2]
        obs["agentview_rgb"] = small
    with pytest.raises(SourceError, match=r"is \(8, 12\), others are \(16, 24\): give --resize"):
        ingest(tmp_path, tmp_path / "out")
    assert len(ingest(tmp_path, tmp_path / "out", resize=(16, 16))[1]) == 2


def test_every_format_is_guessed_by_what_is_in_it(tmp_path):
    layouts.libero(tmp_path / "l_demo.hdf5")
    layouts.robomimic(tmp_path / "r.hdf5")
    layouts.aloha(tmp_path / "aloha", count=1)
    layouts.lerobot_v21(tmp_path / "v21", lengths=(3,))
    layouts.rlds_libero(tmp_path / "rlds")
    layouts.rlds_droid(tmp_path / "droid", ("/success/a",))
    for name, format in {"l_demo.hdf5": "libero", "r.hdf5": "robomimic", "aloha": "aloha",
                         "v21": "lerobot", "rlds": "rlds", "droid": "droid"}.items():  # fmt: skip
        assert guess.guess(tmp_path / name) == format
    (tmp_path / "empty").mkdir()
    assert guess.guess(tmp_path / "empty") == ""


def test_a_config_that_names_foreign_files_is_an_error_with_advice(tmp_path):
    layouts.lerobot_v21(tmp_path / "v21", lengths=(3,))
    with pytest.raises(FileNotFoundError, match="looks like lerobot.*wamjax.ingest --format=lerob"):
        Reader(tmp_path / "v21")
    with pytest.raises(FileNotFoundError, match="wamjax.collect --out="):
        Reader(tmp_path / "nowhere")
