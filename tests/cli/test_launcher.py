"""--gpus N: checked before anything starts, and handed to each process without it."""

import pytest

from lorakit.cli.launcher import _check_gpus, _killed, again, launched, without_gpus
from lorakit.errors import WorkError


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (["train", "r.yaml", "--gpus", "4", "--resume"], ["train", "r.yaml", "--resume"]),
        (["train", "--gpus=4", "r.yaml"], ["train", "r.yaml"]),
        (["train", "r.yaml"], ["train", "r.yaml"]),
    ],
)
def test_the_processes_get_the_command_without_it(given, left):
    assert without_gpus(given) == left


def test_more_gpus_than_there_are_is_one_clear_error(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _check_gpus(2)
    with pytest.raises(WorkError, match="--gpus 4: this machine has 2 CUDA GPUs") as caught:
        _check_gpus(4)
    assert caught.value.hint.startswith("--gpus 2")


def test_without_a_gpu_the_cpu_is_shared_only_where_it_is_meant(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(WorkError, match="no CUDA GPU"):
        _check_gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _check_gpus(2)


def test_a_process_of_torchrun_starts_no_others(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched()  # a leftover
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert launched()


def test_a_killed_rank_is_named_where_no_other_could(monkeypatch):
    class Failure:
        exitcode = -9

    with pytest.raises(WorkError, match="rank 1 was ended by SIGKILL") as caught:
        _killed(1, Failure, "lorakit train r.yaml --resume --gpus 2")
    assert caught.value.hint.endswith("start again with: lorakit train r.yaml --resume --gpus 2")
    Failure.exitcode = -15
    assert _killed(1, Failure, "") == 143


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["train", "my r.yaml"], "lorakit train 'my r.yaml' --resume --gpus 2"),
        (["train", "r.yaml", "--resume"], "lorakit train r.yaml --resume --gpus 2"),
        (["bench", "--steps", "3"], "lorakit bench --steps 3 --gpus 2"),
    ],
)
def test_the_command_to_start_again_is_whole_and_resumes_what_can_be_resumed(arguments, command):
    assert again(arguments, 2) == command
