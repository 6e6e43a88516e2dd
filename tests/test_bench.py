"""Tests what the benchmarks count, without timing anything."""

import json

import pytest

from wamjax.bench import fast_wam as bench


def dense(rows, width, out):
    return 2 * rows * width * out


def test_bench_counts_the_flops_of_a_prefill_and_ten_steps(monkeypatch):
    """Uses the benchmark's tokens and a fraction of its widths. Nothing is timed: a call counts as
    one second, so utilisation is FLOPs over the rate."""
    rates = iter([1e9, 4e9])
    monkeypatch.setattr(bench.hardware, "measure_matmul_rate", lambda seconds: next(rates))
    monkeypatch.setattr(bench, "seconds_of", lambda call, repeats: {"seconds": 1.0})
    config = bench.fast_wam_config("fast")
    model = config.model
    sizes = model.layers, model.heads * model.head_dim, model.video.width, model.action.width
    assert sizes == (8, 384, 384, 128) and (model.video.ffn, model.action.ffn) == (1536, 512)
    d, a, n, layers, words = 48, 16, 6 * 16, 2, 64
    model.layers, model.unroll, model.head_dim, model.context_width = layers, layers, 16, words
    model.video.width, model.video.ffn, model.action.width, model.action.ffn = d, 4 * d, a, 4 * a
    monkeypatch.setattr(bench, "fast_wam_config", lambda variant, scale: config)
    report = bench.run(["fast"], scale=1, repeats=1)
    train_row, act_row = report["rows"]
    assert (train_row["what"], act_row["what"]) == ("train", "direct")
    frame, chunk, text = 98, 32, 129

    def block(tokens, width, seen):  # without the keys and values of the context
        attention = 4 * dense(tokens, width, n) + 2 * dense(tokens, seen, n)
        cross = 2 * dense(tokens, width, n) + 2 * dense(tokens, text, n)
        return attention + cross + 2 * dense(tokens, width, 4 * width)

    def context(width):
        return 2 * dense(text, width, n)

    def time(m, width):
        return dense(m, 256, width) + dense(m, width, width) + dense(m, width, 6 * width)

    embed = sum(dense(text, words, w) + dense(text, w, w) for w in (d, a)) + dense(1, 8, words)
    actions = 2 * dense(chunk, 7, a)
    # Of the last layer's video only the keys and values are used.
    prefill = embed + dense(frame, 4 * 48, d) + 2 * dense(frame, d, n) + time(1, d) + time(11, a)
    prefill += layers * context(a) + (layers - 1) * (block(frame, d, frame) + context(d))
    steps = 10 * (actions + layers * block(chunk, a, frame + chunk))
    assert act_row["flops"] == pytest.approx(prefill + steps, rel=0.002)
    forward = embed + actions + dense(5 * frame, 4 * 48, d) + time(3, d) + time(1, a)
    seen = (frame + 2 * 3 * frame) / 3  # by a video token, on average
    forward += layers * (block(3 * frame, d, seen) + block(chunk, a, frame + chunk))
    forward += layers * (context(d) + context(a))
    # The inputs need no gradient.
    came = dense(3 * frame, 4 * 48, d) + dense(chunk, 7, a) + dense(1, 8, words)
    came += dense(3, 256, d) + dense(1, 256, a)
    assert train_row["flops"] == pytest.approx(4 * (3 * forward - came), rel=0.002)
    assert act_row["flop_utilisation"] == act_row["flops"] / 4e9
    assert act_row["times_faster_than_torch"] == [0.23, 0.25]
    assert json.loads(json.dumps(report)) == report


def test_one_pass_and_seeks_give_the_same_frames(monkeypatch, capsys):
    from wamjax.bench import video

    monkeypatch.setattr(video, "SIZES", ((32, 48),))
    monkeypatch.setattr(video, "CODECS", {"h264": video.CODECS["h264"]})
    report = video.run(1, episodes=2, steps=5)  # raises if a frame differs
    (row,) = report["rows"].values()
    ways = ("one_pass", "seek_each", "converter_kept", "kept", "kept_windows", "windows")
    assert set(row) == {f"{way}_fps" for way in ways} | {
        "video_bytes", "jpeg_bytes", "png_bytes"
    }  # fmt: skip
    assert min(row.values()) > 0
    video.show(report)
    assert "h264 32x48" in capsys.readouterr().out
