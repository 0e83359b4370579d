"""Entries of a recipe's lists: sources, tasks, reward functions; names of transformers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Upper bound of numbers: 400 digits do not fit a float or a numpy seed.
LARGEST = 10**9
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
# Names of transformers. Left out are optimizers of full matrices (GaLore, APOLLO, LOMO) and of
# other hardware, and schedules that follow a metric, which a resumed run could not repeat.
Optimizer = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "adagrad",
    "ademamix",
    "ademamix_8bit",
    "grokadamw",
    "lion_32bit",
    "lion_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "sgd",
    "stable_adamw",
]
Scheduler = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "inverse_sqrt",
    "polynomial",
    "warmup_stable_decay",
]
Tracker = Literal[
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
RewardName = Literal[
    "exact_answer", "numeric_answer", "regex", "json_schema", "unit_tests", "length", "judge"
]
# Keys of the reward functions that read more than `weight`, `label`, `column` and `timeout`.
REWARD_KEYS: dict[str, tuple[str, ...]] = {
    "regex": ("pattern",),
    "json_schema": ("schema_file",),
    "unit_tests": ("memory",),
    "length": ("limit", "buffer"),
    "judge": ("url", "model", "instructions"),
}
REQUIRED_KEYS = {"regex": ("pattern",), "length": ("limit",), "judge": ("url", "model")}


class Source(BaseModel):
    """One of several sources, with the weight of its rows."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, title="source"
    )

    source: str = Field(min_length=1, description="A file, folder, glob, address or hub id.")
    weight: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0,
        description="How often an epoch trains on each row: 2 is twice; 0.5 is half of the rows, "
        "chosen by `seed`. Held-out rows are scored once.",
    )


class EvalTask(BaseModel):
    """A task that is scored during training, with its settings."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, title="task"
    )

    task: str = Field(
        min_length=1,
        description="A file with questions and answers, a task of lm-eval, or `general`.",
    )
    limit: Positive | None = Field(None, description="Score only the first rows.")
    metrics: list[str] = Field(
        default_factory=lambda: ["exact_match", "contains"],
        description="Metrics of a file, as in `lorakit eval --metric`.",
    )
    max_new_tokens: Positive = Field(256, description="Longest answer to a row of a file.")


class RewardFunction(BaseModel):
    """A reward function with its settings: a built-in one by `name`, or one of your own file."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, title="reward"
    )

    name: RewardName | None = Field(None, description="A built-in function.")
    file: str | None = Field(None, description="A Python file of your own; it runs as you.")
    function: str | None = Field(None, description="The function in `file`.")
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = Field(
        1.0, description="Factor in the sum of rewards."
    )
    label: Annotated[str, Field(pattern=r"^\w{1,40}$")] | None = Field(
        None, description="Name in the metrics. Default: that of the function."
    )
    column: str | None = Field(
        None,
        description="Column with the reference: the answer, the tests, or the JSON schema. "
        "Default: `answer`; for unit_tests `tests`, for json_schema `schema`.",
    )
    pattern: str | None = Field(None, description="regex: 1 if it is found in the completion.")
    schema_file: str | None = Field(None, description="json_schema: a file with the schema.")
    memory: Positive = Field(512, description="unit_tests: MiB that the tests may take.")
    limit: Positive | None = Field(
        None, description="length: tokens from which a completion gets -1."
    )
    buffer: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        0, description="length: tokens before `limit` over which the reward falls from 0."
    )
    url: str | None = Field(None, description="judge: an endpoint with OpenAI's routes.")
    model: str | None = Field(None, description="judge: name of its model.")
    instructions: str | None = Field(None, description="judge: what to value.")
    timeout: Annotated[float, Field(gt=0, le=86400)] = Field(
        10.0,
        description="Seconds for the tests of one completion, or for a call of your function with "
        "all completions of a step.",
    )

    @model_validator(mode="after")
    def _check_keys(self) -> RewardFunction:
        if (self.name is None) == (self.file is None):
            raise ValueError("a reward has a name or a file, one of them")
        if (self.file is None) != (self.function is None):
            raise ValueError("file and function belong together: {file: mine.py, function: f}")
        for needed in REQUIRED_KEYS.get(self.name or "", ()):
            if getattr(self, needed) is None:
                raise ValueError(f"reward {self.name} needs {needed}")
        known = REWARD_KEYS.get(self.name or "", ())
        for key in (key for keys in REWARD_KEYS.values() for key in keys):
            if key in self.model_fields_set and key not in known and _is_set(self, key):
                raise ValueError(f"reward {self.name or self.file} has no {key}")
        return self

    @property
    def reference_column(self) -> str | None:
        """Column of a row that the function needs; None if it needs none."""
        if self.column is not None:
            return self.column
        if self.name == "json_schema" and self.schema_file is not None:
            return None
        names = {"unit_tests": "tests", "json_schema": "schema"}
        answers = dict.fromkeys(("exact_answer", "numeric_answer"), "answer")
        return {**names, **answers}.get(self.name or "")

    @property
    def shown(self) -> str:
        """Name in metrics and messages."""
        return self.label or self.name or str(self.function)


def _is_set(entry: RewardFunction, key: str) -> bool:
    field: Any = RewardFunction.model_fields[key]
    return bool(getattr(entry, key) != field.default)
