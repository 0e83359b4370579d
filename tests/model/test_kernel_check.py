"""Kernels of other packages are compared with plain torch before a run relies on them."""

import functools
import logging
import sys
import types

import pytest
import torch
from tests.families import tiny_config
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from lorakit.model.kernel_check import check_kernels, kernel_functions, use_plain_torch_on_cpu

NAME = "torch_chunk_gated_delta_rule"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text"))


@pytest.fixture
def bind(monkeypatch):
    """`bind(kernel)`: transformers' functions as they are where a package brings `kernel`."""
    plain = getattr(qwen, NAME).__wrapped__

    def bound(kernel):
        # transformers leaves out arguments that are not in the kernel's signature.
        kernel = functools.wraps(plain)(kernel)
        package = types.ModuleType("fla")
        package.ops = types.SimpleNamespace(
            gated_delta_rule=types.SimpleNamespace(chunk_gated_delta_rule=kernel)
        )
        monkeypatch.setitem(sys.modules, "fla", package)
        make = hub_kernels.use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
        monkeypatch.setattr(qwen, NAME, make(plain))
        return plain

    return bound


def test_each_bound_function_is_found_and_switched(model):
    functions = {function.name: function for function in kernel_functions(model)}
    assert NAME in functions
    before = getattr(qwen, NAME)
    functions[NAME].use_plain()
    try:
        assert getattr(qwen, NAME) is before.__wrapped__
    finally:
        functions[NAME].restore()
    assert getattr(qwen, NAME) is before


def test_a_kernel_that_is_right_stays(model, bind):
    calls = []

    def right(query, key, value, g, beta, **more):
        calls.append(query)
        return plain(query, key, value, g=g, beta=beta, **more)

    plain = bind(right)
    before = getattr(qwen, NAME)
    assert check_kernels(model, "cpu") is None
    assert calls
    assert getattr(qwen, NAME) is before


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "Triton >= 3.4.0 and < 3.7.1"),
        ("wrong values", "differ from plain torch"),
        ("wrong gradient", "differ from plain torch"),
        ("not a number", "differ from plain torch"),
    ],
)
def test_a_kernel_that_fails_or_is_wrong_is_left_out(model, bind, caplog, fault, reason):
    def kernel(query, key, value, g, beta, **more):
        if fault == "raises":
            raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs\nmore")
        if fault == "wrong gradient":
            query = query.detach()
        out, state = plain(query, key, value, g=g, beta=beta, **more)
        if fault == "not a number":
            return out * float("nan"), state
        return (1.5 * out if fault == "wrong values" else out), state

    plain = bind(kernel)
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        found = check_kernels(model, "cpu")
    assert reason in found
    assert "\n" not in found
    assert f"are replaced by plain torch, which is slower: {found}" in caplog.text
    assert getattr(qwen, NAME) is plain
    ids = torch.arange(8).unsqueeze(0)
    assert model(input_ids=ids).logits.isfinite().all()


def test_layers_on_another_device_are_not_run(model, bind):
    def kernel(*_, **__):
        raise AssertionError("launched")

    bind(kernel)
    assert check_kernels(model, "cuda") is None


def test_a_model_on_the_cpu_runs_no_kernel(model, bind):
    """On a machine with a GPU and fla they are bound, and cannot read its tensors."""

    def kernel(*_args, **_kwargs):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    bind(kernel)
    with pytest.raises(ValueError, match="Pointer argument"):
        model(torch.arange(8).unsqueeze(0))
    use_plain_torch_on_cpu(model)
    use_plain_torch_on_cpu(model)
    assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()
    # A model that is loaded on a GPU later in this process keeps its kernels.
    on_gpu = [torch.zeros(1, 4, 2, 8, device="meta")] * 3
    with pytest.raises(ValueError, match="Pointer argument"):
        getattr(qwen, NAME)(*on_gpu, g=on_gpu[0], beta=on_gpu[0])
    assert [function.plain for function in kernel_functions(model) if function.name == NAME]
