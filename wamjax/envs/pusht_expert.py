"""An expert for PushT that plans: it tries straight pushes in the simulator before it makes one.

A push starts next to the T and moves in a direction within friction of the edge's normal. Its score
is the distance of the T's corners afterwards from those of the outline. The expert executes the
best one: around the T to the start, the push, and back off. Then it observes again, so the next
push corrects noise on its actions, or a push that went differently.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

FIELD = 512.0
RADIUS = 15.0  # radius of the finger
GAP = 8.0  # between finger and T before and after a push
MARGIN = 22.0  # of the field's border, where the finger cannot go
TOUCH = 4.0  # distance that a path keeps from the T
CELL = 14.0  # of the grid of paths
SPEEDS = (60.0, 30.0, 15.0)  # along a path, a step; the fastest that does not touch
AGAIN = 12  # pushes for which a path is searched
TRIES, LONG, SHORT = 96, 140.0, 4.0  # number of pushes to try; their lengths
HOLD = 5  # steps that the finger takes to come to rest
STEP, GAIN, DAMPING = 0.01, 100.0, 20.0  # as in the environment's controller
GOAL = (256.0, 256.0, np.pi / 4)
# Corners of the T in its own frame, around its body's origin.
BAR = np.array([(-60.0, 30.0), (60.0, 30.0), (60.0, 0.0), (-60.0, 0.0)])
STEM = np.array([(-15.0, 30.0), (-15.0, 120.0), (15.0, 120.0), (15.0, 30.0)])
CORNERS = np.concatenate([BAR, STEM])
OUTLINE = np.array(
    [(-60.0, 0.0), (60.0, 0.0), (60.0, 30.0), (15.0, 30.0), (15.0, 120.0), (-15.0, 120.0),
     (-15.0, 30.0), (-60.0, 30.0)]
)  # fmt: skip


class Expert:
    """Plans pushes.

    Args:
      rng: draws the pushes to try.
    """

    def __init__(self, rng: np.random.Generator):
        from gym_pusht.envs.pusht import PushTEnv

        self._rng, self._ahead = rng, []
        self._model = PushTEnv(obs_type="state")
        self._model.reset(seed=0)

    def act(self, env) -> np.ndarray:
        """Returns the finger's target."""
        if not self._ahead:
            self._ahead = self._plan(env)
        return self._ahead.pop(0)

    def _plan(self, env) -> list[np.ndarray]:
        finger = np.array(env.agent.position)
        pose = np.array([*env.block.position, env.block.angle])
        near = off(pose)
        candidates = [(off(self._pushed(pose, *push)), *push) for push in self._pushes(pose, near)]
        candidates = sorted((x for x in candidates if x[0] < near), key=lambda x: x[0])
        roads = Roads(placed(OUTLINE, pose), finger)
        for _, start, end in candidates[:AGAIN]:
            way = self._way(pose, finger, roads.to(start))
            if way is not None:
                away = (start - end) / np.linalg.norm(start - end)
                return [*way, *[end] * HOLD, end + GAP * away]
        # No push helps from here: move towards the middle and plan from elsewhere.
        return [finger + 0.3 * (FIELD / 2 - finger) + self._rng.normal(0, 40, 2)]

    def _pushes(self, pose: np.ndarray, near: float):
        """Returns (start, end) of the finger's middle for pushes that can be started."""
        outline = placed(OUTLINE, pose)
        edges = np.roll(outline, -1, axis=0) - outline
        lengths = np.linalg.norm(edges, axis=1)
        longest = np.clip(2.5 * near, 12.0, LONG)
        for _ in range(TRIES):
            edge = self._rng.choice(len(edges), p=lengths / lengths.sum())
            along = edges[edge] / lengths[edge]
            outward = np.array([along[1], -along[0]])
            point = outline[edge] + self._rng.uniform(0.05, 0.95) * edges[edge]
            start = point + (RADIUS + GAP) * outward
            inside = MARGIN <= start.min() and start.max() <= FIELD - MARGIN
            if not inside or distances(outline, start[None])[0] < RADIUS + TOUCH:
                continue
            angle = self._rng.uniform(-0.5, 0.5)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            length = SHORT * (longest / SHORT) ** self._rng.uniform()
            end = start - (GAP + length) * (turn @ outward)
            if MARGIN <= end.min() and end.max() <= FIELD - MARGIN:
                yield start, end

    def _pushed(self, pose, start, end) -> np.ndarray:
        """Simulates a push and returns the T's pose after it."""
        self._put(pose, start)
        return self._go([end] * HOLD)

    def _way(self, pose, finger, corners: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """Returns a target for each control step along a path, as fast as possible without touching
        the T."""
        if corners is None:
            return None
        for speed in SPEEDS:
            way, at = [], finger
            for corner in corners:
                count = max(1, int(np.ceil(np.linalg.norm(corner - at) / speed)))
                way += [at + (corner - at) * k / count for k in range(1, count + 1)]
                at = corner
            way += [at] * (HOLD - 1)
            self._put(pose, finger)
            moved = self._go(way)
            if np.abs(placed(CORNERS, moved) - placed(CORNERS, pose)).max() < 0.5:
                return way
        return None

    def _put(self, pose, finger) -> None:
        agent, block = self._model.agent, self._model.block
        agent.position, agent.velocity = tuple(map(float, finger)), (0.0, 0.0)
        # The block turns around its centre of mass, so the angle must be set before the position.
        block.angle = float(pose[2])
        block.position = float(pose[0]), float(pose[1])
        block.velocity, block.angular_velocity = (0.0, 0.0), 0.0

    def _go(self, targets) -> np.ndarray:
        """Simulates a control step to each of these targets, like the environment's `step`, and
        returns the T's pose."""
        agent, block, space = self._model.agent, self._model.block, self._model.space
        for target in targets:
            to_x, to_y = map(float, target)
            for _ in range(10):
                (x, y), (u, v) = agent.position, agent.velocity
                agent.velocity = (
                    u + STEP * (GAIN * (to_x - x) - DAMPING * u),
                    v + STEP * (GAIN * (to_y - y) - DAMPING * v),
                )
                space.step(STEP)
        return np.array([*block.position, block.angle])


class Roads:
    """Finds shortest paths of the finger around the T, over a grid.

    Args:
      outline: outline of the T.
      origin: position of the finger.
    """

    def __init__(self, outline: np.ndarray, origin: np.ndarray):
        axis = np.arange(MARGIN, FIELD - MARGIN + 1, CELL)
        self._outline, self._origin = outline, origin
        self._points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
        clear = distances(outline, self._points) > RADIUS + TOUCH
        number = np.arange(len(self._points)).reshape(len(axis), len(axis))
        pairs = [
            np.stack([a.ravel(), b.ravel()])
            for a, b in (
                (number[1:], number[:-1]),
                (number[:, 1:], number[:, :-1]),
                (number[1:, 1:], number[:-1, :-1]),
                (number[1:, :-1], number[:-1, 1:]),
            )
        ]
        one, two = np.concatenate(pairs, axis=1)
        both = clear[one] & clear[two]
        one, two = one[both], two[both]
        length = np.linalg.norm(self._points[one] - self._points[two], axis=1)
        shape = (len(self._points),) * 2
        graph = scipy.sparse.csr_matrix((length, (one, two)), shape=shape)
        self._clear = np.where(clear)[0]
        self._first = self._nearest(origin)
        self._far, self._before = scipy.sparse.csgraph.dijkstra(
            graph, directed=False, indices=self._first, return_predecessors=True
        )

    def to(self, goal: np.ndarray) -> list[np.ndarray] | None:
        """Returns the corners of a path to a point, or None."""
        last = self._nearest(goal)
        if not np.isfinite(self._far[last]):
            return None
        way = [last]
        while way[-1] != self._first:
            way.append(self._before[way[-1]])
        points = [self._origin, *self._points[way[::-1]], goal]
        corners, at = [], 0
        while at < len(points) - 1:  # go straight to the farthest visible point
            ahead = range(len(points) - 1, at + 1, -1)
            at = next((k for k in ahead if self._sees(points[at], points[k])), at + 1)
            corners.append(points[at])
        return corners

    def _nearest(self, point: np.ndarray) -> int:
        away = np.linalg.norm(self._points[self._clear] - point, axis=1)
        return int(self._clear[away.argmin()])

    def _sees(self, a: np.ndarray, b: np.ndarray) -> bool:
        count = max(2, int(np.linalg.norm(b - a) / 5))
        between = a + (b - a) * np.linspace(0, 1, count)[:, None]
        return bool((distances(self._outline, between) > RADIUS + TOUCH - 1).all())


def placed(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Maps points of the T's own frame to the field, (n, 2)."""
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return points @ np.array([[c, s], [-s, c]]) + pose[:2]


def off(pose: np.ndarray) -> float:
    """Returns how far the T is from its outline: the mean distance of its corners, in pixels."""
    corners = placed(CORNERS, pose) - placed(CORNERS, np.array(GOAL))
    return float(np.linalg.norm(corners, axis=1).mean())


def distances(outline: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns the distances of points (n, 2) to the nearest edge, (n,); 0 inside."""
    a, b, p = outline, np.roll(outline, -1, axis=0), points[:, None]
    along = np.clip(((p - a) * (b - a)).sum(-1) / ((b - a) ** 2).sum(-1), 0, 1)
    nearest = np.linalg.norm(a + along[..., None] * (b - a) - p, axis=-1).min(axis=1)
    crosses = (a[:, 1] > p[..., 1]) != (b[:, 1] > p[..., 1])
    rise = np.where(b[:, 1] == a[:, 1], 1.0, b[:, 1] - a[:, 1])
    x = a[:, 0] + (p[..., 1] - a[:, 1]) * (b[:, 0] - a[:, 0]) / rise
    inside = (crosses & (p[..., 0] < x)).sum(axis=1) % 2 == 1
    return np.where(inside, 0.0, nearest)
