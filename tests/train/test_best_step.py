"""The step with the lowest held-out loss is kept, named and used; training stops when it rises."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakit.cli.run_commands import best_title
from lorakit.errors import RecipeError, WorkError
from lorakit.export.exporters import export_run
from lorakit.hardware import detect_device
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.best_record import best_step
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, read_metrics
from lorakit.train.best_step import EarlyStopping, SaveBestStep
from lorakit.train.training_args import check_training_settings

STEPS = 16


@pytest.fixture(scope="module")
def contrary(tmp_path_factory):
    """Held-out rows of the same form with other answers: their loss falls, then rises."""
    path = tmp_path_factory.mktemp("val") / "contrary.jsonl"
    rows = [{"question": f"What color is box {i}?", "answer": "It is purple."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(tiny_recipe, tiny_model_dir, tiny_data, contrary, tmp_path):
    def build(name="run", resume=False, console=None, **values):
        values = {
            "val_size": None, "val_data": str(contrary), "max_steps": STEPS, "eval_every": 2,
            "save_every": 5, "keep_checkpoints": 1, "lora_dropout": 0.0, "learning_rate": 3e-2,
            "lr_scheduler": "constant", "modules_to_save": ["lm_head"], **values,
        }  # fmt: skip
        resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / name, **values)
        return fit(resolved, console or Console(quiet=True), resume=resume)

    return build


def held_out(run):
    return {row["step"]: row["eval_loss"] for row in read_metrics(run, held_out=True)}


def tensors(folder):
    return load_file(folder / ADAPTER_WEIGHTS)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_the_best_step_is_kept_used_and_named(train, tmp_path):
    console = Console(record=True, quiet=False, file=open("/dev/null", "w"))
    outcome = train(load_best_model_at_end=True, console=console)
    run, losses = outcome.run, held_out(outcome.run)
    best = min(losses, key=losses.get)
    assert 2 < best < STEPS  # neither the first nor the last evaluation
    assert STEPS in losses  # the last step is scored too
    assert (outcome.best.step, outcome.best.value, outcome.best.used) == (
        best,
        losses[best],
        True,
    )
    assert best_step(run) == outcome.best
    assert same(tensors(run.adapter), tensors(run.checkpoint(best)))
    assert [p.name for p in run.list_checkpoints()] == [f"step_{best:06d}", "step_000016"]
    assert outcome.evaluation.tuned.loss == pytest.approx(losses[best], abs=1e-4)
    page = run.report.read_text()
    assert "lowest held-out loss" in page
    assert f"step {best}" in page
    assert best_title(run) == f" (best step: {outcome.best.describe()})"
    told = Console(record=True, file=open("/dev/null", "w"))
    facts = export_run(run, "adapter", tmp_path / "exported", told)
    assert facts["step"] == best
    assert f"best     step {best} of {STEPS}" in told.export_text()


def test_early_stopping_ends_the_run_and_uses_the_best_step(train):
    outcome = train(early_stopping_patience=2)
    losses = held_out(outcome.run)
    best = min(losses, key=losses.get)
    assert outcome.exit_code == 0
    assert outcome.steps == best + 4 < STEPS
    assert outcome.best.used
    assert same(tensors(outcome.run.adapter), tensors(outcome.run.checkpoint(best)))
    # A second start finds that it has ended; more patience goes on.
    again = train(early_stopping_patience=2, resume=True)
    assert (again.steps, again.best) == (outcome.steps, outcome.best)
    more = train(early_stopping_patience=50, resume=True)
    assert more.steps == STEPS


def test_the_last_step_may_be_the_result(train):
    outcome = train(early_stopping_patience=2, load_best_model_at_end=False)
    run, best = outcome.run, outcome.best
    assert not best.used
    assert run.checkpoint(best.step).exists()
    assert same(tensors(run.adapter), tensors(run.checkpoint(outcome.steps)))
    assert f"that of step {outcome.steps}" in best.describe()


def test_a_resumed_run_has_the_same_best_step_and_stops_at_the_same_step(train):
    whole = train("whole", early_stopping_patience=2)
    cut = train("cut", early_stopping_patience=2, max_steps=whole.best.step + 2)
    assert cut.steps == whole.best.step + 2
    resumed = train("cut", early_stopping_patience=2, resume=True)
    assert resumed.best == whole.best
    assert resumed.steps == whole.steps
    assert same(tensors(resumed.run.adapter), tensors(whole.run.adapter))


def test_without_these_keys_nothing_is_compared(train):
    outcome = train(max_steps=4, modules_to_save=None)
    assert outcome.best is None
    assert not outcome.run.best.exists()
    assert [p.name for p in outcome.run.list_checkpoints()] == ["step_000004"]


def test_a_damaged_best_checkpoint_is_one_error(train, monkeypatch):
    from lorakit.train import resumable_trainer

    def damaged(folder):
        raise resumable_trainer.CorruptedError("state.json is missing")

    monkeypatch.setattr(resumable_trainer, "read_checkpoint", damaged)
    with pytest.raises(WorkError, match=r"best step is damaged: state.json is missing"):
        train(load_best_model_at_end=True)


WRONG = {
    "early_stopping_patience needs held-out rows": ({"eval_every": 2}, False),
    "eval_every is 10 in 10 steps": ({"eval_every": 10}, True),
    "but none is asked for in 10 steps": ({}, True),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_compared_is_refused_before_the_base_is_loaded(message):
    values, held = WRONG[message]
    recipe = Recipe(model="m", data="d", early_stopping_patience=2, **values)
    with pytest.raises(RecipeError, match=message) as caught:
        check_training_settings(recipe, detect_device("float32", prefer="cpu"), 10, held)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "uses", "compares"),
    [
        ({}, False, False),
        ({"load_best_model_at_end": True}, True, True),
        ({"early_stopping_patience": 3}, True, True),
        ({"early_stopping_patience": 3, "load_best_model_at_end": False}, False, True),
        ({"load_best_model_at_end": False}, False, False),
    ],
)
def test_what_the_keys_mean(values, uses, compares):
    recipe = Recipe(model="m", data="d", **values)
    assert (recipe.uses_best_step, recipe.compares_steps) == (uses, compares)
    assert recipe.kept_checkpoints == recipe.keep_checkpoints + compares


def test_the_names_of_hugging_face_are_the_only_ones():
    from lorakit.errors import RecipeError

    with pytest.raises(RecipeError, match="metric_for_best_model"):
        load_recipe(None, [], {"model": "m", "data": "d", "metric_for_best_model": "accuracy"})


@pytest.mark.parametrize(
    ("loss", "best", "saved"),
    [(1.0, None, True), (1.0, 2.0, True), (2.0, 1.0, False), (math.nan, 1.0, False)],
)
def test_a_new_best_step_is_saved(loss, best, saved):
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    state = SimpleNamespace(best_metric=best, global_step=2, max_steps=9)
    args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    SaveBestStep().on_evaluate(args, state, control, {"eval_loss": loss})
    assert control.should_save == saved
    # A loss that is no number is no improvement.
    said = []
    stopper = EarlyStopping(1, said.append)
    stopper.on_evaluate(args, state, control, {"eval_loss": loss})
    assert control.should_training_stop == (not saved) == bool(said)
