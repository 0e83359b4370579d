"""A sweep's runs are those of `lorakit train`, bit by bit, also halved, killed and resumed."""

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from tests.sweeps.conftest import QUIET, SMALL, numbers_of

from lorakit import pipeline
from lorakit.errors import RunError, WorkError
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir, read_json
from lorakit.sweeps import run_sweep
from lorakit.sweeps.run_sweep import resume_sweep, start_sweep
from lorakit.sweeps.sweep_record import SweepDir, SweepRecord, read_record
from lorakit.sweeps.variations import read_range
from lorakit.train.signals import StopRequest


def states(result):
    return [run.state for run in result.record.runs]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_each_run_equals_the_same_run_alone(swept, alone, method):
    shared = {"method": method, "max_steps": 3, "lora_dropout": 0.3}
    result = swept({"learning_rate": [1e-3, 2e-2]}, shared)
    assert result.exit_code == 0
    assert states(result) == ["finished"] * 2
    assert result.base_loads == 1
    first, second = (numbers_of(result.folder.run(run.name)) for run in result.record.runs)
    assert first[0] != second[0]
    assert second == alone(**shared, learning_rate=2e-2)


def test_each_run_is_a_normal_run_directory(swept):
    result = swept({"lora_r": [4, 8]}, {"max_steps": 2})
    folders = [result.folder.run(run.name) for run in result.record.runs]
    for folder, rank in zip(folders, (4, 8), strict=True):
        names = {path.name for path in folder.path.iterdir()}
        assert {"recipe.yaml", "metrics.jsonl", "adapter", "eval.json", "report.html"} <= names
        assert folder.recipe.read_text().count(f"lora_r: {rank}  # --vary") == 1
        assert "stopped.json" not in names
    assert result.record.best().name in {folder.path.name for folder in folders}


def test_seeds_have_their_own_order_and_start(swept, alone):
    result = swept({}, {"max_steps": 2}, seeds=2)
    first, second = (numbers_of(result.folder.run(run.name)) for run in result.record.runs)
    assert first != second
    assert second == alone(max_steps=2, seed=43)


def test_a_run_that_changes_the_base_does_not_change_the_next(swept, alone):
    result = swept({"bias": ["all", "none"]}, {"max_steps": 2})
    assert states(result) == ["finished", "finished"]
    assert numbers_of(result.folder.run(result.record.runs[1].name)) == alone(max_steps=2)


def test_halving_stops_the_worse_half_and_names_the_reason(swept, alone):
    rates = [1e-5, 2e-2, 1e-4, 5e-3]
    result = swept({"learning_rate": rates}, {"max_steps": 8}, halving=True)
    runs = result.record.runs
    assert [run.step for run in runs] == [2, 8, 2, 4]
    assert states(result) == ["stopped", "finished", "stopped", "stopped"]
    assert result.record.kept == [[1, 3], [1]]
    assert result.record.best() is runs[1]
    assert numbers_of(result.folder.run(runs[1].name)) == alone(max_steps=8, learning_rate=2e-2)
    stopped = read_json(result.folder.run(runs[3].name).stopped)
    assert stopped["reason"].startswith("Stopped by the sweep at step 4 of 8: held-out loss ")
    assert stopped["reason"] in result.folder.run(runs[3].name).report.read_text()
    # Nothing is lost: a stopped run goes on as any other.
    fitted = pipeline.fit(load_recipe(result.folder.run(runs[3].name).recipe), QUIET, True)
    assert fitted.steps == 8
    assert numbers_of(fitted.run) == alone(max_steps=8, learning_rate=5e-3)
    assert not fitted.run.stopped.exists()


def test_halving_compares_means_over_seeds(swept):
    vary = {"learning_rate": [1e-5, 2e-2]}
    result = swept(vary, {"max_steps": 4}, halving=True, seeds=2)
    assert [(run.configuration, run.step) for run in result.record.runs] == [
        (0, 2), (0, 2), (1, 4), (1, 4),
    ]  # fmt: skip
    assert result.record.kept == [[1]]


def test_a_failed_run_is_named_and_the_others_go_on(request_of, monkeypatch, alone):
    plain, failing = run_sweep.fit, [True]

    def fit(resolved, *args):
        if resolved.recipe.lora_r == 8 and failing:
            raise WorkError("out of memory at step 1", "lower lora_r")
        return plain(resolved, *args)

    monkeypatch.setattr(run_sweep, "fit", fit)
    result = start_sweep(request_of({"lora_r": [8, 4]}, {"max_steps": 2}), QUIET)
    assert result.exit_code == 1
    assert states(result) == ["failed", "finished"]
    assert result.record.runs[0].reason == "out of memory at step 1"
    assert result.record.best().settings == {"lora_r": 4}
    failing.clear()
    again = resume_sweep(result.folder.path, QUIET)
    assert again.exit_code == 0
    assert states(again) == ["finished", "finished"]
    assert numbers_of(again.folder.run(again.record.runs[0].name)) == alone(max_steps=2, lora_r=8)


def test_out_of_memory_in_a_step_ends_that_run_only(request_of, monkeypatch):
    from lorakit.train.trainer import LoraTrainer

    plain = LoraTrainer._forward_backward

    def forward(trainer, *args):
        if trainer.recipe.lora_r == 8:
            raise MemoryError("tried to allocate 99 GiB")
        return plain(trainer, *args)

    monkeypatch.setattr(LoraTrainer, "_forward_backward", forward)
    result = start_sweep(request_of({"lora_r": [8, 4]}, {"max_steps": 2}), QUIET)
    assert states(result) == ["failed", "finished"]
    assert "out of memory at step 1 with one example at a time" in result.record.runs[0].reason


def test_a_failed_configuration_does_not_survive_a_rung(request_of, monkeypatch):
    plain = run_sweep.fit

    def fit(resolved, *args):
        if resolved.recipe.learning_rate == 2e-2:
            raise ValueError("a bug")
        return plain(resolved, *args)

    monkeypatch.setattr(run_sweep, "fit", fit)
    vary = {"learning_rate": [2e-2, 1e-3, 1e-5]}
    result = start_sweep(request_of(vary, {"max_steps": 4}, halving=True), QUIET)
    assert states(result) == ["failed", "finished", "stopped"]
    assert result.record.runs[0].reason == "ValueError: a bug"
    assert result.exit_code == 1
    again = resume_sweep(result.folder.path, QUIET)  # what a rung has decided stays
    assert states(again) == ["failed", "finished", "stopped"]


def test_a_signal_saves_and_a_resume_goes_on(request_of, monkeypatch, alone):
    asked = StopRequest.asked
    seen = []

    def stop_in_the_third_step(self):
        seen.append(None)
        if len(seen) == 7:
            self.signal = signal.SIGINT
        return asked.fget(self)

    monkeypatch.setattr(StopRequest, "asked", property(stop_in_the_third_step))
    request = request_of({"learning_rate": [1e-3, 2e-2]}, {"max_steps": 4})
    result = start_sweep(request, QUIET)
    assert result.exit_code == 130
    assert "waiting" in states(result)
    monkeypatch.setattr(StopRequest, "asked", asked)
    again = resume_sweep(result.folder.path, QUIET)
    assert again.exit_code == 0
    for run in again.record.runs:
        assert numbers_of(again.folder.run(run.name)) == alone(max_steps=4, **run.settings)


def test_a_killed_sweep_resumes_to_the_same_bits(
    tiny_model_dir, tiny_data, tmp_path, request_of, alone
):
    """Killed while the first run saves its checkpoint, and again after the rung."""
    settings = {**SMALL, "max_steps": 4, "model": str(tiny_model_dir), "data": str(tiny_data)}
    recipe = request_of({}, seeds=2).recipe.recipe
    for key in ("micro_batch_size", "gradient_accumulation_steps", "cutoff_len", "val_size"):
        settings[key] = getattr(recipe, key)
    settings |= {"dtype": "float32", "offline": True}
    job = {
        "folder": str(tmp_path / "killed"),
        "settings": settings,
        "vary": {"learning_rate": [1e-5, 2e-2]},
        "halving": True,
        "kills": [20, 50],
    }
    script = Path(__file__).parent / "killed_sweep.py"
    done = subprocess.run([sys.executable, script, json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == [-9, -9, 0], done.stderr[-3000:]
    record = read_record(SweepDir(tmp_path / "killed"))
    assert [run.state for run in record.runs] == ["stopped", "finished"]
    best = record.best()
    assert best.settings == {"learning_rate": 2e-2}
    found = numbers_of(RunDir(tmp_path / "killed" / best.name))
    assert found == alone(max_steps=4, learning_rate=2e-2)


def test_a_search_records_its_trials_and_goes_on(request_of, monkeypatch):
    pytest.importorskip("optuna")
    vary = {"learning_rate": read_range("1e-4..1e-1")}
    request = request_of(vary, {"max_steps": 1}, trials=2)
    result = start_sweep(request, QUIET)
    assert states(result) == ["finished", "finished"]
    rates = [run.settings["learning_rate"] for run in result.record.runs]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == 2
    again = resume_sweep(result.folder.path, QUIET)
    assert [run.settings["learning_rate"] for run in again.record.runs] == rates


def test_folders_in_use_are_refused(request_of, tmp_path):
    request = request_of({"lora_r": [4, 8]})
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        start_sweep(request, QUIET)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    with pytest.raises(RunError, match="already holds a sweep"):
        start_sweep(request, QUIET)


def test_a_resume_with_other_settings_is_refused(tmp_path):
    SweepRecord({"lora_r": [4, 8]}).write(SweepDir(tmp_path))
    with pytest.raises(RunError, match="--vary lora_r is not what this sweep was started with"):
        resume_sweep(tmp_path, QUIET, vary={"lora_r": [4, 16]})
    (tmp_path / "sweep.yaml").write_text("model: demo\ndata: demo\n")
    assert resume_sweep(tmp_path, QUIET, vary={"lora_r": [4, 8]}).exit_code == 0


def test_several_ranks_are_refused(request_of, monkeypatch):
    monkeypatch.setattr(run_sweep, "launch_environment", lambda: {"RANK": "0"})
    with pytest.raises(RunError, match="trains in one process"):
        start_sweep(request_of({"lora_r": [4, 8]}), QUIET)


def test_another_file_of_the_same_name_is_not_trained(
    request_of, tiny_data, tmp_path, monkeypatch, alone
):
    """`data: ../rows.jsonl` of the sweep's folder is a file of the current folder's parent, too."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "rows.jsonl").write_text(tiny_data.read_text())
    (tmp_path / "rows.jsonl").write_text('{"question": "Wrong?", "answer": "Yes."}\n' * 9)
    monkeypatch.chdir(here)
    settings = {"data": "rows.jsonl", "output_dir": "sweep", "max_steps": 1, "val_size": 2}
    result = start_sweep(request_of({"lora_r": [4, 8]}, settings), QUIET)
    assert "../rows.jsonl" in result.folder.recipe.read_text()
    for run in result.record.runs:
        report = read_json(result.folder.run(run.name).data_report)
        assert report["rows_read"] == 30
    result.record.runs[1].state = "waiting"
    result.record.write(result.folder)
    shutil.rmtree(result.folder.run(result.record.runs[1].name).path)
    again = resume_sweep(result.folder.path, QUIET)
    report = read_json(again.folder.run(again.record.runs[1].name).data_report)
    assert report["rows_read"] == 30


def test_the_recipe_in_the_folder_names_no_place(swept, tmp_path):
    result = swept({"lora_r": [4, 8]}, {"max_steps": 1})
    for path in (result.folder.recipe, result.folder.record):
        assert str(tmp_path) not in path.read_text()


def test_lines_about_the_start_are_printed_once_and_warnings_each_time():
    out, printed = io.StringIO(), set()
    console = Console(file=out)
    for rate in ("0.1", "0.2"):
        with run_sweep.without_repeats(console, printed) as inner:
            inner.print("device   a CPU")
            inner.print(Text("data     rows.jsonl: 30 rows"))
            inner.print(f"memory   {rate}")
            inner.print("note: a warning")
    console.print("device   a CPU")
    lines = out.getvalue().splitlines()
    first = ["device   a CPU", "data     rows.jsonl: 30 rows", "memory   0.1", "note: a warning"]
    assert lines == [*first, "memory   0.2", "note: a warning", "device   a CPU"]
