"""Tests that the explorer's page shows what the objects do, and works in a browser."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_configs import get, spec_of
from viz import browser

from wamjax import config as configs
from wamjax import flops, wam
from wamjax.data import pipeline
from wamjax.models.autoregressive import CAUSAL
from wamjax.models.visibility import cacheable
from wamjax.viz import page
from wamjax.viz.explore import build, schemes, tables
from wamjax.wam.slots import Role
from wamjax.wam.video.schemes import SCHEMES


class Same:
    def forward(self, x):
        return x

    inverse = forward


def unfold(mask):
    size = sum(count for count, _ in mask)
    rows = []
    for count, spans in mask:
        row = np.zeros(size, bool)
        for start, stop in spans:
            row[start:stop] = True
        rows += [row] * count
    return np.array(rows)


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """Returns (config, objective, html) of the variant with the most to show, with its data."""
    root = tmp_path_factory.mktemp("explored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        config = get("quickstart", "debug,variant=optional_idm")
        for source in config.data.sources.values():
            source.collect.episodes = 3
        path = build.write(config, root / "out", measure=False)
        yield config, wam.build(config, pipeline.spec_of(config)), path.read_text()


def test_the_page_is_one_file(explored):
    text = explored[2]
    assert not re.findall(r"(?:src|href)=['\"](?!data:|#)", text)
    assert "default-src 'none'" in text and "http://" not in text.replace(
        "http://www.w3.org/2000/svg", "")  # fmt: skip


def test_slots_and_tables_are_those_of_the_uses(explored):
    _, objective, text = explored
    found = page.embedded(text, "explore")
    assert len(objective.uses) == 2 == len(found["slots"]["uses"]) == len(found["tables"])
    assert [tuple(x) for x in found["slots"]["names"]] == list(objective.slot_names)
    shown = zip(objective.uses, found["slots"]["uses"], found["tables"], strict=True)
    for use, row, table in shown:
        roles = dict(use.factorization.roles)
        for (_, group), state in zip(objective.slot_names, row["states"], strict=True):
            assert state == roles.get(group, Role.ABSENT).name.lower()
        tokens = dict(zip(table["groups"], table["tokens"], strict=True))
        height, width, _ = objective.network.latent
        each = height * width // objective.network.patch**2
        assert tokens["first"] == each and tokens["action"] == objective.chunk
        assert tokens["future"] == each * (found["schemes"][0]["frames"] - 1)
        mask = use.table.mask(tokens)
        np.testing.assert_array_equal(unfold(table["mask"]), mask)
        assert table["each"] == 1 and table["share"] == pytest.approx(mask.mean())
        assert tuple(table["keeps"]) == cacheable(use.table, use.given)
    assert found["tables"][0]["keeps"] == ["first", "cond"]


def test_stages_account_for_the_whole_program(explored):
    """Their FLOPs add up to the program's, and everything read was cached before."""
    config, objective, text = explored
    found = {p["name"]: p for p in page.embedded(text, "explore")["programs"]}
    assert list(found)[:3] == ["act: direct", "act: imagine", "imagine"]
    for name, program in found.items():
        stored = {}
        for stage in program["stages"]:
            assert stage["cached"].items() <= stored.items(), name
            stored |= stage["emits"]
    steps = objective.steps
    imagine = found["act: imagine"]["stages"]
    assert [(s["name"], s["repeats"]) for s in imagine] == [
        ("prefill first", 1), ("denoise future", steps), ("prefill cond", 1),
        ("denoise action", steps),
    ]  # fmt: skip
    assert list(imagine[-1]["cached"]) == ["first", "cond"]
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(objective.init, key)
    observation = objective.observation_spec(1)
    act = functools.partial(_act, objective)
    direct = found["act: direct"]
    assert direct["flops"] == flops.count(act, params, observation, key)
    stages = sum(s["repeats"] * s["flops"] for s in direct["stages"])
    assert direct["rest"] == direct["flops"] - stages > 0
    # The rest is done once: latents, text and state, and the embeddings of all levels.
    outside = functools.partial(_outside, objective)
    assert direct["rest"] == flops.count(outside, params, observation)


def _act(objective, params, observation, key):
    return objective.policy(params, {"actions": Same(), "proprio": Same()}, observation, key)


def _outside(objective, params, observation):
    levels = {"first": jnp.zeros((1, 1)), "action": jnp.zeros((objective.steps + 1, 1))}
    text = {k: observation[k] for k in ("instruction", "proprio")}
    net = objective.bind(params)
    latents = objective.codec.encode(observation["video"])
    return latents, net("conditions", text).contexts, net("times", levels)


def test_noising_shows_real_data_under_the_process(explored):
    config, objective, text = explored
    found = {w["group"]: w for w in page.embedded(text, "explore")["noising"]}
    assert set(found) == {"future", "cond", "action"}
    way, process = found["action"], objective.action_flow
    np.testing.assert_allclose(way["levels"], process.schedule(objective.steps))
    values = np.array([step["values"] for step in way["steps"]])
    noise, clean = values[0], values[-1]
    mixed = [process.corrupt(clean, noise, jnp.float32(level)) for level in way["levels"]]
    np.testing.assert_allclose(values, mixed, atol=2e-3)
    batch = next(iter(pipeline.open_data(config)[2]))
    assert min(np.abs(clean - x).max() for x in batch["actions"][: objective.row]) < 1e-3
    pictures = [step["picture"] for step in found["future"]["steps"]]
    assert len(set(pictures)) == len(pictures) == objective.steps + 1
    assert all(x.startswith("data:image/") for x in pictures)


def test_without_data_only_levels_are_shown(explored, tmp_path):
    config, objective = explored[0].copy_and_resolve_references(), explored[1]
    config.data.root = str(tmp_path)
    config.data.sources.demos = configs.source(path="nowhere")
    ways, note = build._ways(config, objective)
    assert [way["group"] for way in ways] == ["future", "action"] and "nowhere" in note
    np.testing.assert_array_equal(ways[1]["levels"], objective.levels_of("action"))
    assert all(way["steps"] == [] for way in ways)


def test_a_mask_of_many_tokens_is_drawn_coarsely_and_counted_exactly():
    tokens = {"prefix": 3, "video": 5001}
    found = tables._table("ar", CAUSAL, (), tokens, {"prefix": 0, "video": 0})
    assert found["share"] == pytest.approx(CAUSAL.mask(tokens).mean(), rel=1e-12)
    assert len(unfold(found["mask"])) == sum(found["cells"]) <= tables.CELLS + 2
    assert found["each"] == 3 and found["keeps"] == ()


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_list_as_many_passes_as_the_model_makes(name):
    config = get("video_tabletop", "debug")
    config.objective.scheme = name
    configs.validate(config)
    objective = wam.build(config, spec_of(config))
    frames = sum(objective.slots.values())
    scheme = schemes.fitted(objective.scheme, frames)
    shares = np.linspace(1, 0, objective.steps + 1)
    found = schemes.passes(scheme, frames, shares)
    given = sum(list(objective.slots.values())[: scheme.given])
    assert len(found) == objective.passes(given, frames)
    assert all(set(p.now).isdisjoint(p.cache) for p in found)
    made = {i for p in found for i in p.now if "denoise" in p.text}
    assert made | set(range(given)) == set(range(frames))
    table, groups = schemes.table_of(scheme, frames)
    assert table == objective.use.table
    assert {g: len(at) for g, at in groups.items()} == objective.slots
    np.testing.assert_array_equal(
        unfold(tables.runs(table.mask(objective.slots))), table.mask(objective.slots))


LOOK = """
const seen = {}, texts = (id) => [...document.querySelectorAll(`#${id} .facts`)]
  .map((x) => x.textContent).join("|");
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
for (const [i, section] of document.querySelectorAll("section").entries()) {
  press(String(i + 1));
  const all = new Set([texts(section.id)]), choices = section.querySelectorAll(".choice button");
  for (const button of choices.length ? choices : [null]) {
    button?.click();
    for (const key of ["End", "ArrowLeft", "Home", "ArrowRight"]) {
      press(key);
      all.add(texts(section.id));
    }
  }
  seen[section.id] = all.size;
}
const mask = document.querySelector("#tables canvas"), box = mask.getBoundingClientRect();
const place = { clientX: box.left + 1, clientY: box.top + 1 };
mask.dispatchEvent(new PointerEvent("pointerdown", place));
return { seen, pointed: texts("tables"), ready: document.documentElement.dataset.ready,
  paper: getComputedStyle(document.body).backgroundColor,
  overflow: document.documentElement.scrollWidth - innerWidth };
"""


@pytest.mark.parametrize("width,dark", [(1000, False), (500, True)])
def test_the_page_works_in_a_browser(explored, tmp_path, width, dark):
    done = browser.run(explored[2], tmp_path, LOOK, width, dark)
    assert done["ready"] == "yes" and done["overflow"] <= 0
    # Texts that were shown: at the ends of all steps, and for each choice.
    least = {"noising": 4, "schemes": 10, "slots": 2, "tables": 7, "programs": 7}
    assert all(done["seen"][name] >= count for name, count in least.items()), done["seen"]
    assert done["pointed"] == "token 0 of first attends token 0 of first"
    assert (done["paper"] == "rgb(255, 255, 255)") is not dark
    assert (tmp_path / "page.png").stat().st_size > 10_000
