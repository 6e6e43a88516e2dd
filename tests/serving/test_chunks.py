"""Tests chunks on a simulated clock: an answer arrives some control steps after its request."""

import concurrent.futures
import itertools

import numpy as np
import pytest

from wamjax.serving.broker import ActionChunks
from wamjax.serving.chunks import JOININGS, ActionQueue, Delays, joining

H = 12


def test_a_policy_that_takes_a_short_prefix_gets_the_first_actions():
    queue = ActionQueue(joining("prefix", longest=2), H, 2, delays=Delays(expected=4))
    question = queue.ask()
    assert question.prefix is None  # nothing is promised before the first chunk
    queue.give(question, chunk_at(0))
    queue.way.execute = 1
    question = queue.ask()
    assert question.delay == 4
    np.testing.assert_array_equal(question.prefix, chunk_at(0)[:2])
    for _ in range(4):
        queue.play()
    assert queue.give(question, chunk_at(0, episode=1)) and queue.play().tolist() == [4, 100]
    with pytest.raises(ValueError, match="longest = 0 must be at least 1"):
        joining("prefix", longest=0)


def chunk_at(step, episode=0):
    """Returns actions that encode their control step and their observation."""
    steps = np.arange(step, step + H, dtype=np.float32)
    return np.stack([steps, np.full(H, step + 100 * episode, np.float32)], -1)


def simulate(name, latencies, steps, way=None, **options):
    """Returns (actions played, requests, the queue); the answer to request i takes latencies[i]."""
    queue = ActionQueue(joining(name, **way or {}), H, 2, **options)
    latencies, pending, played, questions = iter(latencies), None, [], []
    for now in itertools.count():
        if pending and pending[1] <= now:
            queue.give(pending[0], chunk_at(pending[0].played))
            pending = None
        if (question := queue.ask(np.zeros(2))) is not None:
            questions.append(question)
            pending = question, now + next(latencies)
            if pending[1] == now:
                continue  # the answer arrives at once
        if queue.way.waits and not queue.left:
            continue  # stands still
        if (action := queue.play()) is not None:
            played.append(action)
        if len(played) == steps:
            return np.stack(played), questions, queue


@pytest.mark.parametrize("way", JOININGS)
def test_without_delay_all_ways_play_every_step_once(way):
    played, _, _ = simulate(way, itertools.repeat(0), 60, way={"execute": 4})
    np.testing.assert_allclose(played[:, 0], np.arange(60), rtol=1e-6)


def test_rule_1_before_the_first_chunk_nothing_was_played_so_nothing_is_dropped():
    delays = Delays(expected=9)  # the expected latency
    played, questions, _ = simulate("switch", itertools.repeat(9), 5, delays=delays)
    assert questions[0].delay == 9
    np.testing.assert_array_equal(played[:, 0], np.arange(5))


@pytest.mark.parametrize("late", [1, 3, 6])
def test_rule_1_as_many_are_dropped_as_were_played(late):
    played, questions, _ = simulate("switch", itertools.repeat(late), 40, way={"execute": 2})
    np.testing.assert_array_equal(played[:, 0], np.arange(40))  # no step twice, none left out
    assert len(questions) > 40 / (late + 3)


def test_rule_2_a_delay_is_a_difference_of_indices():
    delays = Delays()
    latencies = itertools.chain([7, 3, 3, 4], itertools.repeat(3))
    simulate("switch", latencies, 40, way={"execute": 4}, delays=delays)
    assert delays.estimate == 4 and 7 not in delays._steps


def test_rule_3_the_first_answer_is_in_no_statistic_and_the_window_forgets():
    delays = Delays(window=3)
    delays.add(500)
    assert delays.estimate == 0
    for steps, estimate in ((2, 2), (6, 6), (1, 6), (1, 6), (1, 1)):
        delays.add(steps)
        assert delays.estimate == estimate


def starved(hold=None, relative=None, give=H):
    queue = ActionQueue(joining("switch"), H, 2, hold, relative)
    question = queue.ask(np.array([10.0, 20.0]))
    queue.give(question, chunk_at(0)[:give] + 1)
    for _ in range(give):
        queue.play()
    return queue


def test_rule_4_without_actions_the_last_command_is_held_and_motions_stand_still():
    np.testing.assert_array_equal(starved().play(), [H, 1])  # not zeros
    np.testing.assert_array_equal(starved(hold=[False, True]).play(), [0, 1])
    queue = starved(hold=[False, False], relative={0: 1})
    np.testing.assert_array_equal(queue.play(), [H + 20, 0])  # an absolute command is held
    assert queue.played == H and queue.step == H + 1
    assert ActionQueue(joining("switch"), H, 2).play() is None  # nothing to hold yet


def test_rule_4_the_prefix_is_padded_by_holding():
    queue = ActionQueue(joining("prefix"), H, 2, [True, False], delays=Delays(expected=4))
    queue.give(queue.ask(), chunk_at(5))
    for _ in range(H - 4):
        assert queue.ask() is None
        queue.play()
    prefix = queue.ask().prefix
    np.testing.assert_array_equal(prefix, chunk_at(5)[-4:])
    queue.lose(queue._asked)
    for _ in range(3):
        queue.play()
    assert queue.left == 1
    np.testing.assert_array_equal(queue.ask().prefix[:, 0], [5 + H - 1] * 4)
    queue.lose(queue._asked)
    queue.play()
    np.testing.assert_array_equal(queue.ask().prefix, [[5 + H - 1, 0]] * 4)


def test_rule_5_a_chunk_that_is_too_late_is_played_only_if_there_is_no_other():
    def late(played):
        queue = ActionQueue(joining("prefix", execute=4), H, 2, delays=Delays(expected=2))
        queue.give(queue.ask(), chunk_at(0))
        queue.play()
        queue.play()
        question = queue.ask()
        for _ in range(played):
            queue.play()
        return queue, queue.give(question, chunk_at(2, episode=1)), queue.play()

    queue, used, action = late(2)  # as expected
    assert used and action[1] == 102
    queue, used, action = late(5)
    assert not used and action[1] == 0
    assert queue.ask() is not None and queue.delays.estimate == 5  # a better estimate
    queue, used, action = late(H - 2)  # ran dry
    assert used is True and action[1] == 102
    queue, used, action = late(H + 3)  # stood still meanwhile; the rest of the prefix still fits
    assert used and action[0] == H


def test_a_chunk_that_arrives_after_its_end_is_not_played():
    queue = ActionQueue(joining("switch"), 4, 2)
    queue.give(queue.ask(), chunk_at(0)[:4])
    assert queue.ask() is None
    queue.play()
    queue._newest = -100  # time for another
    question = queue.ask()
    for _ in range(8):
        queue.play()
    assert not queue.give(question, chunk_at(1)[:3])
    assert queue.play()[0] == 3  # held


def test_rule_6_relative_actions_are_anchored_to_the_state_of_their_observation():
    queue = ActionQueue(joining("prefix"), H, 2, relative={0: 1}, delays=Delays(expected=3))
    question = queue.ask(np.array([0.0, 50.0]))
    queue.give(question, np.zeros((H, 2)) + [1, 7])
    assert [queue.play().tolist() for _ in range(H - 3)] == [[51, 7]] * (H - 3)
    question = queue.ask(np.array([0.0, 60.0]))  # the arm has moved meanwhile
    np.testing.assert_array_equal(question.prefix, [[51 - 60, 7]] * 3)
    for _ in range(3):
        queue.play()
    queue.give(question, np.zeros((H, 2)) + [-9, 7])
    np.testing.assert_array_equal(queue.play(), [51, 7])
    with pytest.raises(ValueError, match="relative to the state"):
        queue.reset()
        queue.ask()


def joined(way, latency=3, **options):
    """Returns the actions played when two chunks differ by a jump of 100."""
    queue = ActionQueue(joining(way, **options), H, 2)
    queue.give(queue.ask(), chunk_at(0))
    for _ in range(4):
        queue.play()
    queue._newest = -100
    question = queue.ask()
    for _ in range(latency):
        queue.play()
    queue.give(question, chunk_at(4) + [0, 96])
    return np.stack([queue.play() for _ in range(8)])


def test_a_switch_jumps_a_blend_does_not_and_an_ensemble_stays_between():
    assert joined("switch")[0, 1] == 100
    blend = joined("blend", steps=3)
    np.testing.assert_allclose(blend[:5, 1], [25, 50, 75, 100, 100])
    ensemble = joined("ensemble", decay=1.0)
    older = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(ensemble[:5, 1], [100 * (1 - older)] * 5, rtol=1e-5)
    np.testing.assert_allclose(ensemble[5:, 1], 100)  # after the end of the older chunk
    for way in ("switch", "blend", "ensemble"):
        np.testing.assert_allclose(joined(way)[:, 0], np.arange(7, 15), rtol=1e-6)


def test_synchronous_stands_still_and_drops_nothing():
    played, questions, queue = simulate("synchronous", itertools.repeat(5), 30, way={"execute": 3})
    np.testing.assert_array_equal(played[:, 0], np.arange(30))
    assert [q.played for q in questions[:4]] == [0, 3, 6, 9] and queue.delays.estimate == 0


def test_invalid_settings_are_errors():
    for way, options, text in (("blnd", {}, "'blnd' must be"), ("blend", {"steps": 0}, "steps = 0"),
                               ("switch", {"execute": 0}, "at least 1")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            joining(way, **options)
    with pytest.raises(ValueError, match="hold has shape"):
        ActionQueue(joining("switch"), H, 2, hold=[True])


class Walker:
    """Returns speeds that change from one chunk to the next, and continues a prefix."""

    def __init__(self, latencies):
        self.metadata = {"prefix": H // 2, "extras": [], "actions": {"hold": [True]}}
        self.latencies, self.now, self.asked = latencies, 0, []

    def infer(self, observation):
        speed = (1, 3, 2)[len(self.asked) % 3]
        prefix = np.asarray(observation.get("prefix", np.zeros((0, 1))), np.float32)
        last = prefix[-1, 0] if len(prefix) else observation["place"]
        rest = last + speed * np.arange(1, H - len(prefix) + 1, dtype=np.float32)
        return {"actions": np.concatenate([prefix, rest[:, None]])}

    def submit(self, call, observation):
        future, due = concurrent.futures.Future(), self.now + next(self.latencies)
        future.set_result(call(observation))
        self.asked.append(observation)
        future.done = lambda: self.now >= due
        return future


def walk(way, latencies, steps=60):
    """Returns (a robot's path, its requests, the remaining actions at each step); latencies are in
    control steps."""
    walker = Walker(latencies)
    chunks = ActionChunks(walker, way, execute=H // 2, executor=walker)
    out, left = [], []
    for walker.now in range(steps):
        left.append(chunks.queue.left if out else 0)
        out.append(chunks.act({"place": out[-1] if out else 0.0})[0])
    return np.array(out), walker.asked, np.array(left)


@pytest.mark.parametrize("late", range(1, H // 2 + 1))
def test_a_prefix_keeps_a_robot_from_jumping_where_a_switch_does(late):
    way, asked, _ = walk("prefix", itertools.repeat(late))
    assert 1 <= np.diff(way).min() and np.diff(way).max() <= 3 and len(asked) >= 60 // (H // 2) - 1
    for question in asked:
        at = question["executed_actions"]
        told = question["prefix"][: len(way) - at, 0]
        assert len(question["prefix"]) == question["inference_delay"]
        np.testing.assert_array_equal(told[:late], way[at : at + len(told)][:late])
    jumpy, *_ = walk("switch", itertools.repeat(late))
    assert late < 3 or np.diff(jumpy).max() > 3 or np.diff(jumpy).min() < 1


@pytest.mark.parametrize("seed", range(20))
def test_with_answers_at_any_time_a_prefix_jumps_only_where_there_was_nothing_left(seed):
    """Rule 5: such a chunk starts after its prefix, and is played only if there is no other."""
    draws = np.random.default_rng(seed).integers(1, H // 2 + 1, 400)

    def left_before_jumps(joined):
        way, asked, left = walk(joined, iter(draws), steps=300)
        steps = np.diff(way)
        return left[1:][(steps < 0) | (steps > 3)], asked

    left, asked = left_before_jumps("prefix")
    assert (left == 0).all()
    assert len(asked) > 20 and max(len(x["prefix"]) for x in asked) == H // 2
    assert left_before_jumps("switch")[0].any()


class Robot:
    """Acts as client and executor: answers requests when the test says so."""

    def __init__(self):
        self.asked, self.metadata = [], {"extras": [], "actions": {"hold": [False, True]}}
        self.error = None

    def infer(self, observation):
        if self.error:
            raise self.error
        return {"actions": chunk_at(observation["now"])}

    def submit(self, call, observation):
        future = concurrent.futures.Future()
        self.asked.append((future, call, observation))
        return future

    def answer(self):
        future, call, observation = self.asked.pop(0)
        try:
            future.set_result(call(observation))
        except Exception as error:
            future.set_exception(error)


def test_action_chunks_requests_in_the_background_and_never_blocks():
    robot = Robot()
    chunks = ActionChunks(robot, "switch", execute=4, executor=robot)
    out = []
    for now in range(40):
        if robot.asked and now % 3 == 0:
            robot.answer()
        out.append(chunks.act({"now": now})[0])
    np.testing.assert_array_equal(out, np.arange(40))
    robot.answer() if robot.asked else None
    chunks.act({"now": 40})
    while not robot.asked:
        chunks.act({"now": 41})
    future, _, asked = robot.asked[-1]
    assert asked["inference_delay"] == 3 and asked["executed_actions"] >= 40
    for _ in range(H):
        held = chunks.act({"now": 0})
    assert held[0] == 0 and held[1] > 0  # a motion stands still, the other command stays


def test_errors_are_raised_when_actions_run_out_and_reset_clears_them():
    robot = Robot()
    chunks = ActionChunks(robot, "switch", execute=1, executor=robot)
    chunks.act({"now": 0})
    robot.error = TimeoutError("late")
    for now in range(1, H):
        assert chunks.act({"now": now})[0] == now
        if robot.asked:
            robot.answer()
    with pytest.raises(TimeoutError, match="late"):
        chunks.act({"now": H})
    robot.error = None
    chunks.act({"now": H})
    stale = robot.asked.pop()
    chunks.reset()
    stale[0].set_result({"actions": chunk_at(77)})
    robot.submit = lambda call, x: concurrent.futures.ThreadPoolExecutor(1).submit(call, x)
    assert chunks.act({"now": 3})[0] == 3
    with pytest.raises(ValueError, match="takes no committed actions"):
        ActionChunks(robot, "prefix")
