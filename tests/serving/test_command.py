"""Tests the command on a bundle of the quickstart, with clients in other processes."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from bundle import runs
from data import synthetic
from test_configs import get, spec_of

import wamjax
from wamjax import export_policy, serve
from wamjax.envs import tabletop
from wamjax.serving import server
from wamjax.serving.client import Client, ServerError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Exports quickstart:debug with two modes, untrained."""
    root, config = tmp_path_factory.mktemp("serve"), get("quickstart", "variant=optional_idm,debug")
    config.data.cameras = config.data.cameras or tuple(tabletop.CAMERAS)
    config.model.layers, config.objective.infer_steps = 1, 2
    runs.save(root / "run", config, spec_of(config), steps=(1,))
    export_policy.from_run(root / "run", root / "bundle", progress=False)
    return root / "bundle"


class Command:
    """Runs ``python -m wamjax.serve`` and sets `port` once it serves."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wamjax.serve", "--port=0", *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=dict(os.environ),
        )  # fmt: skip
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving "):
                self.port = int(line.rsplit(":", 1)[1])
                return
        raise AssertionError(self.process.stderr.read())

    def end(self):
        """Returns (exit status, output)."""
        self.process.send_signal(signal.SIGTERM)
        out, errors = self.process.communicate(timeout=30)
        return self.process.returncode, "".join(self.lines) + out + errors


@pytest.fixture(scope="module")
def served(bundle):
    command = Command(f"--bundle={bundle}", "--names=libero,aloha", "--max_batch=2",
                      "--mode=direct,imagine")  # fmt: skip
    yield command
    status, text = command.end()
    assert status == 0 and text.endswith("ended\n") or "ended\n" in text, text
    assert "Traceback" not in text


def test_metadata_describes_the_policys_inputs_and_outputs(served, bundle):
    with Client(port=served.port) as client:
        about = client.metadata
    manifest = wamjax.load_policy(bundle).manifest
    spec = manifest.spec
    assert about["protocol"] == 1 and len(about["bundle"]) == 16 and about["prefix"] == 0
    assert about["horizon"] == spec.chunk and about["control_hz"] == spec.control_hz
    assert about["cameras"] == {name: [*size, 3] for name, size in spec.cameras.items()}
    assert about["actions"]["names"] == list(manifest.action_names)
    assert about["actions"]["hold"] == ["grip" in name for name in manifest.action_names]
    assert about["state"]["size"] == spec.proprio_dim and about["modes"] == ["direct", "imagine"]
    for mode in about["modes"]:
        assert 0 < about["latency_ms"][mode]["p50"] <= about["latency_ms"][mode]["p99"]
    json.dumps(about)  # plain values only


def seen(policy, seed=0):
    rng = np.random.default_rng(seed)
    out = policy.example()
    out["images"] = {k: rng.integers(0, 256, x.shape, np.uint8) for k, x in out["images"].items()}
    return out


def test_actions_are_those_of_the_policy(served, bundle):
    """Compares means over seeds, since served clients share no noise with a local call."""
    policy = wamjax.load_policy(bundle)
    local = seen(policy)
    pictures, state = local["images"], local["proprio"]
    first, second = pictures.values()
    others = [
        {"observation/image": first, "observation/wrist_image": second,
         "observation/state": state, "prompt": local["instruction"]},
        {"images": {"cam_high": np.moveaxis(first, -1, 0),
                    "cam_left_wrist": np.moveaxis(second, -1, 0)},
         "state": state.astype(np.float64), "prompt": local["instruction"]},
        {f"observation/{name}": x for name, x in pictures.items()}
        | {"observation/state": state, "prompt": local["instruction"]},
    ]  # fmt: skip
    want = np.stack([policy(local, seed) for seed in range(24)])
    with Client(port=served.port) as client:
        got = np.stack([client.infer(x)["actions"] for x in [local, *others] * 6])
        assert got.shape == want.shape and got.dtype == want.dtype
        spread = want.std(0) + 1e-3
        assert (np.abs(got.mean(0) - want.mean(0)) < 2.5 * spread).all()
        imagined = client.infer(local | {"mode": "imagine"})
        assert imagined["mode"] == "imagine" and imagined["actions"].shape == want.shape[1:]
        with pytest.raises(ServerError, match="the policy has cameras"):
            client.infer({"observation/image": first})
        with pytest.raises(ServerError, match="not 'uint8'|not uint8"):
            client.infer(local | {"images": {k: x / 255 for k, x in pictures.items()}})


def test_serving_to_other_machines_needs_a_key(bundle, monkeypatch):
    monkeypatch.setattr(server, "bind", lambda *_: pytest.fail("the port is open"))
    monkeypatch.setattr(logging, "captureWarnings", lambda _: None)  # those are pytest's
    arguments = f"--bundle={bundle}", "--host=0.0.0.0"
    with (
        synthetic.command(serve, *arguments),
        pytest.raises(ValueError, match="--host=0.0.0.0 can be reached by others"),
    ):
        serve.main([])
