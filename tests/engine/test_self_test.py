"""The two comparisons find what is wrong, and a card whose kernels are right passes both."""

import pytest
import torch

from lorakit.engine import attach, self_test
from lorakit.engine.attach import attach_engine
from lorakit.ops import backend, lora

from .engine_models import tiny

CPU = torch.device("cpu")
CARDS = {"a card of 8.0": (8, 0), "a T4": (7, 5)}


@pytest.fixture(params=CARDS)
def card(request, monkeypatch):
    """The CPU with Triton's interpreter, as a card of this capability would choose kernels."""
    if torch.cuda.is_available():
        pytest.skip("without a card kernels are interpreted; with one it chooses for itself")
    pytest.importorskip("triton", reason="the triton package is not installed")
    here = CARDS[request.param]
    monkeypatch.setattr(
        backend, "_runs", lambda _, since: not backend._kept_to_definitions and here >= since
    )
    # Attention stays torch's own: the variable-length one needs a card.
    monkeypatch.setattr("lorakit.engine.attention.has_matrix_kernels", lambda _: False)
    return request.param


# Interpreted kernels take seconds: each family in one dtype, and Qwen3, whose norms of heads are
# kernels on both, on one card.
@pytest.mark.parametrize(
    ("card", "family", "dtype"),
    [
        ("a card of 8.0", "llama", torch.float32),
        ("a card of 8.0", "qwen3", torch.float16),
        ("a card of 8.0", "gemma", torch.float16),
        ("a T4", "llama", torch.float32),
        ("a T4", "gemma", torch.float16),
    ],
    indirect=["card"],
)
def test_kernels_give_the_gradients_of_plain_torch(card, family, dtype):
    model = tiny(family, dtype=dtype, lora_dropout=0.2)
    engine, path = attach_engine(model.get_base_model(), CPU)
    assert engine is not None, path
    assert "gradients by" in path
    apart = self_test.of_gradients(engine, model.get_base_model())
    assert 0 < apart < self_test.GRADIENT_TOLERANCE[dtype] / 2


@pytest.mark.parametrize("target", ["up_proj", "k_proj"])
def test_kernels_serve_adapters_on_one_module_of_a_group(card, target):
    model = tiny(target_modules=[target], lora_dropout=0.2)
    tokens = torch.arange(2, 19).unsqueeze(0)
    base = model.get_base_model()
    with torch.no_grad():
        expected = model.eval().get_base_model().get_decoder()(input_ids=tokens)[0]
    engine, path = attach_engine(base, CPU)
    assert engine is not None, path
    with torch.no_grad():
        found = engine({"input_ids": tokens}, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert self_test.of_gradients(engine, base) < self_test.GRADIENT_TOLERANCE[torch.float32] / 2


@pytest.mark.parametrize("card", ["a card of 8.0"], indirect=True)
def test_the_layer_that_is_compared_has_adapters(card, monkeypatch):
    seen, plain = [], self_test._gradients
    monkeypatch.setattr(
        self_test, "_gradients", lambda layer, *rest: seen.append(layer) or plain(layer, *rest)
    )
    engine, path = attach_engine(tiny(layers_to_transform=[1]).get_base_model(), CPU)
    assert engine is not None, path
    assert seen == [engine.layers[1]] * 2


@pytest.mark.parametrize("card", ["a T4"], indirect=True)
def test_a_t4_multiplies_no_matrix_in_a_kernel(card, monkeypatch):
    made = []
    for name in ("lora_down_triton", "lora_input_grad_triton_", "lora_a_grad_triton"):
        monkeypatch.setattr(f"lorakit.ops.lora_triton.{name}", lambda *_, n=name: made.append(n))
    for name in ("lora_add_triton", "lora_output_grads_triton"):
        monkeypatch.setattr(
            f"lorakit.ops.lora_output_triton.{name}", lambda *_, n=name: made.append(n)
        )
    engine, _ = attach_engine(tiny(lora_dropout=0.2).get_base_model(), CPU)
    assert engine is not None
    assert made == []


@pytest.mark.parametrize("card", ["a card of 8.0"], indirect=True)
def test_a_kernel_that_goes_wrong_on_this_gpu_is_found(card, monkeypatch):
    right = lora.lora_a_grad_reference
    monkeypatch.setattr(
        "lorakit.ops.lora_triton.lora_a_grad_triton",
        lambda ds, x, keys, p, factor, into=None: 1.1 * factor * right(ds, x, keys, p),
    )
    engine, path = attach_engine(tiny(lora_dropout=0.2).get_base_model(), CPU)
    assert engine is None
    assert "the kernels' gradients differ by 10.0% from plain torch's: its own layers" in path


@pytest.mark.parametrize("card", ["a card of 8.0"], indirect=True)
def test_a_kernel_that_does_not_run_on_this_gpu_is_no_end(card, monkeypatch):
    def no_such_instruction(*_, **__):
        raise RuntimeError("PassManager::run failed\nand a page of intermediate code")

    monkeypatch.setattr("lorakit.ops.rms_norm_triton.rms_norm_triton", no_such_instruction)
    model = tiny()
    engine, path = attach_engine(model.get_base_model(), CPU)
    assert engine is None
    assert path == (
        "the kernels do not run on this GPU (RuntimeError: PassManager::run failed): its own layers"
    )
    assert model(torch.arange(5).unsqueeze(0)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("comparison", "said"),
    [("of_layers", "the probe differs by nan"), ("of_gradients", "gradients differ by nan")],
)
def test_a_difference_that_is_no_number_is_a_difference(monkeypatch, comparison, said):
    monkeypatch.setattr(self_test, "has_kernels", lambda _: True)
    monkeypatch.setattr(self_test, "of_gradients", lambda *_: 0.0)
    monkeypatch.setattr(self_test, comparison, lambda *_: float("nan"))
    engine, path = attach_engine(tiny().get_base_model(), CPU)
    assert engine is None
    assert said in path


def test_memory_that_runs_out_is_not_taken_for_a_fault_of_the_kernels(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(self_test, "of_layers", full)
    with pytest.raises(torch.OutOfMemoryError):
        attach_engine(tiny().get_base_model(), CPU)


def test_the_comparison_leaves_factors_and_random_numbers_as_they_were(card):
    model = tiny(lora_dropout=0.2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    engine, _ = attach_engine(model.get_base_model(), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    attach.refresh(engine.groups, training=True)
    group = engine.layers[0].down
    assert torch.equal(group.b, group.adapted[0].b)
