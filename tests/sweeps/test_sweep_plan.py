"""What a sweep needs, and which of its configurations cannot be trained, before any is."""

import io

import pytest
from rich.console import Console
from tests.sweeps.conftest import QUIET

from lorakit.errors import LorakitError, RecipeError, RunError, WorkError
from lorakit.sweeps import sweep_plan
from lorakit.sweeps.sweep_plan import plan_sweep, require_sweep_space
from lorakit.sweeps.sweep_view import sweep_plan_view
from lorakit.sweeps.variations import Range


def test_the_plan_adds_up_runs_steps_and_the_largest_memory(request_of):
    vary = {"lora_r": [4, 64], "learning_rate": [1e-3, 1e-2]}
    request = request_of(vary, {"max_steps": 8}, seeds=2)
    plan = plan_sweep(request, QUIET)
    assert plan.count == len(plan.runs) == 8
    assert plan.steps == plan.full_steps == 64
    assert plan.largest.run.settings["lora_r"] == 64
    assert plan.comparable
    small, large = (p.plan.parts["adapters (float32)"] for p in (plan.runs[0], plan.largest))
    assert large == 16 * small
    values = plan.as_dict()
    assert values["count"] == 8
    assert values["memory"]["total_bytes"] == plan.largest.plan.total_bytes
    out = io.StringIO()
    Console(file=out, width=120).print(sweep_plan_view(plan, request))
    assert "8, one after the other on one base; 64 steps in all" in out.getvalue()
    assert "the base once" in out.getvalue()


def test_halving_takes_off_the_steps_of_the_worse_half(request_of):
    vary = {"learning_rate": [1e-3, 1e-2, 1e-4, 1e-5]}
    plan = plan_sweep(request_of(vary, {"max_steps": 8}, halving=True), QUIET)
    assert (plan.steps, plan.full_steps) == (16, 32)


def test_a_search_is_planned_at_the_ends_of_its_ranges(request_of):
    pytest.importorskip("optuna")
    vary = {"lora_r": Range(4, 64, True, False), "learning_rate": Range(1e-5, 1e-3, False, True)}
    plan = plan_sweep(request_of(vary, trials=10), QUIET)
    assert [p.run.settings for p in plan.runs] == [
        {"lora_r": 4, "learning_rate": 1e-5},
        {"lora_r": 64, "learning_rate": 1e-3},
    ]
    assert plan.count == 10


def test_all_configurations_that_cannot_be_trained_are_named_first(request_of, tmp_path):
    vary = {"target_modules": [["q_proj"], ["q_prj"], ["nothing"]]}
    with pytest.raises(RecipeError, match="2 of 3 configurations cannot be trained") as caught:
        plan_sweep(request_of(vary), QUIET)
    assert "q_prj" in caught.value.message
    assert "nothing" in caught.value.message
    assert not (tmp_path / "sweep").exists()


def test_a_fault_of_the_recipe_itself_is_said_once(request_of):
    with pytest.raises(LorakitError) as caught:
        plan_sweep(request_of({"lora_r": [4, 8]}, {"data": "./missing.jsonl"}), QUIET)
    assert "missing.jsonl: no such file" in caught.value.message
    assert "configurations" not in caught.value.message


@pytest.mark.parametrize(
    ("vary", "settings", "options", "said"),
    [
        ({}, {}, {}, "needs settings to vary"),
        ({"lora_r": [4]}, {}, {"seeds": 0}, "--seeds: found 0"),
        ({"lora_r": [4]}, {}, {"trials": 2, "halving": True}, "--halving compares runs"),
        ({}, {}, {"trials": 2, "seeds": 2}, "--trials needs a range"),
        ({"lora_r": Range(4, 8, True, False)}, {}, {}, "a range is searched"),
        ({"lora_r": [4, 8]}, {"val_size": 0}, {"halving": True}, "no rows are held out"),
        ({"val_size": [3, 4]}, {}, {"halving": True}, "have different held-out rows"),
    ],
)
def test_options_that_do_not_go_together_are_refused(request_of, vary, settings, options, said):
    with pytest.raises((RecipeError, RunError)) as caught:
        plan_sweep(request_of(vary, settings, **options), QUIET)
    assert said in caught.value.message
    assert caught.value.hint or "--seeds" in said


def test_different_held_out_rows_are_trained_but_not_ranked(request_of):
    assert not plan_sweep(request_of({"val_size": [3, 4]}), QUIET).comparable
    assert not plan_sweep(request_of({"lora_r": [3, 4]}, {"val_size": 0}), QUIET).comparable


def test_a_disk_that_is_too_small_for_all_runs_is_refused(request_of, tmp_path, monkeypatch):
    plan = plan_sweep(request_of({"lora_r": [4, 8]}), QUIET)
    require_sweep_space(plan, tmp_path)
    monkeypatch.setattr(sweep_plan, "free_bytes", lambda _: plan.disk_bytes - 1)
    with pytest.raises(WorkError, match="2 runs take"):
        require_sweep_space(plan, tmp_path)
