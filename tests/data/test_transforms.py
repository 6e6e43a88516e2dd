import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic

from wamjax.data.normalize import normalizers
from wamjax.data.records import Reader
from wamjax.data.spec import DataSpec
from wamjax.data.transforms import Composite, sample_transforms
from wamjax.data.windows import Windows


@pytest.fixture
def data(tmp_path):
    reader = Reader(synthetic.write(tmp_path / "a"))
    spec = DataSpec(synthetic.CAMERAS, 3, 2, 4, 3, 2, 8, 10.0, words=("lift", "block", "the"))
    chain = sample_transforms(spec, normalizers(reader.stored_statistics(), "min_max"))
    return spec, chain, Windows(reader, spec)


def test_inverse_undoes_forward(data):
    spec, chain, windows = data
    for i in range(len(windows)):
        window = windows[i]
        model = chain.forward(window)
        assert "images" not in model and model["video"].shape == (3, *spec.composite, 3)
        assert not model["actions"][~window["action_valid"]].any()
        assert model["actions"].dtype == model["proprio"].dtype == np.float32
        assert (model["instruction"] == [1, 3, 2, 0, 0, 0, 0, 0]).all()
        back = chain.inverse(model)
        for camera, pictures in window["images"].items():
            assert np.array_equal(back["images"][camera], pictures)
        np.testing.assert_allclose(back["proprio"], window["proprio"], atol=1e-5)
        valid = window["action_valid"]
        np.testing.assert_allclose(back["actions"][valid], window["actions"][valid], atol=1e-5)


def test_the_same_chain_takes_an_observation_and_a_plan(data):
    _, chain, windows = data
    window = windows[0]
    observation = {
        "images": {k: v[:1] for k, v in window["images"].items()},
        "proprio": window["proprio"],
        "instruction": window["instruction"],
    }
    seen, trained = chain.forward(observation), chain.forward(window)
    assert np.array_equal(seen["video"], trained["video"][:1])
    assert np.array_equal(seen["proprio"], trained["proprio"])
    plan = chain.inverse({"actions": trained["actions"]})
    np.testing.assert_allclose(plan["actions"], window["actions"], atol=1e-5)


def test_composite_works_on_both_kinds_of_arrays_and_under_jit(data):
    spec, _, windows = data
    composite, images = Composite(spec.picture), windows[0]["images"]
    host = composite.forward({"images": images})["video"]
    device = jax.jit(lambda x: composite.forward({"images": x})["video"])(
        {k: jnp.asarray(v) for k, v in images.items()}
    )
    assert isinstance(host, np.ndarray) and np.array_equal(host, device)
    assert (host[..., :6, 2] == 0).all() and (host[..., 6:, 2] == 1).all()


def test_bad_cameras_are_named(data):
    spec, chain, windows = data
    images = windows[0]["images"]
    with pytest.raises(ValueError, match=r"no camera 'wrist'; the cameras are \['top'\]"):
        chain.forward({"images": {"top": images["top"]}})
    with pytest.raises(ValueError, match=r"camera 'top' are \(8, 4, 3\), the spec says"):
        chain.forward({"images": images | {"top": images["top"][..., :4, :]}})
    with pytest.raises(ValueError, match="not equally high.*data.cameras"):
        _ = DataSpec({"a": (4, 4), "b": (5, 4)}, 1, 1, 1, 1, 1, 1, 1.0).composite
