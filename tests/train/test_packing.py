"""Packed documents train as single ones do, and the proof of it finds every leak."""

import pytest
import torch
from tests.families import declared_class, tiny_config

from lorakit.data.batching import collate, pack
from lorakit.model.base_class import text_decoder
from lorakit.model.kernel_functions import kernel_functions
from lorakit.train import packing
from lorakit.train.loss import attach_loss
from lorakit.train.packing import PACKED, PackedRows, in_turn_reason, isolates_documents
from lorakit.types import Example, Origin

HYBRIDS = [
    *("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next"),
    *("lfm2", "falcon_h1", "granitemoehybrid", "nemotron_h"),
]
MIXED = "off: this model's layers mix packed documents"


def model_of(name, dtype=torch.float32, **changes):
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    return declared_class(config)(config).to(dtype)


def documents():
    rows = []
    for number, length in enumerate((9, 3, 70, 1 + 64)):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(4, 320, (length,), generator=generator).tolist()
        rows.append(Example(ids, ids, Origin("x", number)))
    return rows


def gradients(model, micro_batches):
    model.zero_grad()
    total = 0.0
    for micro in micro_batches:
        loss = model(**micro, use_cache=False).loss_sum / 100
        loss.backward()
        total += float(loss.detach())
    decoder = text_decoder(model)
    return total, {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "recompute"), [(n, False) for n in HYBRIDS] + [("qwen3_5", True), ("falcon_h1", True)]
)
def test_packed_documents_have_the_loss_and_the_gradients_of_single_ones(name, recompute):
    model = model_of(name).train()
    assert attach_loss(model).packing == PACKED
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = documents()
    loss, expected = gradients(model, [collate([row], 0) for row in rows])
    found_loss, found = gradients(model, [pack(rows)])
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((found[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_leak_is_found_however_small(name, dtype, monkeypatch):
    """Falcon-H1 and LFM2 with the hub's initializer leak 0.1% to 0.5%, less than rounding."""
    model = model_of(name, dtype, initializer_range=0.02)
    assert isolates_documents(model) == PACKED
    monkeypatch.setattr(packing, "document_arguments", lambda *_: {})
    assert isolates_documents(model) == MIXED


def test_attention_without_positions_in_its_mask_is_found(monkeypatch):
    model = model_of("granitemoehybrid")
    monkeypatch.setattr(packing, "MASKS_WITHOUT_POSITIONS", frozenset())
    assert isolates_documents(model) == MIXED


def test_positions_that_do_not_restart_are_found(monkeypatch):
    """Nothing of the first document is read, but its length is: states differ from those alone."""

    def one_row(self, borders, lengths, position_ids):
        given = own(self, borders, lengths, position_ids)
        mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
        return given | {"position_ids": torch.arange(12)[None], "attention_mask": mask[None, None]}

    own = PackedRows.arguments
    model = model_of_learned_positions()
    monkeypatch.setattr(PackedRows, "arguments", one_row)
    assert "differs from the same one alone by" in isolates_documents(model)


def model_of_learned_positions():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=320, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_a_gradient_that_is_not_a_number_is_reported():
    model = model_of("qwen3")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    assert isolates_documents(model) == "off: the gradient of two packed documents is not finite"


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("qwen3_5_text", None),  # our own operation takes all documents at once
        ("falcon_h1", "mamba-ssm"),
        ("lfm2", None),  # convolutions only, which are cheap one by one
        ("qwen3", None),
    ],
)
def test_recurrent_layers_without_a_kernel_are_a_reason_against_packing(name, package, monkeypatch):
    model = model_of(name)
    reason = in_turn_reason(model)
    assert (reason is None) == (package is None)
    if package:
        assert reason.startswith("off: recurrent layers without a kernel")
        assert package in reason
        for function in kernel_functions(model):
            monkeypatch.setattr(function, "use_kernel", True)
        assert in_turn_reason(model) is None
