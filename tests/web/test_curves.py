"""Metrics are read as they grow, and long curves keep their peaks."""

import json
import math
import time

from lorakit.web.curves import Metrics, reduced


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_only_new_complete_lines_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    assert not metrics.update()
    path.write_text(lines({"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}) + '{"step": 2')
    assert metrics.update()
    assert metrics.since({}) == {"loss": ([1], [2.0]), "eval_loss": ([1], [2.5])}
    known = metrics.counts()
    with path.open("a") as handle:
        handle.write(', "loss": null}\n')
    assert metrics.update()
    assert metrics.since(known) == {"loss": ([2], [None])}
    assert not metrics.update()


def test_a_file_that_a_resume_wrote_again_is_read_from_its_start(tmp_path):
    path, new = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.write_text(lines(*({"step": i, "loss": 1.0} for i in range(9))))
    metrics = Metrics(path)
    metrics.update()
    version = metrics.version
    new.write_text(lines(*({"step": i, "loss": 3.0} for i in range(9))))
    new.replace(path)
    assert metrics.update()
    assert metrics.version == version + 1
    assert metrics.since({})["loss"][1] == [3.0] * 9


def test_damaged_rows_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = [{"step": True, "loss": 1}, {"step": -1, "loss": 1}, {"step": 2**60, "loss": 1}, [1], 5]
    path.write_text(
        "\0\n[[[[\n" + lines(*odd, {"step": 3, "loss": "x"}, {"step": 4, "loss": 1e300})
    )
    metrics = Metrics(path)
    metrics.update()
    assert metrics.since({}) == {"loss": ([3, 4], [None, None])}


def test_a_hundred_thousand_steps_become_a_thousand_points_with_every_peak():
    from array import array

    xs = array("d", range(100_000))
    ys = array("d", (math.sin(x / 5000) for x in range(100_000)))
    ys[54_321], ys[77_777], ys[10] = 50.0, -50.0, math.nan
    begin = time.perf_counter()
    steps, values = reduced(xs, ys)
    assert time.perf_counter() - begin < 5
    assert len(steps) <= 1000
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert {50.0, -50.0} <= set(values)


def test_a_part_without_a_number_is_a_gap():
    from array import array

    nothing = array("d", [math.nan] * 100)
    assert set(reduced(array("d", range(100)), nothing, 10)[1]) == {None}
