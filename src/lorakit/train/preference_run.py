"""Everything that a preference objective adds to a trainer: its rows, reference and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.batching import trained_sequences
from lorakit.distributed.process_group import DistributedContext
from lorakit.recipe.schema import PAIR_OBJECTIVES, Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.preference_loss import SUMS, Answers, PreferenceObjective, metrics_of
from lorakit.train.preference_reference import ReferenceStore, answer_logps, sequence_logps
from lorakit.train.preference_rows import PreferenceRows, TrainerRows
from lorakit.types import Example

# Rows whose rewards are computed twice to measure rounding.
ROUNDING_ROWS = 4


class PreferenceRun:
    """State of the training with a preference objective.

    Args:
        start: hash of the adapter that training started from, if any.
        together: the ranks pass through the model together.
        note: prints a line.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        train: Sequence[Example],
        val: Sequence[Example],
        pad_id: int,
        device: torch.device,
        ranks: DistributedContext,
        start: str | None,
        together: bool,
        note: Callable[[str], None],
    ) -> None:
        self.objective = PreferenceObjective(recipe, device)
        self.paired = recipe.objective in PAIR_OBJECTIVES
        self.pad_id, self.ranks, self.together, self.note = pad_id, ranks, together, note
        self.train = PreferenceRows(train, mismatch=not self.paired)
        self.val = PreferenceRows(val, not self.paired, held_out=True) if val else None
        self.store = reference_store(run, recipe, start)
        self.totals = torch.zeros(len(SUMS), device=device)
        self.kl_total, self.steps = torch.zeros((), device=device), 0

    @property
    def trainer_rows(self) -> TrainerRows:
        """Rows for the trainer's data loader."""
        return TrainerRows(self.train)

    def prepare(self, model: Any, load_start: Callable[[], None] | None = None) -> None:
        """Read the reference values, or compute those that are missing.

        Args:
            model: the model as training starts, or any later one if the values are kept.
            load_start: makes `model` the one that training started from, if it is not.
        """
        if not self.objective.needs_reference:
            return
        parts = {"train": self.train, **({"val": self.val} if self.val is not None else {})}
        keys = {part: self.store.key(rows) for part, rows in parts.items()}
        found = self.ranks.run_on_main_and_broadcast(
            lambda: {part: self.store.read(part, key) for part, key in keys.items()}
        )
        missing = [part for part in parts if found[part] is None]
        if missing and load_start is not None:
            load_start()
        began, values = time.monotonic(), dict[str, NDArray[np.float32]]()
        for part, rows in parts.items():
            known = found[part]
            values[part] = self._logps(model, rows) if known is None else known
            rows.reference = values[part]
        if missing:
            if self.ranks.is_main:
                self.store.write(values, keys)
            count = sum(len(parts[part]) for part in missing)
            rounding = self._rounding(model)
            self.note(
                f"reference log-probabilities of {count:,} rows in {time.monotonic() - began:.0f} s"
                + (f"; rounding changes a reward by {rounding:.1g}" if rounding > 1e-3 else "")
            )

    def _rounding(self, model: Any) -> float:
        """Mean difference between rewards in a batch and alone, over a few rows.

        Other shapes are computed in another order, in steps as in the reference.
        """
        few = [self.train[i] for i in range(min(ROUNDING_ROWS, len(self.train)))]
        alone = np.concatenate([self._logps(model, [row]) for row in few])
        difference = np.abs(alone - [row.reference for row in few]).mean()
        return self.objective.beta * float(difference)

    def _logps(self, model: Any, rows: Sequence[Example]) -> NDArray[np.float32]:
        return answer_logps(model, rows, self.pad_id, self.ranks, self.together, self.note)

    # -- a step -----------------------------------------------------------------------------------

    def begin(self, model: Any, examples: Sequence[Example], own: Sequence[Example]) -> None:
        """Set what the loss of a step needs of all its examples.

        Args:
            own: those of this rank.
        """
        self.objective.begin(examples)
        if self.paired:
            return
        own = examples if self.together else own
        shift, count = self._shift(model, own), len(own)
        sums = torch.tensor([shift, count], dtype=torch.float32, device=self.objective.kl.device)
        if self.ranks.world_size > 1 and not self.together:
            self.ranks.all_reduce_(sums)
        self.objective.kl.copy_((sums[0] / sums[1].clamp(min=1)).clamp(min=0))

    def _shift(self, model: Any, own: Sequence[Example]) -> float:
        """Sum of log p - log p of the reference over the mismatched answers."""
        logps = sequence_logps(model, [e.sequences[1] for e in own], self.pad_id)
        return float(logps.sum() - sum(e.reference[1] for e in own))

    def add(self, sums: Tensor, loss: Tensor) -> None:
        """Add the sums of a step to those of the next row of metrics, unless it is skipped."""
        finite = torch.isfinite(loss)
        self.totals += torch.where(finite, sums, torch.zeros_like(sums))
        self.kl_total += self.objective.kl
        self.steps += 1

    def row(self) -> dict[str, float]:
        """Metrics of the steps since the last row."""
        metrics = metrics_of(self.totals.tolist(), self.paired)
        if not self.paired and self.steps:
            metrics["kl"] = float(self.kl_total) / self.steps
        self.totals.zero_()
        self.kl_total.zero_()
        self.steps = 0
        return metrics

    # -- held-out rows ----------------------------------------------------------------------------

    def score(self, model: Any) -> dict[str, float]:
        """Loss and metrics of the held-out rows."""
        rows = self.val if self.val is not None else ()
        return preference_scores(self.objective, rows, self._logps(model, rows))


def reference_store(run: RunDir, recipe: Recipe, start: str | None) -> ReferenceStore:
    """The file of a run's reference values.

    Args:
        start: hash of the adapter that training started from, if any.
    """
    facts = {"start": start, "dtype": recipe.dtype, "method": recipe.method}
    return ReferenceStore(run.reference, facts)


def preference_scores(
    objective: PreferenceObjective, rows: Sequence[Example], logps: NDArray[np.float32]
) -> dict[str, float]:
    """Mean loss of `rows`, and metrics with TRL's names, from log-probabilities [N, 2]."""
    if not rows:
        return {}
    examples = [rows[i] for i in range(len(rows))]
    paired = examples[0].good is None
    reference = np.array([e.reference or (0.0, 0.0) for e in examples], np.float32)
    counts = [s.trained_tokens for e in examples for s in trained_sequences(e)]
    device = objective.kl.device

    def on_device(values: Any) -> Tensor:
        return torch.as_tensor(np.ravel(values), dtype=torch.float32, device=device)

    if not paired:
        shift = float((logps[:, 1] - reference[:, 1]).mean())
        objective.kl.fill_(max(0.0, shift))
        logps, reference = logps[:, :1], reference[:, :1]
    objective.begin(examples)
    good = None if paired else on_device([bool(e.good) for e in examples])
    answers = Answers(on_device(logps), on_device(counts), on_device(reference), good)
    metrics = {"loss": float(objective.losses(answers).mean())}
    metrics |= metrics_of(objective.sums(answers).tolist(), paired)
    return metrics | ({} if paired else {"kl": float(objective.kl)})


def chosen_only(examples: Sequence[Example]) -> Sequence[Example]:
    """The answers whose perplexity is worth knowing: the chosen ones, or those labeled good.

    Examples of supervised data are returned as they are.
    """
    first = examples[0] if len(examples) else None
    if first is None or not (first.second or first.good is not None):
        return examples
    rows = (examples[i] for i in range(len(examples)))
    return [row.sequences[0] for row in rows if row.good is not False]
