"""Compares with timesteps and trajectories of diffusers' schedulers, for one fixed network.

diffusers computes in float32, so trajectories agree to 1e-5 of their size; timesteps are equal. The
long ones of DDPM are compared with its steps in float64.
Trajectories are compared after the second and the last step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from wamjax.diffusion.ddpm import DDPM  # noqa: E402
from wamjax.diffusion.edm import EDM  # noqa: E402
from wamjax.diffusion.flow import RectifiedFlow  # noqa: E402
from wamjax.diffusion.solvers import SOLVERS  # noqa: E402
from wamjax.diffusion.stochastic import ancestral  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
SHAPE = (2, 5, 3)
MIX = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
START = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def network(x, time, channels=3):
    """Computes a smooth function of state and time that both libraries can evaluate."""
    lib, mix = jnp, MIX
    if isinstance(x, torch.Tensor):
        lib, mix = torch, torch.from_numpy(MIX).to(x.dtype)
    out = lib.sin(x @ mix[:, :channels] + time / 300)
    return out + 0.3 * x if channels == 3 else out


def reference(scheduler, start=START, call=network, **kwargs):
    """Returns the states of a diffusers scheduler after each of its steps."""
    x, states = torch.from_numpy(start), []
    for time in scheduler.timesteps:
        scaled = getattr(scheduler, "scale_model_input", lambda x, time: x)(x, time)
        x = scheduler.step(call(scaled, time), time, x, return_dict=False, **kwargs)[0]
        states.append(x.numpy())
    return states


def check(solver, call, process, levels, want, times=None, start=START, rtol=1e-5):
    """Compares a solver on prefixes of the grid with the reference states.

    Args:
      times: levels passed to the network, (n,); the solver's levels by default.
    """
    assert len(levels) == len(want) + 1
    times = levels if times is None else np.append(times, 0)
    for n in {min(2, len(want)), len(want)}:
        got = solver(call, start, levels[: n + 1], times[: n + 1], process)
        state, before = want[n - 1], [start, *want][n - 1]
        size = np.abs(state).max() + 0.02 * np.abs(before).max()  # float32 loses this in a big step
        np.testing.assert_allclose(got, state, rtol=0, atol=rtol * size)


def network_of(process):
    """Returns the network of a process with `c_in`, given the level."""
    return lambda x, level: network(process.c_in(level) * x, process.c_noise(level))


@pytest.mark.parametrize("shift, steps", [(1.0, 6), (3.0, 6), (5.0, 6), (3.0, 1), (5.0, 25)])
def test_flow_match_euler(shift, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    flow = RectifiedFlow(shift, spacing="euler")
    levels = flow.schedule(steps)
    np.testing.assert_allclose(levels, scheduler.sigmas, rtol=2e-7)
    np.testing.assert_allclose(1000 * levels[:-1], scheduler.timesteps, rtol=2e-7)
    want = reference(scheduler)
    for name in ("euler", "ddim"):
        check(SOLVERS[name], network, flow, levels, want, 1000 * levels[:-1])


@pytest.mark.parametrize("process, grid", [
    (RectifiedFlow(1.0, spacing="euler"), "1 .8002 .6004 .4006 .2008 .001"),
    (RectifiedFlow(3.0, spacing="euler"), "1 .923343 .818923 .668327 .432225 .008929"),
    (RectifiedFlow(5.0, spacing="euler"), "1 .952663 .883213 .771431 .56165 .024414"),
    (RectifiedFlow(3.0, spacing="unipc"), ".999999 .93757 .857327 .750375 .600719 .376404"),
    (DDPM(spacing="leading"), "830 664 498 332 166 0"),
    (EDM(), "80 24.40834 5.838948 .965417 .085087 .002"),
])  # fmt: skip
def test_numbers_of_the_spec(process, grid):
    want = np.array(grid.split(), float)
    np.testing.assert_allclose(process.schedule(6)[:-1], want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "shift, steps", [(1.0, 6), (3.0, 6), (5.0, 6), (3.0, 1), (3.0, 2), (5.0, 20)]
)
def test_unipc_on_a_flow(shift, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    flow = RectifiedFlow(shift, spacing="unipc")
    levels = flow.schedule(steps)
    times = np.floor(1000 * levels[:-1])
    np.testing.assert_array_equal(times, scheduler.timesteps)
    np.testing.assert_array_equal(levels.astype(np.float32), scheduler.sigmas)
    if (shift, steps) == (3.0, 6):
        np.testing.assert_array_equal(times, [999, 937, 857, 750, 600, 376])
    # At the start 1 - sigma is 1e-6, so both sides must use the same float32 sigma.
    levels = scheduler.sigmas.numpy()
    check(SOLVERS["unipc"], network, flow, levels, reference(scheduler), times)


@pytest.mark.parametrize(
    "ours, theirs", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
@pytest.mark.parametrize("noising, betas", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("solver, scheduler", [
    ("unipc", diffusers.UniPCMultistepScheduler),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler),
])  # fmt: skip
def test_multistep_on_a_variance_preserving_path(solver, scheduler, noising, betas, ours, theirs):
    scheduler = scheduler(beta_schedule=betas, prediction_type=theirs)
    scheduler.set_timesteps(11)
    process = DDPM(noising, predicts=ours, spacing="multistep")
    levels = process.schedule(11)
    np.testing.assert_array_equal(levels[:-1], scheduler.timesteps)
    # At the end of "cosine" the float32 abar of diffusers is 1.3e-5 off, and x0 is divided by it.
    rtol = 3e-5 if noising == "cosine" else 1e-5
    check(SOLVERS[solver], network, process, levels, reference(scheduler), rtol=rtol)


@pytest.mark.parametrize("sigma_data, steps", [(0.5, 1), (0.5, 6), (1.0, 20)])
def test_edm_euler(sigma_data, steps):
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_data=sigma_data)
    scheduler.set_timesteps(steps)
    process = EDM(sigma_data)
    levels = process.schedule(steps)
    np.testing.assert_allclose(levels, scheduler.sigmas, rtol=3e-7)
    times = process.c_noise(levels[:-1])
    np.testing.assert_allclose(times, scheduler.timesteps, rtol=1e-5, atol=1e-6)
    start = 80 * START
    want = reference(scheduler, start)
    call = lambda x, level: network(process.c_in(level) * x, process.c_noise(level))  # noqa: E731
    for name in ("euler", "ddim"):
        check(SOLVERS[name], call, process, levels, want, start=start)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("noising, betas", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_ddim(noising, betas, spacing):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=betas, beta_start=1e-4, beta_end=0.02, clip_sample=False,
        timestep_spacing=spacing,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    process = DDPM(noising, spacing=spacing)
    levels = process.schedule(10)
    np.testing.assert_array_equal(levels[:-1], scheduler.timesteps)
    if spacing != "linspace":  # with it, diffusers steps to t - 100, which is not its next timestep
        check(SOLVERS["ddim"], network, process, levels, reference(scheduler))


def given_noise(monkeypatch, module, noises):
    """Makes diffusers use these draws."""
    noises = iter(noises)
    draw = lambda shape, **kwargs: torch.from_numpy(np.array(next(noises)))  # noqa: E731
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)


def our_noises(key, steps):
    """Returns the draws of `ancestral` for a state of one leaf."""
    keys = [jax.random.split(k, 1)[0] for k in jax.random.split(key, steps)]
    return [jax.random.normal(k, SHAPE) for k in keys]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(monkeypatch, eta):
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(8)
    process, key = DDPM(spacing="leading"), jax.random.key(0)
    levels = process.schedule(8)
    given_noise(monkeypatch, "scheduling_ddim", our_noises(key, 8))
    want = reference(scheduler, eta=eta)
    got = ancestral(network, START, levels, levels, process, key, eta)
    np.testing.assert_allclose(got, want[-1], rtol=0, atol=1e-5 * np.abs(want[-1]).max())


def in_float64(scheduler):
    """Computes the tables in float64; the float32 product of 1,000 factors costs 1e-5 in 250
    steps."""
    betas = np.linspace(scheduler.config.beta_start, scheduler.config.beta_end, 1000)
    scheduler.betas = torch.from_numpy(betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = scheduler.one.double()
    return scheduler


@pytest.mark.parametrize("dtype, rounding", [("float32", 1e-5), ("float64", 1e-6)])
@pytest.mark.parametrize("ours, theirs", [
    ("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")
])  # fmt: skip
@pytest.mark.parametrize("steps", [8, 250])
def test_ddpm(monkeypatch, ours, theirs, steps, dtype, rounding):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, variance_type=theirs, timestep_spacing="leading"
    )
    precise = steps > 8 or dtype == "float64"
    scheduler = in_float64(scheduler) if precise else scheduler
    scheduler.set_timesteps(steps)
    process, start = DDPM(variance=ours, spacing="leading"), START.astype(dtype)
    levels = process.schedule(steps)
    np.testing.assert_array_equal(levels[:-1], scheduler.timesteps.numpy())
    channels = 6 if ours == "learned" else 3
    swap = lambda x: x.transpose(1, 2)  # noqa: E731  diffusers has channels first
    call = functools.partial(network, channels=channels)
    with jax.enable_x64(dtype == "float64"):
        key = jax.random.key(0)
        noises = [np.swapaxes(n, 1, 2) for n in our_noises(key, steps)]
        got = ancestral(call, start, levels, levels, process, key)
    assert got.dtype == dtype
    given_noise(monkeypatch, "scheduling_ddpm", noises)
    theirs = lambda x, time: swap(call(swap(x), time))  # noqa: E731
    first = np.swapaxes(START, 1, 2).astype(np.float64 if precise else np.float32)
    want = np.swapaxes(reference(scheduler, first, theirs)[-1], 1, 2)
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding * np.abs(want).max())
