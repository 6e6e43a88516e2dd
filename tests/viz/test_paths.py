"""Tests the picture of paths: exact fields, exact end points, and its numbers."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from PIL import Image

from wamjax.viz import __main__ as command
from wamjax.viz import paths


def test_moons_are_standardised_and_apart():
    data = paths.moons().sample(jax.random.key(0), 4000)
    np.testing.assert_allclose(data.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(data.std(0), 1, atol=0.06)
    assert float(jnp.linalg.norm(paths.moons().means, axis=-1).min()) > 0.3  # not a blob


@pytest.mark.parametrize("path", paths.PATHS)
def test_exact_trajectories(path):
    """They end in the data's distribution, and agree with another solver."""
    process, noise = paths.PATHS[path], jax.random.normal(jax.random.key(0), (1000, 2))
    exact = paths.trajectories(path, noise)
    assert exact.shape == (101, 1000, 2)
    start = jax.jit(process.corrupt)(0.0, noise, process.schedule(1)[0])
    np.testing.assert_allclose(exact[0], start, rtol=1e-5)
    data = paths.moons().sample(jax.random.key(1), 1000)
    assert abs(float(paths.energy_distance(exact[-1], data))) < 0.01
    refined = paths.trajectories(path, noise[:50], substeps=24)
    np.testing.assert_allclose(exact[:, :50], refined, atol=0.02)
    # The velocity of the process itself, between two states in the middle.
    first, last = process.schedule(1)
    levels = np.linspace(first, last, 101)
    exact = np.asarray(exact)

    @jax.jit
    def field_at(x, level):
        return process.velocity(x, paths.moons().predict(process, x, level), level)

    field = np.asarray(field_at((exact[50] + exact[51]) / 2, (levels[50] + levels[51]) / 2))
    moved = (exact[51] - exact[50]) / (levels[51] - levels[50])
    np.testing.assert_allclose(moved, field, rtol=0, atol=0.03 * np.abs(field).max())


def test_curvature():
    """Measures a straight path, a half circle, and a straight path with growing speed."""
    s = np.linspace(0, 1, 2001)[:, None, None]
    straight = s * np.array([[3.0, 4.0], [1.0, 0.0]])
    assert paths.curvature(straight) == {
        k: pytest.approx(0, abs=1e-9) for k in ("detour", "defect")
    }
    circle = np.concatenate([np.cos(np.pi * s), np.sin(np.pi * s)], axis=-1)
    got = paths.curvature(circle)
    assert got["detour"] == pytest.approx(np.pi / 2 - 1, rel=1e-4)
    assert got["defect"] == pytest.approx((np.pi**2 - 4) / 4, rel=1e-4)
    faster = paths.curvature(s**2 * np.array([[3.0, 4.0]]))
    assert faster["detour"] == pytest.approx(0, abs=1e-9)
    assert faster["defect"] == pytest.approx(1 / 3, rel=1e-3)


def test_given_pairs_are_straight_on_the_flow_only():
    x0, noise = (
        paths.moons().sample(jax.random.key(0), 64),
        jax.random.normal(jax.random.key(1), (64, 2)),
    )
    flow, diffusion = (paths.curvature(paths.pairs(p, x0, noise)) for p in ("flow", "diffusion"))
    assert flow["detour"] < 1e-6 and flow["defect"] < 1e-6
    assert diffusion["detour"] > 0.02 and diffusion["defect"] > 0.3


def test_energy_distance():
    """Compares with scipy's on a line; it is about zero for equal distributions."""
    from scipy.stats import energy_distance

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((800, 2)), rng.standard_normal((700, 2)) + 0.5
    a[:, 1] = b[:, 1] = 0
    got = float(paths.energy_distance(jnp.asarray(a), jnp.asarray(b)))
    assert got == pytest.approx(energy_distance(a[:, 0], b[:, 0]) ** 2, rel=0.05)
    assert abs(float(paths.energy_distance(a[:400], a[400:]))) < 0.02


def test_enough():
    rows = [{"calls": c, "e": e} for c, e in [(2, 0.01), (5, 0.5), (10, 0.04), (20, 0.02)]]
    assert paths.enough(rows, "e", 0.05) == 10  # a lucky first value does not count
    assert paths.enough(rows, "e", 0.03) == 20 and paths.enough(rows, "e", 0.001) is None
    assert paths.enough([{"calls": 3, "e": None}], "e", 1.0) is None


def test_numbers_and_picture(tmp_path):
    """Checks numbers and picture, and in small the article's claim: the flow needs fewer calls."""
    numbers = paths.save(tmp_path / "new", steps=(10, 40), count=512)
    assert json.loads((tmp_path / "new" / "paths.json").read_text()) == numbers
    with Image.open(tmp_path / "new" / "paths.png") as image:
        assert np.asarray(image).std() > 10
    errors = numbers["errors"]
    assert {path: tuple(rows) for path, rows in errors.items()} == paths.LINES
    for rows in errors.values():
        for solver, (few, many) in rows.items():
            assert few["steps"] == 10 and many["calls"] > few["calls"]
            if solver != "ancestral":
                assert many["ode_error"] < few["ode_error"]
    assert (
        errors["flow"]["euler"][0]["distance"]
        < 0.02
        < errors["diffusion"]["ancestral"][0]["distance"]
    )
    assert (
        errors["flow"]["heun"][0]["calls"] == 20 and errors["diffusion"]["heun"][0]["calls"] == 19
    )
    assert "flow unipc" in paths.text(numbers)


def test_the_command(tmp_path, monkeypatch, capsys):
    save = lambda folder, seed: small(folder, (2, 3), 64, seed)  # noqa: E731
    small = paths.save
    monkeypatch.setattr(paths, "save", save)
    given = types.SimpleNamespace(output=str(tmp_path), seed=3)
    monkeypatch.setattr(command, "flags", types.SimpleNamespace(FLAGS=given))
    monkeypatch.setattr(paths, "LINES", {"diffusion": ("ancestral",), "flow": ("euler",)})
    command.main(["viz", "paths"])
    assert "flow euler" in capsys.readouterr().out
    assert {f.name for f in tmp_path.iterdir()} == {"paths.json", "paths.png"}


def test_the_command_refuses_bad_flags():
    with pytest.raises(app.UsageError, match="name one picture.*'path'"):
        command.main(["viz", "path"])
