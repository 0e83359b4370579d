"""The measure between full and partial predictions, and an engine that dies elsewhere."""

import math

import pytest
import torch

from lorakit.errors import WorkError
from lorakit.export import llama_cpp
from lorakit.export.llama_cpp import Task, ask_all, divergence


def place(*pairs):
    return [(i, math.log(p)) for i, p in pairs]


def test_divergence_of_a_case_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kl, same = divergence(p, [place((0, 0.4), (1, 0.4), (2, 0.2))])
    assert kl == pytest.approx(0.5 * math.log(1.25) + 0.3 * math.log(0.75), abs=1e-6)
    assert same == 1


def test_tokens_left_out_are_one_class():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    kl, same = divergence(p, [place((1, 0.6), (0, 0.2))])
    by_hand = 0.5 * math.log(2.5) + 0.3 * math.log(0.5)
    assert kl == pytest.approx(by_hand + 0.2 * math.log(0.2 / 0.2), abs=1e-6)
    assert same == 0


def test_a_file_that_is_no_model_is_one_clear_error(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WorkError, match=r"llama.cpp cannot run x.gguf"):
        ask_all([Task(str(tmp_path / "x.gguf"), [[1]], 1)])


def test_the_engine_is_there():
    """The development install brings it: the tests of GGUF files must not pass by being skipped."""
    assert llama_cpp.installed()
