"""Steps are written to metrics.jsonl and shown on one line without a terminal."""

import io

from rich.console import Console

from lorakit.storage.run_dir import RunDir, read_metrics
from lorakit.train.progress import TrainingProgress, process_memory_bytes


def row(step):
    return {"step": step, "loss": 1.5, "tokens_per_second": 1234.5, "seconds": 0.5}


def test_lines_without_a_terminal_are_few_and_the_last_step_is_always_shown(tmp_path):
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream), RunDir(tmp_path), "cpu")
    progress.start(0, 5)
    for step in range(1, 6):
        progress.step(row(step))
    progress.stop()
    lines = stream.getvalue().splitlines()
    assert [line.split(" ")[1] for line in lines] == ["1/5", "5/5"]
    assert "loss 1.500" in lines[0]
    assert "1,234 tok/s" in lines[0] or "1,235 tok/s" in lines[0]
    # Four steps of half a second, then none.
    assert [line.rpartition(" · ")[2] for line in lines] == ["2 s left", "0 s left"]
    assert [r["step"] for r in read_metrics(RunDir(tmp_path))] == [1, 2, 3, 4, 5]


def test_a_terminal_gets_a_live_bar(tmp_path):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None, width=100)
    progress = TrainingProgress(console, RunDir(tmp_path), "cpu")
    progress.start(0, 2)
    progress.step(row(2))
    progress.note("held-out loss 1.0")
    progress.stop()
    progress.stop()
    assert "2/2" in stream.getvalue()
    assert "held-out loss 1.0" in stream.getvalue()


def test_a_log_that_cannot_be_written_warns_once_and_has_every_row_later(tmp_path):
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream), RunDir(tmp_path / "later"), "cpu")
    progress.start(0, 5)
    for step in (1, 2, 3):
        progress.step(row(step))
    assert stream.getvalue().count("training continues") == 1
    (tmp_path / "later").mkdir()
    for step in (4, 5):
        progress.step(row(step))
    assert [r["step"] for r in read_metrics(RunDir(tmp_path / "later"))] == [1, 2, 3, 4, 5]


def test_a_step_without_a_finite_loss_is_shown_as_that(tmp_path):
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream), RunDir(tmp_path), "cpu")
    progress.start(0, 1)
    progress.step({**row(1), "loss": None})
    assert "step 1/1 · no finite loss · " in stream.getvalue()


def test_memory_is_this_process():
    assert process_memory_bytes("cpu") > 50e6
