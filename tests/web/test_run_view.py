"""What the page points at in a run that went wrong, and what it makes of its files."""

import json

import pytest

from lorakit.storage.run_dir import RunDir
from lorakit.web.run_view import curve_rows, download_of, run_notes, run_values, section
from lorakit.web.workspace import Workspace, read_facts, read_settings


def notes_of(folder):
    run = RunDir(folder)
    metrics = Workspace(folder.parent).metrics(run)
    return " ".join(run_notes(run, read_settings(run), metrics, read_facts(run.data_report)))


def change(folder, **values):
    path = folder / "data_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_good_run_has_no_notes(tmp_path, make_run):
    assert notes_of(make_run(tmp_path / "good", steps=40)) == ""


def test_a_wrong_mask_is_named(tmp_path, make_run):
    folder = make_run(tmp_path / "a", train_on="all")
    change(folder, trained_tokens_train=9000)
    assert "questions included: `train_on: responses`" in notes_of(folder)
    folder = make_run(tmp_path / "b")
    change(folder, trained_tokens_train=9000)
    assert "read as plain text" in notes_of(folder)
    change(folder, trained_tokens_train=100)
    assert "Only 1.1% of the tokens are trained" in notes_of(folder)


def test_a_rate_that_is_too_high_is_named(tmp_path, make_run):
    short = make_run(tmp_path / "a", steps=30, loss=lambda i: 2 + i / 10, learning_rate=0.05)
    assert "likely learning_rate is too high (0.05" in notes_of(short)
    long = make_run(tmp_path / "b", steps=200, loss=lambda i: 2 + i / 100, learning_rate=0.05)
    assert "learning_rate is too high" in notes_of(long)


def test_duplicated_data_is_named(tmp_path, make_run):
    folder = make_run(tmp_path / "a")
    few = {"kind": "exact duplicate", "count": 3, "first_rows": ["demo:5"], "action": "kept"}
    change(folder, faults=[few])
    assert notes_of(folder) == ""
    change(folder, faults=[{**few, "count": 200}])
    assert "200 × exact duplicate" in notes_of(folder)
    held = "held-out row is trained on"
    change(folder, faults=[{**few, "kind": held, "count": 30}])
    assert held in notes_of(folder)


def test_a_held_out_loss_that_rises_is_named(tmp_path, make_run):
    folder = make_run(tmp_path / "a")
    rows = [{"step": 20 + i, "eval_loss": 1 + abs(i - 2) / 5} for i in range(6)]
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    assert "learns its data by heart" in notes_of(folder)


def test_skipped_steps_and_spikes_are_named(tmp_path, make_run):
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 1300, "loss": null, "skipped": true}\n')
    assert "Step 1,300 was skipped" in notes_of(folder)


def test_a_slow_run_is_named(tmp_path, make_run):
    folder = make_run(tmp_path / "a", steps=30)
    (folder / "plan.json").write_text('{"tokens_per_second": 90000}')
    assert "1,800 tokens/s, the plan expects 90,000" in notes_of(folder)


def test_the_table_of_a_long_run_is_short(tmp_path, make_run):
    folder = make_run(tmp_path / "a", steps=500)
    rows = curve_rows(Workspace(tmp_path).metrics(RunDir(folder)))
    assert len(rows) == 20
    assert (rows[0][0], rows[-1][0]) == ("1", "500")
    assert rows[0][2] == "0.0001"


def test_a_run_without_files_has_a_page(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    workspace = Workspace(tmp_path)
    values = run_values(workspace, RunDir(folder), workspace.summary("empty", folder))
    assert values["samples"] == values["memory"] == values["rows"] == []


def test_section_hides_odd_contents_only():
    assert section(lambda: {}["x"], "default") == "default"
    with pytest.raises(OSError, match="disk"):
        section(lambda: (_ for _ in ()).throw(OSError("disk")), "default")


def test_downloads_are_named(tmp_path, make_run):
    run = RunDir(make_run(tmp_path / "a"))
    workspace = Workspace(tmp_path)
    assert download_of(run, "eval.json", workspace) == run.eval
    assert download_of(run, "report.html", workspace) is None  # not written yet
    assert download_of(run, "../a/eval.json", workspace) is None
