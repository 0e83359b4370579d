"""Nothing is launched on fake tensors: not Triton's kernels, not those that transformers binds."""

import sys
import types

import pytest
import torch
from tests.families import tiny_config
from torch import nn
from transformers.integrations import hub_kernels
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from lorakit.planning.activations import simulate
from lorakit.planning.fake_pass import fake_pass
from lorakit.planning.known_models import shape_config
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

CPU = Device("cpu", "CPU", 16 * 2**30, "float32")


def recipe(**values):
    given = {"target_modules": "all-linear", "micro_batch_size": 1, "cutoff_len": 64, **values}
    return Recipe(model="m", data="d", **given)


class Driver:
    """Triton's driver of a GPU that only writes down what would be launched on it."""

    def __init__(self):
        self.launched = []
        self.utils = self

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, _):
        return {"max_shared_mem": 2**17, "warpSize": 32, "multiprocessor_count": 1}

    def load_binary(self, *_):
        return 0, 0, 16, 0, 1024

    def launcher_cls(self, *_):
        return lambda *given: self.launched.extend(x for x in given if hasattr(x, "data_ptr"))


@pytest.fixture
def driver(monkeypatch):
    runtime = pytest.importorskip("triton.runtime", reason="the triton package is not installed")
    found = Driver()
    monkeypatch.setattr(runtime.driver, "_active", found)
    return found


def doubled(x, n, BLOCK: "tl.constexpr"):  # noqa: F821
    places = tl.arange(0, BLOCK)  # noqa: F821
    tl.store(x + places, 2 * tl.load(x + places, mask=places < n), mask=places < n)  # noqa: F821


@pytest.fixture
def kernel(driver, monkeypatch):
    """A compiled kernel as other packages have them, also where tests interpret ours."""
    import triton
    from triton.runtime.jit import JITFunction

    if not torch.cuda.is_available() and not has_compiler():
        pytest.skip("this triton package brings no compiler for NVIDIA GPUs")
    monkeypatch.setitem(globals(), "tl", triton.language)
    compiled = JITFunction(doubled)

    def launch(x):
        compiled[(1,)](x, 64, BLOCK=64)
        return x

    return launch


def has_compiler():
    from pathlib import Path

    import triton

    return (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists()


def test_a_kernel_is_not_launched_on_fake_tensors(driver, kernel, monkeypatch):
    real = torch.zeros(64)
    kernel(real)
    assert driver.launched == [real]  # so a launch would be seen
    driver.launched.clear()
    with fake_pass(nn.Linear(1, 1)):
        fake = torch.zeros(64)
        with pytest.raises(RuntimeError, match="data pointer"):
            kernel(fake)
    assert not driver.launched
    rotated = modeling_llama.apply_rotary_pos_emb

    def rotated_by_a_kernel(queries, *more):
        return rotated(kernel(queries), *more)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated_by_a_kernel)
    assert simulate(recipe(seed=1), shape_config("tiny"), CPU, False) is None
    assert not driver.launched


def bound_to_a_package(monkeypatch):
    """Qwen3.5's functions as transformers binds them where flash-linear-attention is installed."""
    called = []

    def chunk_gated_delta_rule(q, *args, **kwargs):
        called.append(q)
        raise AssertionError("launched")

    package = types.ModuleType("fla")
    package.ops = types.SimpleNamespace(
        gated_delta_rule=types.SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    )
    monkeypatch.setitem(sys.modules, "fla", package)
    own = qwen.torch_chunk_gated_delta_rule.__wrapped__
    bind = hub_kernels.use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    bound = bind(own)
    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", bound)
    return called, bound


def test_layers_bound_to_a_package_are_counted_in_plain_torch(monkeypatch):
    config = tiny_config("qwen3_5_text", num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    plain = simulate(recipe(), config, CPU, False)
    called, bound = bound_to_a_package(monkeypatch)
    assert simulate(recipe(seed=2, cutoff_len=65), config, CPU, False).kept > plain.kept
    assert not called
    function = qwen.torch_chunk_gated_delta_rule
    assert function.bound is bound
    with pytest.raises(AssertionError, match="launched"):  # a real run still takes it
        one = torch.zeros(1, 1, 1, 1, device="meta")
        function(one, key=one, value=one, g=one, beta=one)


def test_a_function_made_a_module_is_seen_through(monkeypatch):
    """As the package `kernels` makes each of them one."""
    called, func = bound_to_a_package(monkeypatch)

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", Func())
    with fake_pass(model_of(qwen)):
        function = qwen.torch_chunk_gated_delta_rule
        assert isinstance(function.bound, Func)
        assert function.plain is func.__wrapped__
        assert not function.use_kernel
    assert function.use_kernel
    assert not called


def model_of(module):
    """A module that says it is defined there."""
    kind = type("Layer", (nn.Module,), {"__module__": module.__name__})
    return kind()


def test_bindings_come_back_after_an_error(monkeypatch):
    bound_to_a_package(monkeypatch)
    with pytest.raises(ValueError, match="broken"), fake_pass(model_of(qwen)):
        raise ValueError("broken")
    assert qwen.torch_chunk_gated_delta_rule.use_kernel
    assert float(torch.ones(1)) == 1.0


def test_an_operation_without_shapes_is_not_run_for_real():
    ran = []
    name = "lorakit_test::shapeless"
    torch.library.define(name, "(Tensor x) -> Tensor")

    def shapeless(x):
        ran.append(x)
        return x.clone()

    torch.library.impl(name, "cpu", shapeless)
    with fake_pass(nn.Linear(1, 1)):
        x = torch.zeros(4)
        with pytest.raises(RuntimeError):
            torch.ops.lorakit_test.shapeless(x)
    assert not ran
