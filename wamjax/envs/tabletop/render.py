"""Renders the two cameras: 64x64 uint8 pictures of a state, drawn analytically with smooth edges.

Every shape is a coverage (how much of each pixel it fills, from its exact position) painted over
the picture so far, so that a motion of a tenth of a pixel shows. Height shows in three ways: a
shadow that moves away, a gripper and a held block that grow as they come nearer to the camera, and
a gripper that turns lighter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from wamjax.envs.tabletop.shifts import Shift
from wamjax.envs.tabletop.tasks import NUM_TINTS, ZONE_SIZE
from wamjax.envs.tabletop.world import BLOCK_RADIUS, GRIPPER_RADIUS, NUM_BLOCKS, State, proprio

SIZE = 64
CAMERAS = {"overhead": (SIZE, SIZE), "gripper": (SIZE, SIZE)}
OVERHEAD_HALF, GRIPPER_HALF = 1.1, 0.4  # half the width that each camera sees, in table units

_PALETTE = np.array(
    [
        (0.90, 0.10, 0.10),  # red
        (0.10, 0.25, 0.95),  # blue
        (0.05, 0.65, 0.20),  # green
        (0.95, 0.20, 0.80),  # magenta
        (0.10, 0.80, 0.85),  # cyan
        (0.98, 0.80, 0.15),  # yellow zone
        (0.62, 0.42, 0.85),  # purple zone
        (0.88, 0.86, 0.82),  # table
    ],
    np.float32,
)
_YELLOW, _PURPLE, _TABLE = NUM_BLOCKS, NUM_BLOCKS + 1, NUM_BLOCKS + 2
assert _PALETTE.shape == (NUM_TINTS, 3)
_FLOOR = np.array((0.25, 0.25, 0.28), np.float32)  # around the table
_GROWTH = 0.6  # how much larger things look at z = 1


def observe(state: State, shift: Shift) -> dict:
    """Returns the robot's observation: {"images": {camera: uint8 (64, 64, 3)}, "proprio": f32
    (5,)}."""
    return {"images": render(state, shift), "proprio": proprio(state)}


def render(state: State, shift: Shift) -> dict[str, UInt8[Array, "64 64 3"]]:
    """Renders both views of a state; row 0 is the far edge, column 0 the left edge."""
    offset = shift.camera_offset * state.look.camera
    centres = jnp.stack([offset, state.gripper[:2] + offset])
    halves = jnp.array([OVERHEAD_HALF, GRIPPER_HALF])
    # As one array: XLA would otherwise fuse each view into whatever joins them, ten times slower.
    views = jax.vmap(_view, (None, None, 0, 0))(state, shift, centres, halves)
    return dict(zip(CAMERAS, views, strict=True))


def composite(images: Mapping[str, Array], cameras: Sequence[str] = tuple(CAMERAS)) -> Array:
    """Puts the cameras side by side, in this order: (..., 64, 128, 3)."""
    return jnp.concatenate([images[name] for name in cameras], axis=-2)


@jax.jit
def render_episode(states: State, shift: Shift) -> dict[str, UInt8[Array, "t 64 64 3"]]:
    """Renders all frames of an episode, from its states with a leading time axis."""
    return jax.vmap(render, (0, None))(states, shift)


@jax.jit
def render_episodes(states: State, shift: Shift) -> dict[str, UInt8[Array, "e t 64 64 3"]]:
    """Renders all frames of many episodes, from their states with leading axes (e, t)."""
    return jax.vmap(jax.vmap(render, (0, None)), (0, None))(states, shift)


def _view(state: State, shift: Shift, centre: Array, half: Array) -> Array:
    """Renders a camera above `centre` that sees `half` to every side."""
    canvas = _Canvas(centre, half)
    palette = jnp.clip(_PALETTE + shift.colours * state.look.tint, 0.0, 1.0)
    z = state.gripper[2]
    nearness = 1 + _GROWTH * z

    picture = [jnp.full((SIZE, SIZE), channel) for channel in _FLOOR]
    picture = _paint(picture, canvas.box(jnp.zeros(2), 1.0), palette[_TABLE])
    for side in (0, 1):
        colour = palette[jnp.where(state.yellow == side, _YELLOW, _PURPLE)]
        picture = _paint(picture, canvas.box(state.zones[side], ZONE_SIZE), colour)
    for block in range(NUM_BLOCKS):
        cover = canvas.box(state.blocks[block], BLOCK_RADIUS)
        picture = _paint(picture, cover, palette[block])

    shadow = state.gripper[:2] + z * jnp.array([0.25, -0.15])
    picture = _paint(picture, 0.4 * canvas.disc(shadow, 1.3 * GRIPPER_RADIUS), jnp.zeros(3))
    held = jnp.maximum(state.held, 0)
    cover = canvas.box(state.blocks[held], BLOCK_RADIUS * nearness) * (state.held >= 0)
    picture = _paint(picture, cover, palette[held])
    picture = _paint_gripper(picture, canvas, state, nearness)
    return _expose(picture, canvas, state, shift)


def _paint_gripper(picture: list, canvas: _Canvas, state: State, nearness: Array) -> list:
    """Paints a ring with two fingers, apart by the opening; a block between them shows through."""
    colour = jnp.full(3, 0.05) + 0.4 * state.gripper[2]
    xy, radius = state.gripper[:2], GRIPPER_RADIUS * nearness
    picture = _paint(picture, canvas.ring(xy, radius, 0.028), colour)
    for side in (-1.0, 1.0):
        finger = xy + jnp.stack([side * nearness * (0.03 + 0.09 * state.opening), 0.0])
        cover = canvas.box(finger, nearness * jnp.array([0.02, 0.06]))
        picture = _paint(picture, cover, colour)
    return picture


def _paint(picture: list, cover: Array, colour: Array) -> list:
    return [plane + cover * (c - plane) for plane, c in zip(picture, colour, strict=True)]


def _expose(picture: list, canvas: _Canvas, state: State, shift: Shift) -> Array:
    """Lights the picture and converts it to uint8 (64, 64, 3)."""
    overall, along_x, along_y = state.look.light
    across = (along_x * canvas.u[None, :] + along_y * canvas.u[:, None]) / 2
    light = 1 + shift.lighting * (overall + across)
    planes = [jnp.clip(plane * light, 0.0, 1.0) * 255 + 0.5 for plane in picture]
    return jnp.stack(planes, axis=-1).astype(jnp.uint8)


class _Canvas:
    """Holds the pixel grid of a view, and computes the coverage of shapes on it: (64, 64) in [0, 1]
    each."""

    def __init__(self, centre: Float[Array, "2"], half: Array):
        self.u = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
        self.x = centre[0] + half * self.u
        self.y = centre[1] - half * self.u
        self.pixel = 2 * half / SIZE

    def box(self, middle: Array, half_sides: Array | float) -> Array:
        """Returns an axis-aligned box: exact, as the product of its coverage along each axis."""
        half_x, half_y = jnp.broadcast_to(jnp.asarray(half_sides), (2,))
        return self._inside(half_y - jnp.abs(self.y - middle[1]))[:, None] * self._inside(
            half_x - jnp.abs(self.x - middle[0])
        )

    def disc(self, middle: Array, radius: Array | float) -> Array:
        return self._inside(-self._beyond(middle, radius))

    def ring(self, middle: Array, radius: Array | float, width: float) -> Array:
        return self._inside(width / 2 - jnp.abs(self._beyond(middle, radius)))

    def _inside(self, depth: Array) -> Array:
        """Returns the coverage of a pixel whose centre is `depth` inside a straight edge."""
        return jnp.clip(depth / self.pixel + 0.5, 0.0, 1.0)

    def _beyond(self, middle: Array, radius: Array | float) -> Array:
        """Returns the distance to a circle, negative inside; exact to first order at the edge,
        without sqrt."""
        square = ((self.y - middle[1]) ** 2)[:, None] + (self.x - middle[0]) ** 2
        return (square - radius**2) / (2 * radius)
