"""Tests committed actions, from a robot's queue over the wire into the policy and back."""

import concurrent.futures
import json
import time
import urllib.request

import jax
import numpy as np
import pytest
from bundle import runs
from serving.fake import serving

import wamjax
from wamjax import export_policy
from wamjax.bundle.observation import BadObservation
from wamjax.serving import worker
from wamjax.serving.broker import ActionChunks
from wamjax.serving.client import Client, ServerError
from wamjax.serving.names import Names, tables
from wamjax.serving.worker import Batching, Worker

MOST, WIDTH, CHUNK = 3, runs.SPEC.action_dim, runs.SPEC.chunk


class Repeatable:
    """Takes its noise from the state, so an observation has the same answer in any batch."""

    def __init__(self, policy):
        self.policy, self.batches, self.admit = policy, [], policy.admit
        self.example, self.prefix_max = policy.example, policy.prefix_max

    def act(self, arrays, key):
        self.batches.append(arrays["prefix/count"].tolist())
        seeds = np.round(1e3 * arrays["proprio"][:, 0]).astype(np.int32)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(5), seed))(seeds)
        return self.policy.act(arrays, keys)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Returns a policy that takes prefixes in both of its modes."""
    root = tmp_path_factory.mktemp("prefix")
    precise = {"precision.compute": "float32", "objective.prefix_max": MOST}
    runs.save(root / "run", runs.fast_wam("optional_idm", **precise))
    export_policy.from_run(root / "run", root / "bundle", progress=False)
    policy = wamjax.load_policy(root / "bundle")
    return {mode: Repeatable(policy.with_mode(mode)) for mode in ("direct", "imagine")}


@pytest.fixture(scope="module")
def running(policies):
    names = Names(tables((), tuple(runs.SPEC.cameras)))
    work = Worker(policies, names, Batching(4, 0.02))
    about = {"horizon": CHUNK, "prefix": MOST, "extras": [], "actions": {"hold": [True] * WIDTH}}
    with serving(work=work, about=about, rate=1e4) as out:
        yield out


@pytest.fixture
def client(running):
    with Client(port=running.port) as out:
        yield out


def committed(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("mode", ["direct", "imagine"])
def test_a_prefix_comes_back_unchanged_and_an_empty_one_is_none(client, mode):
    seen = runs.observation() | {"mode": mode}
    free = client.infer(seen)["actions"]
    for count in range(MOST + 1):
        prefix = committed(count)
        actions = client.infer(seen | {"prefix": prefix})["actions"]
        np.testing.assert_array_equal(actions[:count], prefix)
        changed = np.abs(actions[count:] - free[count:]).max()
        assert changed > 1e-3 if count else changed == 0
    doubles = client.infer(seen | {"prefix": prefix.astype(np.float64)})
    np.testing.assert_array_equal(doubles["actions"], actions)
    assert "prefix" not in doubles  # actions are the only array of an answer


def test_clients_with_prefixes_of_all_lengths_are_one_batch_of_their_mode(running, policies):
    """Each gets the same answer as alone."""
    asked = [runs.observation(seed=i) | {"mode": mode} for mode in policies for i in range(4)]
    asked = [x | ({"prefix": committed(i % 4, i)} if i % 4 else {}) for i, x in enumerate(asked)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = [Client(port=running.port) for _ in asked]
        alone = [c.infer(x)["actions"] for c, x in zip(clients, asked, strict=True)]
        for policy in policies.values():
            policy.batches.clear()
        work = running.application.work
        until = time.monotonic() + 30
        # Whichever client is served alone first, the others are queued by then.
        while sum(sorted(x) == [0, 1, 2, 3] for p in policies.values() for x in p.batches) < 2:
            together = list(pool.map(lambda c, x: c.infer(x)["actions"], clients, asked))
            for one, many in zip(alone, together, strict=True):
                np.testing.assert_allclose(many, one, atol=2e-5)
            assert time.monotonic() < until, [p.batches for p in policies.values()]
        assert work.batching.max_batch == 4
        for one in clients:
            one.close()


def test_mismatched_prefixes_are_one_line_errors_with_both_sizes(client, policies):
    seen = runs.observation()
    for prefix, text in (
        (committed(MOST + 1), r"prefix is float32 \(4, 3\), .* \(d, 3\): .*, at most 3"),
        (committed(2)[:, :2], r"prefix is float32 \(2, 2\), .* \(d, 3\): .*, at most 3"),
        (committed(2)[0], r"prefix is float32 \(3,\), .* numbers \(d, a\)"),
        ([[1.0, 2.0, 3.0], [1.0]], "its rows differ in length"),
        (np.full((1, WIDTH), np.nan, np.float32), "must be finite"),
        ("abc", r"prefix is <U3 \(\), .* numbers"),
    ):
        with pytest.raises(ServerError, match=text) as error:
            client.infer(seen | {"prefix": prefix})
        assert "\n" not in str(error.value)
    with pytest.raises(ServerError, match="'imagin' is not served; there are direct, imagine"):
        client.infer(seen | {"mode": "imagin"})
    assert client.infer(seen)["actions"].shape == (CHUNK, WIDTH)
    with pytest.raises(BadObservation, match=r"at most 3"):
        policies["direct"].admit(seen, committed(9))


def test_json_carries_prefixes_too(running, client):
    seen = runs.observation()
    plain = {"images": {k: x.tolist() for k, x in seen["images"].items()},
             "proprio": seen["proprio"].tolist(), "instruction": seen["instruction"]}
    for prefix in (committed(2), committed(0)):
        body = json.dumps(plain | {"prefix": prefix.tolist()}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/act", body) as reply:
            actions = np.asarray(json.loads(reply.read()), np.float32)
        want = client.infer(seen | {"prefix": prefix})["actions"]
        np.testing.assert_array_equal(actions, want)


class Late:
    """Answers over the wire at once, and delays the answers by some control steps."""

    def __init__(self, steps):
        self.steps, self.now, self.asked = steps, 0, []

    def submit(self, call, observation):
        future, due = concurrent.futures.Future(), self.now + self.steps
        future.set_result(call(observation))
        self.asked.append((observation, future.result()["actions"]))
        future.done = lambda: self.now >= due
        return future


@pytest.mark.parametrize("late", [1, 3, 4])
def test_a_robot_plays_what_it_had_committed_to_and_goes_on_with_the_new_chunk(client, late):
    """Also with more steps than the policy's prefix, which then has the first of them."""
    clock = Late(late)
    robot = ActionChunks(client, "prefix", execute=2, executor=clock)
    played = []
    for clock.now in range(30):
        played.append(robot.act(runs.observation(seed=clock.now)))
    assert len(clock.asked) > 30 // (late + 3)
    for observation, actions in clock.asked:
        prefix, at = observation["prefix"], observation["executed_actions"]
        assert len(prefix) == min(observation["inference_delay"], MOST)
        np.testing.assert_array_equal(actions[: len(prefix)], prefix)
        # The committed actions were executed until the answer arrived.
        count = min(len(prefix), len(played) - at, late)
        np.testing.assert_array_equal(played[at : at + count], prefix[:count])
    starts = [observation["executed_actions"] for observation, _ in clock.asked]
    (_, actions), start = clock.asked[3], starts[3]
    end = starts[4] + late  # until the next answer arrives
    np.testing.assert_array_equal(played[start + late : end], actions[late : end - start])


def test_the_worker_compiles_every_mode_before_it_serves(policies, monkeypatch):
    monkeypatch.setattr(worker, "TRIALS", 1)
    for policy in policies.values():
        policy.batches.clear()
    work = Worker(policies, Names(tables((), tuple(runs.SPEC.cameras))), Batching(2))
    work.start()
    assert [p.batches for p in policies.values()] == [[[0], [0, 0], [0]]] * 2
    assert work.latency().keys() == {"direct", "imagine"} and work.stop()
