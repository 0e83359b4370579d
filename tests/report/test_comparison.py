"""Runs next to each other: what differs, what is best, and what cannot be compared is named."""

import json

import pytest
from tests.report.conftest import row

from lorakit.display.rich_output import as_text
from lorakit.errors import RunError
from lorakit.report.comparison import compare_runs, comparison_charts, write_comparison
from lorakit.storage.run_dir import RunDir, append_metrics


def scores(run, edit, loss, task=None, rows=10, base=2.0):
    score = {"perplexity": 7.0, "tokens": 40}
    tasks = [] if task is None else [
        {"task": "gsm8k", "metric": "exact", "rows": rows, "base": 0.25, "tuned": task}
    ]  # fmt: skip
    sides = {"base": {**score, "loss": base}, "tuned": {**score, "loss": loss}}
    edit(run.eval, **sides, tasks=tasks)
    return run


@pytest.fixture
def pair(make_run, edit):
    one = scores(make_run("one", lora_r=8), edit, 1.25, 0.5)
    two = scores(make_run("two", lora_r=32, seed=7), edit, 1.5, 0.75)
    append_metrics(two, [{"step": 8, "eval_loss": 1.5, "eval_gsm8k_exact": 0.75}])
    return one, two


def test_settings_that_differ_and_the_best_of_each_result_are_shown(pair):
    found = compare_runs(pair)
    assert found.names == ("one", "two")
    assert {s.key: s.shown for s in found.settings} == {
        "lora_r": ("8", "32"),
        "seed": ("42", "7"),
    }
    measures = {m.name: m for m in found.measures}
    assert measures["held-out loss"].values == (1.25, 1.5)
    assert measures["held-out loss"].best == 0
    assert measures["gsm8k exact"].best == 1
    assert measures["gsm8k exact"].shown == ("0.5 (+0.25)", "0.75 (+0.5)")
    assert measures["steps"].shown == ("8", "8")
    assert not found.notes
    text = as_text(found, width=160)
    assert "1.2500 *" in text
    assert "0.75 (+0.5) *" in text
    assert "lora_r" in text
    value = json.loads(json.dumps(found.as_dict()))
    assert value["best"] == {"held-out loss": "one", "gsm8k exact": "two"}
    assert value["runs"][1]["settings"] == {"lora_r": "32", "seed": "7"}


def test_each_curve_has_a_line_of_each_run(pair):
    charts = {name: chart.svg for name, _, chart in comparison_charts(compare_runs(pair))}
    assert set(charts) == {"Loss", "Held-out loss", "eval_gsm8k_exact"}
    assert charts["Loss"].count('class="curve"') == 2
    assert "#2f7fd6" in charts["Loss"]
    assert "#d9681c" in charts["Loss"]


def test_the_page_has_both_runs_and_is_closed(pair, tmp_path, read_page):
    path = tmp_path / "new" / "compare.html"
    write_comparison(compare_runs(pair), path)
    page = read_page(path.read_text())
    assert not page.open
    assert "one" in page.text
    assert "0.75 (+0.5) ★" in page.text
    assert "script" not in {tag for tag, _ in page.tags}


def test_results_of_different_rows_are_named(make_run, edit):
    one = scores(make_run("one"), edit, 1.0, 0.5, rows=10)
    two = scores(make_run("two"), edit, 1.0, 0.5, rows=20, base=3.0)
    found = compare_runs([one, two])
    assert found.notes == (
        "the held-out losses are not of the same rows or the same base",
        "gsm8k exact: the runs were scored on different numbers of rows",
    )
    assert "all settings are equal" in as_text(found)
    edit(two.eval, tuned={"loss": 1.0, "perplexity": 2.0, "tokens": 41})
    assert compare_runs([one, two]).notes[0] == "the held-out losses are not of the same rows"


def test_files_of_one_name_in_two_folders_are_not_equal(make_run):
    one, two = make_run("one", data="/a/rows.jsonl"), make_run("two", data="/b/rows.jsonl")
    (setting,) = compare_runs([one, two]).settings
    assert setting.shown == ("rows.jsonl #1", "rows.jsonl #2")


def test_runs_of_one_name_and_runs_that_stopped(make_run, tmp_path):
    run = make_run("a")
    (tmp_path / "other").mkdir()
    stopped = RunDir(tmp_path / "other" / "a")
    stopped.path.mkdir()
    stopped.recipe.write_text(run.recipe.read_text())
    append_metrics(stopped, [row(1, loss=float("nan")), row(2)])
    found = compare_runs([run, stopped])
    assert found.names == (f"{tmp_path.name}/a", "other/a")
    assert {m.name: m.shown for m in found.measures}["held-out loss"] == ("1.0000", "–")


def test_one_run_or_one_twice_is_refused(make_run):
    run = make_run("a")
    with pytest.raises(RunError, match="found 1 run to compare, expected two or more"):
        compare_runs([run])
    with pytest.raises(RunError, match="given twice"):
        compare_runs([run, run])
