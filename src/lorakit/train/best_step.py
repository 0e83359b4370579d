"""Keep the step that is best by a metric, and stop when the metric no longer improves.

transformers compares the values (`metric_for_best_model`) and counts the evaluations without
improvement. Here a new best step is saved at once, the last step is scored too, and the count
survives a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from transformers import EarlyStoppingCallback, TrainerCallback

from lorakit.errors import RecipeError
from lorakit.recipe.loader import suggest
from lorakit.recipe.schema import PAIR_OBJECTIVES, PREFERENCE_OBJECTIVES, Recipe
from lorakit.storage.best_record import LOSS, metric_name


class TaskScorer(Protocol):
    """Scores of a recipe's `eval_tasks` during training, see `evaluation/training_scores.py`."""

    @property
    def directions(self) -> Mapping[str, bool]:
        """Key of each metric, and True where higher is better."""
        ...

    def score(self, model: Any) -> dict[str, float]:
        """Score the model; one value for each key of `directions`."""
        ...


def metric_direction(recipe: Recipe, scorer: TaskScorer | None) -> bool:
    """True if a higher `metric_for_best_model` is better.

    Raises:
        RecipeError: no evaluation gives this metric.
    """
    key = recipe.metric_for_best_model
    known = {LOSS: False, "eval_perplexity": False, **(scorer.directions if scorer else {})}
    if recipe.objective in PREFERENCE_OBJECTIVES:
        known["eval_rewards/margins"] = True
    if recipe.objective in PAIR_OBJECTIVES:
        known["eval_rewards/accuracies"] = True
    if key not in known:
        raise RecipeError(
            f"metric_for_best_model: {key}: no evaluation gives it{suggest(key, known)}",
            hint=f"metrics of this run: {', '.join(known)}",
        )
    return known[key]


def evaluations_without_improvement(state: Any) -> int:
    """Count the last evaluations without a better value, as kept in a trainer's state."""
    kept = state.stateful_callbacks.get(EarlyStopping.__name__)
    return int(kept["attributes"]["early_stopping_patience_counter"]) if kept else 0


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count a resumed run continues."""

    def __init__(self, patience: int, note: Callable[[str], None]) -> None:
        super().__init__(early_stopping_patience=patience)
        self.note = note

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.early_stopping_patience_counter = evaluations_without_improvement(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        super().on_evaluate(args, state, control, metrics)
        if control.should_training_stop and state.global_step < state.max_steps:
            self.note(
                f"step {state.global_step}: the {metric_name(args.metric_for_best_model)} did not "
                f"{'rise' if args.greater_is_better else 'fall'} in "
                f"{self.early_stopping_patience_counter} evaluations: stopping early"
            )


class SaveBestStep(TrainerCallback):
    """Score the last step, and save each step that is the best so far or the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> Any:
        value, best = metrics[args.metric_for_best_model], state.best_metric
        # A value that is not finite is no improvement, and neither is -inf of a failed task.
        better = best is None or (value > best if args.greater_is_better else value < best)
        if better or control.should_training_stop:
            control.should_save = True
        return control
