"""Tests that damaged or impossible bundles do not act, and that NaN actions are not returned."""

import copy
import json
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from bundle import runs

import wamjax
from wamjax import export_policy
from wamjax.bundle import files
from wamjax.bundle.observation import BadObservation
from wamjax.bundle.policy import Limits, NotFinite
from wamjax.training.integrity import Damaged

NAN, INFINITE = ([x] * runs.SPEC.action_dim for x in (float("nan"), float("-inf")))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("safety")
    export_policy.from_run(runs.save(root / "run", runs.fast_wam()), root / "b", progress=False)
    return root / "b"


@pytest.fixture(scope="module")
def policy(bundle):
    return wamjax.load_policy(bundle)


def changed(bundle, place, **changes):
    """Copies a bundle with a changed policy.json, without its digest."""
    folder = shutil.copytree(bundle, place)
    values = json.loads((folder / "policy.json").read_text())
    values.pop("digest")
    for path, value in changes.items():
        *parents, name = path.split("__")
        node = values
        for parent in parents:
            node = node[parent]
        node[name] = value
    (folder / "policy.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"statistics__actions__max": NAN}, "actions.max must be a list of finite"),
        ({"statistics__actions__min": INFINITE}, "actions.min must be a list of finite"),
        ({"statistics__actions__min": [0.0]}, "actions.min has 1 dimensions, the policy "),
        ({"statistics__actions__max": [True] * len(NAN)}, "actions.max must be a list of finite"),
        ({"statistics__actions__max": [10**400] * len(NAN)}, "actions.max must be a list of"),
        ({"statistics__proprio__min": [9.0] * 5}, "proprio.min is above max in dimension 0"),
        ({"spec__action_dim": 0}, "spec.action_dim = 0 must be a positive number"),
        ({"spec__chunk": "8"}, "spec.chunk = '8' must be a positive number"),
        ({"spec__control_hz": -1.0}, "spec.control_hz = -1.0 must be a positive number"),
        ({"spec__cameras": [["overhead", 0, 24]]}, "'overhead' is .0, 24., it must be"),
        ({"action_names": ["dx"]}, "action_names names 1 dimensions, there are "),
        ({"step": "five"}, "step = 'five' must be a number of steps"),
    ],
)
def test_impossible_values_are_errors_that_name_the_file(bundle, tmp_path, changes, message):
    with pytest.raises(files.BadBundle, match=message) as error:
        wamjax.load_policy(changed(bundle, tmp_path / "b", **changes))
    assert str(tmp_path / "b" / "policy.json") in str(error.value)
    assert "\n" not in str(error.value)


def mutate(value, rng):
    """Returns a JSON value with one random change."""
    value = copy.deepcopy(value)
    node, path = value, []
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.8):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append((node, key))
        node = node[key]
    if not path:
        return rng.choice([None, 0, "x", []])
    parent, key = path[-1]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}?"] = parent.pop(key)
    else:
        parent[key] = rng.choice(
            [None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", [], {}, [[]], [None], -0.5]
        )
    return value


def test_mutations_of_the_manifest_are_errors_or_harmless(bundle, tmp_path):
    """A manifest that can still be read has positive sizes and possible statistics."""
    rng, good = random.Random(0), json.loads((bundle / "policy.json").read_text())
    good.pop("digest")
    file, refused = tmp_path / "policy.json", 0
    for part in ("weights", "planner", "codec", "embeddings"):
        (tmp_path / part).mkdir()
    for _ in range(1500):
        file.write_text(json.dumps(mutate(good, rng)))
        try:
            manifest = files.read(tmp_path)
        except files.BadBundle as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            files._check(manifest)
    assert refused > 400
    for text in ("", "[", "null", "[" * 100_000, '{"format": 1}', "\x00"):
        file.write_text(text)
        with pytest.raises(files.BadBundle, match="policy.json"):
            files.read(tmp_path)


def test_a_bundle_with_a_flipped_bit_or_missing_chunk_is_refused(bundle, tmp_path):
    chunks = sorted(p for p in (bundle / "weights" / "params").rglob("*")
                    if p.is_file() and p.name[0].isdigit() and p.stat().st_size > 40)  # fmt: skip
    rng = np.random.default_rng(0)
    for i, chunk in enumerate(rng.choice(chunks, 6, replace=False)):
        folder = shutil.copytree(bundle, tmp_path / str(i))
        path = folder / chunk.relative_to(bundle)
        raw = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(raw)))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw) if i < 5 else path.unlink()
        with pytest.raises((Damaged, ValueError)):
            wamjax.load_policy(folder)
    folder = shutil.copytree(bundle, tmp_path / "manifest")
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text.replace('"step": 5', '"step": 4'))
    with pytest.raises(files.BadBundle, match="its digest differs"):
        wamjax.load_policy(folder)


def test_non_finite_actions_are_not_returned(bundle):
    policy = wamjax.load_policy(bundle)
    params = jax.tree.map(
        lambda x: jax.device_put(np.full_like(np.asarray(x), np.nan)), policy._acting.params
    )
    object.__setattr__(policy._acting, "params", params)
    with pytest.raises(NotFinite, match="not finite for observation 0 and returned none"):
        policy(runs.observation())


def test_out_of_range_observations_warn_once_or_are_refused(bundle, tmp_path, recwarn):
    texts = ["lift the block", "lower the block"]
    folder = changed(bundle, tmp_path / "b", statistics__instructions=texts)
    policy = wamjax.load_policy(folder)
    seen = runs.observation()
    base = policy(seen)
    assert not recwarn.list and policy.instructions == tuple(texts)
    for text in ("lift teh block", "lift teh block", "fly"):
        policy(seen | {"instruction": text})
    policy(seen | {"proprio": seen["proprio"] * 0 + 1e30})
    said = [str(w.message) for w in recwarn.list if w.category is UserWarning]
    assert len(said) == 3 and "'fly' is not one of the 2" in said.pop(1)
    assert "teh block' is not one of the 2 demonstrated instructions, such as 'lift" in said[0]
    assert "] is 1e+30, the demonstrations had" in said[1]
    np.testing.assert_array_equal(policy(seen), base)
    strict = wamjax.load_policy(folder, limits=Limits(far=5.0, batch=1, unknown=True))
    for change in ({"instruction": ""}, {"proprio": seen["proprio"] + 1000}):
        with pytest.raises(BadObservation, match="beyond the limits of this policy"):
            strict(seen | change)
    with pytest.raises(BadObservation, match="a batch of 2 robots, at most 1"):
        strict(runs.observation(batch=2))


def test_a_system_without_locks_acts_and_trains():
    """Simulates Windows, which has no `fcntl`."""
    modules = ("wamjax.bundle.policy", "wamjax.train", "wamjax.data.records", "wamjax.doctor")
    code = "import sys; sys.modules['fcntl'] = None\n" + "\n".join(f"import {m}" for m in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_lists_its_public_names():
    assert dir(wamjax) == ["__version__", "load_policy"]


def test_acting_during_warm_up_does_not_use_up_warnings(bundle, tmp_path, recwarn):
    """Otherwise the warning, which is given once, would be used up before a robot moves."""
    texts = ["lift the block", "lower the block"]
    changes = {"statistics__instructions": texts, "statistics__proprio__min": [2.0] * 5,
               "statistics__proprio__max": [2.5] * 5}  # fmt: skip
    folder = changed(bundle, tmp_path / "b", **changes)
    strict = wamjax.load_policy(folder, limits=Limits(far=1.0, unknown=True))
    for count in (0, 2):
        strict(strict.example(count))
    assert not [w for w in recwarn.list if w.category is UserWarning]
    with pytest.raises(BadObservation, match="is not one of the 2 demonstrated instructions"):
        strict(strict.example() | {"instruction": "lift teh block"})


def test_errors_say_how_other_folders_become_bundles(bundle, tmp_path):
    runs.save(tmp_path / "run", runs.fast_wam(), steps=(2,))
    for folder, message in (
        (tmp_path / "run", "is a run, not a policy bundle.*--workdir=.*/run "),
        (bundle / "weights", "holds converted weights, not a policy bundle.*--weights="),
        (tmp_path / "gone", "does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=f"(?s){message}"):
            wamjax.load_policy(folder)
