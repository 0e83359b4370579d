"""The page of a sweep: all runs that have begun, and why some of them stopped."""

from tests.made_runs import make_run

from lorakit.storage.run_dir import append_metrics
from lorakit.sweeps.sweep_page import renew_sweep_page, write_sweep_page
from lorakit.sweeps.sweep_record import RunRecord, SweepDir, SweepRecord


def learned(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.01)


def made(folder, tiny_model_dir, names):
    for rank, name in zip((4, 8), names, strict=True):
        run = make_run(folder.path / name, tiny_model_dir, learned, lora_r=rank)
        rows = [{"step": s, "loss": 3.0 / s, "learning_rate": 0.1, "tokens": 9} for s in (1, 2, 3)]
        append_metrics(run, [{**row, "seconds": 1.0, "memory_gb": 1.0} for row in rows])


def test_the_page_compares_the_runs_and_gives_reasons(tiny_model_dir, tmp_path):
    folder = SweepDir(tmp_path / "mine")
    made(folder, tiny_model_dir, ("1-a", "2-b"))
    runs = [
        RunRecord("1-a", 0, {"lora_r": 4}, "stopped", 8, 2, {"2": 4.5}, reason="stopped <by> it"),
        RunRecord("2-b", 1, {"lora_r": 8}, "finished", 8, 8, {"2": 3.5}, held_out=1.25),
        RunRecord("3-c", 2, {"lora_r": 9}),
    ]
    record = SweepRecord({}, halving=True, runs=runs)
    assert write_sweep_page(folder, record)
    page = folder.page.read_text()
    assert "Sweep mine" in page
    assert page.index("2-b") < page.index("1-a")
    assert "The best run is 2-b, with a held-out loss of 1.2500" in page
    assert "stopped &lt;by&gt; it" in page
    assert "Held-out loss" in page  # of the rungs
    assert "3-c" not in page


def test_one_run_or_a_damaged_one_makes_no_page(tiny_model_dir, tmp_path):
    folder, notes = SweepDir(tmp_path / "mine"), []
    made(folder, tiny_model_dir, ("1-a", "2-b"))
    one = SweepRecord({}, runs=[RunRecord("1-a", 0, {})])
    assert not write_sweep_page(folder, one)
    (folder.path / "2-b" / "recipe.yaml").write_text("lora_r: none\n")
    one.runs.append(RunRecord("2-b", 1, {}))
    renew_sweep_page(folder, one, notes.append)
    assert not folder.page.exists()
    assert len(notes) == 1
    assert "compare.html was not written" in notes[0]
