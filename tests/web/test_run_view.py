"""What the page points at in a run that went wrong, and what it makes of its files."""

import json

import pytest

from lorakit.storage.run_dir import RunDir
from lorakit.web.run_view import curve_rows, download_of, run_values, section
from lorakit.web.workspace import Workspace


def notes(folder):
    workspace, run = Workspace(folder.parent), RunDir(folder)
    return run_values(workspace, run, workspace.summary("a", folder))["notes"]


def test_notes_are_those_of_the_run(tmp_path, make_run):
    assert notes(make_run(tmp_path / "good", steps=40)) == []
    folder = make_run(tmp_path / "a", steps=30, loss=lambda i: 2 + i / 10, learning_rate=0.05)
    path = folder / "data_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trained_tokens_train": 100}))
    found = notes(folder)
    assert "learning_rate is too high" in found[0]
    assert "of the tokens are trained" in found[-1]
    path.write_text('{"faults": 3}')  # damaged: the notes that need no report are left
    assert found[0] in notes(folder)


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
