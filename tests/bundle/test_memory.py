"""Tests how much memory loading a bundle takes."""

import weakref

from bundle import runs

import wamjax
from wamjax import export_policy
from wamjax.weights import store


def test_at_most_one_array_is_held_in_two_layouts(tmp_path, monkeypatch):
    """A stacked array is released as soon as it is split into layers, before the next one."""
    runs.save(tmp_path / "run", runs.fast_wam(), steps=(3,))
    export_policy.from_run(tmp_path / "run", tmp_path / "bundle", progress=False)
    load, stacked, alive = store.Stored.load, [], []

    def watched(stored, want):
        alive.append([path for path, array in stacked if array() is not None])
        out = load(stored, want)
        stacked.extend((k, weakref.ref(x)) for k, x in out.items() if k.startswith("blocks/"))
        return out

    monkeypatch.setattr(store.Stored, "load", watched)
    wamjax.load_policy(tmp_path / "bundle")
    assert len(alive) > len(stacked) > 20 and not any(alive)
