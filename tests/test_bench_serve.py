"""Tests what the server's benchmark counts, not its speed."""

import pytest

from wamjax.bench import serve


def test_it_counts_answers_of_all_clients_with_and_without_batches(capsys):
    report = serve.run([3], seconds=0.4, max_batch=2, policy_ms=1.0)
    assert [(row["clients"], row["max_batch"]) for row in report["rows"]] == [(3, 1), (3, 2)]
    for row in report["rows"]:
        assert row["per_second"] > 0 and 1 <= row["batch"] <= row["max_batch"]
        assert 0 < row["above_p50_ms"] <= row["above_p99_ms"] < row["p99_ms"]
        assert 0 < row["least_over_median"] <= 1 <= row["service_max_over_median"]
    assert report["message_kb"] == pytest.approx(2 * 224 * 224 * 3 / 1024, abs=2)
    serve.show(report)
    assert "3 clients: batches are" in capsys.readouterr().out
