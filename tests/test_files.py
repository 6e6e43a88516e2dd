"""Tests local paths and buckets: the same code, and files are never partial.

The bucket is served locally (`gcs.py`); its clients are the real ones.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import compiler
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from bundle import runs
from data import synthetic
from data import test_latents as latents
from data.ingest import layouts
from PIL import Image

from wamjax import export_policy, files, ingest, locks
from wamjax.bundle import files as bundles
from wamjax.bundle.policy import load_policy
from wamjax.data import tensors
from wamjax.data.embeddings import EmbeddingCache, Settings
from wamjax.data.records import Reader, RecordError, Writer
from wamjax.runs import trained
from wamjax.training import guards, metrics
from wamjax.training.checkpoint import Checkpoints, restore_params
from wamjax.tree import flatten
from wamjax.viz import masks

gcs = pytest.importorskip("gcs")
ROOT = pathlib.Path(toy.__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("gcsfs")
    with gcs.serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.environment(server).items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield server


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """Returns a folder for this test, on disk and in a bucket."""
    if request.param == "disk":
        return files.path(tmp_path)
    request.getfixturevalue("server")
    return files.path(f"gs://{gcs.BUCKET}/{request.node.name}".replace("[bucket]", ""))


def names(folder):
    return [file.name for file in files.glob(folder, "*")]


def test_a_file_is_the_old_one_or_the_new_one(root):
    place = root / "DONE"
    root.mkdir(parents=True, exist_ok=True)
    for mode, old, new in (("w", "old", "néw"), ("wb", b"old", b"new")):
        with files.atomic(place, mode) as file:
            file.write(old)
        with pytest.raises(ZeroDivisionError), files.atomic(place, mode) as file:
            file.write(new)
            file.flush()
            1 / 0  # noqa: B018
        assert place.read_bytes() == b"old" and names(root) == ["DONE"]
        with files.atomic(place, mode) as file:
            file.write(new)
    assert place.read_bytes() == b"new" and names(root) == ["DONE"]
    files.write_text(place, "néw")
    assert place.read_text() == "néw" and files.size(place) == 4


def test_a_folder_appears_only_when_complete(root):
    place = root / "weights"
    with pytest.raises(ZeroDivisionError), files.draft(place, last="about") as draft:
        draft.mkdir()
        (draft / "one").write_text("1")
        1 / 0  # noqa: B018
    assert not place.exists() and names(root) == []
    with files.draft(place, last="about") as draft:
        (draft / "in").mkdir(parents=True)
        (draft / "in" / "one").write_text("1")
        (draft / "about").write_text("2")
    assert (place / "in" / "one").read_text() == "1" and names(place) == ["about", "in"]
    assert files.size(place) == 2
    with pytest.raises(FileExistsError, match="weights exists; remove it"), files.draft(place):
        pass


def test_a_partially_uploaded_folder_does_not_count(server):
    place = files.path(f"gs://{gcs.BUCKET}/broken")

    def send(*names):
        with files.draft(place, last="about") as draft:
            draft.mkdir()
            for name in names:
                (draft / name).write_text("1")

    server.refuse = "/b"
    with pytest.raises(OSError):
        send("a", "b", "about")
    server.refuse = None
    assert server.names("bucket/broken/") == ["bucket/broken/a"]
    assert not files.is_there(place, "about")
    send("c", "about")  # nothing of the first one is left
    assert server.names("bucket/broken/") == ["bucket/broken/about", "bucket/broken/c"]


def test_a_large_file_that_is_interrupted_is_not_seen(server, monkeypatch):
    place = files.path(f"gs://{gcs.BUCKET}/large/one")
    data, copy = np.random.default_rng(0).bytes(9 * 2**20), files.shutil.copyfileobj

    def broken(source, target, length):
        target.write(source.read(6 * 2**20))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "copyfileobj", broken)
        with files.atomic(place, "wb") as file:
            file.write(data)
    assert not place.exists() and files.shutil.copyfileobj is copy
    with files.atomic(place, "wb") as file:
        file.write(data)
    assert server.objects["bucket/large/one"][0] == data


def test_a_journal_grows(root):
    root.mkdir(parents=True, exist_ok=True)
    journal = files.Journal(root / "lines")
    journal.write("a\n")
    journal.flush(must=True)
    assert (root / "lines").read_text() == "a\n"
    journal.write("b\n")
    journal.close()
    again = files.Journal(root / "lines")
    again.write("c\n")
    again.close()
    assert (root / "lines").read_text() == "a\nb\nc\n"


def test_downloads_are_cached_until_they_change(server, capsys):
    place = files.path(f"gs://{gcs.BUCKET}/fetched/x.safetensors")
    tensors.write(place, {"x": np.arange(5)}, {"for": "people"})
    for _ in range(2):
        arrays, said = tensors.read(place)
        assert np.array_equal(arrays["x"], np.arange(5)) and said == {"for": "people"}
    assert capsys.readouterr().err.count(f"fetching {place}") == 1
    tensors.write(place, {"x": np.arange(7)}, {})
    assert np.array_equal(tensors.read(place)[0]["x"], np.arange(7))
    with pytest.raises(FileNotFoundError):
        files.fetch(place.with_name("none"))


def test_demonstrations_in_a_bucket_are_ingested(server, tmp_path, capsys):
    """Copies a folder of demonstrations once, and reads it like a local one."""
    (tmp_path / "here" / "deep").mkdir(parents=True)
    layouts.libero(tmp_path / "here" / "deep" / "lift_demo.hdf5")
    (tmp_path / "here" / "README").write_text("of nothing")
    for file in (f for f in (tmp_path / "here").rglob("*") if f.is_file()):
        name = file.relative_to(tmp_path / "here").as_posix()
        server.put(f"{gcs.BUCKET}/demos/{name}", file.read_bytes())
    outs = {}
    for source in (str(tmp_path / "here"), f"gs://{gcs.BUCKET}/demos", f"gs://{gcs.BUCKET}/demos"):
        out = tmp_path / f"out{len(outs)}"
        with synthetic.command(ingest, f"--source={source}", f"--out={out}"):
            ingest.main([])
        outs[out] = Reader(out)
    told = capsys.readouterr()
    assert (told.out + told.err).count("fetching 2 files") == 1
    one, *others = outs.values()
    for other in others:
        assert other.info == one.info and other.digest("actions") == one.digest("actions") != ""
        assert [list(e.images["agentview_rgb"]) for e in other] == [
            list(e.images["agentview_rgb"]) for e in one
        ]
    server.put(f"{gcs.BUCKET}/demos/README", b"of something")
    assert (files.fetch_all(f"gs://{gcs.BUCKET}/demos") / "README").read_text() == "of something"
    with pytest.raises(FileNotFoundError):
        files.fetch_all(f"gs://{gcs.BUCKET}/nothing")


def test_a_missing_package_or_unreachable_bucket_is_an_error(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    files._prepare_buckets.cache_clear()
    with pytest.raises(files.NotWritable, match=r"--workdir=gs://b/x .*pip install 'wamjax\[gcs\]"):
        files.path("gs://b/x", "--workdir")
    monkeypatch.undo()
    folder = files.path(f"gs://{gcs.BUCKET}/x")
    monkeypatch.setattr(type(folder), "exists", lambda _: (_ for _ in ()).throw(OSError("401")))
    with pytest.raises(files.NotWritable, match=r"cannot reach gs://.*\(401\): log in.*or a fix"):
        files.make_folder(folder, "a fix")


# ---- locks ----


def test_one_process_at_a_time_writes_to_a_bucket(server, monkeypatch, capsys):
    monkeypatch.setattr(locks, "BEAT", 0.2)
    monkeypatch.setattr(locks, "PATIENCE", 20.0)  # a busy machine's heart beats late
    run = files.path(f"gs://{gcs.BUCKET}/locked")
    with guards.alone(run):
        with pytest.raises(guards.Occupied, match="locked is in use: process .* on .*--workdir"):
            with guards.alone(run):
                pass
        # A process that considered this one dead has the lock now.
        taken = threading.Event()
        mine = json.loads((run / ".lock").read_text())
        with locks.hold(run / "other", lambda other: taken.set() or said.append(other)):
            said = []
            other = mine | {"token": "another", "host": "elsewhere"}
            files.write_text(run / "other", json.dumps(other))
            assert taken.wait(20) and said == [f"process {os.getpid()} on elsewhere"]
        assert (run / "other").exists()  # it belongs to the other process
    assert not (run / ".lock").exists()
    with guards.alone(run / "x"):
        pass
    monkeypatch.setattr(locks, "PATIENCE", 1.0)
    # A lock of another machine without a heartbeat, and one of a process here that is gone.
    for dead, patience in (({"host": "elsewhere"}, True), ({"process": 2**22 + 1}, False)):
        files.write_text(run / ".lock", json.dumps(mine | {"token": "dead"} | dead))
        with guards.alone(run):
            assert json.loads((run / ".lock").read_text())["token"] != "dead"
        assert ("gave none: it is dead" in capsys.readouterr().err) == patience


# ---- runs and data in buckets ----


def state_of(workdir):
    """Returns the content of the newest checkpoint: path -> bytes."""
    with Checkpoints(workdir, keep=2) as checkpoints:
        step = checkpoints.latest
        items = dict.fromkeys(("params", "ema", "optimizer"), ocp.args.StandardRestore())
        found = checkpoints._manager.restore(step, args=ocp.args.Composite(**items))
    arrays = {name: flatten(found[name]) for name in items}
    return step, {k: {p: np.asarray(x).tobytes() for p, x in v.items()} for k, v in arrays.items()}


def losses(workdir):
    timing = "step_time", "data_wait", "mfu"
    return [{k: v for k, v in row.items() if k not in timing} for row in metrics.read(workdir)]


def test_a_run_in_a_bucket_is_killed_and_goes_on_bit_for_bit(server, tmp_path, capsys):
    bucket, config = "gs://bucket/runs/one", toy.config(total_steps=6, **{"checkpoint.every": 2})
    env = os.environ | {"XLA_FLAGS": compiler.flags(devices=1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, toy.__file__, bucket, "6", "5", "checkpoint.every=2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = server.names("bucket/runs/one/")
    assert "bucket/runs/one/.lock" in left and "bucket/runs/one/DONE" not in left
    one = {"devices": jax.devices()[:1]}
    assert toy.run(config, bucket, **one)
    said = capsys.readouterr().err
    assert "continuing from checkpoint" in said and "sign of life" not in said
    assert toy.run(config, tmp_path, **one)
    assert losses(bucket) == losses(tmp_path) and len(losses(bucket)) == 6
    want = state_of(tmp_path)
    assert state_of(bucket) == want and want[0] == 6
    assert toy.run(config, bucket, **one)
    assert f"{bucket} is done at step 6" in capsys.readouterr().err
    run = files.path(bucket)
    assert names(run) == ["DONE", "checkpoints", "config.json", "media", "metrics.jsonl"]
    ours, local = restore_params(bucket), restore_params(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, local.params))
    assert Image.open(files.fetch(run / "media" / "losses.png")).size[0] > 100
    table = toy.fast_wam().tables[0]
    masks.save(table, run / "media" / "mask.png")
    assert Image.open(files.fetch(run / "media" / "mask.png")).size[0] > 100
    # A flipped bit: the checkpoint is set aside, and trained again from the one before.
    place = "bucket/runs/one/checkpoints"
    whole = {name.removeprefix(f"{place}/6/") for name in server.names(f"{place}/6/")}
    name = max(server.names(f"{place}/6/optimizer/d/"), key=lambda n: len(server.objects[n][0]))
    data = bytearray(server.objects[name][0])
    data[len(data) // 2] ^= 1
    server.put(name, data)
    (run / "DONE").unlink()
    assert toy.run(config, bucket, **one)
    assert f"checkpoint 6 is set aside as {bucket}" in capsys.readouterr().err
    aside = server.names(f"{place}/damaged-6/")
    assert {name.removeprefix(f"{place}/damaged-6/") for name in aside} == whole
    assert state_of(bucket) == want


def test_a_data_set_is_written_and_read(root):
    path = root / "set"
    with pytest.raises(ZeroDivisionError), Writer(path, synthetic.info(), 1) as writer:
        writer.write(synthetic.episode(0, 4, synthetic.info()))
        writer.write(synthetic.episode(1, 4, synthetic.info()))
        1 / 0  # noqa: B018
    assert names(root) == []
    synthetic.write(path, shard_bytes=5000)
    assert names(root) == ["set"] and not any(n.startswith(".") for n in names(path))
    with pytest.raises(FileExistsError, match="exists already"):
        synthetic.write(path)
    reader = Reader(path)
    assert reader.stored_statistics()["actions"]["count"] == sum(synthetic.LENGTHS)
    for i in (5, 0, 2):
        want = synthetic.episode(i, synthetic.LENGTHS[i], synthetic.info())
        assert np.array_equal(reader[i].proprio, want.proprio) and reader[i].task == want.task
        frames = reader[i].frames("wrist", range(synthetic.LENGTHS[i] + 1))
        assert np.array_equal(frames[-1], synthetic.picture(i, synthetic.LENGTHS[i], "wrist"))
    shard = files.glob(path, "episodes-*")[-1]
    shard.unlink()
    with pytest.raises(RecordError, match=f"{shard}: record 1 .*does not exist"):
        Reader(path)[5]


def test_latents_go_on_where_they_were_interrupted(root, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.2)
    monkeypatch.setattr(locks, "PATIENCE", 1.0)
    demos, out = synthetic.write(tmp_path / "demos"), root / "latents"
    with pytest.raises(KeyboardInterrupt):
        latents.write(demos, out, encode=latents.Counting(fail_at=5), shard_bytes=3000)
    assert not out.exists()
    count = latents.write(demos, out, shard_bytes=3000)
    assert 0 < count < sum(synthetic.LENGTHS) and latents.opened(out).read(2, 4)[0, 0, 0, 1] == 4
    latents.write(demos, tmp_path / "whole", shard_bytes=3000)
    assert latents.contents(files.path(tmp_path / "whole")) == latents.contents(out)
    with pytest.raises(FileExistsError, match="latents exists"):
        latents.write(demos, out)


def test_embeddings_are_kept(root):
    cache = EmbeddingCache.create(root / "texts", Settings("toy", 4))
    cache.add({"lift it": np.ones((2, 8))})
    again = EmbeddingCache(root / "texts")
    assert "lift it" in again and again.lookup("lift it").sum() == 16


def test_a_bundle_is_exported_from_a_run_in_a_bucket_and_loaded(server, tmp_path):
    run, bundle = "gs://bucket/runs/policy", "gs://bucket/bundles/policy"
    runs.save(run, runs.fast_wam(), steps=(3,))
    export_policy.from_run(run, bundle, progress=False)
    with pytest.raises(FileExistsError, match="gs://bucket/bundles/policy exists"):
        export_policy.from_run(run, bundle, progress=False)
    export_policy.from_run(run, tmp_path / "bundle", progress=False)
    assert bundles.read(bundle).to_json() == bundles.read(tmp_path / "bundle").to_json()
    ours, local = (load_policy(b)._acting.params for b in (bundle, tmp_path / "bundle"))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, local))
    assert trained.load(run)[2] == 3
