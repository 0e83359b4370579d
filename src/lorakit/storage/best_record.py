"""The best step of a run and its metric, as kept in best.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lorakit.storage.run_dir import RunDir, read_json, write_json

LOSS = "eval_loss"


def metric_name(key: str) -> str:
    """Name of a metric in messages."""
    return "held-out loss" if key == LOSS else key


@dataclass(frozen=True, slots=True)
class BestStep:
    """The step with the best value of a metric; `used` if the run's adapter is of this step."""

    step: int
    value: float
    steps: int
    used: bool
    metric: str = LOSS

    def describe(self) -> str:
        """Describe it in one line, for messages."""
        adapter = "this step's" if self.used else f"that of step {self.steps}"
        return (
            f"step {self.step} of {self.steps}, {metric_name(self.metric)} {self.value:.4f}; the "
            f"adapter is {adapter}"
        )

    def write(self, run: RunDir) -> None:
        """Write `best.json`."""
        write_json(run.best, asdict(self))


def best_step(run: RunDir) -> BestStep | None:
    """Read `best.json` of a finished run; None if the run did not compare steps."""
    values = read_json(run.best)
    if not isinstance(values, dict):
        return None
    try:
        return BestStep(
            int(values["step"]),
            float(values["value"] if "value" in values else values[LOSS]),  # before 2027
            int(values["steps"]),
            bool(values["used"]),
            str(values.get("metric", LOSS)),
        )
    except (KeyError, TypeError, ValueError):
        return None
