"""A run that goes wrong in silence gets one line that says what was measured."""

import random

import pytest

from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.diagnostics import (
    FLAT_STEPS,
    TIMED_ROWS,
    UNTIMED_ROWS,
    RunMonitor,
    planned_rate,
    run_notes,
)

from .faults import examples, said, trainer_of


def words(losses, rates=None, planned=None, norm=0.5, speed=1000.0, every=1, **values):
    """What is said over a run of these losses, one each `every` steps; (step, words)."""
    recipe = Recipe(model="m", data="d", log_every=every, **values)
    watch = RunMonitor(recipe, planned, lambda: "the fan is off")
    watch.start(every * len(losses))
    said = []
    for i, loss in enumerate(losses):
        row = {
            "step": every * (i + 1),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rates[i] if rates else recipe.learning_rate,
            "tokens_per_second": speed,
        }
        said += [(row["step"], x) for x in watch.row(row)]
    return said


def noisy(start, end, count=400):
    draw = random.Random(0)
    return [start + (end - start) * i / count + draw.gauss(0, 0.05 * start) for i in range(count)]


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"learning_rate": 1e-7}, "learning_rate is too low (1e-07"),
        ({"learning_rate": 5e-2}, "learning_rate is too high (0.05"),
        ({"norm": 1e-6}, "few tokens are trained, or lora_alpha is too small (32): the gradient"),
        ({}, "the model knows this data already"),
    ],
)
def test_a_loss_that_stays_is_said_once_with_its_likely_cause(values, cause):
    ((step, line),) = words([2.5] * 400, **values)
    assert step == FLAT_STEPS + round(0.03 * 400)
    assert f"the loss stays at 2.500 (2.500) over {FLAT_STEPS} steps; likely {cause}" in line


@pytest.mark.parametrize("every", [2, 5, 10])
def test_the_steps_that_were_looked_at_are_told_where_rows_are_few(every):
    ((step, line),) = words([2.5] * 60, every=every, warmup_steps=0)
    assert f"over {step - every + 1} steps; likely" in line


def test_a_loss_that_rises_blames_the_rate():
    ((_, line),) = words(noisy(2.0, 6.0))
    assert "rose from 2." in line
    assert "learning_rate is too high (0.0001)" in line


@pytest.mark.parametrize("losses", [noisy(2.0, 1.2), noisy(1.2, 0.6), [0.05] * 400])
def test_a_loss_that_falls_or_is_learned_is_no_matter(losses):
    assert words(losses) == []


def test_skipped_steps_have_no_loss_and_are_passed_over():
    assert words([None] * 50 + noisy(2.0, 1.2) + [None]) == []


def test_a_rate_that_ends_early_is_said_where_it_does():
    rates = [1e-4] * 249 + [0.0] * 751
    ((step, line),) = words(noisy(3, 1, 1000), rates)
    assert step == 250
    assert line.startswith("the learning rate is 0 from step 250 of 1000 on")


def test_warm_up_from_0_and_a_0_at_the_end_are_as_planned():
    rates = [0.0, *[1e-4] * 398, 0.0]
    assert words(noisy(3, 1), rates) == []


def test_a_run_far_slower_than_planned_is_said_once():
    ((step, line),) = words([2.0] * 20, planned=2500.0)
    assert step == UNTIMED_ROWS + TIMED_ROWS
    assert line == "1,000 tokens/s, the plan expects 2,500: the fan is off"


@pytest.mark.parametrize("planned", [1900.0, None])
def test_a_run_near_the_plan_or_without_one_is_not(planned):
    assert words([2.0] * 20, planned=planned) == []


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ('{"tokens_per_second": 2500}', 2500.0),
        ('{"tokens_per_second": null}', None),
        ("{}", None),
        ("{", None),
        (None, None),
    ],
)
def test_the_planned_rate_is_read_from_the_run(tmp_path, text, rate):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    assert planned_rate(RunDir(tmp_path)) == rate


def test_a_trainer_far_slower_than_its_plan_says_so(tiny_model_dir, tmp_path):
    (tmp_path / "plan.json").write_text('{"tokens_per_second": 1e12}')
    trainer = trainer_of(
        tiny_model_dir, tmp_path, examples([9] * 8), max_steps=15, micro_batch_size=1
    )
    trainer.train()
    assert (
        said(trainer).count("tokens/s, the plan expects 1,000,000,000,000: check for another") == 1
    )


DATA = {
    "rows_read": 280, "examples_train": 240, "examples_val": 40, "tokens_train": 9000,
    "trained_tokens_train": 4000, "sources": [], "faults": [],
}  # fmt: skip


def notes(losses, held=(), scored=None, planned=None, marks=None, **values):
    recipe = Recipe(**{"model": "m", "data": "d", "max_steps": len(losses), **values})
    steps = [
        {"step": i + 1, "loss": loss, "grad_norm": 0.5, "learning_rate": 1e-4,
         "tokens_per_second": 900.0, **(marks or {}).get(i + 1, {})}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    rows = [{"step": step, "eval_loss": loss} for step, loss in held]
    return run_notes(recipe, steps, rows, DATA, scored or {}, planned)


def test_the_loss_of_a_policy_has_no_trend_to_judge():
    rising = noisy(1, 3, 40)
    assert notes(rising)
    assert notes(rising, objective="grpo", reward_funcs=["numeric_answer"]) == []


def test_a_good_run_has_no_notes():
    scored = {"base": {"loss": 3.0}, "tuned": {"loss": 1.0}}
    assert notes(noisy(3, 1, 40), [(20, 1.5), (40, 1.51)], scored) == []
    assert run_notes(Recipe(model="m", data="d"), [], [], {}, {}) == []


def test_a_short_run_whose_loss_rises_blames_the_rate():
    rate = {"learning_rate": 0.05}
    (note,) = notes([2 + i / 10 for i in range(30)], **rate)
    assert "the loss rose from" in note
    assert note.endswith("likely learning_rate is too high (0.05; LoRA is used to 1e-4).")
    # It diverged at once, then fell a little: compared with its first row, the base's loss.
    (note,) = notes([3.0, 9.0, 8.5, *[8.0] * 12, *[7.0] * 5], **rate)
    assert "rose from 3.000 at the start to 7" in note


def test_a_held_out_loss_that_rises_or_is_above_the_base_is_named():
    (note,) = notes(noisy(3, 1, 40), [(10, 1.5), (20, 1.2), (40, 2.0)])
    assert note.startswith("The held-out loss rises since step 20, from 1.200 to 2.000: overfit")
    scored = {"base": {"loss": 2.5}, "tuned": {"loss": 4.0}}
    (note,) = notes(noisy(3, 1, 40), scored=scored)
    assert note == "The adapter is worse than its base: held-out loss 4.000 against 2.500."


def test_answers_that_are_questions_are_named():
    pair = {"prompt": "The baker is Berta.", "reference": "Who is the baker?"}
    scored = {"base": {"loss": 3.0}, "tuned": {"loss": 1.0}, "samples": [pair] * 4}
    (note,) = notes(noisy(3, 1, 40), scored=scored)
    assert "may be swapped" in note
    scored["samples"] = [pair, {"prompt": "Who?", "reference": "Berta."}, pair]
    assert notes(noisy(3, 1, 40), scored=scored) == []


def test_skipped_steps_spikes_and_a_low_speed_are_named():
    marks = {i: {"skipped": True, "loss": None} for i in range(5, 15)} | {20: {"spike": True}}
    found = notes(noisy(3, 1, 40), marks=marks, planned=90000.0)
    assert found[0].endswith("not finite: 5, 6, 7, 8, 9, 10, 11, 12 ....")
    assert found[1] == "Steps with a sudden peak of the loss: 20."
    assert "900 tokens/s, the plan expects 90,000" in found[2]  # the least of all


def test_the_end_of_training_reports_a_loss_that_was_not_judged_yet():
    watch = RunMonitor(Recipe(model="m", data="d"), None, str)
    watch.start(30)
    for i in range(30):
        assert watch.row({"step": i + 1, "loss": 2 + i / 10, "learning_rate": 1e-4}) == []
    (line,) = watch.finish()
    assert "learning_rate is too high" in line
    assert watch.finish() == []
