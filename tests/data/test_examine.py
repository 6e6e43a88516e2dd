"""Tests the doctor's warnings about data sets: none for a good one, and one for each fault."""

import html.parser
import json
import re

import numpy as np
import pytest
from data import synthetic
from data.ingest import layouts

import wamjax.data
from wamjax import doctor
from wamjax.data.examine import as_text, examine

INFO = {
    "control_hz": 20.0,
    "action_names": ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    "proprio_names": ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right"),
}
BACKGROUND = np.random.default_rng(9).integers(60, 120, (16, 24, 3)).astype(np.uint8)


def scene(i, steps):
    """Returns pictures of one scene, brighter at the top, with a moving dot."""
    out = np.broadcast_to(BACKGROUND, (steps, 16, 24, 3)).copy()
    out[:, :6] += 100
    for t in range(steps):
        out[t, 8 + t % 6, (5 * i + t) % 24] = 255, 0, 0
    return out


def write(path, change=lambda i, episode: None, count=5, steps=24, **info):
    def episodes():
        for i in range(count):
            actions, states = layouts.motion(i, steps)
            episode = {"images": {"front": scene(i, steps)}, "proprio": states,
                       "actions": actions, "instruction": f"lift cube {i}",
                       "success": True}  # fmt: skip
            change(i, episode)
            yield episode

    wamjax.data.write_episodes(path, INFO | info, episodes())
    return path


def test_a_good_data_set_gives_no_warnings(tmp_path):
    found = examine(write(tmp_path / "a"))
    assert found.warnings == []
    assert found.facts["gripper"] == "actions[6] (gripper): -1 opens, 1 closes"
    assert found.facts["actions"] == "delta" and found.facts["rate"] == "20 Hz"
    assert found.facts["steps"].startswith("120 (24 to 24")


def picture(turn, of=(2,)):
    def change(i, episode):
        if i in of:
            episode["images"]["front"] = turn(episode["images"]["front"])

    return change


def number(key, i, step, dim, value):
    def change(k, episode):
        if k == i:
            episode[key][step, dim] = value

    return change


def words(texts):
    return lambda i, episode: episode.update(instruction=texts[i % len(texts)])


def reverse_gripper(i, episode):
    if i == 3:
        episode["actions"][:, 6] *= -1


def steps_of(key, cut):
    def change(i, episode):
        if i == 1:
            episode["images"]["front"] = episode["images"]["front"][:cut]
            episode["proprio"], episode["actions"] = episode["proprio"][:cut], episode[key][:cut]

    return change


def same(i, episode):
    if i == 4:
        episode["actions"] = layouts.motion(0, 24)[0]


def nearly(i, episode):
    episode["actions"][:, 4] = 1e-3 * episode["actions"][:, 4]
    if i == 0:
        episode["actions"][3, 4] = 1.0


def after(i, episode):
    for key in ("proprio", "images"):
        x = episode[key]["front"] if key == "images" else episode[key]
        x = np.concatenate([x[1:], x[-1:]])
        episode[key] = {"front": x} if key == "images" else x


def idle(i, episode):
    episode["actions"][5:15, :6] = 0
    episode["proprio"][6:16] = episode["proprio"][5]


@pytest.mark.parametrize("change, said", [
    (picture(lambda x: x[:, ::-1]), r"'front' is upside down, beside the other episodes, in 2"),
    (picture(lambda x: x // 20), r"camera 'front' is dark in 1 of 5 episodes \(2\)"),
    (picture(lambda x: 0 * x + 90, (1, 3)), r"is of one colour in 2 of 5 episodes \(1, 3\)"),
    (picture(lambda x: np.broadcast_to(x[:1], x.shape)), r"is frozen in 1 of 5 episodes \(2\)"),
    (number("proprio", 1, 7, 2, 5.0), r"proprio\[2\] \(z\) jumps 2 times: episode 1 step 6"),
    (words(["", "lift"]), "some episodes have no instruction"),
    (words(["Lift it", "lift it"]), r"\['Lift it', 'lift it'\] are the same to the tokeniser"),
    (reverse_gripper, r"the gripper opens and closes the other way round in 1 episodes \(3\)"),
    (steps_of("actions", 1), r"1 episodes have one step \(1\)"),
    (same, r"1 times episodes have the same actions: \[0, 4\]"),
    (nearly, r"actions\[4\] \(dry\) is nearly constant"),
    (nearly, r"actions\[4\] \(dry\) reaches 1, and comes back as"),
    (lambda i, e: e["actions"].__setitem__((slice(None), 3), 0.5), r"actions\[3\] \(drx\) is "
                                                                   "constant"),
    (after, "observations were stored after their action.*--pairing=after"),
    (idle, r"4\d% of the steps do nothing; .*--no_op=1e-4"),
    (lambda i, e: e.update(success=i == 0), "80% of the episodes are not marked as successful"),
])  # fmt: skip
def test_every_fault_is_named(tmp_path, change, said):
    warnings = examine(write(tmp_path / "a", change)).warnings
    assert [w for w in warnings if re.search(said, w)], warnings


def test_short_episodes_and_plain_scenes_are_not_taken_for_faults_of_cameras(tmp_path):
    def plain(i, episode):  # one small thing, which stands elsewhere in one of them
        shown = np.full((24, 16, 24, 3), 90, np.uint8)
        shown[:, 13 if i == 2 else 2, 10:13] = 200, 30, 30
        shown[::2, 8, 8] = 100
        episode["images"]["front"] = shown

    assert not [w for w in examine(write(tmp_path / "a", plain)).warnings if "camera" in w]
    warnings = examine(write(tmp_path / "b", steps=1)).warnings
    assert not [w for w in warnings if "camera" in w] and [w for w in warnings if "one step" in w]


def test_swapped_colours_are_detected(tmp_path):
    def change(i, episode):
        shown = episode["images"]["front"].copy()
        shown[..., 2] //= 4
        shown[:, :, :12, 0] //= 3
        episode["images"]["front"] = shown[..., ::-1] if i == 1 else shown

    warnings = examine(write(tmp_path / "a", change)).warnings
    assert "camera 'front' is in swapped colours (BGR), beside the other episodes, in 1" in warnings


def test_absolute_actions_are_recognised(tmp_path):
    def change(i, episode):
        states = episode["proprio"]
        target = np.concatenate([states[1:, :6], states[-1:, :6]])
        episode["actions"][:, :6] = target + 0.001

    assert examine(write(tmp_path / "a", change)).facts["actions"] == "absolute"


def test_statistics_of_other_data_are_detected(tmp_path):
    write(tmp_path / "a")
    file = tmp_path / "a" / "statistics.json"
    rows = json.loads(file.read_text())
    rows["actions"]["mean"][0] += 0.1
    file.write_text(json.dumps(rows))
    (warning,) = examine(tmp_path / "a").warnings
    assert "statistics.json does not fit the episodes (actions.mean)" in warning


def test_bad_records_are_counted(tmp_path):
    write(tmp_path / "a", steps=400)
    (file,) = (tmp_path / "a").glob("episodes-*")
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)
    found = examine(tmp_path / "a")
    assert len(found.episodes) == 4 and "cannot be read" in found.warnings[0]


def test_a_rate_that_disagrees_with_another_data_set_gives_a_warning(tmp_path):
    def steady(i, episode):
        episode["proprio"][:, :6] += np.arange(len(episode["proprio"]))[:, None]

    def half(i, episode):
        steady(i, episode)
        for key in ("proprio", "actions"):
            episode[key] = episode[key][::2]
        episode["images"]["front"] = episode["images"]["front"][::2]

    write(tmp_path / "fast", steady), write(tmp_path / "slow", half, steps=48)
    warnings = examine(tmp_path / "slow", [tmp_path / "fast"]).warnings
    assert [w for w in warnings if "is the rate of one wrong?" in w], warnings
    write(tmp_path / "twin", steady)
    warnings = examine(tmp_path / "twin", [tmp_path / "fast"]).warnings
    assert not [w for w in warnings if "rate" in w]


def test_warnings_of_ingest_are_repeated(tmp_path):
    write(tmp_path / "a")
    report = {"warnings": ["frames were lost"], "bad": {"x.hdf5": "x.hdf5: cut off"}}
    (tmp_path / "a" / "ingest.json").write_text(json.dumps(report))
    assert examine(tmp_path / "a").warnings == [
        "1 episodes of the source were left out: x.hdf5", "frames were lost"
    ]  # fmt: skip


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)


def test_the_command_prints_it_and_writes_a_page_that_needs_no_other_file(tmp_path, capsys):
    write(tmp_path / "a", words(["<b>lift</b> it"]))
    arguments = [f"--data={tmp_path / 'a'}", f"--out={tmp_path / 'report'}"]
    with synthetic.command(doctor, *arguments):
        doctor.main([])
    assert as_text(examine(tmp_path / "a")) in capsys.readouterr().out
    text = (tmp_path / "report" / "data.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and "&lt;b&gt;lift" in text and "<b>" not in text
    assert page.tags.count("img") == 25 and page.tags.count("svg") == 2 * (7 + 8) + 1
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    with synthetic.command(doctor, f"--data={tmp_path / 'a'}", "--json"):
        doctor.main([])
    assert json.loads(capsys.readouterr().out)["facts"]["actions"] == "delta"
