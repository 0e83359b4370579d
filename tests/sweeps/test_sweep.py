"""A sweep from Python: its runs, the best, and its rows as data."""

import pytest
from rich.console import Console

import lorakit
from lorakit.errors import RecipeError

ROWS = [{"question": f"What color is box {i}?", "answer": "It is red."} for i in range(12)]


@pytest.fixture(scope="module")
def swept(tiny_model_dir, tmp_path_factory):
    return lorakit.sweep(
        model=str(tiny_model_dir), train_dataset=ROWS, vary={"learning_rate": [1e-5, 2e-2]},
        output_dir=str(tmp_path_factory.mktemp("made") / "sweep"), console=Console(quiet=True),
        max_steps=2, val_size=2, cutoff_len=64, lora_r=4, micro_batch_size=2,
    )  # fmt: skip


def test_a_sweep_gives_its_runs_and_the_best(swept):
    assert [run.recipe.learning_rate for run in swept.runs] == [1e-5, 2e-2]
    assert swept.best.recipe.learning_rate == 2e-2
    assert swept.best.finished
    rows = swept.rows
    assert [row["learning_rate"] for row in rows] == [1e-5, 2e-2]
    assert rows[1]["held_out"] == swept.best.evaluation.tuned.loss
    assert "best" in repr(swept)
    assert "<pre" in swept._repr_html_()


def test_a_finished_sweep_is_opened_and_resumed(swept):
    assert lorakit.Sweep(swept.path).rows == swept.rows
    again = lorakit.sweep(swept.path, resume=True, console=Console(quiet=True))
    assert again.rows == swept.rows


def test_a_resume_needs_a_folder():
    with pytest.raises(RecipeError, match="needs the folder of a sweep"):
        lorakit.sweep({"model": "demo"}, resume=True)
