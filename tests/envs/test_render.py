"""Tests that the cameras show things in the right places, down to fractions of a pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.tabletop import CAMERAS, Shift, composite, observe, render, render_episodes, reset
from wamjax.envs.tabletop import world as w

# `tabletop.render` is the function; its module is only needed for the scale of the cameras.
OVERHEAD_HALF, GRIPPER_HALF, SIZE = 1.1, 0.4, 64
NONE = Shift.none()
picture, start = jax.jit(render), jax.jit(reset)


def scene(**changes):
    state = start(jax.random.key(4), 0, NONE)
    zones = jnp.array([[-0.5, 0.6], [0.5, 0.6]])
    blocks = jnp.array([[-0.5, -0.5], [0.1, -0.5], [0.6, -0.2], [9.0, 9.0], [9.0, 9.0]])
    state = state._replace(blocks=blocks, zones=zones, gripper=jnp.array([0.0, 0.1, 0.5]))
    return state._replace(**changes)


def pixel_at(image, xy, centre=(0.0, 0.0), half=OVERHEAD_HALF):
    column = int((xy[0] - centre[0] + half) / (2 * half) * SIZE)
    row = int((centre[1] + half - xy[1]) / (2 * half) * SIZE)
    return np.asarray(image[row, column]).astype(int)


def redness(image):
    """Returns the red block's centre of mass (column, row); table and zones are far less red."""
    image = np.asarray(image).astype(float)
    weight = np.clip(image[..., 0] - image[..., 1:].max(-1) - 6, 0, None)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def test_views_are_uint8_and_side_by_side():
    images = picture(scene(), NONE)
    assert {name: image.shape[:2] for name, image in images.items()} == CAMERAS
    assert all(image.dtype == jnp.uint8 for image in images.values())
    both = composite({name: np.asarray(image) for name, image in images.items()})
    np.testing.assert_array_equal(both[:, :64], images["overhead"])
    np.testing.assert_array_equal(both[:, 64:], images["gripper"])
    observation = jax.jit(observe)(scene(), NONE)
    assert observation["proprio"].shape == (w.PROPRIO_DIM,)


def test_blocks_are_where_they_are_in_their_colour():
    state = scene()
    image = picture(state, NONE)["overhead"]
    for block, channel in ((0, 0), (1, 2), (2, 1)):
        r_g_b = pixel_at(image, state.blocks[block])
        assert r_g_b[channel] > 130 and r_g_b[channel] - np.delete(r_g_b, channel).max() > 80
    table = pixel_at(image, (-0.8, 0.0))
    assert table.min() > 180 and np.ptp(table) < 30


def test_yellow_zone_is_on_the_side_that_the_state_says():
    for yellow in (0, 1):
        state = scene(yellow=jnp.asarray(yellow))
        image = picture(state, NONE)["overhead"]
        is_yellow = [pixel_at(image, zone)[2] < 100 for zone in state.zones]
        assert is_yellow == [yellow == 0, yellow == 1]


def test_a_tenth_of_a_pixel_shows():
    shift = 0.1 * 2 * OVERHEAD_HALF / SIZE
    state = scene(zones=jnp.full((2, 2), 9.0))
    moved = state._replace(blocks=state.blocks.at[0].add(jnp.array([shift, -2 * shift])))
    step = redness(picture(moved, NONE)["overhead"]) - redness(picture(state, NONE)["overhead"])
    np.testing.assert_allclose(step, [0.1, 0.2], atol=0.02)


def test_gripper_camera_moves_with_the_gripper():
    for xy in ((-0.25, -0.3), (-0.75, -0.7)):
        state = scene(gripper=jnp.array([*xy, 0.9]))
        image = picture(state, NONE)["gripper"]
        expected = (np.array([-0.5, -0.5]) - xy) / (2 * GRIPPER_HALF) * SIZE * [1, -1] + SIZE / 2
        np.testing.assert_allclose(redness(image), expected - 0.5, atol=0.3)
    # its picture depends only on positions relative to it
    offset = jnp.array([0.1, -0.1])
    state = scene(gripper=jnp.array([-0.4, -0.4, 0.5]))
    together = state._replace(
        gripper=state.gripper.at[:2].add(offset),
        blocks=state.blocks + offset,
        zones=state.zones + offset,
    )
    difference = picture(state, NONE)["gripper"].astype(int) - picture(together, NONE)["gripper"]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"gripper": jnp.array([0.0, 0.1, 0.4])},
        {"opening": jnp.asarray(0.5)},
        {"held": jnp.asarray(0), "blocks": jnp.array([[0.0, 0.1]] + [[9.0, 9.0]] * 4)},
    ],
    ids=["height", "opening", "held"],
)
def test_both_cameras_see(change):
    before, after = picture(scene(), NONE), picture(scene(**change), NONE)
    for camera in CAMERAS:
        difference = np.abs(before[camera].astype(int) - after[camera].astype(int))
        assert difference.max() > 40, camera


def test_absent_blocks_leave_no_trace():
    elsewhere = scene().blocks.at[3:].set(-7.0)
    for camera, image in picture(scene(), NONE).items():
        np.testing.assert_array_equal(image, picture(scene(blocks=elsewhere), NONE)[camera])


def test_batched_frames_are_the_single_frames():
    states = jax.tree.map(lambda x: np.stack([np.stack([x, x])] * 3), scene())
    states.gripper[1, 1, 0] = 0.3
    frames = render_episodes(states, NONE)
    assert frames["overhead"].shape == (3, 2, 64, 64, 3)
    single = picture(jax.tree.map(lambda x: x[1, 1], states), NONE)
    for camera, image in single.items():
        difference = frames[camera][1, 1].astype(int) - image.astype(int)
        assert np.abs(difference).max() <= 1
