"""One evaluation of a run: what it writes, what it keeps, and what it does not ask again."""

import io
import json

import pytest
from rich.console import Console
from tests.made_runs import answer

from lorakit.display.evaluation_view import evaluation_view
from lorakit.display.rich_output import as_text
from lorakit.errors import DataError, WorkError
from lorakit.evaluation import evaluate_run as module
from lorakit.evaluation import model_side
from lorakit.evaluation.evaluate_run import EvalRequest, evaluate_run
from lorakit.evaluation.file_task import FileTask
from lorakit.evaluation.judge import JudgeEndpoint
from lorakit.report.load_run import read_run
from lorakit.run import open_run

pytestmark = pytest.mark.usefixtures("own_tasks_only")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Box {i}?", "completion": answer("fruit", i, 3)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(talker, tmp_path):
    from tests.made_runs import talking_run

    return talking_run(tmp_path / "runs" / "fruit", talker, "fruit")


def request(mine, *tasks, **more):
    values = {"tasks": (f"{mine}", *tasks), "metrics": ("exact_match",), "max_new_tokens": 3}
    return EvalRequest(**{"general": False, **values, **more})


def test_before_and_after_in_eval_json_report_and_terminal(run, mine, console):
    result, failed = evaluate_run(run, request(mine, "boxes:3", general=True), console)
    assert not failed
    scores = {(s.task, s.metric): s for s in result.tasks}
    own = scores["mine", "exact_match"]
    assert (own.rows, own.base, own.tuned, own.verdict) == (6, 0.0, 1.0, "better")
    assert scores["boxes", "exact_match (first-word)"].tuned == 1.0
    assert ("general skills", "accuracy") in scores
    value = json.loads(run.eval.read_text())
    assert value["base"] is None  # the talker has no held-out rows
    assert [s["task"] for s in value["tasks"]] == [s.task for s in result.tasks]
    assert open_run(run.path).evaluation.tasks == result.tasks
    text = as_text(evaluation_view(result), width=160)
    assert "mine" in text
    assert "+1.000 to +1.000" in text
    page = run.report.read_text()
    assert "+1.000 to +1.000" in page
    assert read_run(run).scored is None


def test_a_stopped_evaluation_continues(run, mine, console, monkeypatch):
    asked = []
    original = model_side.answer_batch

    def counted(model, tokenizer, batch, *more):
        asked.append(len(batch))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(model, tokenizer, batch, *more)

    monkeypatch.setattr(model_side, "ROWS", 2)
    monkeypatch.setattr(model_side, "answer_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, request(mine), console)
    assert not run.eval.exists()
    result, _ = evaluate_run(run, request(mine), console)
    assert asked == [2, 2, 2, 2, 2, 2, 2]  # 6 rows of both, and the batch that was interrupted
    assert result.tasks[0].tuned == 1.0
    evaluate_run(run, request(mine), console)
    assert len(asked) == 7


def test_scores_of_other_tasks_are_kept_until_the_adapter_changes(run, mine, console):
    evaluate_run(run, request(mine), console)
    evaluate_run(run, EvalRequest(tasks=("boxes:2",), general=False), console)
    kept = {s["task"] for s in json.loads(run.eval.read_text())["tasks"]}
    assert kept == {"mine", "boxes"}
    value = json.loads(run.eval.read_text())
    run.eval.write_text(json.dumps({**value, "adapter": "of another one"}))
    evaluate_run(run, EvalRequest(tasks=("boxes:2",), general=False), console)
    assert {s["task"] for s in json.loads(run.eval.read_text())["tasks"]} == {"boxes"}


def test_a_task_that_fails_is_named_and_the_others_go_on(run, mine, console, monkeypatch):
    def fails(self, side):
        raise WorkError("out of memory on a task's request")

    monkeypatch.setattr(FileTask, "run", fails)
    result, failed = evaluate_run(run, request(mine, "gone", "boxes:2"), console)
    assert set(failed) == {"mine", "gone"}
    assert {score.task for score in result.tasks} == {"boxes"}
    said = console.file.getvalue()
    assert "left out: out of memory on a task's request" in said
    assert "left out: task gone: its data (json) cannot be loaded" in said


def test_held_out_scores_stay_with_tasks_and_other_data(finish, mine, console, tmp_path):
    run = finish(seed=11).run
    before = json.loads(run.eval.read_text())
    result, _ = evaluate_run(run, request(mine, samples=1), console)
    assert result.base.loss == pytest.approx(before["base"]["loss"], rel=1e-3)
    evaluate_run(run, request(mine, data=str(mine)), console)
    value = json.loads(run.eval.read_text())
    assert value["data"] == result.data
    assert value["tuned"]["loss"] == pytest.approx(before["tuned"]["loss"], rel=1e-3)
    assert "Tasks" in run.report.read_text()


def test_nothing_to_evaluate_is_refused(run, console):
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate_run(run, EvalRequest(general=False), console)


def test_a_judge_gets_the_answers_of_both(run, mine, console, monkeypatch):
    seen = []

    def judge(endpoint, pairs, store, progress, note):
        seen.extend(pairs)
        return

    monkeypatch.setattr(module, "judge_pairs", judge)
    asked = request(
        mine, data=str(mine), samples=0, judge=JudgeEndpoint("http://h/v1", "m"), judge_rows=2
    )
    _, failed = evaluate_run(run, asked, console)
    assert failed == {"judge": "no pair was judged"}
    assert [(s.base, s.tuned) for s in seen] == [
        (answer("base", i, 3), answer("fruit", i, 3)) for i in (0, 1)
    ]


def test_nothing_is_sent_unless_asked(run, mine, console, monkeypatch):
    monkeypatch.setattr(module, "judge_pairs", lambda *_: pytest.fail("asked a judge"))
    evaluate_run(run, request(mine), console)
