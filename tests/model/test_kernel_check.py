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

from lorakit.model import kernel_check
from lorakit.model.kernel_check import check_kernels
from lorakit.model.kernel_functions import KernelFunction, kernel_functions
from lorakit.ops import backend

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
        monkeypatch.setattr(KernelFunction, "plain_on", ())  # these kernels read CPU tensors
        return plain

    return bound


def test_a_kernel_that_is_right_stays(model, bind):
    calls = []

    def right(query, key, value, g, beta, **more):
        calls.append(query)
        return plain(query, key, value, g=g, beta=beta, **more)

    plain = bind(right)
    assert check_kernels(model, "cpu") is None
    assert calls
    assert getattr(qwen, NAME).use_kernel


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
    assert not getattr(qwen, NAME).use_kernel
    ids = torch.arange(8).unsqueeze(0)
    assert model(input_ids=ids).logits.isfinite().all()


def test_layers_on_another_device_are_not_run(model, bind):
    def kernel(*_, **__):
        raise AssertionError("launched")

    bind(kernel)
    assert check_kernels(model, "cuda") is None


def test_packages_that_would_bring_kernels_are_named(caplog):
    """Those whose kernels we have in our own operations are not."""
    torch.manual_seed(0)
    falcon = AutoModelForCausalLM.from_config(tiny_config("falcon_h1"))
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        assert check_kernels(falcon, "cpu") is None
    assert "FalconH1Mixer runs in plain torch, which is slower" in caplog.text
    assert caplog.text.rstrip().endswith("pip install mamba-ssm")


@pytest.mark.parametrize("right", [True, False])
def test_our_own_kernels_are_checked_too(model, monkeypatch, caplog, right):
    def own(arguments, only_kernels):
        if not kernel_check.has_kernels(arguments["value"]) or backend._kept_to_definitions:
            return None
        given = {k: v for k, v in arguments.items() if k != "kwargs"}
        out, state = getattr(qwen, NAME).plain(**given)
        return (out if right else 1.5 * out), state

    kernel_functions(model)
    function = getattr(qwen, NAME)
    monkeypatch.setattr(function, "own", own)
    monkeypatch.setattr(function, "use_own", True)
    monkeypatch.setattr(kernel_check, "has_kernels", lambda _: True)
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        found = check_kernels(model, "cpu")
    assert (found is None) == right
    assert function.use_own == right
    assert ("Qwen3_5GatedDeltaNet are replaced by plain torch" in caplog.text) != right
    for other in kernel_functions(model):
        other.use_own = other.own is not None


@pytest.mark.parametrize("right", [True, False])
def test_our_kernel_comes_before_a_packages_which_replaces_it_where_it_is_wrong(
    model, bind, monkeypatch, caplog, right
):
    """Another package's kernel is not launched, or autotuned, where ours is right."""
    launched, only = [], []

    def others(query, key, value, g, beta, **more):
        launched.append(query)
        return plain(query, key, value, g=g, beta=beta, **more)

    def own(arguments, only_kernels):
        if backend._kept_to_definitions:
            return None
        only.append(only_kernels)
        given = {k: v for k, v in arguments.items() if k != "kwargs"}
        out, state = plain(**given)
        return (out if right else 1.5 * out), state

    plain = bind(others)
    function = next(f for f in kernel_functions(model) if f.name == NAME)
    monkeypatch.setattr(function, "own", own)
    monkeypatch.setattr(kernel_check, "has_kernels", lambda _: True)
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        found = check_kernels(model, "cpu")
    assert (found is None) == right
    assert bool(launched) != right
    assert function.use_own == right
    assert function.use_kernel
    assert only[0]
    assert ("are replaced by those of other packages, which is slower" in caplog.text) != right
    for f in kernel_functions(model):
        f.use_own = f.own is not None
