import dataclasses
import errno
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import toy
from grain.checkpoint import CheckpointHandler

from wamjax import config as configs
from wamjax import disk
from wamjax.training import checkpoint, optim, sharding
from wamjax.training import state as states
from wamjax.training.checkpoint import Checkpoints, restore_params
from wamjax.training.integrity import Damaged
from wamjax.tree import flatten


def abstract_state(config, sizes=(1, 1, 1)):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    abstract = jax.eval_shape(lambda: states.create(toy.Toy(), optim.make(config), config))
    places = sharding.state_shardings(abstract, abstract.params, mesh)
    return sharding.with_shardings(abstract, places)


def random_state(config, sizes, step, seed=0):
    """Returns a state whose leaves all differ, so that swaps are detected."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        value = rng.normal(size=x.shape) if x.ndim else rng.integers(1, 99)
        return jax.device_put(np.asarray(value, x.dtype), x.sharding)

    state = jax.tree.map(leaf, abstract_state(config, sizes))
    return states.TrainState(**{**vars(state), "step": jax.numpy.asarray(step, "int32")})


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]), err_msg=key)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a run directory with steps 3, 5, 8 saved from a 2x2x2 mesh, two of them kept."""
    workdir, config = tmp_path_factory.mktemp("run"), toy.config()
    data = toy.iterator(8)
    given = {}
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (3, 5, 8):
            given[step] = random_state(config, (2, 2, 2), step, seed=step)
            checkpoints.save(given[step], data, config, toy.STATISTICS)
            given[step, "next"] = next(data)  # after the save has returned, during its writing
    return workdir, config, given


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1), (2, 1, 1), (1, 1, 1)])
def test_restores_exactly_on_another_mesh(saved, sizes):
    workdir, config, given = saved
    abstract, data = abstract_state(config, sizes), toy.iterator(8)
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest == 8
        state = checkpoints.restore(abstract, data)
        assert configs.diff(checkpoints.config(), config) == {}
        assert checkpoints.statistics() == toy.STATISTICS
    assert_same(state, given[8])
    jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(str(a)), state, abstract)
    assert_same(next(data), given[8, "next"])


def test_keeps_the_newest_and_a_saved_step_stays(saved):
    workdir, config, given = saved
    with Checkpoints(workdir, keep=2) as checkpoints:
        other = random_state(config, (2, 2, 2), 8, seed=1)
        checkpoints.save(other, toy.iterator(8), config, {})
    assert sorted(p.name for p in (workdir / checkpoint.FOLDER).iterdir()) == ["5", "8"]
    assert_same(restore_params(workdir, ema=False).params, given[8].params)


def test_restore_params_for_evaluation(saved):
    workdir, config, given = saved
    newest = restore_params(workdir)
    assert newest.step == 8 and newest.statistics == toy.STATISTICS
    assert newest.config.to_dict() == config.to_dict()
    assert_same(newest.params, given[8].ema)  # the run has an average, which acts
    assert_same(restore_params(workdir, step=5, ema=False).params, given[5].params)
    places = jax.tree.map(lambda x: x.sharding, abstract_state(config, (4, 2, 1)).params)
    split = restore_params(workdir, shardings=places).params
    assert_same(split, given[8].ema)
    assert split["action"]["head"]["kernel"].sharding == places["action"]["head"]["kernel"]


def test_errors_of_restore_params(saved, tmp_path):
    workdir = saved[0]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 4; it has \[5, 8\]"):
        restore_params(workdir, step=4)
    with pytest.raises(FileNotFoundError, match="not a run"):
        restore_params(tmp_path / "nothing")
    config = toy.config(**{"optim.ema_decay": 0.0})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = random_state(config, (1, 1, 1), 1)
        checkpoints.save(state, toy.iterator(8), config, {})
    with pytest.raises(ValueError, match="no moving average"):
        restore_params(tmp_path, ema=True)
    assert_same(restore_params(tmp_path).params, state.params)


@pytest.mark.parametrize("part", ["config/metadata", "params/manifest.ocdbt", "params/_METADATA"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, part, capsys):
    run, (_, config, given) = tmp_path / "run", saved
    shutil.copytree(saved[0], run)
    path = run / checkpoint.FOLDER / "8" / part
    path.write_bytes(path.read_bytes()[:5])
    named = "checkpoint 8 in .* cannot be read: it is damaged, or of another version"
    with pytest.raises(Damaged, match=named):  # requested by its number
        restore_params(run, step=8, ema=False)
    assert restore_params(run, ema=False).step == 5
    assert re.search(f"{named}.*Using the one before, checkpoint 5", capsys.readouterr().err)
    assert (run / checkpoint.FOLDER / "8").is_dir()  # reading alone moves nothing
    with Checkpoints(run, keep=2) as checkpoints:
        assert configs.diff(checkpoints.config(), config) == {}
        state, data = checkpoints.restore(abstract_state(config), toy.iterator(8)), toy.iterator(8)
        assert checkpoints.latest == 5
        assert_same(state, given[5])
        said = capsys.readouterr().err
        assert re.search(f"{named}.*Going on from the one before, checkpoint 5", said)
        assert "checkpoint 8 is set aside as" in said and "Event loop" not in said
        checkpoints.save(given[8], data, config, toy.STATISTICS)  # when the run reaches it again
    names = sorted(p.name for p in (run / checkpoint.FOLDER).iterdir())
    assert names == ["5", "8", "damaged-8"]
    assert (run / checkpoint.FOLDER / "damaged-8" / part).stat().st_size == 5
    assert_same(restore_params(run, ema=False).params, given[8].params)


def test_a_damaged_checkpoint_without_an_older_one_is_an_error(saved, tmp_path):
    """The code may be unable to read it, so nothing is moved."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    for step in (5, 8):
        (run / checkpoint.FOLDER / str(step) / "optimizer" / "_METADATA").write_text("{")
    with Checkpoints(run, keep=2) as checkpoints:
        with pytest.raises(Damaged, match=r"checkpoint 5 .* no older one .* newer ones \[8\]"):
            checkpoints.restore(abstract_state(saved[1]), toy.iterator(8))
    assert sorted(p.name for p in (run / checkpoint.FOLDER).iterdir()) == ["5", "8"]


def flipped(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_trained_on(tmp_path, monkeypatch, count):
    """Returns arrays so large that Orbax's own checksums do not cover them."""
    monkeypatch.setattr(toy, "WIDTH", 512)
    config, step = toy.config(), tmp_path / checkpoint.FOLDER / "8"
    state, data = random_state(config, (1, 1, 1), 8), toy.iterator(8)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, data, config, toy.STATISTICS)
    want = {k: np.asarray(v).tobytes() for k, v in flatten(state).items()}
    position, rng, noticed = data.get_state(), np.random.default_rng(0), {}
    arrays = sorted(step.rglob("d/*"))
    plain = [step / item / "metadata" for item in ("config", "statistics", "digests")]
    sizes = np.array([p.stat().st_size for p in arrays])
    paths = [*rng.choice(arrays, count, p=sizes / sizes.sum()), *plain, *step.glob("data/process*")]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        abstract = abstract_state(config)
        for path in paths:
            whole = path.read_bytes()
            flipped(path, int(rng.integers(8 * len(whole))))
            data = toy.iterator(8)
            try:
                read = checkpoints.config(), checkpoints.statistics()
                got = checkpoints.restore(abstract, data)
            except Damaged as error:
                assert str(tmp_path) in str(error)
                noticed[path] = str(error)
            else:
                assert {k: np.asarray(v).tobytes() for k, v in flatten(got).items()} == want
                assert read == (configs.to_json(config), toy.STATISTICS)
                assert data.get_state() == position
            path.write_bytes(whole)
            checkpoints._damaged.clear()
        assert_same(checkpoints.restore(abstract, data), state)
    assert {*plain, *step.glob("data/process*")} <= set(noticed)
    # Detected by the digests alone. The others are in files copied before a step is complete.
    assert sum("is not what was written" in noticed.get(p, "") for p in arrays) >= 2
    for item, ema in (("params", False), ("ema", True)):
        largest = max(step.glob(f"{item}/**/d/*"), key=lambda p: p.stat().st_size)
        whole = largest.read_bytes()
        flipped(largest, 4 * len(whole))
        for read in (restore_params, lambda *a: checkpoint.parameters(*a)[0].verify()):
            with pytest.raises(Damaged, match="checkpoint 8 in .* is damaged: '"):
                read(tmp_path, 8, ema)
        largest.write_bytes(whole)


def test_a_checkpoint_of_orbax_0_11_30_loads(saved, tmp_path):
    """Its metadata do not state whether the arrays use OCDBT."""
    shutil.copytree(saved[0], tmp_path / "run")
    for path in (tmp_path / "run" / checkpoint.FOLDER / "8").glob("*/_METADATA"):
        about = json.loads(path.read_text())
        about.pop("use_ocdbt", None)
        path.write_text(json.dumps(about))
    assert_same(restore_params(tmp_path / "run").params, saved[2][8].ema)


def test_a_checkpoint_of_an_earlier_version_still_loads(saved, tmp_path, capsys):
    """It has no digests, which is reported, and its average includes frozen parameters."""
    config = toy.config(**{"optim.freeze": ("action/encoder/.*",)})
    abstract = abstract_state(config)
    state = random_state(config, (1, 1, 1), 4)
    whole = random_state(toy.config(), (1, 1, 1), 4, seed=1).params
    old = dataclasses.replace(state, ema=whole)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(old, toy.iterator(8), config, toy.STATISTICS)
    shutil.rmtree(tmp_path / checkpoint.FOLDER / "4" / "digests")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        got = checkpoints.restore(abstract, toy.iterator(8))
    trained = {p: x for p, x in flatten(whole).items() if "encoder" not in p}
    assert flatten(abstract.ema).keys() == trained.keys()
    assert_same(got.ema, trained)
    assert_same(got.params, state.params)
    said = capsys.readouterr().err
    assert said.count("checkpoint 4") == said.count("whether it is damaged cannot be told") == 1
    assert_same(restore_params(tmp_path).params, whole)


def test_the_ema_covers_only_trained_parameters(tmp_path):
    config = toy.config(**{"optim.freeze": ("action/encoder/.*",)})
    state = random_state(config, (1, 1, 1), 4)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, toy.iterator(8), config, toy.STATISTICS)
    want = flatten(state.params) | flatten(state.ema)
    assert "action/encoder/kernel" not in flatten(state.ema)
    assert_same(restore_params(tmp_path).params, want)
    assert_same(restore_params(tmp_path, ema=False).params, state.params)
    for ema, values in ((None, want), (True, want), (False, flatten(state.params))):
        stored, step = checkpoint.parameters(tmp_path, ema=ema)
        assert step == 4
        assert_same({p: stored.slice((p, None)).read() for p in stored.shapes}, values)


# ---- a full disk ----


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_one_line_error_and_loses_nothing(saved, tmp_path, monkeypatch, capfd):
    run, (_, config, given) = tmp_path / "run", saved
    shutil.copytree(saved[0], run)
    with pytest.raises(disk.NoRoom) as error:
        with Checkpoints(run, keep=3) as checkpoints:
            monkeypatch.setattr(CheckpointHandler, "save", full)  # in a thread of Orbax
            state = dataclasses.replace(given[8], step=jax.numpy.int32(9))
            checkpoints.save(state, toy.iterator(8), config, toy.STATISTICS)
    said = str(error.value)
    for part in (str(run / checkpoint.FOLDER), "1,732 bytes", " are free", "the same command"):
        assert part in said
    assert "\n" not in said and "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    assert sorted(p.name for p in (run / checkpoint.FOLDER).iterdir()) == ["5", "8"]
    assert_same(restore_params(run, ema=False).params, given[8].params)


@pytest.mark.parametrize("free, text", [
    (1731, r"no room for a checkpoint: it takes 1,732 bytes, and 1,731 bytes are free"),
    (2 * 1732, r"room for 2 more .* 3 are going to be there at once"), (3 * 1732, ""),
])  # fmt: skip
def test_disk_space_is_checked_before_the_first_step(tmp_path, monkeypatch, capsys, free, text):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    abstract = abstract_state(toy.config())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        if free < 1732:
            with pytest.raises(disk.NoRoom, match=text):
                checkpoints.check_room(abstract)
        else:
            checkpoints.check_room(abstract)
            said = capsys.readouterr().err
            assert re.search(text, said) if text else not said


def test_another_number_of_processes_resumes_the_data_position(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    data = tmp_path / "run" / checkpoint.FOLDER / "8" / "data"
    (data / "process_0-of-1.json").rename(data / "process_0-of-2.json")
    shutil.copy(data / "process_0-of-2.json", data / "process_1-of-2.json")
    shutil.rmtree(tmp_path / "run" / checkpoint.FOLDER / "5")  # nothing else to resume from
    iterator = toy.iterator(8)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.restore(abstract_state(saved[1]), iterator)
        assert iterator.get_state() == {"next_index": 2}
        (data / "process_1-of-2.json").write_text('{"next_index": 3}')
        with pytest.raises(ValueError, match="1-of-2.json is damaged"):
            checkpoints.restore(abstract_state(saved[1]), iterator)
        shutil.rmtree(data.parent / "digests")  # as by an earlier version
        with pytest.raises(ValueError, match=r"1-of-2.json is at {'next_index': 3}, .*': 2}, and"):
            checkpoints.restore(abstract_state(saved[1]), iterator)
        (data / "process_1-of-2.json").write_text('{"next_in')
        with pytest.raises(ValueError, match="checkpoint 8 in .* cannot be read"):
            checkpoints.restore(abstract_state(saved[1]), iterator)
        for file in data.glob("process_*"):
            file.unlink()
        with pytest.raises(ValueError, match="holds no position"):
            checkpoints.restore(abstract_state(saved[1]), iterator)


def test_a_model_of_another_shape_is_an_error_naming_the_parameter(saved):
    workdir, config, _ = saved
    abstract = abstract_state(config)
    kernel = abstract.params["action"]["head"]["kernel"]
    abstract.params["action"]["head"]["kernel"] = jax.ShapeDtypeStruct(
        (8, 4), kernel.dtype, sharding=kernel.sharding
    )
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=r"'action/head/kernel' is \(8, 3\) .* \(8, 4\)"):
            checkpoints.restore(abstract, toy.iterator(8))
        del abstract.params["action"]["head"]["kernel"]
        with pytest.raises(ValueError, match="'action/head/kernel' is .* and absent"):
            checkpoints.restore(abstract, toy.iterator(8))


def test_a_half_written_checkpoint_is_ignored(saved):
    workdir = saved[0]
    torn = workdir / checkpoint.FOLDER / "9.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "config").mkdir()
    try:
        assert restore_params(workdir).step == 8
    finally:
        (torn / "config").rmdir()
        torn.rmdir()


def test_only_json_and_arrays_are_stored(saved):
    files = [p for p in saved[0].rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".pkl", ".pickle", ".npy")]
    positions = {p.parent.parent.name: json.loads(p.read_text())
                 for p in files if p.parent.name == "data" and p.suffix == ".json"}  # fmt: skip
    assert positions == {"5": {"next_index": 1}, "8": {"next_index": 2}}
