"""Tests adapters of simulators, always with fake packages, and with the real ones if installed."""

import importlib.metadata
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from wamjax.envs import aloha, host, libero, metaworld, pusht, pusht_expert, render
from wamjax.envs.world import WORLDS, World, open_world

ADAPTERS = {"metaworld": metaworld, "pusht": pusht, "aloha": aloha, "libero": libero}


@pytest.fixture
def package(monkeypatch):
    """Makes a fake module, and its parent packages, importable."""

    def put(name, **content):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules or not getattr(sys.modules[path], "made_up", False):
                module = types.ModuleType(path)
                module.made_up, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, path, module)
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[path])
        vars(sys.modules[name]).update(content)
        return sys.modules[name]

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    return put


def benchmark(package):
    """Fakes LIBERO's benchmark, with two tasks in each suite."""

    class Suite:
        def __init__(self, name):
            self.tasks = [types.SimpleNamespace(name=f"pick_up_{name}_{i}", language=f"take {i}")
                          for i in range(2)]  # fmt: skip

        def get_num_tasks(self):
            return len(self.tasks)

        def get_task(self, i):
            return self.tasks[i]

        def get_task_names(self):
            return [task.name for task in self.tasks]

        def get_task_bddl_file_path(self, i):
            return f"/bddl/{self.tasks[i].name}"

        def get_task_init_states(self, i):
            return np.arange(50) + 100 * i

    module = package("libero.libero.benchmark")
    module.get_benchmark = lambda name: lambda: Suite(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_simulator_is_opened_by_name_and_describes_a_world(name, package, monkeypatch):
    benchmark(package)
    world = open_world(name, workers=1)
    assert isinstance(world, World) and world.name == name and world.expert
    assert world.environment == f"wamjax.envs.{name}:Environment" and world.workers == 1
    assert world.versions and len(world.action_names) == len(world.noisy or world.action_names)
    # A server can send the description unchanged.
    about = json.loads(json.dumps(ADAPTERS[name].Environment().describe()))
    there = host.described(about | {"address": "localhost:1"})
    for key in ("tasks", "cameras", "proprio_names", "action_names", "max_steps", "noisy"):
        assert getattr(there, key) == getattr(world, key), key
    with pytest.raises(ValueError, match=f"{name}:sise=1.*argument 'sise'"):
        open_world(f"{name}:sise=1")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_package_names_its_extra(name, package, monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    benchmark(package)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=rf"pip install 'wamjax\[{name}\]'"):
        open_world(name)
    assert name in WORLDS


def test_pusht_on_a_made_up_package(package):
    class PushT:
        def __init__(self, **options):
            self.options, self.actions = options, []

        def reset(self, seed):
            assert 0 <= seed < 2**32
            return np.array([seed % 7, 2.0, 3, 4, 5]), {}

        def step(self, action):
            self.actions.append(action)
            done = len(self.actions) == 2
            return np.array([*action, 3, 4, 5]), 0.0, done, False, {"is_success": np.bool_(done)}

        def _render(self):
            side = self.options["observation_width"]
            return np.full((side, side, 3), len(self.actions), np.uint8)

        def close(self):
            self.actions = None

    package("gym_pusht.envs.pusht", PushTEnv=PushT)
    environment = pusht.Environment(size=32)
    seen = environment.reset("push", 2**32 + 12, {})
    np.testing.assert_array_equal(seen["proprio"], [12 % 7, 2])
    seen, done = environment.step(np.array([-5.0, 600.0]))
    np.testing.assert_array_equal(environment._env.actions, [[0, 512]])
    assert not done and seen["images"]()["top"].shape == (32, 32, 3)
    seen, done = environment.step(np.array([7.0, 8.0]))
    np.testing.assert_array_equal(seen["proprio"], [7, 8])
    assert done is True and (seen["images"]()["top"] == 2).all()


def test_aloha_on_a_made_up_package(package, monkeypatch):
    class Physics:
        def __init__(self, path):
            self.model, self.data = types.SimpleNamespace(ptr=path), types.SimpleNamespace(ptr=self)
            self.steps, self.ready = [], False

        from_xml_path = classmethod(lambda cls, path: cls(path))

        def timestep(self):
            return 0.002

        def step(self, count):
            self.steps.append(count)

        def reset_context(self):
            return self

        def __enter__(self):
            self.ready = True

        def __exit__(self, *error):
            self.ready = False

    class Rules:
        def initialize_episode(self, physics):
            assert physics.ready
            self.start = sim.BOX_POSE[0]

        def before_step(self, action, physics):
            self.action = action

        def get_qpos(self, physics):
            return np.arange(14.0)

        def get_reward(self, physics):
            return len(physics.steps) + 2

    class Drawn:
        def __init__(self, model, size, fast):
            self.asked = model, size, fast

        def draw(self, data, cameras):
            return {name: (self.asked, len(data.steps)) for name in cameras}

    sim = package("gym_aloha.tasks.sim", TransferCubeTask=Rules, InsertionTask=Rules, BOX_POSE=[0])
    package("gym_aloha.constants", DT=0.02, ASSETS_DIR=pathlib.Path("/a"))
    package("gym_aloha.utils", sample_box_pose=lambda seed: [seed],
            sample_insertion_pose=lambda seed: ([seed], [seed + 1]))  # fmt: skip
    package("dm_control.mujoco", Physics=Physics)
    monkeypatch.setattr(aloha, "Renderer", Drawn)
    environment = aloha.Environment(size=48, width=64)
    environment.reset("insertion", 5, {})
    np.testing.assert_array_equal(environment._rules.start, [5, 6])
    seen = environment.reset("transfer_cube", 5, {})
    assert environment._rules.start == [5]
    np.testing.assert_array_equal(seen["proprio"], np.arange(14))
    seen, done = environment.step(np.ones(14, np.float32))
    assert not done and environment._physics.steps == [10]  # of 2 ms are 20 ms
    assert environment._rules.action.dtype == float
    seen, done = environment.step(np.ones(14))
    asked = "/a/bimanual_viperx_transfer_cube.xml", (48, 64), True
    assert done and seen["images"]() == {"top": (asked, 2), "angle": (asked, 2)}


class Kitchen:
    """Fakes LIBERO's environment, with a picture without symmetry."""

    made = []

    def __init__(self, bddl_file_name, **options):
        self.name, self.options, self.log, self.open = bddl_file_name, options, [], True
        self.env = types.SimpleNamespace(modify_observable=self.modify)
        self.data = types.SimpleNamespace(**{name: np.zeros(1) for name in libero.PLACES})
        data = types.SimpleNamespace(_data=self.data)
        self.sim = types.SimpleNamespace(render=self.render, data=data)
        self.taken = []
        self.robots = [types.SimpleNamespace(gripper=types.SimpleNamespace(dof=1))]
        Kitchen.made.append(self)

    def seed(self, seed):
        self.log.append(("seed", seed))

    def reset(self):
        self.log.append("reset")
        return self.seen()

    def set_init_state(self, state):
        self.log.append(("state", state))
        return self.seen()

    def modify(self, name, attribute, value):
        self.log.append((name, attribute, value))
        if attribute == "sensor":
            self.note = value

    def step(self, action):
        """Observes in the middle of a step, as robosuite does."""
        self.note({})
        self.taken.append(np.array(action))
        self.data.xpos[:] = len(self.taken)
        return self.seen(), 0.0, False, {}

    def check_success(self):
        return len(self.taken) > 31

    def close(self):
        self.open = False

    def seen(self):
        turn = Rotation.from_euler("xyz", [0.1, 0.2, 3.0]).as_quat()
        return {"robot0_eef_pos": np.array([1.0, 2, 3]), "robot0_eef_quat": turn,
                "robot0_gripper_qpos": np.array([0.01, -0.02])}  # fmt: skip

    def render(self, camera_name, width, height):
        image = np.zeros((height, width, 3), np.uint8)
        image[: height // 2, : width // 4] = 200  # above on the left, in the raw picture
        image[..., 2] = self.data.xpos
        return image


@pytest.fixture
def kitchens(package):
    benchmark(package)
    package("libero.libero.envs", OffScreenRenderEnv=Kitchen)
    package("robosuite.utils.observables", sensor=lambda modality: lambda function: function)
    Kitchen.made.clear()
    return Kitchen.made


@pytest.mark.parametrize(
    "convention, cameras, settle, grips",
    [
        ("fast_wam", ("image", "wrist_image"), 30, {1.0: -1, 0.0: 1, 0.7: -1, 0.2: 1}),
        ("cosmos_policy", ("agentview", "wrist"), 10, {1.0: 1, -1.0: -1, 0.3: 0.3}),
    ],
)
def test_libero_follows_each_public_evaluation(kitchens, convention, cameras, settle, grips):
    environment = libero.Environment(suite="libero_goal", convention=convention)
    seen = environment.reset("pick_up_libero_goal_1", 57, {})
    kitchen = kitchens[0]
    assert kitchen.options["camera_heights"] == kitchen.options["camera_widths"] == 256
    assert ("state", 107) in kitchen.log and ("seed", 0) in kitchen.log  # 57 of 50 states
    assert len(kitchen.taken) == settle
    np.testing.assert_array_equal(np.stack(kitchen.taken), [[0] * 6 + [-1]] * settle)
    assert ("robot0_eye_in_hand_image", "enabled", False) in kitchen.log  # or each step would draw
    images = seen["images"]()
    assert tuple(images) == cameras and {x.shape for x in images.values()} == {(224, 224, 3)}
    # Rendered as observed, within the last step; rendering changes nothing.
    assert (images[cameras[0]][..., 2] == settle - 1).all()
    assert kitchen.data.xpos == settle
    bright = np.argwhere(images[cameras[0]][..., 0] > 150).mean(axis=0) / 224
    # The raw picture is upside down, so its top is below; Fast-WAM's is mirrored, too.
    right = 7 / 8 if convention == "fast_wam" else 1 / 8
    np.testing.assert_allclose(bright, [3 / 4, right], atol=0.01)
    for policy, simulator in grips.items():
        environment.step(np.array([0.1, 0, 0, 0, 0, 0.5, policy], np.float32))
        np.testing.assert_allclose(kitchen.taken[-1][[0, 5, 6]], [0.1, 0.5, simulator], rtol=1e-6)
    names = environment.describe()["proprio_names"]
    felt = dict(zip(names, seen["proprio"], strict=True))
    assert (felt["x"], felt["z"], felt["right_finger"]) == (1, 3, -0.02)
    a = [felt[name] for name in names if name.startswith(("q", "r")) and name != "right_finger"]
    turn = Rotation.from_rotvec(a) if len(a) == 3 else Rotation.from_quat(a)
    np.testing.assert_allclose(turn.as_euler("xyz"), [0.1, 0.2, 3.0], atol=1e-6)


def test_libero_keeps_the_latest_simulators(kitchens):
    environment = libero.Environment(keep=2)
    names = ["pick_up_libero_goal_0", "pick_up_libero_10_1", "pick_up_libero_goal_0",
             "pick_up_libero_object_0", "pick_up_libero_goal_0"]  # fmt: skip
    for name in names:
        environment.reset(name, 0, {})
    assert [k.name.removeprefix("/bddl/") for k in kitchens] == [names[0], names[1], names[3]]
    assert [k.open for k in kitchens] == [True, False, True]
    environment.close()
    assert not any(k.open for k in kitchens)


def test_libero_suites_and_steps_are_the_published_ones(kitchens):
    def most(**options):
        return libero.Environment(**options).describe()["max_steps"]

    assert [most(suite=s) for s in libero.SUITES] == [400, 400, 400, 700] and most() == 700
    assert [most(suite=s, convention="cosmos_policy") for s in libero.SUITES] == [
        220, 280, 300, 520,
    ]  # fmt: skip
    assert len(libero.Environment().describe()["tasks"]) == 8  # two of each, of this made-up one
    with pytest.raises(ValueError, match="libero:suite=libero_90 must be one of"):
        open_world("libero:suite=libero_90")


def test_perturbed_libero_suites_tell_the_instruction_of_their_problem(kitchens, tmp_path):
    """The package derives instructions from file names, which the suites share."""
    module = sys.modules["libero.libero.benchmark"]
    made_up = module.get_benchmark

    def with_problems(suite):
        class Perturbed(made_up(suite)().__class__):
            def get_task_bddl_file_path(self, i):
                path = tmp_path / f"{suite}_{i}.bddl"
                path.write_text(f"(define\n  (:language  Grab {suite} {i} )\n  (:regions (a)))")
                return str(path)

        return lambda: Perturbed(suite)

    module.get_benchmark = with_problems
    for kind in libero.PERTURBED:
        suite = f"libero_goal_{kind}"
        described = libero.Environment(suite=suite).describe()
        names = [task.name for task in made_up(suite)().tasks]
        assert list(described["tasks"]) == names and described["max_steps"] == 400
        told = [f"grab {suite} {i}" for i in range(2)]
        own = [task.language for task in made_up(suite)().tasks]
        assert list(described["tasks"].values()) == (told if kind in ("lan", "task") else own)
    for wrong in ("libero_goal_lans", "libero_goal_", "swap", "libero_90_swap"):
        with pytest.raises(ValueError, match="must be one of .*or one of these with _lan or"):
            libero.Environment(suite=wrong)


def test_an_axis_angle_is_the_rotation_and_is_not_folded():
    """The published formula: angles up to 2 pi where w is negative, against scipy's rotation."""
    for quaternion in Rotation.random(50, rng=np.random.default_rng(0)).as_quat():
        for q in (quaternion, -quaternion):
            a = libero.axis_angle(q)
            np.testing.assert_allclose(
                Rotation.from_rotvec(a).as_matrix(), Rotation.from_quat(q).as_matrix(), atol=1e-7
            )
            assert (np.linalg.norm(a) > np.pi) == (q[3] < 0)
    np.testing.assert_array_equal(libero.axis_angle(np.array([0.0, 0, 0, 1])), np.zeros(3))


@pytest.mark.parametrize("fast", [False, True])
def test_the_fast_renderer_skips_expensive_effects(package, fast):
    flags = {"shadow": 1, "reflection": 1, "fog": 0}

    class Renderer:
        def __init__(self, model, height, width):
            assert model.vis.quality.offsamples == (0 if fast else 4)
            self.shape, self.scene = (height, width, 3), types.SimpleNamespace(flags=flags)

        def update_scene(self, data, camera):
            flags.update(shadow=1, reflection=1)

        def render(self):
            return np.full(self.shape, flags["shadow"] + flags["reflection"], np.uint8)

    flag = types.SimpleNamespace(mjRND_SHADOW="shadow", mjRND_REFLECTION="reflection")
    package("mujoco", Renderer=Renderer, mjtRndFlag=flag)
    quality = types.SimpleNamespace(offsamples=4)
    model = types.SimpleNamespace(vis=types.SimpleNamespace(quality=quality))
    images = render.Renderer(model, (4, 6), fast).draw(None, ("a", "b"))
    assert list(images) == ["a", "b"] and images["b"].shape == (4, 6, 3)
    assert (images["b"] == (0 if fast else 2)).all()


def test_distances_to_the_outline_against_many_points_of_it():
    rng = np.random.default_rng(0)
    outline = pusht_expert.placed(pusht_expert.OUTLINE, np.array([250.0, 260.0, 0.7]))
    points = rng.uniform(100, 420, (200, 2))
    ends = np.roll(outline, -1, axis=0)
    many = np.concatenate([a + np.linspace(0, 1, 2000)[:, None] * (b - a)
                           for a, b in zip(outline, ends, strict=True)])  # fmt: skip
    near = np.linalg.norm(points[:, None] - many, axis=-1).min(axis=1)
    back = pusht_expert.placed(points - [250, 260], np.array([0, 0, -0.7]))
    inside = ((np.abs(back[:, 0]) < 60) & (0 < back[:, 1]) & (back[:, 1] < 30)) | (
        (np.abs(back[:, 0]) < 15) & (0 < back[:, 1]) & (back[:, 1] < 120)
    )
    assert 5 < inside.sum() < 100
    got = pusht_expert.distances(outline, points)
    np.testing.assert_allclose(got, np.where(inside, 0, near), atol=0.1)


def test_paths_lead_around_the_t():
    outline = pusht_expert.placed(pusht_expert.OUTLINE, np.array([256.0, 200.0, 0.0]))
    origin, goal = np.array([180.0, 280.0]), np.array([330.0, 280.0])  # the stem is between
    path = [origin, *pusht_expert.Roads(outline, origin).to(goal)]
    np.testing.assert_array_equal(path[-1], goal)
    dense = np.concatenate([a + np.linspace(0, 1, 50)[:, None] * (b - a)
                            for a, b in zip(path[:-1], path[1:], strict=True)])  # fmt: skip
    assert pusht_expert.distances(outline, dense).min() > pusht_expert.RADIUS
    length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    assert 180 < length < 400
    assert len(pusht_expert.Roads(outline, origin).to(np.array([190.0, 300.0]))) == 1  # is seen


def check_expert(world, task, count, at_least, steps, noise=0.0, exact=True):
    """Runs the expert twice: checks successes, equal outcomes, and a replay of its actions.

    `exact`: to the last bit, even if the simulator ran another episode before.
    """
    keys = jax.random.split(jax.random.key(3), count)
    done, again = (world.demonstrate([task] * count, keys, noise=noise) for _ in range(2))
    if exact:
        jax.tree.map(np.testing.assert_array_equal, done.recording.frames, again.recording.frames)
        np.testing.assert_array_equal(done.recording.actions, again.recording.actions)
    np.testing.assert_array_equal(done.recording.success, again.recording.success)
    assert done.recording.success.sum() >= at_least, done.recording.steps
    row = int(done.recording.success.argmax())
    assert steps[0] < done.recording.steps[row] < steps[1]
    for name, size in world.cameras.items():
        frames = done.recording.frames[name]
        assert frames.shape[2:] == (*size, 3) and frames.std() > 15, name
        assert np.abs(frames[row, 0].astype(int) - frames[row, done.length[row]]).mean() > 0.5
    length = int(done.recording.steps[row])
    replay = jax.tree_util.Partial(lambda o, k: o["actions"])
    played = world.roll_out(
        replay, [task], keys[row : row + 1], shift={}, max_steps=length, execute=length,
        told={"actions": done.recording.actions[row : row + 1, :length]},
    )  # fmt: skip
    assert played.success.all() or not exact
    if exact:
        want = done.recording.proprio[row, : length + 1]
        np.testing.assert_array_equal(played.proprio[0], want)
    return done


def test_pusht_and_its_expert():
    pytest.importorskip("gym_pusht")
    done = check_expert(open_world("pusht", workers=2), "push", 4, 3, (40, 300), noise=2.0)
    assert np.ptp(done.recording.proprio[:, 0, 0]) > 20  # seeds differ


def test_the_model_of_the_pusht_expert_is_the_environment():
    pytest.importorskip("gym_pusht")
    environment = pusht.Environment()
    environment.reset("push", 4, {})
    expert, env = pusht_expert.Expert(np.random.default_rng(0)), environment._env
    pose = np.array([*env.block.position, env.block.angle])
    expert._put(pose, np.array(env.agent.position))
    targets = [pose[:2] + [0, 50 - 10 * i] for i in range(12)]
    moved = expert._go(targets)
    for target in targets:
        environment.step(target)
    here = np.array([*env.block.position, env.block.angle])
    assert np.abs(here - pose).max() > 5  # it was pushed
    np.testing.assert_allclose(moved, here, atol=0.5)


def test_aloha_and_its_expert():
    pytest.importorskip("gym_aloha")
    check_expert(open_world("aloha", workers=2), "transfer_cube", 2, 2, (80, 200))


def test_aloha_is_the_stock_environment_without_its_pictures():
    pytest.importorskip("gym_aloha")
    render.headless()
    from gym_aloha.env import AlohaEnv

    stock, environment = AlohaEnv("insertion", "pixels_agent_pos"), aloha.Environment()
    want, seen = stock.reset(seed=9)[0], environment.reset("insertion", 9, {})
    action = np.array(want["agent_pos"])
    for number in range(3):
        np.testing.assert_allclose(seen["proprio"], want["agent_pos"], atol=1e-12)
        action = action + 0.05 * np.sin(np.arange(14) + number)
        want, reward, *_ = stock.step(action)
        seen, done = environment.step(action)
        assert done == (reward == 4)
    stock.close()
    environment.close()


def test_libero_and_its_expert():
    pytest.importorskip("robosuite")
    world = open_world("libero:suite=libero_object,size=64,fast=true", workers=1)
    assert len(world.tasks) == 10
    task = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    check_expert(world, task, 1, 1, (60, 200), exact=False)
    host.close_idle()


def test_libero_opens_every_perturbed_suite():
    """One simulator of each kind; their goals, objects and places differ as they say."""
    pytest.importorskip("robosuite")
    tasks = {
        suite: libero.Environment(suite=suite).describe()["tasks"]
        for base in libero.SUITES
        for suite in (base, *(f"{base}_{kind}" for kind in libero.PERTURBED))
    }
    assert len(tasks) == 20 and {len(of) for of in tasks.values()} == {10}
    soup = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    told = {kind: tasks[f"libero_object_{kind}"][soup] for kind in libero.PERTURBED}
    assert told["object"] == told["swap"] == tasks["libero_object"][soup]
    assert told["task"] == "pick the cream cheese and place it in the basket"
    assert told["lan"] == "grab alphabet soup and put it into basket"
    for kind in libero.PERTURBED:
        environment = libero.Environment(suite=f"libero_object_{kind}", size=64, fast=True)
        seen = environment.reset(soup, 0, {})
        assert seen["images"]()["image"].std() > 10, kind
        seen, achieved = environment.step(np.zeros(7))
        assert np.isfinite(seen["proprio"]).all() and not achieved
        environment.close()


def test_libero_shows_what_the_stock_environment_shows():
    """Uses a moving arm, since stock observations are almost a step old."""
    pytest.importorskip("robosuite")
    environment = libero.Environment(suite="libero_spatial", convention="cosmos_policy", size=64)
    task = next(iter(environment.describe()["tasks"]))
    environment.reset(task, 0, {})
    states, start = environment._open(task)[1], environment._env.get_sim_state()
    from libero.libero import benchmark
    from libero.libero.envs import OffScreenRenderEnv

    path = benchmark.get_benchmark("libero_spatial")().get_task_bddl_file_path(0)
    stock = OffScreenRenderEnv(bddl_file_name=path, camera_heights=64, camera_widths=64,
                               hard_reset=False)  # fmt: skip
    stock.seed(0)
    stock.reset()
    stock.set_init_state(states[0])
    for _ in range(10):
        stock.step(libero.STILL)
    np.testing.assert_allclose(stock.get_sim_state(), start, atol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(3):
        action = np.append(rng.uniform(-1, 1, 6), -1)
        want, (seen, _) = stock.step(action)[0], environment.step(action)
        images = seen["images"]()
        for raw, name in zip(libero.RAW, ("agentview", "wrist"), strict=True):
            np.testing.assert_array_equal(images[name], want[f"{raw}_image"][::-1])
            assert images[name].std() > 20
        np.testing.assert_allclose(seen["proprio"][2:5], want["robot0_eef_pos"], atol=1e-9)
    stock.close()
    environment.close()
