"""report.html appears in the run's folder, by every way to it, and its failure fails nothing."""

import json

import pytest
from rich.console import Console

import lorakit
from lorakit import fit as story
from lorakit.errors import RunError, WorkError
from lorakit.report.write import renew_report, write_report

SECRET = "hf_" + "a1B2c3D4e5F6g7H8i9J0"


def test_a_page_is_written_and_written_anew(make_run, tmp_path):
    run = make_run()
    assert write_report(run) == run.report
    first = run.report.read_text()
    (run.export / "verify.json").unlink()
    assert write_report(run).read_text() != first
    assert write_report(run, tmp_path / "new" / "r.html").read_text() == run.report.read_text()


def test_a_file_with_other_contents_is_one_message(make_run, edit):
    run = make_run()
    edit(run.data_report, faults=[{"kind": 3}])
    with pytest.raises(RunError, match="holds something else than lorakit writes"):
        write_report(run)


def test_a_failing_report_is_a_note(make_run):
    run, notes = make_run(), []
    run.plan.write_text("{")
    assert not renew_report(run, notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("report.html was not written (")
    run.plan.unlink()
    assert renew_report(run, notes.append)
    assert len(notes) == 1


def test_no_secret_gets_into_it(make_run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef01")
    text = f"see {SECRET} and https://me:word-of-pass@host/x and 0123456789abcdef01"
    page = write_report(make_run(text=text, system=text)).read_text()
    for secret in (SECRET, "word-of-pass", "0123456789abcdef01"):
        assert secret not in page
    assert "***" in page


def test_training_writes_it_and_eval_and_export_renew_it(finish, tiny_data):
    run = lorakit.open_run(finish(max_steps=3, eval_every=2).run.path)
    first = (run.path / "report.html").read_text()
    assert "Held-out perplexity went from" in first
    assert 'class="held"' in first
    assert "Examples by length" in first
    assert str(tiny_data.parent) not in first
    assert tiny_data.name in first
    run.export("adapter", verify=False)
    assert "not compared: asked not to compare" in run.folder.report.read_text()
    (run.folder.report).unlink()
    run.evaluate(samples=0)
    assert run.folder.report.exists()
    assert run.report() == run.folder.report
    assert [row["step"] for row in run.held_out] == [2, 3]


def test_a_run_that_ended_with_a_fault_has_its_page_too(
    tiny_model_dir, tiny_data, tmp_path, monkeypatch
):
    def fails(*_):
        raise WorkError("diverged")

    monkeypatch.setattr(story, "save_adapter", fails)
    with pytest.raises(WorkError, match="diverged"):
        lorakit.finetune(
            model=str(tiny_model_dir), data=tiny_data, output_dir=tmp_path / "run", max_steps=1,
            val_size=0, cutoff_len=64, offline=True, console=Console(quiet=True),
        )  # fmt: skip
    assert "Stopped after step 1 of 1" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_whose_report_cannot_be_made_is_trained_all_the_same(
    tiny_model_dir, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    (folder / "report.html").mkdir(parents=True)  # a folder in its place
    run = lorakit.finetune(
        model=str(tiny_model_dir), data=tiny_data, output_dir=folder, max_steps=1, val_size=0,
        cutoff_len=64, offline=True,
    )  # fmt: skip
    assert run.finished
    assert json.loads(run.folder.plan.read_text())["parts"]
