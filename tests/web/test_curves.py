"""Metrics are read as they grow, and long curves keep their peaks."""

import json
import math
import time
from array import array

from lorakit.web.curves import Metrics


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path):
    metrics = Metrics(path)
    metrics.update()
    return metrics


def test_only_new_complete_lines_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = read(path)
    assert metrics.curves(100) == {}
    path.write_text(lines({"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}) + '{"step": 2')
    metrics.update()
    assert metrics.curves(100) == {"loss": ([1], [2.0]), "eval_loss": ([1], [2.5])}
    with path.open("a") as handle:
        handle.write(', "loss": null}\n')
    metrics.update()
    assert metrics.curves(100)["loss"] == ([1, 2], [2.0, None])
    assert metrics.rows == 3
    metrics.update()
    assert metrics.rows == 3


def test_a_file_that_a_resume_wrote_again_is_read_from_its_start(tmp_path):
    path, new = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.write_text(lines(*({"step": i, "loss": 1.0} for i in range(9))))
    metrics = read(path)
    new.write_text(lines(*({"step": i, "loss": 3.0} for i in range(4))))
    new.replace(path)
    metrics.update()
    assert metrics.curves(100)["loss"][1] == [3.0] * 4
    assert metrics.rows == 13  # a page sees that there is something new


def test_damaged_rows_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = [{"step": True, "loss": 1}, {"step": -1, "loss": 1}, {"step": 2**60, "loss": 1}, [1], 5]
    path.write_text(
        "\0\n[[[[\n" + lines(*odd, {"step": 3, "loss": "x"}, {"step": 4, "loss": 1e300})
    )
    assert read(path).curves(100) == {"loss": ([3, 4], [None, None])}


def test_rows_of_steps_have_what_all_of_them_have(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 1.0 + i, "grad_norm": 0.5} for i in range(1, 6)]
    rows[2] |= {"loss": None, "skipped": True}
    rows[4]["memory_gb"] = 2.0
    path.write_text(lines(*rows, {"step": 5, "eval_loss": 1.5}, {"step": 9, "eval_loss": None}))
    metrics = read(path)
    found = list(metrics.steps())
    assert found[0] == {"step": 1, "loss": 2.0, "grad_norm": 0.5}
    assert found[2]["loss"] is None
    assert found[2]["skipped"]
    assert [row["step"] for row in metrics.steps(3)] == [1, 3, 5]
    assert metrics.held_out() == [{"step": 5, "eval_loss": 1.5}]
    assert (metrics.peak("memory_gb"), metrics.peak("tokens_per_second")) == (2.0, None)


def test_a_hundred_thousand_steps_become_a_thousand_points_with_every_peak(tmp_path):
    metrics = Metrics(tmp_path / "none")
    ys = array("d", (math.sin(x / 5000) for x in range(100_000)))
    ys[54_321], ys[77_777], ys[10] = 50.0, -50.0, math.nan
    metrics.columns["loss"] = array("d", range(100_000)), ys
    begin = time.perf_counter()
    steps, values = metrics.curves(1000)["loss"]
    assert time.perf_counter() - begin < 5
    assert len(steps) <= 1000
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert {50.0, -50.0} <= set(values)
