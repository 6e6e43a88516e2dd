import json
import shutil

import jax
import numpy as np
import pytest
import toy

from wamjax import checkpoint, optim, sharding
from wamjax import config as configs
from wamjax import state as states
from wamjax.checkpoint import Checkpoints, restore_params
from wamjax.tree import flatten


def abstract_state(config, sizes=(1, 1, 1)):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    abstract = jax.eval_shape(lambda: states.create(toy.Toy(), optim.make(config), config))
    places = sharding.state_shardings(abstract, abstract.params, mesh)
    return sharding.with_shardings(abstract, places)


def random_state(config, sizes, step, seed=0):
    """A state whose every leaf is different, so that nothing can be mistaken for anything else."""
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
    """A run directory with steps 3, 5, 8 saved from a 2x2x2 mesh, two of them kept."""
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
    assert_same(newest.params, given[8].ema)  # the run has an average, so that is what acts
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
def test_a_damaged_checkpoint_is_named(saved, tmp_path, part):
    shutil.copytree(saved[0], tmp_path / "run")
    path = tmp_path / "run" / checkpoint.FOLDER / "8" / part
    path.write_bytes(path.read_bytes()[:5])
    named = "checkpoint 8 in .* cannot be read: it is damaged, or of another version"
    with pytest.raises(ValueError, match=named):
        restore_params(tmp_path / "run", ema=False)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        with pytest.raises(ValueError, match=named):
            checkpoints.config()
            checkpoints.restore(abstract_state(saved[1]), toy.iterator(8))
    shutil.rmtree(tmp_path / "run" / checkpoint.FOLDER / "8")
    assert restore_params(tmp_path / "run", ema=False).step == 5


def test_another_number_of_processes_goes_on_from_the_position_of_all(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    data = tmp_path / "run" / checkpoint.FOLDER / "8" / "data"
    (data / "process_0-of-1.json").rename(data / "process_0-of-2.json")
    shutil.copy(data / "process_0-of-2.json", data / "process_1-of-2.json")
    iterator = toy.iterator(8)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.restore(abstract_state(saved[1]), iterator)
        assert iterator.get_state() == {"next_index": 2}
        (data / "process_1-of-2.json").write_text('{"next_index": 3}')
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
