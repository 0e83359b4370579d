"""A bar on a terminal, lines with the remaining time elsewhere, nothing without a console."""

import io

from rich.console import Console

from lorakit.evaluation import eval_progress
from lorakit.evaluation.eval_progress import EvalProgress


def test_lines_name_task_model_count_and_remaining_time(monkeypatch):
    now = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr(eval_progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    progress = EvalProgress(Console(file=out, width=100))
    progress.task = "gsm8k"
    with progress.stage("tuned", 100, 20) as advance:
        advance(10)
        assert out.getvalue() == ""
        advance(30)
    assert out.getvalue() == "gsm8k tuned: 60 of 100 answers, 20 s left\n"


def test_nothing_is_shown_if_all_is_answered_or_nobody_looks():
    out = io.StringIO()
    with EvalProgress(Console(file=out)).stage("base", 5, 5) as advance:
        advance(0)
    with EvalProgress(None).stage("base", 5, 0) as advance:
        advance(5)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    progress = EvalProgress(Console(file=out, force_terminal=True, width=100))
    progress.task = "mmlu"
    with progress.stage("base", 4, 1) as advance:
        advance(3)
    assert "mmlu base" in out.getvalue()
    assert "4/4" in out.getvalue()
