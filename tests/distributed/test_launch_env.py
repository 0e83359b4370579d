"""Leftovers of launchers are ignored or are one message; a complete launch is taken."""

import os

import pytest
from rich.console import Console

from lorakit.cli.launcher import launched
from lorakit.distributed.launch_env import (
    REQUIRED,
    hidden_launch_variables,
    launch_environment,
    launched_rank,
)
from lorakit.distributed.process_group import init_distributed
from lorakit.errors import RunError
from lorakit.pipeline import fit
from lorakit.storage.run_dir import read_metrics

WHOLE = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in (*REQUIRED, "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def put(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_complete_launch_is_a_rank(environment):
    environment(WHOLE)
    assert launch_environment() == launch_environment(strict=True) == WHOLE
    assert launched_rank() == 1
    assert launched()


IGNORED = [
    {"RANK": "3"},
    {"RANK": "abc"},
    {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    {**WHOLE, "WORLD_SIZE": "1"},
    {"WORLD_SIZE": ""},
    {"PMI_SIZE": "2", "PMI_RANK": "1"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
]


@pytest.mark.parametrize("left", IGNORED, ids=lambda left: next(iter(left)))
def test_leftovers_of_one_process_are_ignored(environment, left):
    environment(left)
    assert launch_environment(strict=True) == {}
    assert launched_rank() == 0
    assert not launched()
    with init_distributed() as ranks:
        assert ranks.world_size == 1
        assert not {n for n in left if not n.startswith("MASTER_")} & set(os.environ)
    assert {name: os.environ[name] for name in left} == left


@pytest.mark.parametrize("lost", [name for name in REQUIRED if name != "WORLD_SIZE"])
def test_a_part_of_a_launch_is_one_message(environment, lost):
    environment({name: value for name, value in WHOLE.items() if name != lost})
    assert launch_environment() == {}  # for commands that need no ranks
    with pytest.raises(RunError, match=f"WORLD_SIZE=2 .*{lost} not set") as caught:
        launch_environment(strict=True)
    assert "unset " in caught.value.hint


@pytest.mark.parametrize("odd", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_value_that_is_no_number_is_named(environment, odd):
    environment({**WHOLE, odd: "two"})
    with pytest.raises(RunError, match=f"{odd} is 'two'"):
        launch_environment(strict=True)


def test_the_libraries_do_not_see_launchers(environment, monkeypatch):
    environment({"ACCELERATE_USE_DEEPSPEED": "true", "FSDP_VERSION": "2", "PMI_SIZE": "4"})
    environment({"ACCELERATE_MIXED_PRECISION": "fp16", "KEPT": "x"})
    with hidden_launch_variables():
        assert not [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "PMI_"))]
        assert os.environ["KEPT"] == "x"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"


LEFT = {
    "RANK": "3", "LOCAL_RANK": "1", "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2",
    "FSDP_VERSION": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}  # fmt: skip


def test_a_run_among_leftovers_gives_the_same_losses(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, environment
):
    losses = []
    for name, more in (("clean", {}), ("left", LEFT)):
        environment(more)
        resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / name, max_steps=2)
        run = fit(resolved, Console(quiet=True)).run
        losses.append([row["loss"] for row in read_metrics(run)])
    assert losses[0] == losses[1]
