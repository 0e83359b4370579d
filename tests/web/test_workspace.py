"""The list of runs: states, damage, newer versions, and paths that stay in the folder."""

import json
import os

import pytest

from lorakit.errors import DataError, RunError
from lorakit.web import workspace as listing
from lorakit.web.workspace import Workspace


def runs_of(folder):
    workspace = Workspace(folder)
    found = workspace.folders().items()
    return {name: workspace.summary(name, path) for name, path in found}


def test_runs_are_found_with_their_numbers(folder):
    runs = runs_of(folder)
    assert runs.keys() == {"runs/good", "runs/half"}
    good, half = runs["runs/good"], runs["runs/half"]
    assert (good.status, good.step, good.steps, good.held_out) == ("finished", 12, 12, 0.25)
    assert (half.status, half.step, half.steps, half.share) == ("stopped", 12, 20, 0.6)
    assert (good.model, good.method, good.fault) == ("demo", "lora", "")
    assert half.held_out == pytest.approx(3 / 10 + 0.1)
    assert good.size > 1000


def test_a_folder_of_runs_may_be_opened_itself_but_not_a_run(folder):
    assert runs_of(folder / "runs").keys() == {"good", "half"}
    assert Workspace(folder / "runs").home == folder / "runs"
    assert Workspace(folder).home == folder / "runs"
    with pytest.raises(RunError, match=r"is one run.*\n.*lorakit ui"):
        Workspace(folder / "runs" / "good")


def test_a_summary_is_made_again_only_after_a_change(folder):
    workspace = Workspace(folder)
    path = folder / "runs" / "half"
    first = workspace.summary("runs/half", path)
    assert workspace.summary("runs/half", path) is first
    with (path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 13, "loss": 0.5}\n')
    assert workspace.summary("runs/half", path).step == 13


@pytest.mark.parametrize(
    ("file", "text", "status", "words"),
    [
        ("recipe.yaml", "\0", "damaged", "recipe.yaml"),
        ("recipe.yaml", "model: [", "damaged", "recipe.yaml"),
        ("recipe.yaml", "surprise: 1\nmodel: demo\ndata: demo\n", "damaged", "surprise"),
        ("eval.json", "{", "finished", "eval.json; remove the file"),
        ("plan.json", "[]", "finished", "plan.json; remove the file"),
    ],
)
def test_a_damaged_file_is_one_sentence(folder, file, text, status, words):
    (folder / "runs" / "good" / file).write_text(text)
    run = runs_of(folder)["runs/good"]
    assert run.status == status
    assert words in run.fault
    assert "\n" not in run.fault


def test_a_run_of_a_newer_version_names_the_command(folder):
    path = folder / "runs" / "good"
    (path / "environment.json").write_text(json.dumps({"versions": {"lorakit": "99.0"}}))
    (path / "recipe.yaml").write_text("model: demo\ndata: demo\nnew_key: 1\n")
    assert "pip install -U lorakit" in runs_of(folder)["runs/good"].fault


def test_a_run_without_its_recipe_is_listed(folder):
    (folder / "runs" / "half" / "recipe.yaml").unlink()
    assert "No recipe.yaml" in runs_of(folder)["runs/half"].fault


@pytest.mark.parametrize("text", ["{}", "[1]", '{"step": "x"}', "\0", '{"step": 5, "loss": []}'])
def test_odd_metrics_do_not_break_the_list(folder, text):
    (folder / "runs" / "good" / "metrics.jsonl").write_text(text + "\n")
    assert runs_of(folder)["runs/good"].loss is None


def test_a_run_with_a_writer_is_running(folder, monkeypatch):
    monkeypatch.setattr(listing, "lock_owner", lambda path: 5 if path.name == "half" else None)
    assert {name: run.status for name, run in runs_of(folder).items()} == {
        "runs/good": "finished",
        "runs/half": "running",
    }


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path_factory, make_run):
    outside = tmp_path_factory.mktemp("outside")
    make_run(outside / "secret")
    (outside / "rows.jsonl").write_text("{}\n")
    (folder / "runs" / "link").symlink_to(outside / "secret")
    (folder / "data.jsonl").symlink_to(outside / "rows.jsonl")
    workspace = Workspace(folder)
    assert "runs/link" not in workspace.folders()
    for source in ("data.jsonl", "*.jsonl", str(outside / "rows.jsonl"), "../x", "/etc/passwd"):
        with pytest.raises(DataError):
            workspace.check_source(source, "data")
    for source in ("my.jsonl", "m*.jsonl", "demo", "demo:heldout", "user/name", "https://a.org/x"):
        workspace.check_source(source, "data")
    for source in (
        "http://a.org/x",
        "file:///etc/passwd",
        "~/x",
        "",
        "..",
        "/",
        "a\0b",
        "x" * 9999,
    ):
        with pytest.raises(DataError):
            workspace.check_source(source, "data")


def test_names_that_are_not_in_the_list_are_refused(folder):
    workspace = Workspace(folder)
    for name in ("", "..", "runs", "/etc", "runs/../..", "runs/good/../good", "\0", "x" * 9999):
        with pytest.raises(RunError, match="no such run"):
            workspace.find(name)


def test_files_and_models_are_suggested(folder):
    (folder / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "base" / name).write_text("{}")
    workspace = Workspace(folder)
    assert workspace.data_files() == ["base/config.json", "my.jsonl"]
    assert workspace.local_models() == ["base"]
    before = workspace.stamp("my.jsonl")
    os.utime(folder / "my.jsonl", (1, 1))
    assert workspace.stamp("my.jsonl") != before
