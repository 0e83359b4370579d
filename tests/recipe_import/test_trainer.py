"""TrainingArguments by name, held against the installed transformers."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from lorakit.recipe_import.rules import Draft, Unfit
from lorakit.recipe_import.trainer import (
    SCHEDULERS,
    TRAINER,
    TRAINER_DEFAULTS,
    packed_rows,
    tracker,
)
from lorakit.train.arguments import OPTIMIZERS

FIELDS = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}


def read(key, value, **source):
    return TRAINER[key].read(value, Draft({key: value, **source}, Path()))


def test_our_defaults_are_theirs():
    for key, rule in TRAINER.items():
        ours = rule.here.strip("`")
        if ours in TRAINER_DEFAULTS and key in FIELDS and key != "warmup_ratio":
            assert rule.read(FIELDS[key], Draft({}, Path())).values == {
                ours: TRAINER_DEFAULTS[ours]
            }


def test_each_of_our_optimizers_and_schedules_comes_back_as_itself():
    for ours, theirs in OPTIMIZERS.items():
        assert read("optim", theirs).values == {"optimizer": ours}
    for name in SCHEDULERS:
        assert read("lr_scheduler_type", name).values == {"lr_scheduler": name}


def test_steps_and_shares():
    assert read("max_steps", -1).status == "own"
    assert read("max_steps", 60).values == {"max_steps": 60}
    assert read("warmup_steps", 10).values == {"warmup_steps": 10}
    assert read("warmup_steps", 0.1).values == {"warmup_ratio": 0.1}
    assert read("warmup_steps", 0, warmup_ratio=0.1).status == "own"
    assert read("warmup_ratio", 0.1, warmup_steps=5).status == "own"
    assert read("save_steps", 0.25).status == "own"
    assert read("max_grad_norm", 0).values == {"max_grad_norm": 1e9}


def test_types_and_trackers():
    assert read("bf16", True).values == {"dtype": "bfloat16"}
    assert read("bf16", "auto").values == {"dtype": "auto"}
    assert read("fp16", True, bf16=True).status == "own"
    assert read("report_to", "none").values == {"report_to": []}
    assert read("report_to", ["wandb", "tensorboard"]).values["report_to"] == [
        "wandb",
        "tensorboard",
    ]
    with pytest.raises(Unfit, match="comet_ml"):
        read("report_to", "comet_ml")
    draft = Draft({}, Path(), {"report_to": ["wandb"]})
    assert tracker("mlflow").read(True, draft).values == {"report_to": ["wandb", "mlflow"]}
    assert tracker("wandb").read("project", draft).values == {"report_to": ["wandb"]}


def test_packed_rows_are_another_batch():
    rule = packed_rows("max_length", 1024)
    assert "row of a step is 1024 tokens" in rule.read(True, Draft({}, Path())).note
    assert "about 4096 /" in rule.read(True, Draft({"max_length": 4096}, Path())).note
    assert rule.read("no", Draft({}, Path())).status == "own"


def test_no_token_is_taken():
    assert read("hub_token", "hf_secret").values == {}
