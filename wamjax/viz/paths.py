"""Compares diffusion's path from noise to data with the flow's on a plane, and solvers on both.

The data are two moons, a mixture of Gaussians, so the perfect network is known and all error comes
from the solver. Two errors are measured for each number of network calls: the distance of the end
points from those of the exact ODE, and the distance of the samples from the data as distributions.
Each path has its usual grid: even timesteps for diffusion, even tau for the flow. (Solvers in x0
see nothing of a path but its grid of noise-to-signal ratios, so their differences are the grids'.)
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.mixture import Mixture
from wamjax.diffusion.solvers import SOLVERS
from wamjax.diffusion.stochastic import ancestral
from wamjax.viz import figures

PATHS = {"diffusion": DDPM(), "flow": RectifiedFlow()}
STEPS = (2, 3, 5, 10, 20, 50, 100, 200)
LINES = {  # path -> solvers measured on it
    "diffusion": ("ancestral", "euler", "heun", "ddim", "dpmpp_2m", "unipc"),
    "flow": ("euler", "heun", "dpmpp_2m", "unipc"),
}
CLOSE = 0.1  # end points this near to the exact ones, in standard deviations of the data, are right
NEAR = 0.005  # so are samples at this energy distance, five times the spread of 2048 good ones


def moons(components: int = 12, std: float = 0.12) -> Mixture:
    """Returns two interlocked half circles with mean 0 and about unit variance in each
    direction."""
    angles = np.linspace(0, np.pi, components)
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    lower = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], axis=1)
    means = np.concatenate([upper, lower])
    means = (means - means.mean(0)) / means.std(0)
    weights = np.full(len(means), 1 / len(means))
    return Mixture(weights, means.astype(np.float32), np.full(len(means), std, np.float32))


@functools.partial(jax.jit, static_argnames=("path", "solver", "steps"))
def sample(path: str, solver: str, steps: int, noise: Float[Array, "n 2"], key: Array) -> Array:
    """Returns end points from `noise`; `key` is for stochastic solvers."""
    process = PATHS[path]
    levels = process.schedule(steps)
    predict = functools.partial(moons().predict, process)
    if solver == "ancestral":
        return ancestral(predict, noise, levels, levels, process, key)
    return SOLVERS[solver](predict, noise, levels, levels, process)


@functools.partial(jax.jit, static_argnames=("path", "states", "substeps"))
def trajectories(
    path: str, noise: Float[Array, "n 2"], states: int = 101, substeps: int = 8
) -> Float[Array, "s n 2"]:
    """Returns states of the exact ODE at evenly spaced levels, from noise to data.

    All paths are integrated on the flow, where the field is bounded at both ends, and scaled back.
    """
    process, flow = PATHS[path], RectifiedFlow()
    ends = process.schedule(1)
    alpha, sigma = process.alpha_sigma(np.linspace(ends[0], ends[-1], states))
    scale = alpha + sigma
    tau = sigma / scale

    def segment(x, ends):
        taus = jnp.linspace(*ends, substeps + 1)
        x = SOLVERS["heun"](functools.partial(moons().predict, flow), x, taus, taus)
        return x, x

    start = tau[0] * noise
    _, rest = jax.lax.scan(segment, start, (jnp.asarray(tau[:-1]), jnp.asarray(tau[1:])))
    return jnp.asarray(scale)[:, None, None] * jnp.concatenate([start[None], rest])


def pairs(path: str, x0: Array, noise: Array, states: int = 101) -> Float[Array, "s n 2"]:
    """Returns the path of given data and noise at evenly spaced levels, where training samples
    lie."""
    process = PATHS[path]
    first, last = process.schedule(1)
    return jnp.stack([process.corrupt(x0, noise, t) for t in np.linspace(first, last, states)])


def curvature(path: Float[Array, "s n 2"]) -> dict[str, float]:
    """Measures how far paths are from straight ones at constant speed; both numbers are 0 for
    those.

    Returns:
      "detour": length over distance of the ends, less 1; "defect": the mean square of velocity less
      mean velocity, over that of the mean (the straightness of arXiv 2209.03003, without unit),
      which counts changes of speed too. Medians over the paths.
    """
    moves = np.diff(np.asarray(path, np.float64), axis=0)
    chord = moves.sum(0)
    length = np.linalg.norm(moves, axis=-1).sum(0)
    defect = np.mean(np.sum((len(moves) * moves - chord) ** 2, axis=-1), axis=0)
    return {
        "detour": float(np.median(length / np.linalg.norm(chord, axis=-1)) - 1),
        "defect": float(np.median(defect / np.sum(chord**2, axis=-1))),
    }


@jax.jit
def energy_distance(a: Float[Array, "n 2"], b: Float[Array, "m 2"]) -> Array:
    """Returns the energy distance of two sets of samples; unbiased, so about 0 (of either sign) if
    equal."""

    def mean(a, b, pairs):
        return jnp.sum(jnp.linalg.norm(a[:, None] - b, axis=-1)) / pairs

    n, m = len(a), len(b)
    return 2 * mean(a, b, n * m) - mean(a, a, n * (n - 1)) - mean(b, b, m * (m - 1))


def measure(steps: tuple[int, ...] = STEPS, count: int = 2048, seed: int = 0) -> dict[str, Any]:
    """Returns all numbers of the picture.

    Args:
      steps: steps of the solvers; Heun makes nearly two network calls per step.
      count: number of samples, and of data points to compare them with.

    Returns:
      "curvature": for given pairs and for trajectories of the ODE, by path. "floor": energy
      distance of the data from themselves drawn again. "errors": path -> solver -> rows of steps,
      calls, ode_error (root mean square, None if random), distance. "calls": path -> solver ->
      {"ode_error", "distance"}: the calls that are `enough` for `CLOSE` and for `NEAR`.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    data, again = (moons().sample(key, count) for key in keys[:2])
    noise = jax.random.normal(keys[2], (count, 2))
    bent: dict[str, Any] = {"pairs": {}, "trajectories": {}}
    errors: dict[str, Any] = {}
    for path, solvers in LINES.items():
        exact = trajectories(path, noise)
        bent["pairs"][path] = curvature(pairs(path, data[:256], noise[:256]))
        bent["trajectories"][path] = curvature(exact[:, :256])
        errors[path] = {}
        for solver in solvers:
            rows = errors[path][solver] = []
            for n in steps:
                start = PATHS[path].corrupt(0.0, noise, PATHS[path].schedule(n)[0])
                ends = sample(path, solver, n, start, keys[3])
                off = jnp.sqrt(jnp.mean(jnp.sum((ends - exact[-1]) ** 2, axis=-1)))
                rows.append({
                    "steps": n,
                    "calls": calls(path, solver, n),
                    "ode_error": None if solver == "ancestral" else float(off),
                    "distance": float(energy_distance(ends, data)),
                })  # fmt: skip
    floor = float(energy_distance(again, data))
    needed = {
        path: {
            solver: {
                "ode_error": enough(r, "ode_error", CLOSE),
                "distance": enough(r, "distance", NEAR),
            }
            for solver, r in rows.items()
        }
        for path, rows in errors.items()
    }
    return {"curvature": bent, "floor": floor, "errors": errors, "calls": needed}


def calls(path: str, solver: str, steps: int) -> int:
    """Returns the network calls of a run; Heun's last step on the diffusion path is an Euler
    step."""
    return {"heun": 2 * steps - (path == "diffusion")}.get(solver, steps)


def enough(rows: list[dict[str, Any]], error: str, limit: float) -> int | None:
    """Returns the fewest measured calls from which on the error stays below the limit, or None."""
    good = None
    for row in reversed(rows):
        if row[error] is None or row[error] >= limit:
            break
        good = row["calls"]
    return good


def draw(numbers: dict[str, Any], path: str | Path, seed: int = 0, shown: int = 24) -> Path:
    """Draws trajectories of both paths, paths of given pairs, and both errors against network
    calls.

    Args:
      numbers: from `measure`.
      path: a PNG.
      shown: number of trajectories.
    """
    figure = figures.figure(13, 9)
    axes = figure.subplot_mosaic("AABBCC;DDDEEE")
    key = jax.random.key(seed)
    data, noise = moons().sample(key, 600), jax.random.normal(key, (shown, 2))
    for name, panel in zip(PATHS, "AB", strict=True):
        detour = numbers["curvature"]["trajectories"][name]["detour"]
        _plane(axes[panel], data)
        _lines(axes[panel], trajectories(name, noise), figures.COLORS[list(PATHS).index(name)])
        axes[panel].set_title(f"{name}: trajectories, {detour:+.0%} length", loc="left")
    _plane(axes["C"], data)
    for colour, name in zip(figures.COLORS, PATHS, strict=False):
        detour = numbers["curvature"]["pairs"][name]["detour"]
        label = f"{name}, {detour:+.1%} length"
        _lines(axes["C"], pairs(name, data[:8], noise[:8]), colour, label)
    axes["C"].set_title("given pairs of noise and data", loc="left")
    axes["C"].legend(frameon=False, fontsize=8, loc="lower left")
    for panel, error, limit, title in (
        ("D", "ode_error", CLOSE, "distance from the exact end point (data have std 1)"),
        ("E", "distance", NEAR, "energy distance of samples from the data"),
    ):
        _errors(axes[panel], numbers["errors"], error, limit)
        axes[panel].set_title(title, loc="left")
    axes["E"].axhspan(0, abs(numbers["floor"]), color=figures.MUTED, alpha=0.15, lw=0)
    handles, labels = axes["E"].get_legend_handles_labels()
    axes["D"].legend(handles, labels, frameon=False, fontsize=8, ncols=2)
    return figures.write(figure, path)


def save(
    folder: str | Path, steps: tuple[int, ...] = STEPS, count: int = 2048, seed: int = 0
) -> dict[str, Any]:
    """Measures, and writes ``paths.json`` and ``paths.png`` into `folder`; returns the numbers."""
    numbers = measure(steps, count, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "paths.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(numbers, folder / "paths.png", seed)
    return numbers


def text(numbers: dict[str, Any]) -> str:
    """Formats the numbers as a table."""
    lines = ["curvature           detour   defect"]
    for kind, rows in numbers["curvature"].items():
        for path, row in rows.items():
            lines.append(f"{kind + ' ' + path:24}{row['detour']:.3f} {row['defect']:8.3f}")
    lines.append(f"calls needed            ends within {CLOSE}  samples within {NEAR}")
    for path, rows in numbers["calls"].items():
        for solver, row in rows.items():
            cells = (str(row[e]) if row[e] else "-" for e in ("ode_error", "distance"))
            lines.append(f"{path + ' ' + solver:24}{next(cells):>16}{next(cells):>21}")
    return "\n".join(lines)


def _plane(axes, data) -> None:
    axes.plot(*np.asarray(data).T, ".", color=figures.MUTED, ms=2, alpha=0.4)
    axes.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
    axes.set_axis_off()


def _lines(axes, path, colour: str, label: str | None = None) -> None:
    path = np.asarray(path)
    lines = axes.plot(path[..., 0], path[..., 1], color=colour, lw=1, alpha=0.8)
    lines[0].set_label(label)
    axes.plot(*path[0].T, "o", mfc="white", mec=colour, ms=3)
    axes.plot(*path[-1].T, "o", color=colour, ms=3)


def _errors(axes, errors: dict[str, Any], error: str, limit: float) -> None:
    solvers = list(dict.fromkeys(s for rows in errors.values() for s in rows))
    for path, line in zip(errors, ("--", "-"), strict=True):
        for solver, rows in errors[path].items():
            known = [(r["calls"], max(r[error], 1e-4)) for r in rows if r[error] is not None]
            if known:
                colour = figures.COLORS[solvers.index(solver)]
                label = f"{path}, {solver}"
                axes.plot(*np.transpose(known), line + "o", color=colour, ms=3, lw=1.3, label=label)
    axes.axhline(limit, color=figures.BAD, lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="network calls")
    figures.plain(axes)
